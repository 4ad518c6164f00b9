// Per target: the vectors that every kernel is written in. What a kernel file looks like:
// transform.cc.
#if defined(KVMIX_KERNELS_VECTORS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVMIX_KERNELS_VECTORS_INL_H_
#undef KVMIX_KERNELS_VECTORS_INL_H_
#else
#define KVMIX_KERNELS_VECTORS_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "hwy/highway.h"
#include "kernels/per_target.h"

// Byte dot products of four terms in one instruction: vpdpbusd, which wants one operand unsigned,
// or sdot (which Highway has in this NEON target only).
#undef KVMIX_QUADS
#undef KVMIX_UNSIGNED_QUADS
#if HWY_ARCH_X86
#define KVMIX_QUADS (HWY_TARGET <= HWY_AVX3_DL)
#define KVMIX_UNSIGNED_QUADS KVMIX_QUADS
#else
#define KVMIX_QUADS (HWY_TARGET == HWY_NEON_BF16)
#define KVMIX_UNSIGNED_QUADS 0
#endif

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using DI32 = hn::ScalableTag<std::int32_t>;
using DI16 = hn::ScalableTag<std::int16_t>;
using DI8 = hn::ScalableTag<std::int8_t>;
using DU8 = hn::ScalableTag<std::uint8_t>;
using VF = hn::Vec<DF>;
using VI32 = hn::Vec<DI32>;
using VI16 = hn::Vec<DI16>;
using VI8 = hn::Vec<DI8>;
using VU8 = hn::Vec<DU8>;

constexpr float kLog2E = 1.4426950408889634f;
constexpr std::size_t kLanes = hn::MaxLanes(DF());  // numbers of f32 or i32 in a vector

// f(0), f(1), ... f(N - 1) with the number as a compile-time constant: arrays of vectors indexed by
// it stay in registers.
template <std::size_t N, class F>
HWY_INLINE void Unroll(F&& f) {
  const auto call = [&]<std::size_t... I>(std::index_sequence<I...>) KVMIX_LAMBDA {
    (f(std::integral_constant<std::size_t, I>()), ...);
  };
  call(std::make_index_sequence<N>());
}

// A vector of kCount parts, a part for each of the vectors: op(a lane, a lane) of its lanes, until
// kLanes / kCount are left.
template <std::size_t kCount, class Op>
HWY_INLINE VF Folded(const VF* v, const Op& op) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    const VF a = Folded<kCount / 2>(v, op), b = Folded<kCount / 2>(v + kCount / 2, op);
    return op(hn::ConcatEven(DF(), b, a), hn::ConcatOdd(DF(), b, a));
  }
}
// A vector whose first kCount lanes are each what `op` makes of all lanes of one of the vectors.
template <std::size_t kCount, class Op>
HWY_INLINE VF Reduced(const VF* v, const Op& op) {
  VF all = Folded<kCount>(v, op);
  for (std::size_t lanes = kLanes / kCount; lanes > 1; lanes /= 2) {
    const VF twice[2] = {all, all};
    all = Folded<2>(twice, op);
  }
  return all;
}

template <typename T>
HWY_INLINE T LoadScalar(const std::uint8_t* p) {
  T t;
  std::memcpy(&t, p, sizeof(T));
  return t;
}

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
