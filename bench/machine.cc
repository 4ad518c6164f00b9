#include "bench/machine.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <thread>

#include <fmt/format.h>

#include "kvmix/speed.h"

namespace kvmix::bench {
namespace {

// sysconf knows the caches on x86, /sys on most others.
std::size_t CacheBytes(int name, int level, std::size_t otherwise) {
  if (const long bytes = sysconf(name); bytes > 0) return static_cast<std::size_t>(bytes);
  for (int index = 0; index < 8; ++index) {
    const std::string folder = fmt::format("/sys/devices/system/cpu/cpu0/cache/index{}/", index);
    int found = 0;
    std::string type;
    std::size_t kib = 0;  // "1024K"
    std::ifstream(folder + "level") >> found;
    std::ifstream(folder + "type") >> type;
    std::ifstream(folder + "size") >> kib;
    if (found == level && type != "Instruction" && kib != 0) return kib << 10;
  }
  return otherwise;
}

std::size_t MemoryBytes() {
  std::size_t bytes = static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) *
                      static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  for (const char* limit :
       {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    std::size_t group = 0;  // "max" leaves it 0
    if (std::ifstream(limit) >> group && group != 0) bytes = std::min(bytes, group);
  }
  return bytes;
}

Machine Inspect() {
  Machine m;
  m.cpu = kvmix::ThisMachine().cpu;
  m.cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  m.l1 = CacheBytes(_SC_LEVEL1_DCACHE_SIZE, 1, std::size_t{32} << 10);
  m.l2 = CacheBytes(_SC_LEVEL2_CACHE_SIZE, 2, std::size_t{1} << 20);
  m.last_cache = std::max(m.l2, CacheBytes(_SC_LEVEL3_CACHE_SIZE, 3, std::size_t{32} << 20));
  m.memory = MemoryBytes();
  return m;
}

}  // namespace

const Machine& ThisMachine() {
  static const Machine machine = Inspect();
  return machine;
}

std::string SizeText(std::size_t bytes) {
  const char* const units[] = {"B", "KiB", "MiB", "GiB"};
  double size = static_cast<double>(bytes);
  std::size_t unit = 0;
  for (; size >= 1024 && unit < 3; ++unit) size /= 1024;
  return fmt::format("{:.{}f} {}", size, size < 10 && unit > 0 ? 1 : 0, units[unit]);
}

std::string ColdSetNote(std::size_t bytes) {
  return fmt::format("cold set of {}: a quarter of memory, twice the last cache would be {}",
                     SizeText(bytes), SizeText(ThisMachine().cold_wanted()));
}

Buffer::Buffer(std::size_t bytes) : size_(bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    std::fprintf(stderr, "kvmix-bench: no memory for %zu bytes\n", bytes);
    std::exit(1);
  }
  madvise(p, bytes, MADV_HUGEPAGE);
  data_ = static_cast<std::uint8_t*>(p);
}

Buffer::~Buffer() { munmap(data_, size_); }

}  // namespace kvmix::bench
