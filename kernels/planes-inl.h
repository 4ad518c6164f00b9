// Per target: codes, one a byte, to the planes of a canonical row (kernels/levels.h), and back.
#if defined(KVMIX_KERNELS_PLANES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVMIX_KERNELS_PLANES_INL_H_
#undef KVMIX_KERNELS_PLANES_INL_H_
#else
#define KVMIX_KERNELS_PLANES_INL_H_
#endif

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/formats.h"
#include "kernels/levels.h"
#include "kernels/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {

// The kBits bits of each code from kFrom up, dim * kBits / 8 bytes. codes: whole vectors are read.
template <std::size_t kFrom, std::size_t kBits>
HWY_INLINE void PackPlane(const std::uint8_t* HWY_RESTRICT codes, std::size_t dim,
                          std::uint8_t* HWY_RESTRICT to) {
  const hn::Repartition<std::uint16_t, DU8> d16;
  const hn::Rebind<std::uint8_t, decltype(d16)> half;
  constexpr std::size_t kStep = hn::MaxLanes(DU8());
  HWY_ALIGN std::uint8_t bytes[kMaxDim];
  const VU8 mask = hn::Set(DU8(), static_cast<std::uint8_t>((1u << kBits) - 1));
  for (std::size_t i = 0; i < dim; i += kStep) {
    const VU8 code = hn::Load(DU8(), codes + i);
    const auto shifted = kFrom == 0 ? code : hn::ShiftRight<kFrom>(code);
    hn::Store(hn::And(shifted, mask), DU8(), bytes + i);
  }
  // Two neighbours become one, until a byte is full.
  const auto halve = [&](auto bits, std::size_t count) KVMIX_LAMBDA {
    for (std::size_t i = 0; i < count; i += kStep) {
      const auto two = hn::BitCast(d16, hn::Load(DU8(), bytes + i));
      hn::StoreU(hn::TruncateTo(half, hn::Or(two, hn::ShiftRight<8 - bits>(two))), half,
                 bytes + i / 2);
    }
  };
  if constexpr (kBits == 1) halve(std::integral_constant<int, 1>(), dim);
  if constexpr (kBits <= 2) halve(std::integral_constant<int, 2>(), dim * kBits / 2);
  halve(std::integral_constant<int, 4>(), dim * kBits / 4);
  std::memcpy(to, bytes, dim * kBits / 8);
}

// codes: aligned, whole vectors are read.
HWY_INLINE void PackRow(Storage storage, const std::uint8_t* HWY_RESTRICT codes, std::size_t dim,
                        std::uint8_t* HWY_RESTRICT row) {
  switch (storage) {
    case Storage::kI6:
      PackPlane<0, 4>(codes, dim, row);
      return PackPlane<4, 2>(codes, dim, row + dim / 2);
    case Storage::kI4:
      return PackPlane<0, 4>(codes, dim, row);
    case Storage::kI3:
      PackPlane<0, 2>(codes, dim, row);
      return PackPlane<2, 1>(codes, dim, row + dim / 4);
    default:
      std::memcpy(row, codes, dim);
  }
}

// The inverse of PackPlane: the plane's bits, one code's a byte, in whole vectors.
template <std::size_t kBits>
HWY_INLINE void SpreadPlane(const std::uint8_t* HWY_RESTRICT plane, std::size_t dim,
                            std::uint8_t* bytes) {
  const hn::Repartition<std::uint16_t, DU8> d16;
  const hn::Rebind<std::uint8_t, decltype(d16)> half;
  constexpr std::size_t kStep = hn::MaxLanes(DU8());
  std::memcpy(bytes, plane, dim * kBits / 8);
  // From the end to the front, in place.
  const auto twice = [&](auto bits, std::size_t count) KVMIX_LAMBDA {
    const auto mask = hn::Set(d16, static_cast<std::uint16_t>(0x0101 * ((1 << bits) - 1)));
    for (std::size_t i = hwy::RoundUpTo(count, kStep); i > 0; i -= kStep) {
      const auto two = hn::PromoteTo(d16, hn::LoadU(half, bytes + (i - kStep) / 2));
      const auto apart = hn::And(hn::Or(two, hn::ShiftLeft<8 - bits>(two)), mask);
      hn::Store(hn::BitCast(DU8(), apart), DU8(), bytes + i - kStep);
    }
  };
  twice(std::integral_constant<int, 4>(), dim * kBits / 4);
  if constexpr (kBits <= 2) twice(std::integral_constant<int, 2>(), dim * kBits / 2);
  if constexpr (kBits == 1) twice(std::integral_constant<int, 1>(), dim);
}

// to[c] <- the code of channel c of a row below i8. Whole vectors are written: `to` is aligned and
// has room for dim rounded up to them.
HWY_INLINE void SpreadCodes(Storage storage, const std::uint8_t* HWY_RESTRICT row, std::size_t dim,
                            std::uint8_t* HWY_RESTRICT to) {
  if (storage == Storage::kI4) return SpreadPlane<4>(row, dim, to);
  HWY_ALIGN std::uint8_t upper[kMaxDim];
  const auto join = [&](auto shift) KVMIX_LAMBDA {
    for (std::size_t i = 0; i < dim; i += hn::MaxLanes(DU8())) {
      const VU8 up = hn::ShiftLeft<shift>(hn::Load(DU8(), upper + i));
      hn::Store(hn::Or(hn::Load(DU8(), to + i), up), DU8(), to + i);
    }
  };
  if (storage == Storage::kI6) {
    SpreadPlane<4>(row, dim, to);
    SpreadPlane<2>(row + dim / 2, dim, upper);
    join(std::integral_constant<int, 4>());
  } else {
    SpreadPlane<2>(row, dim, to);
    SpreadPlane<1>(row + dim / 4, dim, upper);
    join(std::integral_constant<int, 2>());
  }
}

// The same, the levels that the codes are.
HWY_INLINE void SpreadLevels(Storage storage, const std::uint8_t* HWY_RESTRICT row, std::size_t dim,
                             std::uint8_t* HWY_RESTRICT to) {
  SpreadCodes(storage, row, dim, to);
  static constexpr auto kTable3 = [] {
    std::array<std::int8_t, 16> table{};
    for (std::size_t c = 0; c < kLevels3.size(); ++c) table[c] = kLevels3[c];
    return table;
  }();
  const VU8 half = hn::Set(DU8(), std::uint8_t{32});
  const VI8 table = hn::LoadDup128(DI8(), (storage == Storage::kI4 ? kLevels : kTable3).data());
  for (std::size_t i = 0; i < dim; i += hn::MaxLanes(DU8())) {
    const VU8 codes = hn::Load(DU8(), to + i);
    const VU8 levels = storage == Storage::kI6
                           ? hn::Sub(hn::Xor(codes, half), half)
                           : hn::BitCast(DU8(), hn::TableLookupBytes(table, codes));
    hn::Store(levels, DU8(), to + i);
  }
}

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
