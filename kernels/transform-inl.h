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

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels {
namespace HWY_NAMESPACE {
namespace {

// Channels of a block: the largest power of two that divides dim.
HWY_INLINE std::size_t HadamardBlock(std::size_t dim) { return dim & (~dim + 1); }

// Lane i's partner at distance kDistance, lane i ^ kDistance.
template <std::size_t kDistance>
HWY_INLINE F32 Partner(F32 x) {
  const DF32 d;
  if constexpr (kDistance == 1) return hn::Reverse2(d, x);
  if constexpr (kDistance == 2) return hn::Shuffle1032(x);
  if constexpr (kDistance == 4) return hn::SwapAdjacentBlocks(x);
  if constexpr (kDistance == 8) return hn::ConcatLowerUpper(d, x, x);
}

// Pairs of lanes (a, b) at a distance become (a + b, a - b). 1 and -1 are exact factors: MulAdd
// rounds once on every target.
template <std::size_t kDistance>
HWY_INLINE F32 Butterflies(F32 x) {
  const DF32 d;
  const hn::RebindToUnsigned<DF32> du;
  const auto is_b = hn::TestBit(hn::Iota(du, 0), hn::Set(du, kDistance));
  const F32 sign = hn::IfThenElse(hn::RebindMask(d, is_b), hn::Set(d, -1.0f), hn::Set(d, 1.0f));
  return hn::MulAdd(x, sign, Partner<kDistance>(x));
}

// The distances below a vector's length, as far as the block reaches.
HWY_INLINE F32 WithinVector(F32 x, std::size_t block) {
  constexpr std::size_t kVector = hn::MaxLanes(DF32());
  if (kVector > 1 && block > 1) x = Butterflies<1>(x);
  if (kVector > 2 && block > 2) x = Butterflies<2>(x);
  if constexpr (kVector > 4) {
    if (block > 4) x = Butterflies<4>(x);
  }
  if constexpr (kVector > 8) {
    if (block > 8) x = Butterflies<8>(x);
  }
  return x;
}

// One row in place, x <- after * H(before * x) / sqrt(block). before, after: [dim], or null for 1.
HWY_INLINE void HadamardRow(float* HWY_RESTRICT x, std::size_t dim,
                            const float* HWY_RESTRICT before, const float* HWY_RESTRICT after) {
  const DF32 d;
  const std::size_t lanes = hn::Lanes(d), block = HadamardBlock(dim);
  // Whole vectors hold whole blocks, or are parts of one: a row's end is never cut inside a block.
  ForVectors<Tail::kPartial>(0, dim, lanes, [&](auto io, std::size_t i) KVMIX_LAMBDA {
    F32 v = io.Load(d, x + i);
    if (before != nullptr) v = hn::Mul(v, io.Load(d, before + i));
    io.Store(WithinVector(v, block), d, x + i);
  });
  std::size_t h = lanes;
  for (; 2 * h < block; h *= 4) {  // two distances, h and 2 h, in one walk
    for (std::size_t i = 0; i < dim; i += 4 * h) {
      for (std::size_t j = i; j < i + h; j += lanes) {
        const F32 a = hn::LoadU(d, x + j), b = hn::LoadU(d, x + j + h);
        const F32 e = hn::LoadU(d, x + j + 2 * h), f = hn::LoadU(d, x + j + 3 * h);
        const F32 ab = hn::Add(a, b), a_b = hn::Sub(a, b), ef = hn::Add(e, f), e_f = hn::Sub(e, f);
        hn::StoreU(hn::Add(ab, ef), d, x + j);
        hn::StoreU(hn::Add(a_b, e_f), d, x + j + h);
        hn::StoreU(hn::Sub(ab, ef), d, x + j + 2 * h);
        hn::StoreU(hn::Sub(a_b, e_f), d, x + j + 3 * h);
      }
    }
  }
  for (; h < block; h *= 2) {
    for (std::size_t i = 0; i < dim; i += 2 * h) {
      for (std::size_t j = i; j < i + h; j += lanes) {
        const F32 a = hn::LoadU(d, x + j), b = hn::LoadU(d, x + j + h);
        hn::StoreU(hn::Add(a, b), d, x + j);
        hn::StoreU(hn::Sub(a, b), d, x + j + h);
      }
    }
  }
  const F32 norm = hn::Set(d, 1.0f / std::sqrt(static_cast<float>(block)));
  ForVectors<Tail::kPartial>(0, dim, lanes, [&](auto io, std::size_t i) KVMIX_LAMBDA {
    F32 v = hn::Mul(io.Load(d, x + i), norm);
    if (after != nullptr) v = hn::Mul(v, io.Load(d, after + i));
    io.Store(v, d, x + i);
  });
}

HWY_INLINE void ScaleRow(float* HWY_RESTRICT x, std::size_t dim, const float* HWY_RESTRICT by) {
  ForVectors<Tail::kPartial>(0, dim, hn::Lanes(DF32()), [&](auto io, std::size_t i) KVMIX_LAMBDA {
    io.Store(hn::Mul(io.Load(DF32(), x + i), io.Load(DF32(), by + i)), DF32(), x + i);
  });
}

// x <- R(factor * x), or x <- factor * R(x); R is nothing without `hadamard`.
HWY_INLINE void FactorThenRotate(float* x, std::size_t dim, const float* factor, bool hadamard) {
  if (hadamard) {
    HadamardRow(x, dim, factor, nullptr);
  } else if (factor != nullptr) {
    ScaleRow(x, dim, factor);
  }
}
HWY_INLINE void RotateThenFactor(float* x, std::size_t dim, const float* factor, bool hadamard) {
  if (hadamard) {
    HadamardRow(x, dim, nullptr, factor);
  } else if (factor != nullptr) {
    ScaleRow(x, dim, factor);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace kvmix::kernels
HWY_AFTER_NAMESPACE();

#endif  // KVMIX_KERNELS_TRANSFORM_INL_H_
