// Rows of halves -> int8 codes, and back.
//
// Per token, eight rows at a time, so that one reduction, one f16 -> f32 conversion and three
// divisions serve eight rows: (1) absmax of each row, as an integer max over the halves' bits
// without their sign (with a mean: over the bits of |y|), so that NaN and Inf show up as large
// maxima; (2) the eight maxima are transposed into one vector, scales and their inverses follow;
// (3) every row is read again (from L1), divided, rounded and packed, four f32 vectors into one
// vector of codes.
//
// Division. A code is rint(RN(y / s)), s = RN(m / 127), to the last bit, and a division per element
// would cost more than all the rest. RN is the f32 rounding, T = k + 1/2 a tie, 0 < T < 128.
// Product (halves without a mean against their own f32 scale): m and x are integers below 2^11
// times powers of two, so 127 x / m is a T or
//   at least 2^-19 T away from any. It is one only where 127 divides m's significand (then s has at
//   most 5 significant bits: such rows take Quotient) or x = +-m/2, T = 63.5. So x times an inverse
//   that is off by less than 2^-20 rounds to the same integer for all other x; and the inverse is
//   moved by 2^-21, more than its own error (2^-22), to the side on which RN((m/2) / s) makes x =
//   m/2 fall.
// Quotient (everything else): v = RN(1/s),  q = RN(y v),  r = RN(y - q s),  q' = RN(q + r v), two
// fused multiply-adds (Markstein).
//   |q - y/s| <= 1.5 ulp(q), so r is exact or off by one unit of ulp(s) ulp(q), and before its last
//   rounding q' is within E = 1.5 * 2^-24 + 2^-24 < 3 * 2^-24 ulp(q) of y/s. Write s = S ulp(s),
//   2^23 <= S < 2^24. Rounded to an integer, q' can differ from RN(y/s) only beside a tie T, 2^t <=
//   T < 2^(t+1): if y/s is within E of M = T +- ulp(T)/2. There y - s T = j ulp(s)/2 with an
//   integer j, and |y/s - M| < E means |j 2^(23-t) - S| < 6: S is within 5 of a multiple of 2^17.
//   Those scales (64 multiples x 10) times all ties are few: tests/quantize_test.cc tries every one
//   on every target. Where S is the multiple itself, y/s = M would make y a product of more than 24
//   significant bits: impossible, and the next value is far away. r must not underflow: rows with
//   an absmax below 2^-60 are divided. So are all rows on targets without fused multiply-add.
//
// The rare rows (NaN, Inf, absmax below 2^-60, values to be clamped) are found by their maximum and
// done by CarefulRow.
#include "kernels/quantize.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/quantize.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "kernels/per_target.h"
#include "kernels/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels {
namespace HWY_NAMESPACE {
namespace {

constexpr float kSmallest = 0x1p-100f;  // a row below has scale 0
constexpr float kSafe = 0x1p-60f;       // no underflow in Quotient from here on
constexpr float kLargest = 3.4028234e38f;
constexpr int kMaxCode = 127;
constexpr std::size_t kLarge = std::size_t{256} << 10;  // bytes: not for L2

// y / scale for one scale, fit to be rounded to an integer: the top of this file says how.
struct Product {
  F32 inverse;

  HWY_INLINE F32 operator()(F32 y) const { return hn::Mul(y, inverse); }
};
struct Quotient {
  F32 scale, inverse;

