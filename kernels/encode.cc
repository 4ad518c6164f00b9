// Rows -> int8 codes or halves, and back.
//
// Per token, eight rows at a time, so that one reduction, one conversion to f32 and three divisions
// serve eight rows:
//   1. absmax of each row, as an integer maximum over bits without their sign (of halves as they
//   are,
//      else of y as f32), so that NaN and Inf show up as large maxima
//   2. the eight maxima are transposed into one vector; scales and their inverses follow
//   3. every row is read again (from L1), divided, rounded and packed, four f32 vectors into one
//      vector of codes
//
// A code is rint(RN(y / s)), to the last bit; RN is the rounding to f32. A division per element
// would cost more than all the rest, so there are two ways around it, each proven in
// docs/numerics.md:
//   Product   halves without a mean against their own f32 scale: y times the inverse of s, moved by
//             2^-21 to the side on which x = absmax / 2, the only tie, falls
//   Quotient  everything else: y times the inverse, and one step of correction by two fused
//             multiply-adds. Rows with an absmax below 2^-60 are divided; so are all rows on
//             targets without fused multiply-add.
//
// A rotation or a fold comes first, eight rows at a time into scratch, which is then encoded as
// f32. Rare rows (NaN, Inf, absmax below 2^-60, values to be clamped) are found by their maximum
// and done by CarefulRow.
#include "kernels/encode.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/encode.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "kernels/per_target.h"
#include "kernels/rows-inl.h"
#include "kernels/transform-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels {
namespace HWY_NAMESPACE {
namespace {

constexpr float kSmallest = 0x1p-100f;  // a row below has scale 0
constexpr float kSafe = 0x1p-60f;       // no underflow in Quotient from here on
constexpr int kMaxCode = 127;
constexpr std::size_t kLarge = std::size_t{256} << 10;  // bytes: not for L2

template <class T>
struct Type {
  using type = T;
};

template <class IO>
HWY_INLINE void Put(IO io, F32 v, float* to) {
  io.Store(v, DF32(), to);
}
template <class IO>
HWY_INLINE void Put(IO io, F32 v, std::uint16_t* to) {
  io.Store(hn::BitCast(DU16(), hn::DemoteTo(hn::Rebind<hwy::float16_t, DF32>(), v)), DU16(), to);
}

template <class X>
HWY_INLINE void ToFloats(const typename X::T* HWY_RESTRICT x, std::size_t n,
                         float* HWY_RESTRICT out) {
  ForVectors<Tail::kPartial>(0, n, hn::Lanes(DF32()), [&](auto io, std::size_t i) KVMIX_LAMBDA {
    Put(io, X::Load(io, x + i), out + i);
  });
}

HWY_INLINE void FiniteHalves(const std::uint16_t* HWY_RESTRICT x, std::size_t n,
                             std::uint16_t* HWY_RESTRICT out) {
  const hn::ScalableTag<std::uint16_t> d;
  ForVectors<Tail::kPartial>(0, n, hn::Lanes(d), [&](auto io, std::size_t i) KVMIX_LAMBDA {
    io.Store(Finite(d, io.Load(d, x + i)), d, out + i);
  });
}

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
template <class X>
std::uint64_t CarefulRow(const CarefulRows<X>& y, std::size_t dim, float scale,
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

template <class X>
float CarefulAbsMax(const CarefulRows<X>& y, std::size_t dim) {
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
HWY_INLINE void ScaleGroup(const Source<typename Rows::Numbers>& in, std::size_t t, bool bf16,
                           GroupScales& s) {
  GroupAbsMax<Rows, kRows>(in, t, s.absmax);
  MakeScales(bf16, s);
}

// Codes of many rows, `stride` bytes apart.
struct CodeRows {
  std::int8_t* codes;
  std::size_t stride;
  HWY_INLINE std::int8_t* row(std::size_t t) const { return codes + t * stride; }
};

// Their codes.
template <class Rows, std::size_t kRows>
HWY_INLINE void QuantizeGroup(const Source<typename Rows::Numbers>& in, std::size_t t, bool bf16,
                              bool large, const GroupScales& s, CodeRows out,
                              float* HWY_RESTRICT scales) {
  const RowPrefetcher prefetch_x(in.x, in.stride_bytes, in.dim * sizeof(*in.x)),
      prefetch_codes(out.codes, out.stride, in.dim);
  for (std::size_t r = 0; r < kRows; ++r) {
    if (large) {
      prefetch_x(t + kGroup + r);
      prefetch_codes(t + r);
    }
    const Rows y(in, t + r);
    if (Rows::kHalves && !bf16 && !FewBits(s.divisor[r])) {
      QuantizeRow(y, in.dim, Product{hn::Set(DF32(), s.product[r])}, out.row(t + r));
    } else {
      QuantizeRow(y, in.dim, Quotient{hn::Set(DF32(), s.divisor[r]), hn::Set(DF32(), s.inverse[r])},
                  out.row(t + r));
    }
    scales[t + r] = s.scale[r];
  }
  if (HWY_LIKELY(!s.careful)) return;
  for (std::size_t r = 0; r < kRows; ++r) {
    if (!IsCareful(s.absmax[r])) continue;
    const CarefulRows y(in, t + r);
    GroupScales same;
    std::fill_n(same.absmax, kGroup, CarefulAbsMax(y, in.dim));
    MakeScales(bf16, same);
    CarefulRow(y, in.dim, same.divisor[0], out.row(t + r));
    scales[t + r] = same.scale[0];
  }
}

// kDim, here and below: the number of channels, if not 0. Loops of known length have no branches to
// mispredict: up to 1.7 times as fast.
template <class Rows, std::size_t kDim>
void PerTokenRows(Source<typename Rows::Numbers> in, bool bf16, CodeRows out, float* scales) {
  if constexpr (kDim != 0) in.dim = kDim;
  // The next group's scales are on their way while this group's codes are made: their long chain of
  // latencies is hidden.
  GroupScales s[2];
  const bool large = in.count * in.dim * sizeof(*in.x) >= kLarge;
  const std::size_t groups = in.count / kGroup;
  if (groups > 0) ScaleGroup<Rows, kGroup>(in, 0, bf16, s[0]);
  for (std::size_t g = 0; g < groups; ++g) {
    if (g + 1 < groups) ScaleGroup<Rows, kGroup>(in, (g + 1) * kGroup, bf16, s[(g + 1) % 2]);
    QuantizeGroup<Rows, kGroup>(in, g * kGroup, bf16, large, s[g % 2], out, scales);
  }
  for (std::size_t t = groups * kGroup; t < in.count; ++t) {
    ScaleGroup<Rows, 1>(in, t, bf16, s[0]);
    QuantizeGroup<Rows, 1>(in, t, bf16, large, s[0], out, scales);
  }
}

// f(Rows(), kDim) with the rows' class, and with their length where that is worth a copy of the
// code.
template <class X, class F>
HWY_INLINE decltype(auto) WithRows(const Source<X>& in, const F& f) {
  using Plain = std::conditional_t<std::is_same_v<X, Halves>, PlainHalves, FloatRows<X, false>>;
  using Any = std::integral_constant<std::size_t, 0>;
  if (in.mean != nullptr) {
    if constexpr (std::is_same_v<X, Halves>) {
      if (in.dim == 64)
        return f(Type<FloatRows<X, true>>(), std::integral_constant<std::size_t, 64>());
      if (in.dim == 128)
        return f(Type<FloatRows<X, true>>(), std::integral_constant<std::size_t, 128>());
    }
    return f(Type<FloatRows<X, true>>(), Any());
  }
  if constexpr (!std::is_same_v<X, BFloats>) {
    if (in.dim == 64) return f(Type<Plain>(), std::integral_constant<std::size_t, 64>());
    if (in.dim == 128) return f(Type<Plain>(), std::integral_constant<std::size_t, 128>());
  }
  return f(Type<Plain>(), Any());
}

template <class Rows, std::size_t kDim>
float AbsMaxRows(Source<typename Rows::Numbers> in) {
  if constexpr (kDim != 0) in.dim = kDim;
  const typename Rows::DMax d;
  auto max = hn::Zero(d);
  const RowPrefetcher prefetch(in.x, in.stride_bytes, in.dim * sizeof(*in.x));
  for (std::size_t t = 0; t < in.count; ++t) {
    prefetch(t);
    max = Rows(in, t).Max(in.dim, max);
  }
  const float absmax = Rows::Value(hn::ReduceMax(d, max));
  if (HWY_LIKELY(absmax <= kLargest)) return absmax;
  float careful = 0.0f;
  for (std::size_t t = 0; t < in.count; ++t)
    careful = std::max(careful, CarefulAbsMax(CarefulRows(in, t), in.dim));
  return careful;
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
std::uint64_t PerHeadRows(Source<typename Rows::Numbers> in, float scale, Divide divide,
                          CodeRows out) {
  if constexpr (kDim != 0) in.dim = kDim;
  const typename Rows::DMax d;
  // Nothing within 127.25 scales rounds beyond 127. Scales that Quotient cannot take let only zeros
  // pass.
  const bool safe = scale >= kSafe && scale <= kLargest / 128.0f;
  const auto limit = hn::Set(d, Rows::Bits(safe ? 127.25f * scale : 0.0f));
  const RowPrefetcher prefetch(out.codes, out.stride, in.dim);
  std::uint64_t clamped = 0;
  for (std::size_t t = 0; t < in.count; ++t) {
    Rows y(in, t);
    if constexpr (std::is_same_v<Out, Whole>) prefetch(t);
    if (HWY_LIKELY(hn::AllTrue(d, hn::Le(y.Max(in.dim, hn::Zero(d)), limit)))) {
      // Load again: clang 14 keeps the bits, and takes them apart half by half to convert them.
      asm("" : "+r"(y.x));
      QuantizeRow<Out>(y, in.dim, divide, out.row(t));
    } else {
      clamped += CarefulRow(CarefulRows(in, t), in.dim, scale, out.row(t));
    }
  }
  return clamped;
}

template <class Rows, std::size_t kDim, class Divide>
std::uint64_t PerHeadTo(const Source<typename Rows::Numbers>& in, float scale, Divide divide,
                        CodeRows out) {
  if (!Streams(out.codes, out.stride, in.count, in.dim, hn::MaxLanes(DI8()))) {
    return PerHeadRows<Whole, Rows, kDim>(in, scale, divide, out);
  }
  const std::uint64_t clamped = PerHeadRows<Streamed, Rows, kDim>(in, scale, divide, out);
  hwy::FlushStream();
  return clamped;
}

template <class X>
std::uint64_t PerHead(const Source<X>& in, float scale, CodeRows out) {
  if (!(scale > 0.0f && scale <= kLargest)) {
    // The scale of a head of zeros: whatever is not one is lost.
    std::uint64_t lost = 0;
    for (std::size_t t = 0; t < in.count; ++t) {
      lost += CarefulRow(CarefulRows(in, t), in.dim, kSmallest / kMaxCode, out.row(t));
      std::memset(out.row(t), 0, in.dim);
    }
    return lost;
  }
  return WithRows(in, [&](auto rows, auto dim) HWY_ATTR {
    using Rows = typename decltype(rows)::type;
    if constexpr (Rows::kHalves) {
      // Most likely the scale is the one of some half.
      GroupScales s;
      std::fill_n(s.absmax, kGroup, HalfFloat(HalfBits(127.0f * scale)));
      MakeScales(false, s);
      if (s.scale[0] == scale && !FewBits(scale)) {
        return PerHeadTo<Rows, dim>(in, scale, Product{hn::Set(DF32(), s.product[0])}, out);
      }
    }
    const Quotient quotient{hn::Set(DF32(), scale), hn::Set(DF32(), 1.0f / scale)};
    return PerHeadTo<Rows, 0>(in, scale, quotient, out);
  });
}

// ---- encode

// Codes beyond what the format holds are counted. Those of a token's own scale never are.
template <class X>
std::uint64_t EncodeI8(const Source<X>& in, const RowFormat& format, CodeRows out, float* scales) {
  if (format.scale == ScaleStore::kConstant) return PerHead(in, format.constant, out);
  WithRows(in, [&](auto rows, auto dim) HWY_ATTR {
    using Rows = typename decltype(rows)::type;
    PerTokenRows<Rows, dim>(in, format.scale == ScaleStore::kBF16, out, scales);
  });
  return 0;
}

std::uint64_t EncodeF16(const EncodeTask& t) {
  std::uint64_t clamped = 0;
  WithDtype(t.in.dtype, [&](auto x) HWY_ATTR {
    using X = decltype(x);
    const Source<X> in(t.in, nullptr, 0);
    for (std::size_t r = 0; r < in.count; ++r) {
      std::uint16_t* to = reinterpret_cast<std::uint16_t*>(t.rows + r * t.row_stride);
      if constexpr (std::is_same_v<X, Halves>) {
        FiniteHalves(in.row(r), in.dim, to);
      } else {
        ForVectors<Tail::kPartial>(
            0, in.dim, hn::Lanes(DF32()), [&](auto io, std::size_t i) KVMIX_LAMBDA {
              const F32 value = X::LoadFinite(io, in.row(r) + i), most = hn::Set(DF32(), 65504.0f);
              clamped += hn::CountTrue(DF32(), hn::Ge(hn::Abs(value), hn::Set(DF32(), 65520.0f)));
              Put(io, hn::Max(hn::Min(value, most), hn::Neg(most)), to + i);
            });
      }
    }
  });
  return clamped;
}

// y of rows [first, first + count) as f32, dim apart. Larger numbers than 2^64 are cut, so that
// nothing overflows.
void TransformRows(const RowsIn& rows, const Transform& transform, std::size_t first,
                   std::size_t count, float* y) {
  const F32 most = hn::Set(DF32(), 0x1p64f);
  WithDtype(rows.dtype, [&](auto x) HWY_ATTR {
    using X = decltype(x);
    const Source<X> in(rows, nullptr, 0);
    for (std::size_t r = first; r < first + count; ++r, y += in.dim) {
      const Transform own = transform.From(r);
      ForVectors<Tail::kPartial>(0, in.dim, hn::Lanes(DF32()),
                                 [&](auto io, std::size_t i) KVMIX_LAMBDA {
                                   F32 value = X::LoadFinite(io, in.row(r) + i);
                                   if (own.mean != nullptr)
                                     value = hn::Sub(value, io.Load(DF32(), own.mean + i));
                                   value = hn::Max(hn::Min(value, most), hn::Neg(most));
                                   Put(io, value, y + i);
                                 });
      FactorThenRotate(y, in.dim, own.inv_factor, own.hadamard);
    }
  });
}

// body(first row, their y) for groups of rows.
template <class Body>
HWY_INLINE void ForTransformed(const RowsIn& rows, const Transform& transform, const Body& body) {
  HWY_ALIGN float y[kGroup * kMaxDim];
  for (std::size_t first = 0; first < rows.count; first += kGroup) {
    const std::size_t count = HWY_MIN(kGroup, rows.count - first);
    TransformRows(rows, transform, first, count, y);
    const RowsIn as_f32{y, Dtype::kF32, static_cast<std::ptrdiff_t>(rows.dim), count, rows.dim};
    body(first, Source<Floats>(as_f32, nullptr, 0));
  }
}

std::uint64_t Encode(const EncodeTask& t) {
  if (t.format.storage == Storage::kF16) return EncodeF16(t);
  std::uint64_t clamped = 0;
  const CodeRows out{reinterpret_cast<std::int8_t*>(t.rows), t.row_stride};
  if (t.transform.rotates_or_folds()) {
    ForTransformed(t.in, t.transform, [&](std::size_t first, const Source<Floats>& y) HWY_ATTR {
      clamped += EncodeI8(y, t.format, {out.row(first), out.stride},
                          t.scales != nullptr ? t.scales + first : nullptr);
    });
  } else {
    WithDtype(t.in.dtype, [&](auto x) HWY_ATTR {
      const Source<decltype(x)> in(t.in, t.transform.mean, t.transform.row_stride);
      clamped = EncodeI8(in, t.format, out, t.scales);
    });
  }
  return clamped;
}

float HeadScale(const RowsIn& rows, const Transform& transform) {
  float absmax = 0.0f;
  const auto add = [&](const auto& in) HWY_ATTR {
    const float own = WithRows(in, [&](auto kind, auto dim) HWY_ATTR {
      return AbsMaxRows<typename decltype(kind)::type, dim>(in);
    });
    absmax = HWY_MAX(absmax, own);
  };
  if (transform.rotates_or_folds()) {
    ForTransformed(rows, transform, [&](std::size_t, const Source<Floats>& y) HWY_ATTR { add(y); });
  } else {
    WithDtype(rows.dtype, [&](auto x) HWY_ATTR {
      add(Source<decltype(x)>(rows, transform.mean, transform.row_stride));
    });
  }
  return absmax < kSmallest ? 0.0f : absmax / 127.0f;
}

// ---- decode

// mean + scale * code, each rounded; mean may be null. Rows of a task that neither rotates nor
// folds.
struct I8Row {
  const std::int8_t* HWY_RESTRICT codes;
  const float* HWY_RESTRICT mean;
  F32 scale;

  template <bool kMean, class IO>
  HWY_INLINE F32 Load(IO io, std::size_t i) const {
    const hn::Rebind<std::int8_t, DF32> d8;
    const I32 code = hn::PromoteTo(DI32(), io.Load(d8, codes + i));
    const F32 y = hn::Mul(hn::ConvertTo(DF32(), code), scale);
    if constexpr (kMean) return hn::Add(y, io.Load(DF32(), mean + i));
    return y;
  }
};

HWY_INLINE I8Row I8RowOf(const CodedRows& in, const float* mean, std::size_t r) {
  const float scale = in.scales != nullptr ? in.scales[r] : in.format.constant;
  return {reinterpret_cast<const std::int8_t*>(in.rows + r * in.row_stride), mean,
          hn::Set(DF32(), scale)};
}

template <bool kMean, class IO, class Out>
HWY_INLINE void DecodeI8Row(const I8Row& row, std::size_t dim, Out* HWY_RESTRICT to) {
  const std::size_t lanes = hn::Lanes(DF32());
  std::size_t i = 0;
  for (; i + 4 * lanes <= dim; i += 4 * lanes) {
    for (std::size_t k = i; k < i + 4 * lanes; k += lanes)
      Put(IO(), row.template Load<kMean>(Whole(), k), to + k);
  }
  ForVectors<Tail::kOverlap>(i, dim, lanes, [&](auto io, std::size_t k) KVMIX_LAMBDA {
    Put(io, row.template Load<kMean>(io, k), to + k);
  });
}

template <bool kMean, class IO, class Out>
void DecodeI8Rows(const CodedRows& in, Out* out, std::size_t out_stride) {
  for (std::size_t r = 0; r < in.count; ++r) {
    const I8Row row = I8RowOf(in, in.transform.From(r).mean, r);
    DecodeI8Row<kMean, IO>(row, in.format.dim, out + r * out_stride);
  }
}

// One row, whatever the format, to f32.
void DecodeRow(const CodedRows& in, std::size_t r, float* HWY_RESTRICT to) {
  const std::size_t dim = in.format.dim;
  const Transform transform = in.transform.From(r);
  if (in.format.storage == Storage::kF16) {
    ToFloats<Halves>(reinterpret_cast<const std::uint16_t*>(in.rows + r * in.row_stride), dim, to);
  } else if (!transform.rotates_or_folds() && transform.mean != nullptr) {
    DecodeI8Row<true, Whole>(I8RowOf(in, transform.mean, r), dim, to);
  } else {
    DecodeI8Row<false, Whole>(I8RowOf(in, nullptr, r), dim, to);
    RotateThenFactor(to, dim, transform.factor, transform.hadamard);
    if (transform.mean == nullptr) return;
    ForVectors<Tail::kPartial>(0, dim, hn::Lanes(DF32()), [&](auto io, std::size_t i) KVMIX_LAMBDA {
      const F32 mean = io.Load(DF32(), transform.mean + i);
      Put(io, hn::Add(io.Load(DF32(), to + i), mean), to + i);
    });
  }
}

template <class Out>
void Decode(const CodedRows& in, Out* out, std::size_t out_stride) {
  const std::size_t dim = in.format.dim;
  if (in.format.storage == Storage::kF16 || in.transform.rotates_or_folds()) {
    HWY_ALIGN float row[kMaxDim];
    for (std::size_t r = 0; r < in.count; ++r) {
      DecodeRow(in, r, row);
      ForVectors<Tail::kPartial>(0, dim, hn::Lanes(DF32()),
                                 [&](auto io, std::size_t i) KVMIX_LAMBDA {
                                   Put(io, io.Load(DF32(), row + i), out + r * out_stride + i);
                                 });
    }
    return;
  }
  const bool mean = in.transform.mean != nullptr;
  if (Streams(out, out_stride, in.count, dim, hn::MaxLanes(DF32()))) {
    (mean ? DecodeI8Rows<true, Streamed, Out> : DecodeI8Rows<false, Streamed, Out>)(in, out,
                                                                                    out_stride);
    hwy::FlushStream();
  } else {
    (mean ? DecodeI8Rows<true, Whole, Out> : DecodeI8Rows<false, Whole, Out>)(in, out, out_stride);
  }
}

RowErrors Errors(const CodedRows& coded, const RowsIn& x) {
  HWY_ALIGN float decoded[kMaxDim];
  F32 max_error = hn::Zero(DF32()), max_abs = hn::Zero(DF32());
  RowErrors errors{};
  WithDtype(x.dtype, [&](auto numbers) HWY_ATTR {
    using X = decltype(numbers);
    const Source<X> in(x, nullptr, 0);
    const RowPrefetcher prefetch_x(in.x, in.stride_bytes, in.dim * sizeof(*in.x)),
        prefetch_rows(coded.rows, coded.row_stride, RowBytes(coded.format));
    for (std::size_t r = 0; r < in.count; ++r) {
      prefetch_x(r);
      prefetch_rows(r);
      DecodeRow(coded, r, decoded);
      F32 sum = hn::Zero(DF32());
      ForVectors<Tail::kPartial>(0, in.dim, hn::Lanes(DF32()),
                                 [&](auto io, std::size_t i) KVMIX_LAMBDA {
                                   const F32 value = X::LoadFinite(io, in.row(r) + i);
                                   const F32 error = hn::Sub(io.Load(DF32(), decoded + i), value);
                                   sum = hn::MulAdd(error, error, sum);
                                   max_error = hn::Max(max_error, hn::Abs(error));
                                   max_abs = hn::Max(max_abs, hn::Abs(value));
                                 });
      errors.sum_squared_error += static_cast<double>(hn::ReduceSum(DF32(), sum));
    }
  });
  errors.max_error = static_cast<double>(hn::ReduceMax(DF32(), max_error));
  errors.max_abs = static_cast<double>(hn::ReduceMax(DF32(), max_abs));
  return errors;
}

void ToFloat(const RowsIn& in, float* out, std::size_t out_stride) {
  WithDtype(in.dtype, [&](auto x) HWY_ATTR {
    using X = decltype(x);
    const Source<X> source(in, nullptr, 0);
    for (std::size_t r = 0; r < in.count; ++r) {
      ToFloats<X>(source.row(r), in.dim, out + r * out_stride);
    }
  });
}

}  // namespace

EncodeKernels EncodeTable() {
  return {&Encode, &Decode<float>, &Decode<std::uint16_t>, &Errors, &HeadScale, &ToFloat};
}

}  // namespace HWY_NAMESPACE
}  // namespace kvmix::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvmix::kernels {
HWY_EXPORT(EncodeTable);
EncodeKernels EncodeKernelsFor(std::int64_t target) {
  return KVMIX_CALL_FOR(target, EncodeTable)();
}
}  // namespace kvmix::kernels
#endif  // HWY_ONCE
