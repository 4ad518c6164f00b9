// The simplest loops that reach a limit. Arithmetic: sixteen independent chains cover the latency
// (4 cycles times 2 a cycle) on every CPU so far; with the two factors that is 18 registers, so
// where there are only 16 (AVX2 and below) there are twelve chains. Memory: four vectors a step,
// from front to end.
#include "kernels/probe.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/probe.cc"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "kernels/per_target.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

constexpr std::size_t kAhead =
    2048;  // bytes from a load to its prefetch; 8192 is a fifth slower than none on Granite Rapids
#if HWY_ARCH_X86 && HWY_TARGET > HWY_AVX3
constexpr std::size_t kChains = 12;
#else
constexpr std::size_t kChains = 16;
#endif

using DU64 = hn::ScalableTag<std::uint64_t>;
using DU64x4 = hn::CappedTag<std::uint64_t, 4>;
using DF32 = hn::ScalableTag<float>;
using DI32 = hn::ScalableTag<std::int32_t>;
using DI16 = hn::ScalableTag<std::int16_t>;
using DI8 = hn::ScalableTag<std::int8_t>;

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

// With D of 32 bytes where vectors are longer: 64-byte loads read DRAM a sixth slower on Granite
// Rapids.
template <class D, bool kPrefetch>
std::uint64_t Read(const std::uint8_t* HWY_RESTRICT from, std::size_t n) {
  const D d;
  const std::size_t bytes = hn::Lanes(d) * sizeof(std::uint64_t);
  auto a = hn::Zero(d), b = a, c = a, e = a;
  for (std::size_t i = 0; i < n; i += 4 * bytes) {
    if constexpr (kPrefetch) {
      for (std::size_t line = i; line < i + 4 * bytes; line += 64)
        __builtin_prefetch(from + line + kAhead, 0, 2);  // into L2
    }
    const auto at = [&](std::size_t v) KVMIX_LAMBDA {
      return hn::Load(d, reinterpret_cast<const std::uint64_t*>(from + i + v * bytes));
    };
    a = hn::Add(a, at(0));
    b = hn::Add(b, at(1));
    c = hn::Add(c, at(2));
    e = hn::Add(e, at(3));
  }
  return hn::ReduceSum(d, hn::Add(hn::Add(a, b), hn::Add(c, e)));
}

template <bool kStream>
void Copy(const std::uint8_t* HWY_RESTRICT from, std::size_t n, std::uint8_t* HWY_RESTRICT to) {
  const hn::ScalableTag<std::uint8_t> d;
  const std::size_t bytes = hn::Lanes(d);
  for (std::size_t i = 0; i < n; i += 4 * bytes) {
    auto a = hn::Load(d, from + i), b = hn::Load(d, from + i + bytes),
         c = hn::Load(d, from + i + 2 * bytes), e = hn::Load(d, from + i + 3 * bytes);
    Opaque(a);  // else compilers call memcpy
    if constexpr (kStream) {
      hn::Stream(a, d, to + i);
      hn::Stream(b, d, to + i + bytes);
      hn::Stream(c, d, to + i + 2 * bytes);
      hn::Stream(e, d, to + i + 3 * bytes);
    } else {
      hn::Store(a, d, to + i);
      hn::Store(b, d, to + i + bytes);
      hn::Store(c, d, to + i + 2 * bytes);
      hn::Store(e, d, to + i + 3 * bytes);
    }
  }
  if constexpr (kStream) hwy::FlushStream();
}

// Runs `rounds` rounds of kChains steps, sum = step(sum); returns the multiply-adds done.
template <class D, class Step>
HWY_INLINE double Chains(D d, std::size_t rounds, std::size_t per_step, const Step& step) {
  auto s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0, s8 = s0,
       s9 = s0, s10 = s0, s11 = s0;
  [[maybe_unused]] auto s12 = s0, s13 = s0, s14 = s0, s15 = s0;
  const auto advance = [&](auto& sum) KVMIX_LAMBDA {
    sum = step(sum);
    Opaque(sum);
  };
  for (std::size_t r = 0; r < rounds; ++r) {
    advance(s0), advance(s1), advance(s2), advance(s3), advance(s4), advance(s5), advance(s6),
        advance(s7);
    advance(s8), advance(s9), advance(s10), advance(s11);
    if constexpr (kChains == 16) advance(s12), advance(s13), advance(s14), advance(s15);
  }
  return static_cast<double>(rounds) * static_cast<double>(kChains * per_step);
}

double FmaF32(std::size_t rounds) {
  auto a = hn::Set(DF32(), 1e-6f), b = hn::Set(DF32(), 0.5f);
  Opaque(a);
  Opaque(b);
  return Chains(DF32(), rounds, hn::Lanes(DF32()),
                [&](auto sum) KVMIX_LAMBDA { return hn::MulAdd(a, b, sum); });
}

double WideningI16(std::size_t rounds) {
  auto a = hn::Set(DI16(), 3), b = hn::Set(DI16(), 5);
  [[maybe_unused]] auto unused = hn::Zero(DI32());
  return Chains(DI32(), rounds, hn::Lanes(DI16()), [&](auto sum) KVMIX_LAMBDA {
    Opaque(a);  // else the product, always the same, is made once
#if HWY_ARCH_X86
    return hn::ReorderWidenMulAccumulate(
        DI32(), a, b, sum, unused);  // one instruction (vpdpwssd) from AVX3_DL on, else two
#else
    return hn::Add(sum, hn::WidenMulPairwiseAdd(DI32(), a, b));
#endif
  });
}

// Highway has the instruction from AVX3_DL on (vpdpbusd) and in NEON_BF16 (sdot, signed by signed);
// its fall-backs are no limit.
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3_DL
using DQuadLeft = hn::ScalableTag<std::uint8_t>;
#define KVMIX_HAVE_DOT 1
#elif HWY_TARGET == HWY_NEON_BF16
using DQuadLeft = DI8;
#define KVMIX_HAVE_DOT 1
#else
#define KVMIX_HAVE_DOT 0
#endif

#if KVMIX_HAVE_DOT
double DotU8I8(std::size_t rounds) {
  auto a = hn::Set(DQuadLeft(), 3);
  auto b = hn::Set(DI8(), 5);
  Opaque(a);
  Opaque(b);
  return Chains(DI32(), rounds, hn::Lanes(DI8()), [&](auto sum) KVMIX_LAMBDA {
    return hn::SumOfMulQuadAccumulate(DI32(), a, b, sum);
  });
}
#else
constexpr double (*DotU8I8)(std::size_t) = nullptr;
#endif
#undef KVMIX_HAVE_DOT

ProbeKernels Table() {
  return {
      Read<DU64, false>, Read<DU64x4, true>, Copy<false>, Copy<true>, FmaF32, WideningI16, DotU8I8};
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace kvmix::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvmix::kernels {

HWY_EXPORT(Table);

ProbeKernels ProbeKernelsFor(std::string_view target) {
  std::int64_t left = hwy::SupportedTargets() & HWY_TARGETS;
  while ((left & (left - 1)) != 0 && target != hwy::TargetName(left & -left)) left &= left - 1;
  return KVMIX_CALL_FOR(left & -left, Table)();
}

}  // namespace kvmix::kernels
#endif  // HWY_ONCE
