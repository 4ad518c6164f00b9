// Per target: the step +shape, codes whose errors fall where queries do not look.
//
// With e = y - decoded(y), a query q' as the kernel sees it (folded, rotated) misses its score by
// q' . e, whose mean square is e^T H e, H the mean of q' q'^T. Factored as H = L D L^T, L unit
// lower triangular, D diagonal and positive,
//
//   e^T H e = sum over k of D[k] * (e[k] + sum over i > k of L[i][k] * e[i])^2
//
// so codes are chosen from the last channel to the first, and every bracket is one rounding error:
//
//   t = y[k] + L[dim - 1][k] * e[dim - 1] + ... + L[k + 1][k] * e[k + 1], in this order
//   n = round-to-nearest-even(t * (1 / scale)), in [-127, 127]
//   code k = that of the level nearest to n, of two the one of the smaller magnitude
//   e[k] = y[k] - scale * level
//
// each step rounded to f32, nothing fused: the same bytes on every target. It is what GPTQ (arXiv
// 2210.17323) and LDLQ (QuIP, 2307.13304) do to weights. For keys: SQuat (2503.24358) keeps K's
// error orthogonal to a subspace of the prompt's queries; OSCAR (2605.17757) and HeadQ (2605.03562)
// use the queries' covariance in other ways. Here L is learnt offline (lib/tune/shaping.h).
#if defined(KVMIX_KERNELS_SHAPE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVMIX_KERNELS_SHAPE_INL_H_
#undef KVMIX_KERNELS_SHAPE_INL_H_
#else
#define KVMIX_KERNELS_SHAPE_INL_H_
#endif

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "hwy/highway.h"
#include "kernels/formats.h"
#include "kernels/levels.h"
#include "kernels/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {

// What n becomes: a level, and its code.
struct Chosen {
  VF level;
  VI32 code;
};
// Codes that are their own levels.
template <std::int32_t kMost>
struct OwnLevels {
  static HWY_INLINE Chosen Choose(VF n) {
    const VF most = hn::Set(DF(), static_cast<float>(kMost));
    const VF level = hn::Max(hn::Min(n, most), hn::Neg(most));
    return {level, hn::And(hn::ConvertTo(DI32(), level), hn::Set(DI32(), 2 * kMost + 1))};
  }
};
// Codes that are numbers of levels.
template <std::size_t kCount, const std::array<std::int8_t, kCount>& kMagnitude>
struct NearestLevels {
  static HWY_INLINE Chosen Choose(VF n) {
    const VF magnitude = hn::Abs(n);
    VF level = hn::Set(DF(), static_cast<float>(kMagnitude[0]));
    VI32 rank = hn::Zero(DI32());
    Unroll<kCount - 1>([&](auto c) KVMIX_LAMBDA {
      constexpr float kBorder = 0.5f * static_cast<float>(kMagnitude[c] + kMagnitude[c + 1]),
                      kRise = static_cast<float>(kMagnitude[c + 1] - kMagnitude[c]);
      const auto above = hn::Gt(magnitude, hn::Set(DF(), kBorder));
      level = hn::Add(level, hn::IfThenElseZero(above, hn::Set(DF(), kRise)));
      rank = hn::Sub(rank, hn::VecFromMask(DI32(), hn::RebindMask(DI32(), above)));
    });
    const auto negative = hn::Lt(n, hn::Zero(DF()));
    const VI32 flip = hn::IfThenElseZero(hn::RebindMask(DI32(), negative),
                                         hn::Set(DI32(), std::int32_t{2 * kCount - 1}));
    return {hn::IfThenElse(negative, hn::Neg(level), level), hn::Xor(rank, flip)};
  }
};

// f(S()) with the struct of a storage.
template <class F>
HWY_INLINE void WithShapedLevels(Storage storage, const F& f) {
  switch (storage) {
    case KVMIX_STORAGE_I8:
      return f(OwnLevels<127>());
    case KVMIX_STORAGE_I6:
      return f(OwnLevels<kLargest6>());
    case KVMIX_STORAGE_I4:
      return f(NearestLevels<8, kMagnitudes>());
    case KVMIX_STORAGE_I3:
      return f(NearestLevels<4, kMagnitudes3>());
    case KVMIX_STORAGE_F16:  // never asked for: numbers are not shaped
      break;
  }
}

constexpr float kRound = 0x1.8p23f;  // added, it rounds, and leaves n in the lowest bits

HWY_INLINE VF NearestInteger(VF t, VF inverse) {
  const VF most = hn::Set(DF(), 127.0f), round = hn::Set(DF(), kRound);
  const VF n = hn::Max(hn::Min(hn::Mul(t, inverse), most), hn::Neg(most));
  return hn::Sub(hn::Add(n, round), round);
}
// 1 / scale, 0 where that is 0.
HWY_INLINE VF InverseScale(VF scale) {
  const auto zero = hn::Eq(scale, hn::Zero(DF()));
  return hn::IfThenZeroElse(zero, hn::Div(hn::Set(DF(), 1.0f), scale));
}

