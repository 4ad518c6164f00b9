// Per target: rows to codes and scales of i6, i4 and i3. The formula: kernels/levels.h.
#if defined(KVMIX_KERNELS_LEVELS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVMIX_KERNELS_LEVELS_INL_H_
#undef KVMIX_KERNELS_LEVELS_INL_H_
#else
#define KVMIX_KERNELS_LEVELS_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/levels.h"
#include "kernels/planes-inl.h"
#include "kernels/rows-inl.h"
#include "kernels/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {

// The levels of a storage: Level() and Rank() of magnitudes |z| within a reach, and Code() of ranks
// and signs (-1: negative).
template <std::size_t kCount, const std::array<std::int8_t, kCount>& kMagnitude,
          const std::array<std::int16_t, 5>& kReach>
struct LloydMax {
  static constexpr std::size_t kReachCount = 5;
  static constexpr std::int32_t kZeroLevel = kMagnitude[0];  // |level| of z = 0
  static constexpr float kLargestScale = 0x1p121f;           // times 127 it is finite
  static constexpr auto kBorders = BordersOf(kMagnitude, kReach);

  static HWY_INLINE VI16 Level(VI16 magnitude, std::size_t reach) {
    VI16 level = hn::Set(DI16(), kMagnitude[0]);
    Unroll<kCount - 1>([&](auto c) KVMIX_LAMBDA {
      const VI16 rise =
          hn::Set(DI16(), static_cast<std::int16_t>(kMagnitude[c + 1] - kMagnitude[c]));
      const auto above = hn::Gt(magnitude, hn::Set(DI16(), kBorders[reach][c]));
      level = hn::Add(level, hn::IfThenElseZero(above, rise));
    });
    return level;
  }
  static HWY_INLINE VI16 Rank(VI16 magnitude, std::size_t reach) {
    VI16 rank = hn::Zero(DI16());
    Unroll<kCount - 1>([&](auto c) KVMIX_LAMBDA {
      const auto above = hn::Gt(magnitude, hn::Set(DI16(), kBorders[reach][c]));
      rank = hn::Sub(rank, hn::VecFromMask(DI16(), above));
    });
    return rank;
  }
  static HWY_INLINE VI16 Code(VI16 rank, VI16 sign) {
    return hn::And(hn::Xor(rank, sign), hn::Set(DI16(), std::int16_t{2 * kCount - 1}));
  }
};
using Levels4 = LloydMax<8, kMagnitudes, kReaches>;
using Levels3 = LloydMax<4, kMagnitudes3, kReaches3>;

struct Levels6 {
  static constexpr std::size_t kReachCount = kReaches6.size();
  static constexpr std::int32_t kZeroLevel = 0;
  static constexpr float kLargestScale = 0x1p123f;
  static HWY_INLINE VI16 Level(VI16 magnitude, std::size_t reach) {
    return hn::Min(hn::MulFixedPoint15(magnitude, hn::Set(DI16(), kReaches6[reach])),
                   hn::Set(DI16(), std::int16_t{kLargest6}));
  }
  static HWY_INLINE VI16 Rank(VI16 magnitude, std::size_t reach) { return Level(magnitude, reach); }
  static HWY_INLINE VI16 Code(VI16 rank, VI16 sign) {
    return hn::And(hn::Sub(hn::Xor(rank, sign), sign), hn::Set(DI16(), std::int16_t{63}));
  }
};

// One row's z, as magnitudes and signs (-1: negative), 0 behind its end.
struct FixedPoint {
  static constexpr std::size_t kStep = 2 * kLanes;
  HWY_ALIGN std::int16_t magnitude[kMaxDim];
  HWY_ALIGN std::int16_t sign[kMaxDim];
  std::size_t padded;

  static HWY_INLINE std::size_t Padded(std::size_t dim) {  // up to whole vectors
    return hwy::RoundUpTo(dim, kStep);
  }

