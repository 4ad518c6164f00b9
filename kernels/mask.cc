#include "kernels/mask.h"

#include <type_traits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/mask.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "kernels/formats.h"
#include "kernels/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {
namespace {

// Numbers as signed bits. kInfinity: those of +inf.
template <typename Bits, Bits kInfinity>
bool ScanBlock(const Bits* bits, std::size_t tokens, MaskRange& range) {
  const hn::ScalableTag<Bits> d;
  using M = hn::Mask<decltype(d)>;
  const auto sign = hn::Set(d, hwy::LimitsMin<Bits>()), infinity = hn::Set(d, kInfinity);
  std::size_t zeros = 0;
  M bad = hn::MaskFalse(d);
  range = {};
  for (std::size_t i = 0; i < tokens; i += hn::Lanes(d)) {
    const std::size_t n = HWY_MIN(hn::Lanes(d), tokens - i);
    const auto x = hn::LoadN(d, bits + i, n);
    const auto magnitude = hn::AndNot(sign, x);
    const M valid = hn::FirstN(d, n), hidden = hn::Eq(x, hn::Or(sign, infinity));
    const M seen = hn::AndNot(hidden, valid);
    bad = hn::Or(bad, hn::AndNot(hn::Lt(magnitude, infinity), seen));
    zeros += hn::CountTrue(d, hn::And(seen, hn::Eq(magnitude, hn::Zero(d))));
    if (hn::AllFalse(d, seen)) continue;
    if (range.last == 0) {
      range.first = static_cast<std::uint16_t>(i + hn::FindKnownFirstTrue(d, seen));
    }
    range.last = static_cast<std::uint16_t>(i + hn::FindKnownLastTrue(d, seen) + 1);
  }
  range.zeros = zeros == static_cast<std::size_t>(range.last - range.first);
  return hn::AllFalse(d, bad);
}

template <typename Bits, Bits kInfinity>
bool ScanRow(const void* values, std::size_t tokens, MaskRange* ranges) {
  const Bits* const bits = static_cast<const Bits*>(values);
  bool good = true;
  for (std::size_t t = 0; t < tokens; t += kBlockTokens) {
    good &= ScanBlock<Bits, kInfinity>(bits + t, HWY_MIN(kBlockTokens, tokens - t), *ranges++);
  }
  return good;
}

bool Scan(const void* values, Dtype dtype, std::size_t tokens, MaskRange* ranges) {
  switch (dtype) {
    case KVMIX_F32:
      return ScanRow<std::int32_t, 0x7F800000>(values, tokens, ranges);
    case KVMIX_BF16:
      return ScanRow<std::int16_t, 0x7F80>(values, tokens, ranges);
    case KVMIX_F16:
      break;
  }
  return ScanRow<std::int16_t, 0x7C00>(values, tokens, ranges);
}

}  // namespace

MaskKernels MaskTable() { return {&Scan}; }

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvmix::kernels {
HWY_EXPORT(MaskTable);
MaskKernels MaskKernelsFor(std::int64_t target) { return KVMIX_CALL_FOR(target, MaskTable)(); }
}  // namespace kvmix::kernels
#endif  // HWY_ONCE
