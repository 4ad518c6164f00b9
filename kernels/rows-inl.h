// Per target: rows of f16, bf16 or f32 as vectors of f32, with their absmax, and vectors of codes:
// what kernels/encode.cc reads and writes.
#if defined(KVMIX_KERNELS_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVMIX_KERNELS_ROWS_INL_H_
#undef KVMIX_KERNELS_ROWS_INL_H_
#else
#define KVMIX_KERNELS_ROWS_INL_H_
#endif

#include <array>
#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/per_target.h"
#include "kernels/rows.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using DF32 = hn::ScalableTag<float>;
using DI32 = hn::ScalableTag<std::int32_t>;
using DI16 = hn::ScalableTag<std::int16_t>;
using DI8 = hn::ScalableTag<std::int8_t>;
using DU16 = hn::Rebind<std::uint16_t, DF32>;  // as many lanes as DF32
using F32 = hn::Vec<DF32>;
using I32 = hn::Vec<DI32>;

constexpr std::size_t kGroup = 8;  // rows whose maxima are reduced together
constexpr float kLargest = 3.4028234e38f;

// How a loop's body reads and writes: a whole vector, or its first n lanes (the others read as 0).
struct Whole {
  template <class D>
  HWY_INLINE hn::Vec<D> Load(D d, const hn::TFromD<D>* from) const {
    return hn::LoadU(d, from);
  }
  template <class D>
  HWY_INLINE void Store(hn::Vec<D> v, D d, hn::TFromD<D>* to) const {
    hn::StoreU(v, d, to);
  }
};
// Past the caches (non-temporal): the address must be aligned to the vector.
struct Streamed : Whole {
  template <class D>
  HWY_INLINE void Store(hn::Vec<D> v, D d, hn::TFromD<D>* to) const {
    hn::Stream(v, d, to);
  }
};
struct First {
  std::size_t n;
  template <class D>
  HWY_INLINE hn::Vec<D> Load(D d, const hn::TFromD<D>* from) const {
    return hn::LoadN(d, from, n);
  }
  template <class D>
  HWY_INLINE void Store(hn::Vec<D> v, D d, hn::TFromD<D>* to) const {
    hn::StoreN(v, d, to, n);
  }
};

// What becomes of a row's end. kOverlap: a last whole vector that takes some elements again
// (cheaper, where twice is as good as once).
enum class Tail { kOverlap, kPartial };

// body(io, i) for the vectors of [begin, dim).
template <Tail kTail, class Body>
HWY_INLINE void ForVectors(std::size_t begin, std::size_t dim, std::size_t lanes,
                           const Body& body) {
  std::size_t i = begin;
  for (; i + lanes <= dim; i += lanes) body(Whole(), i);
  if (i == dim) return;
  if (kTail == Tail::kOverlap && dim >= lanes) {
    body(Whole(), dim - lanes);
  } else {
    body(First{dim - i}, i);
  }
}

// Single numbers: to the nearest half's bits, and back.
HWY_INLINE std::uint16_t HalfBits(float x) {
  return hwy::BitCastScalar<std::uint16_t>(hwy::F16FromF32(x));
}
HWY_INLINE float HalfFloat(std::uint16_t bits) {
  return hwy::F32FromF16(hwy::float16_t::FromBits(bits));
}

template <class D>
HWY_INLINE hn::Vec<D> ToFloat(D d, hn::Vec<hn::Rebind<std::uint16_t, D>> halves) {
  const auto x = hn::PromoteTo(d, hn::BitCast(hn::Rebind<hwy::float16_t, D>(), halves));
#if HWY_ARCH_X86 && HWY_TARGET >= HWY_SSE4
  // Without F16C Highway takes infinity for 65536, NaN for what follows: give them an f32's
  // exponent.
  const auto infinity = hn::BitCast(d, hn::Set(hn::RebindToSigned<D>(), 0x7F800000));
  return hn::Or(x, hn::IfThenElseZero(hn::Ge(hn::Abs(x), hn::Set(d, 65536.0f)), infinity));
#else
  return x;
#endif
}

// NaN -> 0, infinities -> the largest half.
template <class D>
HWY_INLINE hn::Vec<D> Finite(D d, hn::Vec<D> halves) {
  const hn::RebindToSigned<D> di;  // signed: SSE2 compares nothing else
  const auto bits = hn::BitCast(di, halves);
  const auto magnitude = hn::And(bits, hn::Set(di, 0x7FFF));
  const auto finite = hn::Or(hn::Xor(bits, magnitude), hn::Min(magnitude, hn::Set(di, 0x7BFF)));
  return hn::BitCast(d, hn::IfThenZeroElse(hn::Gt(magnitude, hn::Set(di, 0x7C00)), finite));
}

