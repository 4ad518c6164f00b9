// Rows -> codes or halves, and back. int8 per token, eight rows at a time, which one
// reduction, one conversion to f32 and three divisions serve:
//   1. absmax of each row, as an integer maximum over bits without their sign (of halves as they
//      are, else of y as f32), so that NaN and Inf show up as large maxima
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
#include "kernels/levels-inl.h"
#include "kernels/planes-inl.h"
#include "kernels/rows-inl.h"
#include "kernels/shape-inl.h"
#include "kernels/storage-inl.h"
#include "kernels/transform-inl.h"
#include "kernels/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {
namespace {

constexpr float kSmallest = 0x1p-100f;  // a row below has scale 0
constexpr float kSafe = 0x1p-60f;       // no underflow in Quotient from here on
constexpr int kMaxCode = 127;
constexpr std::size_t kShapedGroup = 16;                // rows: one a lane of AVX-512
constexpr std::size_t kLarge = std::size_t{256} << 10;  // bytes: not for L2

// f(IO()): whether it writes `tokens` rows of T past the caches, in vectors of that many lanes. An
// output of 256 KiB and its input leave L2 before they are read again, and a store through the
// caches first reads the line from DRAM: dequantizing there is 2.3 times as fast without (Granite
// Rapids). Half vectors of 128-bit targets have no such store.
template <class T, class F>
HWY_INLINE void WithStores(const T* out, std::size_t stride, std::size_t tokens, std::size_t dim,
                           std::size_t lanes, const F& f) {
  const std::size_t vector = lanes * sizeof(T);
  const bool aligned =
      reinterpret_cast<std::uintptr_t>(out) % vector == 0 && stride * sizeof(T) % vector == 0;
  // A row's rest would go through the caches: a line that is written both ways costs 30 times as
  // much.
  const bool no_rest = dim % lanes == 0;
  if (vector >= 16 && aligned && no_rest && tokens * dim * sizeof(T) >= kLarge) {
    f(Streamed());
    hwy::FlushStream();
  } else {
    f(Whole());
  }
}

// ---- one row

// y / scale for one scale, fit to be rounded to an integer: the top of this file says how.
struct Product {
  VF inverse;
  HWY_INLINE VF operator()(VF y) const { return hn::Mul(y, inverse); }
};
struct Quotient {
  VF scale, inverse;
  HWY_INLINE VF operator()(VF y) const {
#if HWY_NATIVE_FMA
    const VF q = hn::Mul(y, inverse);
    const VF r = hn::NegMulAdd(q, scale, y);
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

template <class IO = Whole, class Rows, class Divide>
HWY_INLINE void QuantizeRow(const Rows& y, std::size_t dim, const Divide& divide,
                            std::int8_t* HWY_RESTRICT codes) {
  const auto code = [&](auto io, std::size_t i)
                        KVMIX_LAMBDA { return Nearest(divide(y.Load(io, i))); };
  std::size_t i = 0;
  for (; i + 4 * kLanes <= dim; i += 4 * kLanes) {
    const VI32 a = code(Whole(), i), b = code(Whole(), i + kLanes),
               c = code(Whole(), i + 2 * kLanes), d = code(Whole(), i + 3 * kLanes);
    IO().Store(Pack(a, b, c, d), DI8(), codes + i);
  }
  ForVectors<Tail::kOverlap>(i, dim, [&](auto io, std::size_t k) KVMIX_LAMBDA {
    io.Store(hn::DemoteTo(DCodes(), code(io, k)), DCodes(), codes + k);
  });
}

// Any row at all: NaN and Inf replaced, divided, clamped. Returns the number of clamped values.
template <class X>
std::uint64_t CarefulRow(const CarefulRows<X>& y, std::size_t dim, float scale,
                         std::int8_t* HWY_RESTRICT codes) {
  const VI32 limit = hn::Set(DI32(), kMaxCode);
  const VF divisor = hn::Set(DF(), scale),
           bound = hn::Set(DF(), HWY_MIN(129.0f * scale, kLargest));  // beyond: clamped anyway
  std::uint64_t clamped = 0;
  ForVectors(0, dim, [&](auto io, std::size_t i) KVMIX_LAMBDA {
    const VI32 code = Nearest(hn::Div(Clamp(y.Load(io, i), bound), divisor));
    clamped += hn::CountTrue(DI32(), hn::Gt(hn::Abs(code), limit));
    io.Store(hn::DemoteTo(DCodes(), Clamp(code, limit)), DCodes(), codes + i);
  });
  return clamped;
}

template <class X>
float CarefulAbsMax(const CarefulRows<X>& y, std::size_t dim) {
  VF max = hn::Zero(DF());
  ForVectors(0, dim, [&](auto io, std::size_t i) KVMIX_LAMBDA {
    max = hn::Max(max, hn::Abs(y.Load(io, i)));
  });
  return hn::ReduceMax(DF(), max);
}

// ---- a scale per token

struct GroupScales {
  alignas(32) float absmax[kGroup];
  alignas(32) float scale[kGroup];
  alignas(32) float divisor[kGroup];  // the scale, or 1 where it is 0
  alignas(32) float inverse[kGroup];  // of the divisor
  alignas(32) float product[kGroup];  // the inverse, moved for Product
  std::uint64_t careful;              // bit r: row r is one for CarefulRow
};

// From s.absmax: all the rest.
HWY_INLINE void MakeScales(bool bf16, GroupScales& s) {
  const hn::CappedTag<float, kGroup> d;
  const hn::RebindToUnsigned<decltype(d)> du;
  s.careful = 0;
  for (std::size_t i = 0; i < kGroup; i += hn::Lanes(d)) {
    const auto one = hn::Set(d, 1.0f), absmax = hn::Load(d, s.absmax + i);
    auto bits = hn::BitCast(du, hn::Div(absmax, hn::Set(d, 127.0f)));
    if (bf16) bits = hn::AndNot(hn::Set(du, 0xFFFFu), hn::Add(bits, hn::Set(du, 0xFFFFu)));
    // Not `== 0`: clang would compare halves one by one.
    const auto zero = hn::Lt(absmax, hn::Set(d, kSmallest));
    const auto scale = hn::IfThenZeroElse(zero, hn::BitCast(d, bits));
    const auto divisor = hn::IfThenElse(zero, one, scale), inverse = hn::Div(one, divisor);
    const auto half_rounds_up =
        hn::Ge(hn::Div(hn::Mul(absmax, hn::Set(d, 0.5f)), divisor), hn::Set(d, 63.5f));
    const auto moved =
        hn::IfThenElse(half_rounds_up, hn::Set(d, 1.0f + 0x1p-21f), hn::Set(d, 1.0f - 0x1p-21f));
    hn::Store(scale, d, s.scale + i);
    hn::Store(divisor, d, s.divisor + i);
    hn::Store(inverse, d, s.inverse + i);
    hn::Store(hn::Mul(inverse, moved), d, s.product + i);
    const auto normal =
        hn::And(hn::Le(absmax, hn::Set(d, kLargest)), hn::Ge(absmax, hn::Set(d, kSafe)));
    s.careful |= hn::BitsFromMask(d, hn::Not(hn::Or(normal, zero))) << i;
  }
}

// The scales of eight rows of the same absmax.
HWY_INLINE GroupScales SameScales(bool bf16, float absmax) {
  GroupScales s;
  std::fill_n(s.absmax, kGroup, absmax);
  MakeScales(bf16, s);
  return s;
}

// Codes of many rows, `stride` bytes apart.
struct CodeRows {
  std::int8_t* codes;
  std::size_t stride;
  HWY_INLINE std::int8_t* row(std::size_t t) const { return codes + t * stride; }
};

// absmax and scales of the kRows rows (1 or kGroup) from t on.
template <class Rows, std::size_t kRows>
HWY_INLINE void ScaleGroup(const Source<typename Rows::Numbers>& in, std::size_t t, bool bf16,
                           GroupScales& s) {
  const typename Rows::DMax d;
  constexpr std::size_t kStep = hn::MaxLanes(d);
  HWY_ALIGN hn::TFromD<typename Rows::DMax> max[kRows * kStep];
  for (std::size_t r = 0; r < kRows; ++r)
    hn::Store(Rows(in, t + r).Max(in.dim, hn::Zero(d)), d, max + r * kStep);
  Rows::Reduce([&](std::size_t r) KVMIX_LAMBDA { return hn::Load(d, max + r % kRows * kStep); },
               s.absmax);
  MakeScales(bf16, s);
}

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
      QuantizeRow(y, in.dim, Product{hn::Set(DF(), s.product[r])}, out.row(t + r));
    } else {
      const Quotient quotient{hn::Set(DF(), s.divisor[r]), hn::Set(DF(), s.inverse[r])};
      QuantizeRow(y, in.dim, quotient, out.row(t + r));
    }
    scales[t + r] = s.scale[r];
  }
  if (HWY_LIKELY(s.careful == 0)) return;
  for (std::size_t r = 0; r < kRows; ++r) {
    if ((s.careful >> r & 1) == 0) continue;
    const CarefulRows y(in, t + r);
    const GroupScales same = SameScales(bf16, CarefulAbsMax(y, in.dim));
    CarefulRow(y, in.dim, same.divisor[0], out.row(t + r));
    scales[t + r] = same.scale[0];
  }
}

