// Per target: codes, one a byte, to the planes of a canonical row (kernels/levels.h), and back.
#if defined(KVMIX_KERNELS_PLANES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVMIX_KERNELS_PLANES_INL_H_
#undef KVMIX_KERNELS_PLANES_INL_H_
#else
#define KVMIX_KERNELS_PLANES_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/formats.h"
#include "kernels/storage-inl.h"
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
  WithStorage(storage, [&]<class S>(S) KVMIX_LAMBDA {
    if constexpr (S::kPacked) {
      S::ForPlanes([&]<class P>(P) KVMIX_LAMBDA {
        PackPlane<P::kFrom, P::kBits>(codes, dim, row);
        row += dim * P::kBits / 8;
      });
    } else {
      std::memcpy(row, codes, dim);
    }
  });
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

// to[c] <- f(the code of channel c) of a row of the packed storage S; f takes and gives a vector of
// bytes. Whole vectors are written: `to` is aligned and has room for dim rounded up to them.
template <class S, class F>
HWY_INLINE void SpreadRow(const std::uint8_t* HWY_RESTRICT row, std::size_t dim,
                          std::uint8_t* HWY_RESTRICT to, const F& f) {
  constexpr std::size_t kStep = hn::MaxLanes(DU8());
  HWY_ALIGN std::uint8_t plane[kMaxDim];
  S::ForPlanes([&]<class P>(P) KVMIX_LAMBDA {
    SpreadPlane<P::kBits>(row, dim, plane);
    row += dim * P::kBits / 8;
    for (std::size_t i = 0; i < dim; i += kStep) {
      VU8 codes = hn::Load(DU8(), plane + i);
      if constexpr (P::kFrom != 0)
        codes = hn::Or(hn::Load(DU8(), to + i), hn::ShiftLeft<P::kFrom>(codes));
      hn::Store(P::kFrom + P::kBits == S::kBits ? f(codes) : codes, DU8(), to + i);
    }
  });
}

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