// Rounds to nearest even what lies in an integer's range.
HWY_INLINE I32 Nearest(F32 x) {
#if HWY_ARCH_X86
  return hn::NearestIntInRange(DI32(), x);  // one instruction; NearestInt saturates, in several
#else
  return hn::NearestInt(x);
#endif
}

template <std::size_t kBlocks>
constexpr std::array<std::int32_t, 4 * kBlocks> PackedOrder() {
  std::array<std::int32_t, 4 * kBlocks> order{};
  for (std::size_t i = 0; i < order.size(); ++i)
    order[i] = static_cast<std::int32_t>(i % kBlocks * 4 + i / kBlocks);
  return order;
}

// Four vectors of small integers as one vector of bytes, in order.
HWY_INLINE hn::Vec<DI8> Pack(I32 a, I32 b, I32 c, I32 d) {
  const auto ab = hn::ReorderDemote2To(DI16(), a, b);
  const auto cd = hn::ReorderDemote2To(DI16(), c, d);
  const auto abcd = hn::ReorderDemote2To(DI8(), ab, cd);
  // Demotions work within 128-bit blocks: block k now holds the k-th block of a, of b, of c and of
  // d, four bytes each.
  constexpr std::size_t kBlocks = hn::MaxLanes(DI8()) / 16;
  if constexpr (kBlocks == 1) {
    return abcd;
  } else {
    static constexpr auto kOrder = PackedOrder<kBlocks>();
    return hn::BitCast(DI8(), hn::TableLookupLanes(hn::BitCast(DI32(), abcd),
                                                   hn::SetTableIndices(DI32(), kOrder.data())));
  }
}

// Lane-wise max of a and b, halved: each pair of lanes of type T of the result comes from a, then
// b.
template <class T, class D>
HWY_INLINE hn::Vec<D> PairMax(D d, hn::Vec<D> a, hn::Vec<D> b) {
  const hn::Repartition<T, D> dt;
  const auto x = hn::BitCast(dt, a), y = hn::BitCast(dt, b);
  return hn::Max(hn::BitCast(d, hn::InterleaveLower(dt, x, y)),
                 hn::BitCast(d, hn::InterleaveUpper(dt, x, y)));
}

// Lane-wise max of a vector's 128-bit blocks, stored.
template <class D>
HWY_INLINE void StoreBlockMax(D d, hn::Vec<D> v, hn::TFromD<D>* to) {
  if constexpr (hn::MaxLanes(d) * sizeof(hn::TFromD<D>) > 16) {
    const hn::Half<D> half;
    StoreBlockMax(half, hn::Max(hn::LowerHalf(half, v), hn::UpperHalf(half, v)), to);
  } else {
    hn::StoreU(v, d, to);
  }
}

// The types that rows come in. Load: as they are. LoadFinite: NaN as 0, infinities as +-65504.
struct Halves {
  using T = std::uint16_t;
  template <class IO>
  static HWY_INLINE F32 Load(IO io, const T* p) {
    return ToFloat(DF32(), io.Load(DU16(), p));
  }
  template <class IO>
  static HWY_INLINE F32 LoadFinite(IO io, const T* p) {
    return ToFloat(DF32(), Finite(DU16(), io.Load(DU16(), p)));
  }
};
struct Floats {
  using T = float;
  template <class IO>
  static HWY_INLINE F32 Load(IO io, const T* p) {
    return io.Load(DF32(), p);
  }
  template <class IO>
  static HWY_INLINE F32 LoadFinite(IO io, const T* p) {
    return Finite(Load(io, p));
  }
  static HWY_INLINE F32 Finite(F32 x) {
    const DF32 d;
    const F32 bound = hn::CopySign(hn::Set(d, 65504.0f), x);
    return hn::IfThenZeroElse(hn::IsNaN(x), hn::IfThenElse(hn::IsInf(x), bound, x));
  }
};
struct BFloats {
  using T = std::uint16_t;
  template <class IO>
  static HWY_INLINE F32 Load(IO io, const T* p) {
    const hn::RebindToUnsigned<DF32> du;
    return hn::BitCast(DF32(), hn::ShiftLeft<16>(hn::PromoteTo(du, io.Load(DU16(), p))));
  }
  template <class IO>
  static HWY_INLINE F32 LoadFinite(IO io, const T* p) {
    return Floats::Finite(Load(io, p));
  }
};