// The same matrix for up to kLanes rows, one a lane. y: row r at y + r * dim; codes: one a byte,
// row r at codes + r * code_stride.
template <class Levels>
HWY_NOINLINE void ShapeTogether(const float* HWY_RESTRICT y, std::size_t count, std::size_t dim,
                                const float* HWY_RESTRICT matrix, const float* HWY_RESTRICT scales,
                                std::uint8_t* HWY_RESTRICT codes, std::size_t code_stride) {
  const DF d;
  const hn::Rebind<std::uint8_t, DI32> d8;
  HWY_ALIGN float errors[kMaxDim * kLanes];  // [channel][lane]; before its code is known, y
  HWY_ALIGN std::uint8_t lane_codes[kMaxDim * kLanes];
  const VF scale = hn::LoadN(d, scales, count), inverse = InverseScale(scale);
  for (std::size_t r = 0; r < kLanes; ++r) {  // of lanes without a row, the first one
    const float* HWY_RESTRICT row = y + (r < count ? r * dim : 0);
    for (std::size_t c = 0; c < dim; ++c) errors[c * kLanes + r] = row[c];
  }

  // Channels [first, first + kSize), once those above have their codes.
  const auto block = [&]<std::size_t kSize>(std::integral_constant<std::size_t, kSize>,
                                            std::size_t first) KVMIX_LAMBDA {
    VF own[kSize], t[kSize];
    Unroll<kSize>([&](auto c)
                      KVMIX_LAMBDA { t[c] = own[c] = hn::Load(d, errors + (first + c) * kLanes); });
    for (std::size_t i = dim; i-- > first + kSize;) {
      const VF error = hn::Load(d, errors + i * kLanes);
      const float* HWY_RESTRICT row = matrix + i * dim + first;
      Unroll<kSize>([&](auto c)
                        KVMIX_LAMBDA { t[c] = hn::Add(t[c], hn::Mul(hn::Set(d, row[c]), error)); });
    }
    Unroll<kSize>([&](auto back) KVMIX_LAMBDA {
      constexpr std::size_t kChannel = kSize - 1 - back;
      const std::size_t i = first + kChannel;
      const Chosen chosen = Levels::Choose(NearestInteger(t[kChannel], inverse));
      const VF error = hn::Sub(own[kChannel], hn::Mul(scale, chosen.level));
      hn::Store(error, d, errors + i * kLanes);
      hn::Store(hn::DemoteTo(d8, chosen.code), d8, lane_codes + i * kLanes);
      Unroll<kChannel>([&](auto c) KVMIX_LAMBDA {
        t[c] = hn::Add(t[c], hn::Mul(hn::Set(d, matrix[i * dim + first + c]), error));
      });
    });
  };
  std::size_t left = dim;
  for (constexpr std::size_t kSize = 8; left >= kSize; left -= kSize)
    block(std::integral_constant<std::size_t, kSize>(), left - kSize);
  for (; left > 0; --left) block(std::integral_constant<std::size_t, 1>(), left - 1);
  for (std::size_t r = 0; r < count; ++r) {
    for (std::size_t c = 0; c < dim; ++c) codes[r * code_stride + c] = lane_codes[c * kLanes + r];
  }
}

// Rows of matrices of their own, side by side: their chains of dim steps hide behind each other.
struct ShapedRow {
  const float* y;       // [dim]
  const float* matrix;  // L, [dim][dim], zeros above the diagonal
  float scale;
  std::uint8_t* codes;  // [dim], one a byte
};

template <class Levels, std::size_t kMostRows>
HWY_NOINLINE void ShapeApart(const ShapedRow* HWY_RESTRICT rows, std::size_t count,
                             std::size_t dim) {
  const DF d;
  // Choose() of every n, by its lowest 8 bits: a load is shorter than its chain of operations.
  HWY_ALIGN float level[256];
  HWY_ALIGN std::int32_t code[256];
  for (std::int32_t n = 0; n < 256; n += static_cast<std::int32_t>(kLanes)) {
    const VI32 signed_n = hn::Iota(DI32(), n < 128 ? n : n - 256);
    const Chosen chosen = Levels::Choose(hn::ConvertTo(d, signed_n));
    hn::Store(chosen.level, d, level + n);
    hn::Store(chosen.code, DI32(), code + n);
  }
  const std::size_t padded = hwy::RoundUpTo(dim, kLanes);
  HWY_ALIGN float t[kMostRows * kMaxDim];
  float inverse[kMostRows];
  for (std::size_t r = 0; r < count; ++r) {
    std::memcpy(t + r * padded, rows[r].y, dim * sizeof(float));
    inverse[r] = rows[r].scale > 0.0f ? 1.0f / rows[r].scale : 0.0f;
  }
  for (std::size_t i = dim; i-- > 0;) {
    for (std::size_t r = 0; r < count; ++r) {
      const ShapedRow& row = rows[r];
      float* HWY_RESTRICT own = t + r * padded;
      const float n = HWY_MIN(HWY_MAX(own[i] * inverse[r], -127.0f), 127.0f);
      const auto at = static_cast<std::uint8_t>(hwy::BitCastScalar<std::uint32_t>(n + kRound));
      row.codes[i] = static_cast<std::uint8_t>(code[at]);
      const VF error = hn::Set(d, row.y[i] - row.scale * level[at]);
      const float* HWY_RESTRICT column = row.matrix + i * dim;
      // The last vector reaches beyond i, where L is 0 and t is not read again.
      std::size_t k = 0;
      for (; k + kLanes <= HWY_MIN(i + kLanes - 1, dim); k += kLanes) {
        const VF add = hn::Mul(hn::LoadU(d, column + k), error);
        hn::Store(hn::Add(hn::Load(d, own + k), add), d, own + k);
      }
      for (; k < i; ++k) own[k] += column[k] * hn::GetLane(error);
    }
  }
}

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
