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

// What n becomes, by its lowest 8 bits.
struct Nearest8 {
  std::array<float, 256> level{};
  std::array<std::uint8_t, 256> code{};
};

// Codes that are their own levels, of kBits bits in two's complement.
template <std::int32_t kBits>
constexpr Nearest8 OwnLevels() {
  constexpr std::int32_t kMost = (1 << (kBits - 1)) - 1;
  Nearest8 table;
  for (std::int32_t n = -127; n <= 127; ++n) {
    const std::int32_t level = n > kMost ? kMost : n < -kMost ? -kMost : n;
    const auto at = static_cast<std::uint8_t>(n);
    table.level[at] = static_cast<float>(level);
    table.code[at] = static_cast<std::uint8_t>(level & (2 * kMost + 1));
  }
  return table;
}

// Codes that are numbers of levels.
template <std::size_t kCount>
constexpr Nearest8 NearestLevels(const std::array<std::int8_t, kCount>& levels) {
  Nearest8 table;
  for (std::int32_t n = -127; n <= 127; ++n) {
    std::size_t best = 0;
    for (std::size_t c = 1; c < kCount; ++c) {
      const std::int32_t level = levels[c], before = levels[best];
      const std::int32_t far = (n - level) * (n - level), best_far = (n - before) * (n - before);
      if (far < best_far || (far == best_far && level * level < before * before)) best = c;
    }
    const auto at = static_cast<std::uint8_t>(n);
    table.level[at] = static_cast<float>(levels[best]);
    table.code[at] = static_cast<std::uint8_t>(best);
  }
  return table;
}

inline const Nearest8& NearestOf(Storage storage) {
  static constexpr Nearest8 k8 = OwnLevels<8>(), k6 = OwnLevels<6>();
  static constexpr Nearest8 k4 = NearestLevels(kLevels), k3 = NearestLevels(kLevels3);
  if (storage == Storage::kI6) return k6;
  if (storage == Storage::kI4) return k4;
  return storage == Storage::kI3 ? k3 : k8;
}

// Rows that are shaped side by side: their chains of dim steps hide behind each other.
struct ShapedRow {
  const float* y;       // [dim]
  const float* matrix;  // L, [dim][dim], zeros above the diagonal
  float scale;
  std::uint8_t* codes;  // [dim], one a byte
};

template <std::size_t kMostRows>
HWY_INLINE void ShapeRows(const ShapedRow* HWY_RESTRICT rows, std::size_t count, std::size_t dim,
                          const Nearest8& nearest) {
  const DF d;
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
      // Adding 1.5 * 2^23 rounds, and leaves n in the lowest bits.
      const auto at = static_cast<std::uint8_t>(hwy::BitCastScalar<std::uint32_t>(n + 0x1.8p23f));
      row.codes[i] = nearest.code[at];
      const VF error = hn::Set(d, row.y[i] - row.scale * nearest.level[at]);
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
