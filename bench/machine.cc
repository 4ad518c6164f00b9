#include "bench/machine.h"

#include <sys/mman.h>

#include <cstdlib>

#include <fmt/format.h>

#include "lib/files/machine.h"
#include "tools/console.h"

namespace kvmix::bench {
namespace {

Machine Inspect() {
  const internal::CacheSizes caches = internal::Caches();
  return {internal::CpuName(), internal::UsableThreads(), caches.l1, caches.l2,
          caches.last,         internal::MemoryBytes()};
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

void Die(const std::string& message) { std::exit(tools::Fail(kProgram, message)); }

Buffer::Buffer(std::size_t bytes) : size_(bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) Die("no memory for " + SizeText(bytes));
  madvise(p, bytes, MADV_HUGEPAGE);
  data_ = static_cast<std::uint8_t*>(p);
}

Buffer::~Buffer() { munmap(data_, size_); }

}  // namespace kvmix::bench
