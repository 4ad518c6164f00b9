// The machine, as far as the benchmark must know it. Cache sizes decide what is "hot" and "cold",
// memory how much it may take. Limits are what the machine can do at most, probed in the same run
// as the kernels that are held against them; each once, and only if something asks for it.
//
// Memory: the fastest of several loops (with and without prefetch, and with other vector widths
// than the target's: narrower ones can be faster), over a buffer as large as the kernel's data.
// Arithmetic: the active target's instructions on registers.
#ifndef KVMIX_BENCH_MACHINE_H_
#define KVMIX_BENCH_MACHINE_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/probe.h"
#include "kvmix/codec.h"
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

struct Limit {
  std::string name;         // "dram-read", "dot-u8i8"
  double per_second = 0.0;  // bytes (of a copy: read and written) or multiply-adds
  bool macs = false;
  std::string label() const;  // "dram-read 19.3 GB/s"
};

enum class Access { kRead, kCopy, kStreamCopy };
inline constexpr std::size_t kCold = 0;  // as a size: larger than any cache

class Limits {
 public:
  // seconds: for one probe.
  Limits(const kernels::Kernels& kernels, double seconds) : kernels_(kernels), seconds_(seconds) {}

  // `bytes`: of all data that the kernel walks again and again (a copy: source and destination), or
  // kCold.
  Limit Memory(Access access, std::size_t bytes, int threads);
  // Exact multiply-adds of rows with a tile of such codes, by the best instruction that the active
  // target has: f16 tiles by FMA; the others by widening i16 pairs, or by byte dot products, one
  // for operands of 8 bits and two for the two limbs of 16.
  Limit TileMacs(const CodecKind& kind, int threads);

  // The limits that were probed so far, for people: "dram-read 19.3 GB/s, 1 thread", "l2-copy 111.3
  // GB/s, 128 KiB, 1 thread".
  const std::vector<std::string>& probed() const { return probed_; }

 private:
  Limit Remember(const std::string& what, const std::string& conditions,
                 const std::function<Limit()>& probe);
  double MemoryRate(Access access, std::size_t bytes, int threads) const;
  using MacKernel = double (*)(std::size_t rounds);
  Limit Macs(const char* name, MacKernel kernel, double share, int threads);

  const kernels::Kernels& kernels_;
  double seconds_;
  std::map<std::string, Limit> known_;
  std::vector<std::string> probed_;
};

}  // namespace kvmix::bench

#endif  // KVMIX_BENCH_MACHINE_H_
