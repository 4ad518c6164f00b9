// Per target: the Hadamard transform of rows in memory, with a factor per channel before or after.
#if defined(KVMIX_KERNELS_TRANSFORM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVMIX_KERNELS_TRANSFORM_INL_H_
#undef KVMIX_KERNELS_TRANSFORM_INL_H_
#else
#define KVMIX_KERNELS_TRANSFORM_INL_H_
#endif

#include <cmath>
#include <cstddef>

#include "hwy/highway.h"
#include "kernels/rows-inl.h"
#include "kernels/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {

// Pairs of lanes (a, b) at a distance, i and i ^ kDistance, become (a + b, a - b). 1 and -1 are
// exact factors: MulAdd rounds once on every target.
template <std::size_t kDistance>
HWY_INLINE VF Butterflies(VF x) {
  const DF d;
  const hn::RebindToUnsigned<DF> du;
  VF partner;
  if constexpr (kDistance == 1) partner = hn::Reverse2(d, x);
  if constexpr (kDistance == 2) partner = hn::Shuffle1032(x);
  if constexpr (kDistance == 4) partner = hn::SwapAdjacentBlocks(x);
  if constexpr (kDistance == 8) partner = hn::ConcatLowerUpper(d, x, x);
  const auto is_b = hn::TestBit(hn::Iota(du, 0), hn::Set(du, kDistance));
  const VF sign = hn::IfThenElse(hn::RebindMask(d, is_b), hn::Set(d, -1.0f), hn::Set(d, 1.0f));
  return hn::MulAdd(x, sign, partner);
}

// The distances below a vector's length, as far as the block reaches.
HWY_INLINE VF WithinVector(VF x, std::size_t block) {
  if (block > 1) x = Butterflies<1>(x);
  if (block > 2) x = Butterflies<2>(x);
  if constexpr (kLanes > 4) {
    if (block > 4) x = Butterflies<4>(x);
  }
  if constexpr (kLanes > 8) {
    if (block > 8) x = Butterflies<8>(x);
  }
  return x;
}

// One row in place, x <- after * R(before * x), R = H / sqrt(block). before, after: [dim], or null
// for 1.
HWY_INLINE void HadamardRow(float* HWY_RESTRICT x, std::size_t dim,
                            const float* HWY_RESTRICT before, const float* HWY_RESTRICT after) {
  const DF d;
  const std::size_t block = dim & (~dim + 1);  // the largest power of two that divides dim
  // Whole vectors hold whole blocks, or are parts of one: a row's end is never cut inside a block.
  ForVectors(0, dim, [&](auto io, std::size_t i) KVMIX_LAMBDA {
    VF v = io.Load(d, x + i);
    if (before != nullptr) v = hn::Mul(v, io.Load(d, before + i));
    io.Store(WithinVector(v, block), d, x + i);
  });
  std::size_t h = kLanes;
  for (; 2 * h < block; h *= 4) {  // two distances, h and 2 h, in one walk
    for (std::size_t i = 0; i < dim; i += 4 * h) {
      for (std::size_t j = i; j < i + h; j += kLanes) {
        const VF a = hn::LoadU(d, x + j), b = hn::LoadU(d, x + j + h);
        const VF e = hn::LoadU(d, x + j + 2 * h), f = hn::LoadU(d, x + j + 3 * h);
        const VF ab = hn::Add(a, b), a_b = hn::Sub(a, b), ef = hn::Add(e, f), e_f = hn::Sub(e, f);
        hn::StoreU(hn::Add(ab, ef), d, x + j);
        hn::StoreU(hn::Add(a_b, e_f), d, x + j + h);
        hn::StoreU(hn::Sub(ab, ef), d, x + j + 2 * h);
        hn::StoreU(hn::Sub(a_b, e_f), d, x + j + 3 * h);
      }
    }
  }
  if (h < block) {
    for (std::size_t i = 0; i < dim; i += 2 * h) {
      for (std::size_t j = i; j < i + h; j += kLanes) {
        const VF a = hn::LoadU(d, x + j), b = hn::LoadU(d, x + j + h);
        hn::StoreU(hn::Add(a, b), d, x + j);
        hn::StoreU(hn::Sub(a, b), d, x + j + h);
      }
    }
  }
  const VF norm = hn::Set(d, 1.0f / std::sqrt(static_cast<float>(block)));
  ForVectors(0, dim, [&](auto io, std::size_t i) KVMIX_LAMBDA {
    VF v = hn::Mul(io.Load(d, x + i), norm);
    if (after != nullptr) v = hn::Mul(v, io.Load(d, after + i));
    io.Store(v, d, x + i);
  });
}

// The same, but without `hadamard` R is nothing, and one of the factors at least is null.
HWY_INLINE void TransformRow(float* x, std::size_t dim, const float* before, const float* after,
                             bool hadamard) {
  if (hadamard) return HadamardRow(x, dim, before, after);
  const float* factor = before != nullptr ? before : after;
  if (factor == nullptr) return;
  ForVectors(0, dim, [&](auto io, std::size_t i) KVMIX_LAMBDA {
    io.Store(hn::Mul(io.Load(DF(), x + i), io.Load(DF(), factor + i)), DF(), x + i);
  });
}

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
