#include "bench/machine.h"

#include <sys/mman.h>

#include <bit>
#include <cstring>

#include <fmt/format.h>

#include "kvmix/runner.h"
#include "lib/tune/stopwatch.h"
#include "tools/console.h"

namespace kvmix::bench {
namespace {

// Cold probes take a window of this size at a time and wander through a buffer of
// Machine::cold_bytes(), so that a sample is short and still comes from DRAM.
constexpr std::size_t kWindow = std::size_t{16} << 20;
// Hot probes go over their buffer until about this much was moved.
constexpr std::size_t kHotBytes = std::size_t{16} << 20;
constexpr std::size_t kGrain = 2048;  // two halves that suit the probes
constexpr std::size_t kRounds = 100'000;

// A loop over n bytes; copies move the first half to the second.
using Loop = std::function<void(std::uint8_t* at, std::size_t n)>;

// The given target's, the best target's and AVX2's.
std::vector<Loop> AllLoops(std::string_view chosen, Access access) {
  const auto reader = [](auto read) {
    return [read](std::uint8_t* at, std::size_t n) {
      [[maybe_unused]] static volatile std::uint64_t sink;
      sink = read(at, n);
    };
  };
  const auto copier = [](auto copy) {
    return [copy](std::uint8_t* at, std::size_t n) { copy(at, n / 2, at + n / 2); };
  };
  std::vector<Loop> loops;
  for (const kernels::Kernels& k : kernels::AllKernels()) {
    const std::string_view target = k.target;
    if (target != chosen && target != kernels::AllKernels().front().target && target != "AVX2")
      continue;
    const kernels::ProbeKernels probe = kernels::ProbeKernelsFor(target);
    if (access == Access::kRead) {
      loops.push_back(reader(probe.read));
      loops.push_back(reader(probe.read_prefetch));
    } else {
      loops.push_back(copier(access == Access::kCopy ? probe.copy : probe.copy_stream));
    }
  }
  return loops;
}

// Up to one of eight sizes between two powers of two, so that similar sizes share a probe.
std::size_t Rounded(std::size_t bytes) {
  const std::size_t step = std::max<std::size_t>(1, std::bit_floor(bytes) / 8);
  return (bytes + step - 1) / step * step;
}

std::string ThreadsText(int threads) {
  return fmt::format("{} thread{}", threads, threads == 1 ? "" : "s");
}

std::string LevelName(std::size_t bytes, int threads) {
  const Machine& m = ThisMachine();
  if (bytes == kCold || bytes > m.caches.last) return "dram";
  const std::size_t each = bytes / static_cast<std::size_t>(threads);
  return each <= m.caches.l1 ? "l1" : each <= m.caches.l2 ? "l2" : "l3";
}

}  // namespace

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

std::string Limit::label() const {
  return macs ? fmt::format("{} {:.0f} Gmac/s", name, per_second * 1e-9)
              : fmt::format("{} {:.1f} GB/s", name, per_second * 1e-9);
}

Limit Limits::Remember(const std::string& what, const std::string& conditions,
                       const std::function<Limit()>& probe) {
  const std::string key = what + ", " + conditions;
  if (!known_.contains(key)) {
    known_[key] = probe();
    probed_.push_back(known_[key].label() + ", " + conditions);
  }
  return known_[key];
}

Limit Limits::Memory(Access access, std::size_t bytes, int threads) {
  const char* const kinds[] = {"read", "copy", "stream"};
  const char* const kind = kinds[static_cast<int>(access)];
  const std::string level = LevelName(bytes, threads);
  const std::size_t size = level == "dram" ? kCold : Rounded(bytes);
  const std::string conditions =
      (size == kCold ? "" : SizeText(size) + ", ") + ThreadsText(threads);
  return Remember(kind, conditions, [&] {
    return Limit{level + "-" + kind, MemoryRate(access, size, threads), false};
  });
}

double Limits::MemoryRate(Access access, std::size_t bytes, int threads) const {
  const std::size_t all = bytes == kCold ? ThisMachine().cold_bytes() : bytes,
                    parts = static_cast<std::size_t>(threads);
  const std::size_t window = bytes == kCold ? std::min(kWindow, all / 8) : all;
  const std::size_t slice = std::max(kGrain, window / parts / kGrain * kGrain);
  const std::size_t windows = std::max<std::size_t>(1, all / (slice * parts));
  const std::size_t passes =
      bytes == kCold ? 1 : std::max<std::size_t>(1, kHotBytes / (slice * parts));
  const std::size_t buffer_bytes = windows * parts * slice;
  const auto buffer = AllocatePages(buffer_bytes);
  std::memset(buffer.get(), 1, buffer_bytes);

  std::size_t next = 0;
  std::vector<std::function<void()>> functions;
  for (const Loop& loop : AllLoops(kernels_.target, access)) {
    functions.push_back([&, loop] {
      std::uint8_t* const from = buffer.get() + next * parts * slice;
      next = (next + 1) % windows;
      Runner(threads).Run(parts, [&](std::size_t thread) {
        for (std::size_t pass = 0; pass < passes; ++pass) loop(from + thread * slice, slice);
      });
    });
  }
  const std::vector<double> medians = tune::MedianSeconds(functions, seconds_, 7);
  return static_cast<double>(passes * parts * slice) / std::ranges::min(medians);
}

Limit Limits::Macs(const char* name, MacKernel kernel, double share, int threads) {
  return Remember(name, ThreadsText(threads), [&] {
    double macs = 0.0;
    const auto run = [&] {
      Runner(threads).Run(static_cast<std::size_t>(threads), [&](std::size_t thread) {
        const double done = kernel(kRounds);
        if (thread == 0) macs = done * threads;
      });
    };
    const double seconds = tune::MedianSeconds({run}, seconds_ / 2, 7)[0];
    return Limit{name, share * macs / seconds, true};
  });
}

Limit Limits::TileMacs(const CodecKind& kind, int threads) {
  const kernels::ProbeKernels probe = kernels::ProbeKernelsFor(kernels_.target);
  if (kind.storage == KVMIX_STORAGE_F16) return Macs("fma-f32", probe.fma_f32, 1.0, threads);
  Limit pairs = Macs("mul-i16", probe.widening_i16, 1.0, threads);
  if (probe.dot_u8i8 == nullptr) return pairs;
  Limit dot = OperandBits(kind) == 8 ? Macs("dot-u8i8", probe.dot_u8i8, 1.0, threads)
                                     : Macs("dot-u8i8/2", probe.dot_u8i8, 0.5, threads);
  return dot.per_second > pairs.per_second ? dot : pairs;
}

}  // namespace kvmix::bench