  HWY_INLINE F32 operator()(F32 y) const {
#if HWY_NATIVE_FMA
    const F32 q = hn::Mul(y, inverse);
    const F32 r = hn::NegMulAdd(q, scale, y);
    return hn::MulAdd(r, inverse, q);
#else
    return hn::Div(y, scale);
#endif
  }
};

// At most 5 significant bits: not for Product.
HWY_INLINE bool FewBits(float scale) {
  return (hwy::BitCastScalar<std::uint32_t>(scale) & 0x7FFFFu) == 0;
}

template <class Out = Whole, class Rows, class Divide>
HWY_INLINE void QuantizeRow(const Rows& y, std::size_t dim, const Divide& divide,
                            std::int8_t* HWY_RESTRICT codes) {
  const auto code = [&](auto io, std::size_t i)
                        KVMIX_LAMBDA { return Nearest(divide(y.Load(io, i))); };
  const std::size_t lanes = hn::Lanes(DF32());
  std::size_t i = 0;
  for (; i + 4 * lanes <= dim; i += 4 * lanes) {
    const I32 a = code(Whole(), i), b = code(Whole(), i + lanes), c = code(Whole(), i + 2 * lanes),
              d = code(Whole(), i + 3 * lanes);
    Out().Store(Pack(a, b, c, d), DI8(), codes + i);
  }
  const hn::Rebind<std::int8_t, DF32> d8;
  ForVectors<Tail::kOverlap>(i, dim, lanes, [&](auto io, std::size_t k) KVMIX_LAMBDA {
    io.Store(hn::DemoteTo(d8, code(io, k)), d8, codes + k);
  });
}

// Any row at all: NaN and Inf replaced, divided, clamped. Returns the number of clamped values.
std::uint64_t CarefulRow(const CarefulHalves& y, std::size_t dim, float scale,
                         std::int8_t* HWY_RESTRICT codes) {
  const hn::Rebind<std::int8_t, DF32> d8;
  const I32 limit = hn::Set(DI32(), kMaxCode);
  const F32 divisor = hn::Set(DF32(), scale),
            bound = hn::Set(DF32(), HWY_MIN(129.0f * scale, kLargest));  // beyond: clamped anyway
  std::uint64_t clamped = 0;
  ForVectors<Tail::kPartial>(0, dim, hn::Lanes(DF32()), [&](auto io, std::size_t i) KVMIX_LAMBDA {
    const F32 cut = hn::Max(hn::Min(y.Load(io, i), bound), hn::Neg(bound));
    const I32 code = Nearest(hn::Div(cut, divisor));
    clamped += hn::CountTrue(DI32(), hn::Gt(hn::Abs(code), limit));
    io.Store(hn::DemoteTo(d8, hn::Max(hn::Min(code, limit), hn::Neg(limit))), d8, codes + i);
  });
  return clamped;
}

float CarefulAbsMax(const CarefulHalves& y, std::size_t dim) {
  F32 max = hn::Zero(DF32());
  ForVectors<Tail::kPartial>(0, dim, hn::Lanes(DF32()), [&](auto io, std::size_t i) KVMIX_LAMBDA {
    max = hn::Max(max, hn::Abs(y.Load(io, i)));
  });
  return hn::ReduceMax(DF32(), max);
}

struct GroupScales {
  alignas(32) float absmax[kGroup];
  alignas(32) float scale[kGroup];
  alignas(32) float divisor[kGroup];  // the scale, or 1 where it is 0
  alignas(32) float inverse[kGroup];  // of the divisor
  alignas(32) float product[kGroup];  // the inverse, moved for Product
  bool careful;                       // for some row
};

HWY_INLINE bool IsCareful(float absmax) {
  return !(absmax < kSmallest || (absmax >= kSafe && absmax <= kLargest));
}

// From s.absmax: all the rest.
HWY_INLINE void MakeScales(bool bf16, GroupScales& s) {
  const hn::CappedTag<float, kGroup> d;
  const hn::RebindToUnsigned<decltype(d)> du;
  s.careful = false;
  for (std::size_t i = 0; i < kGroup; i += hn::Lanes(d)) {
    const auto absmax = hn::Load(d, s.absmax + i);
    auto bits = hn::BitCast(du, hn::Div(absmax, hn::Set(d, 127.0f)));
    if (bf16) bits = hn::AndNot(hn::Set(du, 0xFFFFu), hn::Add(bits, hn::Set(du, 0xFFFFu)));
    const auto zero = hn::Lt(
        absmax,
        hn::Set(d, kSmallest));  // clang compares halves one by one if it is told to compare with 0
    const auto scale = hn::IfThenZeroElse(zero, hn::BitCast(d, bits));
    const auto divisor = hn::IfThenElse(zero, hn::Set(d, 1.0f), scale);
    hn::Store(scale, d, s.scale + i);
    hn::Store(divisor, d, s.divisor + i);
    const auto inverse = hn::Div(hn::Set(d, 1.0f), divisor);
    hn::Store(inverse, d, s.inverse + i);
    const auto half_rounds_up =
        hn::Ge(hn::Div(hn::Mul(absmax, hn::Set(d, 0.5f)), divisor), hn::Set(d, 63.5f));
    const auto moved =
        hn::IfThenElse(half_rounds_up, hn::Set(d, 1.0f + 0x1p-21f), hn::Set(d, 1.0f - 0x1p-21f));
    hn::Store(hn::Mul(inverse, moved), d, s.product + i);
    const auto normal =
        hn::And(hn::Le(absmax, hn::Set(d, kLargest)), hn::Ge(absmax, hn::Set(d, kSafe)));
    s.careful |= !hn::AllTrue(d, hn::Or(normal, zero));
  }
}

// Scales of rows t .. t + kRows.
template <class Rows, std::size_t kRows>
HWY_INLINE void ScaleGroup(const RowsIn& in, std::size_t t, bool bf16, GroupScales& s) {
  GroupAbsMax<Rows, kRows>(in, t, s.absmax);
  MakeScales(bf16, s);
}

// Their codes.
template <class Rows, std::size_t kRows>
HWY_INLINE void QuantizeGroup(const RowsIn& in, std::size_t t, bool bf16, bool large,
                              const GroupScales& s, std::int8_t* HWY_RESTRICT codes,
                              std::size_t code_stride, float* HWY_RESTRICT scales) {
  const Prefetcher prefetch_x(in.x, in.stride, in.dim), prefetch_codes(codes, code_stride, in.dim);
  for (std::size_t r = 0; r < kRows; ++r) {
    if (large) {
      prefetch_x(t + kGroup + r);
      prefetch_codes(t + r);
    }
    const Rows y(in, t + r);
    std::int8_t* to = codes + (t + r) * code_stride;
    if (Rows::kHalves && !bf16 && !FewBits(s.divisor[r])) {
      QuantizeRow(y, in.dim, Product{hn::Set(DF32(), s.product[r])}, to);
    } else {
      QuantizeRow(y, in.dim, Quotient{hn::Set(DF32(), s.divisor[r]), hn::Set(DF32(), s.inverse[r])},
                  to);
    }
    scales[t + r] = s.scale[r];
  }
  if (HWY_LIKELY(!s.careful)) return;
  for (std::size_t r = 0; r < kRows; ++r) {
    if (!IsCareful(s.absmax[r])) continue;
    const CarefulHalves y(in, t + r);
    GroupScales same;
    std::fill_n(same.absmax, kGroup, CarefulAbsMax(y, in.dim));
    MakeScales(bf16, same);
    CarefulRow(y, in.dim, same.divisor[0], codes + (t + r) * code_stride);
    scales[t + r] = same.scale[0];
  }
}

template <class Rows, std::size_t kDim>
void PerTokenRows(RowsIn in, bool bf16, std::int8_t* codes, std::size_t code_stride,
                  float* scales) {
  if constexpr (kDim != 0) in.dim = kDim;
  // The next group's scales are on their way while this group's codes are made: their long chain of
  // latencies is hidden.
  GroupScales s[2];
  const bool large = in.tokens * in.dim * sizeof(std::uint16_t) >= kLarge;
  const std::size_t groups = in.tokens / kGroup;
  if (groups > 0) ScaleGroup<Rows, kGroup>(in, 0, bf16, s[0]);
  for (std::size_t g = 0; g < groups; ++g) {
    if (g + 1 < groups) ScaleGroup<Rows, kGroup>(in, (g + 1) * kGroup, bf16, s[(g + 1) % 2]);
    QuantizeGroup<Rows, kGroup>(in, g * kGroup, bf16, large, s[g % 2], codes, code_stride, scales);
  }
  for (std::size_t t = groups * kGroup; t < in.tokens; ++t) {
    ScaleGroup<Rows, 1>(in, t, bf16, s[0]);
    QuantizeGroup<Rows, 1>(in, t, bf16, large, s[0], codes, code_stride, scales);
  }
}

// kDim, here and below: the number of channels, if not 0. Loops of known length have no branches to
// mispredict: up to 1.7 times as fast.
template <class Rows>
void PerTokenOf(const RowsIn& in, bool bf16, std::int8_t* codes, std::size_t code_stride,
                float* scales) {
  const auto rows = in.dim == 64    ? PerTokenRows<Rows, 64>
                    : in.dim == 128 ? PerTokenRows<Rows, 128>
                                    : PerTokenRows<Rows, 0>;
  rows(in, bf16, codes, code_stride, scales);
}

void PerToken(const RowsIn& in, bool bf16_scale, std::int8_t* codes, std::size_t code_stride,
              float* scales) {
  if (in.mean) {
    PerTokenOf<CentredHalves>(in, bf16_scale, codes, code_stride, scales);
  } else {
    PerTokenOf<PlainHalves>(in, bf16_scale, codes, code_stride, scales);
  }
}

template <class Rows, std::size_t kDim = 0>
float AbsMaxRows(RowsIn in) {
  if constexpr (kDim != 0) in.dim = kDim;
  const typename Rows::DMax d;
  auto max = hn::Zero(d);
  const Prefetcher prefetch(in.x, in.stride, in.dim);
  for (std::size_t t = 0; t < in.tokens; ++t) {
    prefetch(t);
    max = Rows(in, t).Max(in.dim, max);
  }
  const float absmax = Rows::Value(hn::ReduceMax(d, max));
  if (HWY_LIKELY(absmax <= kLargest)) return absmax;
  float careful = 0.0f;
  for (std::size_t t = 0; t < in.tokens; ++t)
    careful = HWY_MAX(careful, CarefulAbsMax(CarefulHalves(in, t), in.dim));
  return careful;
}

float AbsMax(const RowsIn& in) {
  if (in.mean) return AbsMaxRows<CentredHalves>(in);
  return (in.dim == 64    ? AbsMaxRows<PlainHalves, 64>
          : in.dim == 128 ? AbsMaxRows<PlainHalves, 128>
                          : AbsMaxRows<PlainHalves>)(in);
}

// Whether rows of T are written past the caches, in vectors of that many lanes. An output of 256
// KiB and its input leave L2 before they are read again, and a store through the caches first reads
// the line from DRAM: dequantizing there is 2.3 times as fast without (Granite Rapids). Half
// vectors of 128-bit targets have no such store.
template <class T>
bool Streams(const T* out, std::size_t stride, std::size_t tokens, std::size_t dim,
             std::size_t lanes) {
  const std::size_t vector = lanes * sizeof(T);
  const bool aligned =
      reinterpret_cast<std::uintptr_t>(out) % vector == 0 && stride * sizeof(T) % vector == 0;
  return vector >= 16 && aligned && tokens * dim * sizeof(T) >= kLarge;
}

template <class Out, class Rows, std::size_t kDim, class Divide>
std::uint64_t PerHeadRows(RowsIn in, float scale, Divide divide, std::int8_t* codes,
                          std::size_t code_stride) {
  if constexpr (kDim != 0) in.dim = kDim;
  const typename Rows::DMax d;
  // Nothing within 127.25 scales rounds beyond 127. Scales that Quotient cannot take let only zeros
  // pass.
  const bool safe = scale >= kSafe && scale <= kLargest / 128.0f;
  const auto limit = hn::Set(d, Rows::Bits(safe ? 127.25f * scale : 0.0f));
  const Prefetcher prefetch(codes, code_stride, in.dim);
  std::uint64_t clamped = 0;
  for (std::size_t t = 0; t < in.tokens; ++t) {
    Rows y(in, t);
    if constexpr (std::is_same_v<Out, Whole>) prefetch(t);
    if (HWY_LIKELY(hn::AllTrue(d, hn::Le(y.Max(in.dim, hn::Zero(d)), limit)))) {
      asm(""
          : "+r"(y.x));  // load again: clang 14 keeps the bits, and takes them apart half by half
                         // to convert them
      QuantizeRow<Out>(y, in.dim, divide, codes + t * code_stride);
    } else {
      clamped += CarefulRow(CarefulHalves(in, t), in.dim, scale, codes + t * code_stride);
    }
  }
  return clamped;
}

template <class Rows, std::size_t kDim, class Divide>
std::uint64_t PerHeadTo(const RowsIn& in, float scale, Divide divide, std::int8_t* codes,
                        std::size_t code_stride) {
  if (!Streams(codes, code_stride, in.tokens, in.dim, hn::MaxLanes(DI8()))) {
    return PerHeadRows<Whole, Rows, kDim>(in, scale, divide, codes, code_stride);
  }
  const std::uint64_t clamped =
      PerHeadRows<Streamed, Rows, kDim>(in, scale, divide, codes, code_stride);
  hwy::FlushStream();
  return clamped;
}

std::uint64_t PerHead(const RowsIn& in, float scale, std::int8_t* codes, std::size_t code_stride) {
  if (scale > 0.0f && scale <= kLargest) {
    const Quotient quotient{hn::Set(DF32(), scale), hn::Set(DF32(), 1.0f / scale)};
    if (in.mean) return PerHeadTo<CentredHalves, 0>(in, scale, quotient, codes, code_stride);
    // Most likely the scale is the one of some half.
    GroupScales s;
    std::fill_n(s.absmax, kGroup, HalfFloat(HalfBits(127.0f * scale)));
    MakeScales(false, s);
    if (s.scale[0] != scale || FewBits(scale))
      return PerHeadTo<PlainHalves, 0>(in, scale, quotient, codes, code_stride);
    const Product product{hn::Set(DF32(), s.product[0])};
    if (in.dim == 64) return PerHeadTo<PlainHalves, 64>(in, scale, product, codes, code_stride);
    if (in.dim == 128) return PerHeadTo<PlainHalves, 128>(in, scale, product, codes, code_stride);
    return PerHeadTo<PlainHalves, 0>(in, scale, product, codes, code_stride);
  }
  // The scale of a head of zeros: whatever is not one is lost.
  std::uint64_t lost = 0;
  for (std::size_t t = 0; t < in.tokens; ++t) {
    lost += CarefulRow(CarefulHalves(in, t), in.dim, kSmallest / kMaxCode, codes + t * code_stride);
    std::memset(codes + t * code_stride, 0, in.dim);
  }
  return lost;
}

// mean + scale * code, each rounded. mean may be null.
struct Decoder {
  const std::int8_t* HWY_RESTRICT codes;
  const float* HWY_RESTRICT mean;
  F32 scale;

