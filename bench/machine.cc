#include "bench/machine.h"

#include <sys/mman.h>

#include <fmt/format.h>

#include "tools/console.h"

namespace kvmix::bench {

const Machine& ThisMachine() {
  static const Machine machine;
  return machine;
}

std::string SizeText(std::size_t bytes) {
  const char* const units[] = {"B", "KiB", "MiB", "GiB"};
  double size = static_cast<double>(bytes);
  std::size_t unit = 0;
  for (; size >= 1024 && unit < 3; ++unit) size /= 1024;
  return fmt::format("{:.{}f} {}", size, size < 10 && unit > 0 ? 1 : 0, units[unit]);
}

std::shared_ptr<std::uint8_t[]> AllocatePages(std::size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) tools::Refuse("no memory for {}", SizeText(bytes));
  madvise(p, bytes, MADV_HUGEPAGE);
  return {static_cast<std::uint8_t*>(p), [bytes](std::uint8_t* at) { munmap(at, bytes); }};
}

}  // namespace kvmix::bench