// f(Numbers()) with the struct of a dtype.
template <class F>
HWY_INLINE decltype(auto) WithDtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kF32:
      return f(Floats());
    case Dtype::kBF16:
      return f(BFloats());
    default:
      return f(Halves());
  }
}

// Typed rows x, and the means that are subtracted from them: row r's mean at mean + r *
// mean_stride, or null.
template <class Numbers>
struct Source {
  using T = typename Numbers::T;
  const T* x;
  std::size_t stride_bytes;  // modulo 2^64, as strides may be negative
  std::size_t count, dim;
  const float* mean;
  std::size_t mean_stride;

  Source(const RowsIn& in, const float* m, std::size_t m_stride)
      : x(static_cast<const T*>(in.x)),
        stride_bytes(static_cast<std::size_t>(in.stride) * sizeof(T)),
        count(in.count),
        dim(in.dim),
        mean(m),
        mean_stride(m_stride) {}
  HWY_INLINE const T* row(std::size_t r) const {
    return reinterpret_cast<const T*>(reinterpret_cast<std::uintptr_t>(x) + r * stride_bytes);
  }
};

// y = x. Maxima are those of the halves' bits without their sign: of the same order as |x|, NaN and
// Inf above all numbers.
struct PlainHalves {
  using Numbers = Halves;
  using DMax = DI16;
  static constexpr bool kHalves = true;  // y is a half

  const std::uint16_t* HWY_RESTRICT x;

  HWY_INLINE PlainHalves(const Source<Halves>& in, std::size_t t) : x(in.row(t)) {}

  template <class IO>
  HWY_INLINE F32 Load(IO io, std::size_t i) const {
    return Halves::Load(io, x + i);
  }

  HWY_INLINE hn::Vec<DMax> Max(std::size_t dim, hn::Vec<DMax> max) const {
    const hn::RebindToUnsigned<DMax> du;
    const auto magnitude = hn::Set(DMax(), 0x7FFF);
    ForVectors<Tail::kOverlap>(0, dim, hn::Lanes(DMax()), [&](auto io, std::size_t i) KVMIX_LAMBDA {
      max = hn::Max(max, hn::And(magnitude, hn::BitCast(DMax(), io.Load(du, x + i))));
    });
    return max;
  }

  // The eight rows' absmax, from vectors of their maxima.
  template <class Maxima>
  static HWY_INLINE void Reduce(const Maxima& v, float* HWY_RESTRICT absmax) {
    const auto pair = [&](std::size_t r)
                          KVMIX_LAMBDA { return PairMax<std::int16_t>(DMax(), v(r), v(r + 1)); };
    const auto low = PairMax<std::int32_t>(DMax(), pair(0), pair(2)),
               high = PairMax<std::int32_t>(DMax(), pair(4), pair(6));
    alignas(16) std::int16_t bits[kGroup];
    StoreBlockMax(DMax(), PairMax<std::int64_t>(DMax(), low, high), bits);
    const hn::CappedTag<float, kGroup> d;
    const hn::Rebind<std::int16_t, decltype(d)> d16;
    const hn::RebindToUnsigned<decltype(d16)> du16;
    for (std::size_t i = 0; i < kGroup; i += hn::Lanes(d)) {
      hn::Store(ToFloat(d, hn::BitCast(du16, hn::LoadU(d16, bits + i))), d, absmax + i);
    }
  }

  static HWY_INLINE float Value(std::int16_t max) {
    return HalfFloat(static_cast<std::uint16_t>(max));
  }

  // The largest maximum of a row within `limit`.
  static HWY_INLINE std::int16_t Bits(float limit) {
    if (limit >= 65504.0f) return 0x7BFF;
    const std::int16_t nearest = static_cast<std::int16_t>(HalfBits(limit));
    return static_cast<std::int16_t>(nearest - (Value(nearest) > limit));
  }
};

// y = x, or x - mean. Maxima are those of the bits of |y|.
template <class X, bool kMean>
struct FloatRows {
  using Numbers = X;
  using DMax = DI32;
  static constexpr bool kHalves = false;

  const typename X::T* HWY_RESTRICT x;
  const float* HWY_RESTRICT mean;

  HWY_INLINE FloatRows(const Source<X>& in, std::size_t t)
      : x(in.row(t)), mean(kMean ? in.mean + t * in.mean_stride : nullptr) {}

