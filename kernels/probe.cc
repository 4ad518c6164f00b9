// The simplest loops that reach a limit. Memory: four vectors a step, from front to end.
#include "kernels/probe.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/probe.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "kernels/amx.h"
#include "kernels/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {
namespace {

// Makes the compiler believe that v has changed: it neither folds nor drops what made it. Free.
template <class V>
HWY_INLINE void Opaque(V& v) {
#if HWY_TARGET == HWY_EMU128
  asm volatile("" : "+m"(v));
#elif HWY_ARCH_X86
  asm volatile("" : "+v"(v.raw));
#elif HWY_ARCH_ARM
  asm volatile("" : "+w"(v.raw));
#endif
}

constexpr std::size_t kVecs = 4;  // of a step through memory
// Bytes from a load to its prefetch; 8192 is a fifth slower than none on Granite Rapids.
constexpr std::size_t kAhead = 2048;

// With D of 32 bytes where vectors are longer: 64-byte loads read DRAM a sixth slower on Granite
// Rapids.
template <class D, bool kPrefetch>
std::uint64_t Read(const std::uint8_t* HWY_RESTRICT from, std::size_t n) {
  const D d;
  constexpr std::size_t kBytes = hn::MaxLanes(d) * sizeof(std::uint64_t);
  hn::Vec<D> sum[kVecs];
  Unroll<kVecs>([&](auto v) KVMIX_LAMBDA { sum[v] = hn::Zero(d); });
  for (std::size_t i = 0; i < n; i += kVecs * kBytes) {
    if constexpr (kPrefetch) {
      for (std::size_t line = i; line < i + kVecs * kBytes; line += 64)
        __builtin_prefetch(from + line + kAhead, 0, 2);  // into L2
    }
    Unroll<kVecs>([&](auto v) KVMIX_LAMBDA {
      const std::uint8_t* at = from + i + v * kBytes;
      sum[v] = hn::Add(sum[v], hn::Load(d, reinterpret_cast<const std::uint64_t*>(at)));
    });
  }
  return hn::ReduceSum(d, hn::Add(hn::Add(sum[0], sum[1]), hn::Add(sum[2], sum[3])));
}

template <bool kStream>
void Copy(const std::uint8_t* HWY_RESTRICT from, std::size_t n, std::uint8_t* HWY_RESTRICT to) {
  const DU8 d;
  constexpr std::size_t kBytes = hn::MaxLanes(d);
  for (std::size_t i = 0; i < n; i += kVecs * kBytes) {
    hn::Vec<DU8> x[kVecs];
    Unroll<kVecs>([&](auto v) KVMIX_LAMBDA { x[v] = hn::Load(d, from + i + v * kBytes); });
    Opaque(x[0]);  // else compilers call memcpy
    Unroll<kVecs>([&](auto v) KVMIX_LAMBDA {
      std::uint8_t* at = to + i + v * kBytes;
      kStream ? hn::Stream(x[v], d, at) : hn::Store(x[v], d, at);
    });
  }
  if constexpr (kStream) hwy::FlushStream();
}

// Independent sums cover the latency: 4 cycles times 2 a cycle on every CPU so far. With the two
// factors that is 18 registers, so there are fewer where there are only 16.
constexpr std::size_t kChains = HWY_ARCH_X86 && HWY_TARGET > HWY_AVX3 ? 12 : 16;

// Runs `rounds` rounds of kChains steps, sum = step(sum); returns the multiply-adds done.
template <class D, class Step>
HWY_INLINE double Chains(D d, std::size_t rounds, std::size_t per_step, const Step& step) {
  hn::Vec<D> sum[kChains];
  Unroll<kChains>([&](auto chain) KVMIX_LAMBDA { sum[chain] = hn::Zero(d); });
  for (std::size_t r = 0; r < rounds; ++r) {
    Unroll<kChains>([&](auto chain) KVMIX_LAMBDA {
      sum[chain] = step(sum[chain]);
      Opaque(sum[chain]);
    });
  }
  return static_cast<double>(rounds) * static_cast<double>(kChains * per_step);
}

double FmaF32(std::size_t rounds) {
  auto a = hn::Set(DF(), 1e-6f), b = hn::Set(DF(), 0.5f);
  Opaque(a);
  Opaque(b);
  return Chains(DF(), rounds, kLanes, [&](VF sum) KVMIX_LAMBDA { return hn::MulAdd(a, b, sum); });
}

double WideningI16(std::size_t rounds) {
  auto a = hn::Set(DI16(), 3), b = hn::Set(DI16(), 5);
  [[maybe_unused]] auto unused = hn::Zero(DI32());
  return Chains(DI32(), rounds, 2 * kLanes, [&](VI32 sum) KVMIX_LAMBDA {
    Opaque(a);  // else the product, always the same, is made once
#if HWY_ARCH_X86
    // One instruction (vpdpwssd) from AVX3_DL on, else two.
    return hn::ReorderWidenMulAccumulate(DI32(), a, b, sum, unused);
#else
    return hn::Add(sum, hn::WidenMulPairwiseAdd(DI32(), a, b));
#endif
  });
}

// Where the target has no instruction, Highway's fall-back is no limit.
#if KVMIX_QUADS
double DotU8I8(std::size_t rounds) {
  auto a = hn::Set(std::conditional_t<KVMIX_UNSIGNED_QUADS, DU8, DI8>(), 3);
  auto b = hn::Set(DI8(), 5);
  Opaque(a);
  Opaque(b);
  return Chains(DI32(), rounds, 4 * kLanes, [&](VI32 sum) KVMIX_LAMBDA {
    return hn::SumOfMulQuadAccumulate(DI32(), a, b, sum);
  });
}
#else
constexpr double (*DotU8I8)(std::size_t) = nullptr;
#endif

}  // namespace

ProbeKernels ProbeTable() {
  using D = hn::ScalableTag<std::uint64_t>;
  using DUpTo32Bytes = hn::CappedTag<std::uint64_t, 4>;
  return {Read<D, false>, Read<DUpTo32Bytes, true>, Copy<false>, Copy<true>, FmaF32, WideningI16,
          DotU8I8};
}

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvmix::kernels {
HWY_EXPORT(ProbeTable);
ProbeKernels ProbeKernelsFor(std::string_view target) {
  if (target == "AMX") {  // AVX3_DL, but for one product
    ProbeKernels probe = ProbeKernelsFor("AVX3_DL");
    probe.dot_u8i8 = &AmxDotU8I8;
    return probe;
  }
  std::int64_t left = hwy::SupportedTargets() & HWY_TARGETS;
  while ((left & (left - 1)) != 0 && target != hwy::TargetName(left & -left)) left &= left - 1;
  return KVMIX_CALL_FOR(left & -left, ProbeTable)();
}
}  // namespace kvmix::kernels
#endif  // HWY_ONCE
