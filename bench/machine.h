// What the benchmark must know of the machine: cache sizes decide what is "hot" and "cold", memory
// how much it may take.
#ifndef KVMIX_BENCH_MACHINE_H_
#define KVMIX_BENCH_MACHINE_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "lib/files/machine.h"

namespace kvmix::bench {

struct Machine {
  std::string cpu = internal::CpuName();
  int cores = internal::UsableThreads();
  internal::CacheSizes caches = internal::Caches();
  std::size_t memory = internal::MemoryBytes();

  std::size_t most_memory() const { return memory / 4; }
  // Data that is to come from DRAM rotates through this much: twice the last cache, or what memory
  // allows.
  std::size_t cold_wanted() const { return 2 * caches.last; }
  std::size_t cold_bytes() const { return std::min(cold_wanted(), most_memory()); }
};

const Machine& ThisMachine();

// "2 MiB", "1.4 GiB"
std::string SizeText(std::size_t bytes);

// Zeroed memory, 64-byte aligned, in huge pages where the system gives them (a cache's memory is
// the same).
std::shared_ptr<std::uint8_t[]> AllocatePages(std::size_t bytes);

}  // namespace kvmix::bench

#endif  // KVMIX_BENCH_MACHINE_H_