  template <class IO>
  HWY_INLINE F32 Load(IO io, std::size_t i) const {
    if constexpr (kMean) return hn::Sub(X::Load(io, x + i), io.Load(DF32(), mean + i));
    return X::Load(io, x + i);
  }

  HWY_INLINE hn::Vec<DMax> Max(std::size_t dim, hn::Vec<DMax> max) const {
    ForVectors<Tail::kOverlap>(0, dim, hn::Lanes(DMax()), [&](auto io, std::size_t i) KVMIX_LAMBDA {
      max = hn::Max(max, hn::BitCast(DMax(), hn::Abs(Load(io, i))));
    });
    return max;
  }

  template <class Maxima>
  static HWY_INLINE void Reduce(const Maxima& v, float* HWY_RESTRICT absmax) {
    const auto pair = [&](std::size_t r)
                          KVMIX_LAMBDA { return PairMax<std::int32_t>(DMax(), v(r), v(r + 1)); };
    alignas(16) std::int32_t bits[kGroup];
    StoreBlockMax(DMax(), PairMax<std::int64_t>(DMax(), pair(0), pair(2)), bits);
    StoreBlockMax(DMax(), PairMax<std::int64_t>(DMax(), pair(4), pair(6)), bits + kGroup / 2);
    hwy::CopyBytes<sizeof(bits)>(bits, absmax);
  }

  static HWY_INLINE float Value(std::int32_t max) { return hwy::BitCastScalar<float>(max); }
  static HWY_INLINE std::int32_t Bits(float limit) {
    return hwy::BitCastScalar<std::int32_t>(limit);
  }
};

// y = x - mean (mean may be null), finite whatever x is. Only loads: for rare rows.
template <class X>
struct CarefulRows {
  const typename X::T* HWY_RESTRICT x;
  const float* HWY_RESTRICT mean;

  HWY_INLINE CarefulRows(const Source<X>& in, std::size_t t)
      : x(in.row(t)), mean(in.mean != nullptr ? in.mean + t * in.mean_stride : nullptr) {}

  template <class IO>
  HWY_INLINE F32 Load(IO io, std::size_t i) const {
    const F32 finite = X::LoadFinite(io, x + i);
    if (mean == nullptr) return finite;
    const F32 largest = hn::Set(DF32(), kLargest);  // a difference of huge numbers may be infinite
    const F32 y = hn::Sub(finite, io.Load(DF32(), mean + i));
    return hn::Max(hn::Min(y, largest), hn::Neg(largest));
  }
};

// Asks for the row that lies some 2 KiB after row t, in L2. Rows of a head are too short for a
// CPU's own prefetchers, and two streams of them (halves and codes) more so: errors() from DRAM is
// 2 to 4 times as fast for it on Granite Rapids.
class RowPrefetcher {
 public:
  RowPrefetcher(const void* rows, std::size_t stride_bytes, std::size_t row_bytes)
      : rows_(reinterpret_cast<std::uintptr_t>(rows)),
        stride_(stride_bytes),
        bytes_(row_bytes),
        ahead_(2048 / (row_bytes + 1) + 1) {}
  HWY_INLINE void operator()(std::size_t t) const {
    const char* row = reinterpret_cast<const char*>(rows_ + (t + ahead_) * stride_);
    for (std::size_t i = 0; i < bytes_; i += 64) __builtin_prefetch(row + i, 0, 2);
  }

 private:
  std::uintptr_t rows_;
  std::size_t stride_, bytes_, ahead_;
};

// absmax of kRows rows (1 or kGroup) from row t on; room for kGroup.
template <class Rows, std::size_t kRows>
HWY_INLINE void GroupAbsMax(const Source<typename Rows::Numbers>& in, std::size_t t,
                            float* HWY_RESTRICT absmax) {
  const typename Rows::DMax d;
  constexpr std::size_t kLanes = hn::MaxLanes(d);
  HWY_ALIGN hn::TFromD<typename Rows::DMax> max[kRows * kLanes];
  for (std::size_t r = 0; r < kRows; ++r)
    hn::Store(Rows(in, t + r).Max(in.dim, hn::Zero(d)), d, max + r * kLanes);
  Rows::Reduce([&](std::size_t r) KVMIX_LAMBDA { return hn::Load(d, max + r % kRows * kLanes); },
               absmax);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace kvmix::kernels
HWY_AFTER_NAMESPACE();

#endif  // KVMIX_KERNELS_ROWS_INL_H_