  // inverse: 32767 / absmax of y [dim], which 0s follow up to `padded`.
  HWY_INLINE void Set(const float* HWY_RESTRICT y, std::size_t dim, float inverse) {
    const hn::Rebind<std::int16_t, DF> d;
    const VF by = hn::Set(DF(), inverse);
    padded = Padded(dim);
    for (std::size_t i = 0; i < padded; i += kLanes) {
      const auto z = hn::DemoteTo(d, Nearest(hn::Mul(hn::Load(DF(), y + i), by)));
      hn::Store(hn::Abs(z), d, magnitude + i);
      hn::Store(hn::ShiftRight<15>(z), d, sign + i);
    }
  }
};

// a^2 / b of a row's levels within one reach, and a / b.
struct Fit {
  double gain, scale;
};

template <class L>
HWY_INLINE Fit FitReach(const FixedPoint& z, std::size_t dim, std::size_t reach) {
  const DI16 d;
  VI32 a[2] = {hn::Zero(DI32()), hn::Zero(DI32())}, b[2] = {a[0], a[0]};
  for (std::size_t i = 0; i < z.padded; i += FixedPoint::kStep) {
    const VI16 magnitude = hn::Load(d, z.magnitude + i), level = L::Level(magnitude, reach);
    a[0] = hn::ReorderWidenMulAccumulate(DI32(), magnitude, level, a[0], a[1]);
    b[0] = hn::ReorderWidenMulAccumulate(DI32(), level, level, b[0], b[1]);
  }
  const auto sum = [](const VI32* v)
                       KVMIX_LAMBDA { return hn::ReduceSum(DI32(), hn::Add(v[0], v[1])); };
  const std::int32_t behind = static_cast<std::int32_t>(z.padded - dim);
  const double z_level = sum(a), level_level = sum(b) - behind * L::kZeroLevel * L::kZeroLevel;
  return {z_level * z_level / level_level, z_level / level_level};
}

// One a byte, in whole vectors.
template <class L>
HWY_INLINE void Codes(const FixedPoint& z, std::size_t reach, std::uint8_t* HWY_RESTRICT codes) {
  const DI16 d;
  const hn::Rebind<std::uint8_t, DI16> d8;
  for (std::size_t i = 0; i < z.padded; i += FixedPoint::kStep) {
    const VI16 rank = L::Rank(hn::Load(d, z.magnitude + i), reach);
    const VI16 code = L::Code(rank, hn::Load(d, z.sign + i));
    hn::Store(hn::TruncateTo(d8, hn::BitCast(hn::RebindToUnsigned<DI16>(), code)), d8, codes + i);
  }
}

// f(L()) with the levels of a storage: i6, i4 or i3.
template <class F>
HWY_INLINE decltype(auto) WithLevels(Storage storage, const F& f) {
  switch (storage) {
    case KVMIX_STORAGE_I6:
      return f(Levels6());
    case KVMIX_STORAGE_I3:
      return f(Levels3());
    case KVMIX_STORAGE_I4:
    case KVMIX_STORAGE_F16:  // has no levels, nor has i8: never asked for
    case KVMIX_STORAGE_I8:
      break;
  }
  return f(Levels4());
}

HWY_INLINE float NearestBF16(float x) {
  const std::uint32_t bits = hwy::BitCastScalar<std::uint32_t>(x);
  return hwy::BitCastScalar<float>((bits + 0x7FFFu + (bits >> 16 & 1u)) & 0xFFFF0000u);
}

// The scale of one row of at least 2^-100, as f32; `codes` (null: not wanted) one a byte, in whole
// vectors. y: 0s follow its end up to FixedPoint::Padded(dim).
template <class L>
HWY_INLINE float EncodeLevels(const float* HWY_RESTRICT y, std::size_t dim, float absmax,
                              std::uint8_t* HWY_RESTRICT codes) {
  FixedPoint z;
  z.Set(y, dim, static_cast<float>(kLargestZ) / absmax);
  std::size_t best_reach = 0;
  Fit best = FitReach<L>(z, dim, 0);
  for (std::size_t reach = 1; reach < L::kReachCount; ++reach) {
    const Fit fit = FitReach<L>(z, dim, reach);
    if (fit.gain <= best.gain) continue;
    best = fit;
    best_reach = reach;
  }
  if (codes != nullptr) Codes<L>(z, best_reach, codes);
  const double unit = static_cast<double>(absmax / static_cast<float>(kLargestZ));
  return HWY_MIN(static_cast<float>(unit * best.scale), L::kLargestScale);
}

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