  template <bool kMean, class IO>
  HWY_INLINE F32 Load(IO io, std::size_t i) const {
    const hn::Rebind<std::int8_t, DF32> d8;
    const F32 y =
        hn::Mul(hn::ConvertTo(DF32(), hn::PromoteTo(DI32(), io.Load(d8, codes + i))), scale);
    if constexpr (kMean) return hn::Add(y, io.Load(DF32(), mean + i));
    return y;
  }
};

template <class IO>
HWY_INLINE void Put(IO io, F32 v, float* to) {
  io.Store(v, DF32(), to);
}
template <class IO>
HWY_INLINE void Put(IO io, F32 v, std::uint16_t* to) {
  io.Store(hn::BitCast(DU16(), hn::DemoteTo(hn::Rebind<hwy::float16_t, DF32>(), v)), DU16(), to);
}

template <bool kMean, class IO, class Out>
void DequantizeRows(const std::int8_t* codes, std::size_t code_stride, const float* scales,
                    std::size_t scale_step, const float* mean, std::size_t tokens, std::size_t dim,
                    Out* out, std::size_t out_stride) {
  const std::size_t lanes = hn::Lanes(DF32());
  for (std::size_t t = 0; t < tokens; ++t) {
    const Decoder row{codes + t * code_stride, mean, hn::Set(DF32(), scales[t * scale_step])};
    Out* HWY_RESTRICT to = out + t * out_stride;
    std::size_t i = 0;
    for (; i + 4 * lanes <= dim; i += 4 * lanes) {
      for (std::size_t k = i; k < i + 4 * lanes; k += lanes)
        Put(IO(), row.template Load<kMean>(Whole(), k), to + k);
    }
    ForVectors<Tail::kOverlap>(i, dim, lanes, [&](auto io, std::size_t k) KVMIX_LAMBDA {
      Put(io, row.template Load<kMean>(io, k), to + k);
    });
  }
}

template <class Out>
void Dequantize(const std::int8_t* codes, std::size_t code_stride, const float* scales,
                std::size_t scale_step, const float* mean, std::size_t tokens, std::size_t dim,
                Out* out, std::size_t out_stride) {
  if (Streams(out, out_stride, tokens, dim, hn::MaxLanes(DF32()))) {
    (mean ? DequantizeRows<true, Streamed, Out>
          : DequantizeRows<false, Streamed, Out>)(codes, code_stride, scales, scale_step, mean,
                                                  tokens, dim, out, out_stride);
    hwy::FlushStream();
  } else {
    (mean ? DequantizeRows<true, Whole, Out>
          : DequantizeRows<false, Whole, Out>)(codes, code_stride, scales, scale_step, mean, tokens,
                                               dim, out, out_stride);
  }
}

template <bool kMean>
RowErrors ErrorsOfRows(RowsIn in, const std::int8_t* codes, std::size_t code_stride,
                       const float* scales, std::size_t scale_step) {
  F32 max_error = hn::Zero(DF32()), max_abs = hn::Zero(DF32());
  RowErrors errors{};
  const Prefetcher prefetch_x(in.x, in.stride, in.dim), prefetch_codes(codes, code_stride, in.dim);
  for (std::size_t t = 0; t < in.tokens; ++t) {
    prefetch_x(t);
    prefetch_codes(t);
    const CarefulHalves row(in, t);
    const Decoder decoded{codes + t * code_stride, in.mean + t * in.mean_stride,
                          hn::Set(DF32(), scales[t * scale_step])};
    F32 sum = hn::Zero(DF32());
    ForVectors<Tail::kPartial>(
        0, in.dim, hn::Lanes(DF32()), [&](auto io, std::size_t i) KVMIX_LAMBDA {
          const F32 x = row.LoadX(io, i), error = hn::Sub(decoded.Load<kMean>(io, i), x);
          sum = hn::MulAdd(error, error, sum);
          max_error = hn::Max(max_error, hn::Abs(error));
          max_abs = hn::Max(max_abs, hn::Abs(x));
        });
    errors.sum_squared_error += static_cast<double>(hn::ReduceSum(DF32(), sum));
  }
  errors.max_error = static_cast<double>(hn::ReduceMax(DF32(), max_error));
  errors.max_abs = static_cast<double>(hn::ReduceMax(DF32(), max_abs));
  return errors;
}

RowErrors Errors(const RowsIn& in, const std::int8_t* codes, std::size_t code_stride,
                 const float* scales, std::size_t scale_step) {
  return (in.mean ? ErrorsOfRows<true> : ErrorsOfRows<false>)(in, codes, code_stride, scales,
                                                              scale_step);
}

void ToFloats(const std::uint16_t* HWY_RESTRICT x, std::size_t n, float* HWY_RESTRICT out) {
  ForVectors<Tail::kPartial>(0, n, hn::Lanes(DF32()), [&](auto io, std::size_t i) KVMIX_LAMBDA {
    Put(io, ToFloat(DF32(), io.Load(DU16(), x + i)), out + i);
  });
}

void FiniteHalves(const std::uint16_t* HWY_RESTRICT x, std::size_t n,
                  std::uint16_t* HWY_RESTRICT out) {
  const hn::ScalableTag<std::uint16_t> d;
  ForVectors<Tail::kPartial>(0, n, hn::Lanes(d), [&](auto io, std::size_t i) KVMIX_LAMBDA {
    io.Store(Finite(d, io.Load(d, x + i)), d, out + i);
  });
}

QuantizeKernels Table() {
  return {PerToken, AbsMax,   PerHead,     Dequantize<float>, Dequantize<std::uint16_t>,
          Errors,   ToFloats, FiniteHalves};
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace kvmix::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvmix::kernels {

HWY_EXPORT(Table);

QuantizeKernels QuantizeKernelsFor(std::int64_t target) { return KVMIX_CALL_FOR(target, Table)(); }

}  // namespace kvmix::kernels
#endif  // HWY_ONCE
