// Per target: nibbles (storage i4, kernels/levels.h) as bytes, and the levels that they are.
#if defined(KVMIX_KERNELS_NIBBLES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVMIX_KERNELS_NIBBLES_INL_H_
#undef KVMIX_KERNELS_NIBBLES_INL_H_
#else
#define KVMIX_KERNELS_NIBBLES_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/levels.h"
#include "kernels/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {

// The levels of codes, one a byte.
HWY_INLINE VI8 LookUpLevels(VU8 codes) {
  const DI8 d;
  const VI8 c = hn::BitCast(d, codes);
#if HWY_TARGET == HWY_SSE2
  // No pshufb, and a table read byte by byte is ten times as slow.
  const VI8 negative = hn::VecFromMask(d, hn::Gt(c, hn::Set(d, std::int8_t{7})));
  const VI8 rank = hn::Xor(c, hn::And(negative, hn::Set(d, std::int8_t{15})));
  VI8 magnitude = hn::Set(d, kMagnitudes[0]);
  Unroll<7>([&](auto i) KVMIX_LAMBDA {
    const VI8 rise = hn::Set(d, static_cast<std::int8_t>(kMagnitudes[i + 1] - kMagnitudes[i]));
    const auto above = hn::Gt(rank, hn::Set(d, static_cast<std::int8_t>(i)));
    magnitude = hn::Add(magnitude, hn::IfThenElseZero(above, rise));
  });
  return hn::Sub(hn::Xor(magnitude, negative), negative);
#else
  return hn::TableLookupBytes(hn::LoadDup128(d, kLevels.data()), c);
#endif
}

// to[c] <- f(code c) for the dim channels of a canonical row; f takes and gives a vector of bytes.
// Whole vectors are written: `to` is aligned and has room for dim rounded up to them.
template <class F>
HWY_INLINE void SpreadNibbles(const std::uint8_t* HWY_RESTRICT row, std::size_t dim,
                              std::uint8_t* HWY_RESTRICT to, const F& f) {
  const hn::Repartition<std::uint16_t, DU8> d16;
  const hn::Rebind<std::uint8_t, decltype(d16)> d8;
  constexpr std::size_t kStep = hn::MaxLanes(DU8());
  for (std::size_t c = 0; c < dim; c += kStep) {
    const auto two =
        hn::PromoteTo(d16, c + kStep <= dim ? hn::LoadU(d8, row + c / 2)
                                            : hn::LoadN(d8, row + c / 2, (dim - c) / 2));
    const auto apart = hn::And(hn::Or(two, hn::ShiftLeft<4>(two)), hn::Set(d16, 0x0F0F));
    hn::Store(f(hn::BitCast(DU8(), apart)), DU8(), to + c);
  }
}

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