// kDim: the number of channels, if not 0. Loops of known length have no branches to mispredict: up
// to 1.7 times as fast.
template <class Rows, std::size_t kDim>
void PerTokenRows(Source<typename Rows::Numbers> in, bool bf16, CodeRows out, float* scales) {
  if constexpr (kDim != 0) in.dim = kDim;
  const bool large = in.count * in.dim * sizeof(*in.x) >= kLarge;
  const std::size_t groups = in.count / kGroup;
  // The next group's scales, a long chain of latencies, hide behind this group's codes.
  GroupScales s[2];
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

template <class T>
struct Type {};

// f(Type<Rows>(), kDim): the length where that is worth a copy of the code.
template <class Rows, bool kCopies, class F>
HWY_INLINE decltype(auto) WithDim(std::size_t dim, const F& f) {
  if constexpr (kCopies) {
    if (dim == 64) return f(Type<Rows>(), std::integral_constant<std::size_t, 64>());
    if (dim == 128) return f(Type<Rows>(), std::integral_constant<std::size_t, 128>());
  }
  return f(Type<Rows>(), std::integral_constant<std::size_t, 0>());
}
template <class X, class F>
HWY_INLINE decltype(auto) WithRows(const Source<X>& in, const F& f) {
  constexpr bool kHalves = std::is_same_v<X, Halves>,
                 kAnyDim = kHalves || std::is_same_v<X, Floats>;
  using Plain = std::conditional_t<kHalves, PlainHalves, FloatRows<X, false>>;
  if (in.mean != nullptr) return WithDim<FloatRows<X, true>, kHalves>(in.dim, f);
  return WithDim<Plain, kAnyDim>(in.dim, f);
}

// ---- a scale per head

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

template <class IO, class Rows, std::size_t kDim, class Divide>
std::uint64_t PerHeadRows(Source<typename Rows::Numbers> in, float scale, Divide divide,
                          CodeRows out) {
  if constexpr (kDim != 0) in.dim = kDim;
  const typename Rows::DMax d;
  // Within 127.25 scales nothing rounds beyond 127. Of scales not for Quotient only zeros pass.
  const bool safe = scale >= kSafe && scale <= kLargest / 128.0f;
  const auto limit = hn::Set(d, Rows::Bits(safe ? 127.25f * scale : 0.0f));
  const RowPrefetcher prefetch(out.codes, out.stride, in.dim);
  std::uint64_t clamped = 0;
  for (std::size_t t = 0; t < in.count; ++t) {
    Rows y(in, t);
    if constexpr (std::is_same_v<IO, Whole>) prefetch(t);
    if (HWY_LIKELY(hn::AllTrue(d, hn::Le(y.Max(in.dim, hn::Zero(d)), limit)))) {
      // Load again: clang 14 keeps the bits, and takes them apart half by half to convert them.
      asm("" : "+r"(y.x));
      QuantizeRow<IO>(y, in.dim, divide, out.row(t));
    } else {
      clamped += CarefulRow(CarefulRows(in, t), in.dim, scale, out.row(t));
    }
  }
  return clamped;
}

template <class X>
std::uint64_t PerHead(const Source<X>& in, float scale, CodeRows out) {
  std::uint64_t clamped = 0;
  if (!(scale > 0.0f && scale <= kLargest)) {
    // The scale of a head of zeros: whatever is not one is lost.
    for (std::size_t t = 0; t < in.count; ++t) {
      clamped += CarefulRow(CarefulRows(in, t), in.dim, kSmallest / kMaxCode, out.row(t));
      std::memset(out.row(t), 0, in.dim);
    }
    return clamped;
  }
  WithRows(in, [&]<class Rows>(Type<Rows>, auto dim) KVMIX_LAMBDA {
    const auto encode = [&](auto known_dim, auto divide) KVMIX_LAMBDA {
      WithStores(out.codes, out.stride, in.count, in.dim, hn::MaxLanes(DI8()),
                 [&](auto io) KVMIX_LAMBDA {
                   clamped = PerHeadRows<decltype(io), Rows, known_dim>(in, scale, divide, out);
                 });
    };
    if constexpr (Rows::kHalves) {
      // Most likely the scale is the one of some half.
      const GroupScales same = SameScales(false, HalfFloat(HalfBits(127.0f * scale)));
      if (same.scale[0] == scale && !FewBits(scale))
        return encode(dim, Product{hn::Set(DF(), same.product[0])});
    }
    encode(std::integral_constant<std::size_t, 0>(),
           Quotient{hn::Set(DF(), scale), hn::Set(DF(), 1.0f / scale)});
  });
  return clamped;
}

// ---- encode

// body(first row, y of these rows as a Source): all rows as they come, or groups of rows that were
// transformed. There larger numbers than 2^64 are cut, so that nothing overflows.
template <class Body>
HWY_INLINE void TransformRows(const RowsIn& rows, const Transform& transform, const Body& body) {
  WithDtype(rows.dtype, [&]<class X>(X) KVMIX_LAMBDA {
    const Source<X> in(rows, transform.mean, transform.row_stride);
    if (!transform.rotates_or_folds() && transform.shaping == nullptr) return body(0, in);
    const std::size_t group = transform.shaping != nullptr ? kShapedGroup : kGroup;
    HWY_ALIGN float y[kShapedGroup * kMaxDim];
    for (std::size_t first = 0; first < in.count; first += group) {
      const std::size_t count = HWY_MIN(group, in.count - first);
      for (std::size_t r = 0; r < count; ++r) {
        const CarefulRows x(in, first + r, 0x1p64f);
        float* to = y + r * in.dim;
        ForVectors(0, in.dim,
                   [&](auto io, std::size_t i) KVMIX_LAMBDA { Put(io, x.Load(io, i), to + i); });
        const Transform own = transform.From(first + r);
        TransformRow(to, in.dim, own.inv_factor, nullptr, own.hadamard);
      }
      const RowsIn as_f32{y, KVMIX_F32, static_cast<std::ptrdiff_t>(in.dim), count, in.dim};
      body(first, Source<Floats>(as_f32));
    }
  });
}

// ---- i6, i4, i3

// shaped: only the scales, as other codes follow.
template <class X>
void EncodeBelowI8(const Source<X>& in, const RowFormat& format, bool shaped, CodeRows out,
                   float* HWY_RESTRICT scales) {
  HWY_ALIGN float y[kMaxDim];
  HWY_ALIGN std::uint8_t codes[kMaxDim];
  std::fill(y + in.dim, y + FixedPoint::Padded(in.dim), 0.0f);
  for (std::size_t t = 0; t < in.count; ++t) {
    const CarefulRows<X> x(in, t);
    VF max = hn::Zero(DF());
    ForVectors(0, in.dim, [&](auto io, std::size_t i) KVMIX_LAMBDA {
      const VF v = x.Load(io, i);
      Put(io, v, y + i);
      max = hn::Max(max, hn::Abs(v));
    });
    std::uint8_t* const row = reinterpret_cast<std::uint8_t*>(out.row(t));
    const float absmax = hn::ReduceMax(DF(), max);
    if (absmax < kSmallest) {
      std::memset(row, 0, RowBytes(format));
      scales[t] = 0.0f;
      continue;
    }
    const float scale = WithLevels(format.storage, [&]<class L>(L) KVMIX_LAMBDA {
      return EncodeLevels<L>(y, in.dim, absmax, shaped ? nullptr : codes);
    });
    if (!shaped) PackRow(format.storage, codes, in.dim, row);
    scales[t] = format.scale == ScaleStore::kBF16 ? NearestBF16(scale) : scale;
  }
}

// Codes beyond what the format holds are counted. Those of a token's own scale never are.
template <class X>
std::uint64_t EncodeI8(const Source<X>& in, const RowFormat& format, CodeRows out, float* scales) {
  if (format.scale == ScaleStore::kConstant) return PerHead(in, format.constant, out);
  WithRows(in, [&]<class Rows>(Type<Rows>, auto dim) KVMIX_LAMBDA {
    PerTokenRows<Rows, dim>(in, format.scale == ScaleStore::kBF16, out, scales);
  });
  return 0;
}

// Other codes for up to kShapedGroup rows from `first` on, of the scales that they have.
void Shape(const Source<Floats>& y, const Transform& transform, std::size_t first,
           const RowFormat& format, const float* scales, CodeRows out) {
  HWY_ALIGN std::uint8_t codes[kShapedGroup * kMaxDim];
  WithShapedLevels(format.storage, [&]<class Levels>(Levels) KVMIX_LAMBDA {
    // Rows of one head share a matrix, and together they pay from three on.
    if (transform.row_stride == 0 && y.count >= 3) {
      for (std::size_t r = 0; r < y.count; r += kLanes) {
        ShapeTogether<Levels>(y.row(r), HWY_MIN(kLanes, y.count - r), y.dim, transform.shaping,
                              scales + r, codes + r * kMaxDim, kMaxDim);
      }
      return;
    }
    ShapedRow rows[kShapedGroup];
    for (std::size_t r = 0; r < y.count; ++r)
      rows[r] = {y.row(r), transform.ShapingOf(first + r, y.dim), scales[r], codes + r * kMaxDim};
    ShapeApart<Levels, kShapedGroup>(rows, y.count, y.dim);
  });
  for (std::size_t r = 0; r < y.count; ++r) {
    PackRow(format.storage, codes + r * kMaxDim, y.dim,
            reinterpret_cast<std::uint8_t*>(out.row(r)));
  }
}

std::uint64_t EncodeF16(const EncodeTask& t) {
  std::uint64_t clamped = 0;
  WithDtype(t.in.dtype, [&]<class X>(X) KVMIX_LAMBDA {
    const Source<X> in(t.in);
    for (std::size_t r = 0; r < in.count; ++r) {
      const auto* x = in.row(r);
      std::uint16_t* to = reinterpret_cast<std::uint16_t*>(t.rows + r * t.row_stride);
      if constexpr (std::is_same_v<X, Halves>) {
        const hn::ScalableTag<std::uint16_t> d;
        ForVectors<Tail::kPartial, 2 * kLanes>(0, in.dim, [&](auto io, std::size_t i) KVMIX_LAMBDA {
          io.Store(FiniteHalves(d, io.Load(d, x + i)), d, to + i);
        });
      } else {
        ForVectors(0, in.dim, [&](auto io, std::size_t i) KVMIX_LAMBDA {
          const VF value = LoadFinite<X>(io, x + i);
          clamped += hn::CountTrue(DF(), hn::Ge(hn::Abs(value), hn::Set(DF(), 65520.0f)));
          Put(io, Clamp(value, hn::Set(DF(), kLargestHalf)), to + i);
        });
      }
    }
  });
  return clamped;
}

std::uint64_t Encode(const EncodeTask& t) {
  if (t.format.storage == KVMIX_STORAGE_F16) return EncodeF16(t);
  std::uint64_t clamped = 0;
  const CodeRows out{reinterpret_cast<std::int8_t*>(t.rows), t.row_stride};
  TransformRows(t.in, t.transform, [&](std::size_t first, const auto& y) KVMIX_LAMBDA {
    const CodeRows to{out.row(first), out.stride};
    float* const scales = t.scales != nullptr ? t.scales + first : nullptr;
    if (t.format.storage == KVMIX_STORAGE_I8) {
      clamped += EncodeI8(y, t.format, to, scales);
    } else {
      EncodeBelowI8(y, t.format, t.transform.shaping != nullptr, to, scales);
    }
    if constexpr (std::is_same_v<std::remove_cvref_t<decltype(y)>, Source<Floats>>) {
      if (t.transform.shaping != nullptr) Shape(y, t.transform, first, t.format, scales, to);
    }
  });
  return clamped;
}

float HeadScale(const RowsIn& rows, const Transform& transform) {
  float absmax = 0.0f;
  TransformRows(rows, transform, [&](std::size_t, const auto& y) KVMIX_LAMBDA {
    const float own = WithRows(
        y, [&]<class Rows>(Type<Rows>, auto dim) KVMIX_LAMBDA { return AbsMaxRows<Rows, dim>(y); });
    absmax = HWY_MAX(absmax, own);
  });
  return absmax < kSmallest ? 0.0f : absmax / 127.0f;
}

// ---- decode

template <class X, class Out>
HWY_INLINE void ConvertRow(const typename X::T* HWY_RESTRICT x, std::size_t dim,
                           Out* HWY_RESTRICT to) {
  ForVectors(0, dim,
             [&](auto io, std::size_t i) KVMIX_LAMBDA { Put(io, X::Load(io, x + i), to + i); });
}

// mean + scale * code, each rounded: row r, if nothing was rotated or folded. codes: those of the
// row, or the levels that they stand for.
template <bool kMean, class IO = Whole, class Out>
HWY_INLINE void DecodeI8Row(const CodedRows& in, std::size_t r,
                            const std::int8_t* HWY_RESTRICT codes, Out* HWY_RESTRICT to) {
  const std::size_t dim = in.format.dim;
  const float* HWY_RESTRICT mean = in.transform.From(r).mean;
  const VF scale = hn::Set(DF(), in.scales != nullptr ? in.scales[r] : in.format.constant);
  const auto decode = [&](auto io, std::size_t i) KVMIX_LAMBDA {
    const VI32 code = hn::PromoteTo(DI32(), io.Load(DCodes(), codes + i));
    VF y = hn::Mul(hn::ConvertTo(DF(), code), scale);
    if constexpr (kMean) y = hn::Add(y, io.Load(DF(), mean + i));
    Put(io, y, to + i);
  };
  std::size_t i = 0;
  for (; i + 4 * kLanes <= dim; i += 4 * kLanes)
    Unroll<4>([&](auto v) KVMIX_LAMBDA { decode(IO(), i + v * kLanes); });
  for (; i + kLanes <= dim; i += kLanes) decode(IO(), i);
  if (i < dim) ForVectors<Tail::kOverlap>(i, dim, decode);
}

template <bool kMean, class IO, class Out>
void DecodeI8Rows(const CodedRows& in, Out* out, std::size_t out_stride) {
  for (std::size_t r = 0; r < in.count; ++r) {
    DecodeI8Row<kMean, IO>(in, r, reinterpret_cast<const std::int8_t*>(in.rows + r * in.row_stride),
                           out + r * out_stride);
  }
}

// One row, whatever the format, to f32.
void DecodeRow(const CodedRows& in, std::size_t r, float* HWY_RESTRICT to) {
  const std::size_t dim = in.format.dim;
  const Transform own = in.transform.From(r);
  const std::uint8_t* row = in.rows + r * in.row_stride;
  HWY_ALIGN std::uint8_t levels[kMaxDim];
  WithStorage(in.format.storage, [&]<class S>(S) KVMIX_LAMBDA {
    if constexpr (S::kPacked) {
      SpreadRow<S>(row, dim, levels,
                   [](VU8 c) KVMIX_LAMBDA { return S::template Levels<false>(c); });
      row = levels;
    }
  });
  const std::int8_t* const codes = reinterpret_cast<const std::int8_t*>(row);
  if (in.format.storage == KVMIX_STORAGE_F16) {
    ConvertRow<Halves>(reinterpret_cast<const std::uint16_t*>(row), dim, to);
  } else if (!own.rotates_or_folds() && own.mean != nullptr) {
    DecodeI8Row<true>(in, r, codes, to);
  } else {
    DecodeI8Row<false>(in, r, codes, to);
    TransformRow(to, dim, nullptr, own.factor, own.hadamard);
    if (own.mean == nullptr) return;
    ForVectors(0, dim, [&](auto io, std::size_t i) KVMIX_LAMBDA {
      Put(io, hn::Add(io.Load(DF(), to + i), io.Load(DF(), own.mean + i)), to + i);
    });
  }
}

template <class Out>
void Decode(const CodedRows& in, Out* out, std::size_t out_stride) {
  const std::size_t dim = in.format.dim;
  if (in.format.storage != KVMIX_STORAGE_I8 || in.transform.rotates_or_folds()) {
    HWY_ALIGN float row[kMaxDim];
    for (std::size_t r = 0; r < in.count; ++r) {
      DecodeRow(in, r, row);
      ConvertRow<Floats>(row, dim, out + r * out_stride);
    }
    return;
  }
  WithStores(out, out_stride, in.count, dim, kLanes, [&]<class IO>(IO) KVMIX_LAMBDA {
    const bool mean = in.transform.mean != nullptr;
    (mean ? DecodeI8Rows<true, IO, Out> : DecodeI8Rows<false, IO, Out>)(in, out, out_stride);
  });
}

RowErrors Errors(const CodedRows& coded, const RowsIn& x) {
  HWY_ALIGN float decoded[kMaxDim];
  VF max_error = hn::Zero(DF()), max_abs = hn::Zero(DF());
  RowErrors errors{};
  WithDtype(x.dtype, [&]<class X>(X) KVMIX_LAMBDA {
    const Source<X> in(x);
    const RowPrefetcher prefetch_x(in.x, in.stride_bytes, in.dim * sizeof(*in.x)),
        prefetch_rows(coded.rows, coded.row_stride, RowBytes(coded.format));
    for (std::size_t r = 0; r < in.count; ++r) {
      prefetch_x(r);
      prefetch_rows(r);
      DecodeRow(coded, r, decoded);
      VF sum = hn::Zero(DF());
      ForVectors(0, in.dim, [&](auto io, std::size_t i) KVMIX_LAMBDA {
        const VF value = LoadFinite<X>(io, in.row(r) + i);
        const VF error = hn::Sub(io.Load(DF(), decoded + i), value);
        sum = hn::MulAdd(error, error, sum);
        max_error = hn::Max(max_error, hn::Abs(error));
        max_abs = hn::Max(max_abs, hn::Abs(value));
      });
      errors.sum_squared_error += static_cast<double>(hn::ReduceSum(DF(), sum));
    }
  });
  errors.max_error = static_cast<double>(hn::ReduceMax(DF(), max_error));
  errors.max_abs = static_cast<double>(hn::ReduceMax(DF(), max_abs));
  return errors;
}

void ToFloat(const RowsIn& rows, float* out, std::size_t out_stride) {
  WithDtype(rows.dtype, [&]<class X>(X) KVMIX_LAMBDA {
    const Source<X> in(rows);
    for (std::size_t r = 0; r < in.count; ++r)
      ConvertRow<X>(in.row(r), in.dim, out + r * out_stride);
  });
}

}  // namespace

EncodeKernels EncodeTable() {
  return {&Encode, &Decode<float>, &Decode<std::uint16_t>, &Errors, &HeadScale, &ToFloat};
}

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvmix::kernels {
HWY_EXPORT(EncodeTable);
EncodeKernels EncodeKernelsFor(std::int64_t target) {
  return KVMIX_CALL_FOR(target, EncodeTable)();
}
}  // namespace kvmix::kernels
#endif  // HWY_ONCE
