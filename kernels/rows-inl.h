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
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/rows.h"
#include "kernels/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {

using DHalves = hn::Rebind<std::uint16_t, DF>;  // kLanes of them
using DCodes = hn::Rebind<std::int8_t, DF>;

constexpr std::size_t kGroup = 8;  // rows whose maxima are reduced together
constexpr float kLargest = 3.4028234e38f;
constexpr float kLargestHalf = 65504.0f;

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
template <Tail kTail = Tail::kPartial, std::size_t kStep = kLanes, class Body>
HWY_INLINE void ForVectors(std::size_t begin, std::size_t dim, const Body& body) {
  std::size_t i = begin;
  for (; i + kStep <= dim; i += kStep) body(Whole(), i);
  if (i == dim) return;
  if (kTail == Tail::kOverlap && dim >= kStep) {
    body(Whole(), dim - kStep);
  } else {
    body(First{dim - i}, i);
  }
}

// ---- numbers

// Single numbers: to the nearest half's bits, and back.
HWY_INLINE std::uint16_t HalfBits(float x) {
  return hwy::BitCastScalar<std::uint16_t>(hwy::F16FromF32(x));
}
HWY_INLINE float HalfFloat(std::uint16_t bits) {
  return hwy::F32FromF16(hwy::float16_t::FromBits(bits));
}

template <class D>
HWY_INLINE hn::Vec<D> FromHalves(D d, hn::Vec<hn::Rebind<std::uint16_t, D>> halves) {
  const auto x = hn::PromoteTo(d, hn::BitCast(hn::Rebind<hwy::float16_t, D>(), halves));
#if HWY_ARCH_X86 && HWY_TARGET >= HWY_SSE4
  // Without F16C Highway takes infinity for 65536, NaN for what follows: set the exponent.
  const auto infinity = hn::BitCast(d, hn::Set(hn::RebindToSigned<D>(), 0x7F800000));
  return hn::Or(x, hn::IfThenElseZero(hn::Ge(hn::Abs(x), hn::Set(d, 65536.0f)), infinity));
#else
  return x;
#endif
}

// Bits of halves: NaN -> 0, infinities -> the largest half.
template <class D>
HWY_INLINE hn::Vec<D> FiniteHalves(D d, hn::Vec<D> halves) {
  const hn::RebindToSigned<D> di;  // signed: SSE2 compares nothing else
  const auto bits = hn::BitCast(di, halves);
  const auto magnitude = hn::And(bits, hn::Set(di, 0x7FFF));
  const auto finite = hn::Or(hn::Xor(bits, magnitude), hn::Min(magnitude, hn::Set(di, 0x7BFF)));
  return hn::BitCast(d, hn::IfThenZeroElse(hn::Gt(magnitude, hn::Set(di, 0x7C00)), finite));
}

template <class IO>
HWY_INLINE void Put(IO io, VF v, float* to) {
  io.Store(v, DF(), to);
}
template <class IO>
HWY_INLINE void Put(IO io, VF v, std::uint16_t* to) {
  const hn::Rebind<hwy::float16_t, DF> d;
  io.Store(hn::BitCast(DHalves(), hn::DemoteTo(d, v)), DHalves(), to);
}

// x, but not beyond +-most. x: f32 or i32.
template <class V>
HWY_INLINE V Clamp(V x, V most) {
  return hn::Max(hn::Min(x, most), hn::Neg(most));
}

// Rounds to nearest even what lies in an integer's range.
HWY_INLINE VI32 Nearest(VF x) {
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
HWY_INLINE VI8 Pack(VI32 a, VI32 b, VI32 c, VI32 d) {
  const VI16 ab = hn::ReorderDemote2To(DI16(), a, b), cd = hn::ReorderDemote2To(DI16(), c, d);
  const VI8 abcd = hn::ReorderDemote2To(DI8(), ab, cd);
  // Demotions work within 128-bit blocks: block k now holds the k-th blocks of a, b, c and d.
  constexpr std::size_t kBlocks = hn::MaxLanes(DI8()) / 16;
  if constexpr (kBlocks == 1) {
    return abcd;
  } else {
    static constexpr auto kOrder = PackedOrder<kBlocks>();
    return hn::BitCast(DI8(), hn::TableLookupLanes(hn::BitCast(DI32(), abcd),
                                                   hn::SetTableIndices(DI32(), kOrder.data())));
  }
}

// Lane-wise max of a and b, halved: pairs of lanes of type T of the result come from a and b in
// turns.
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

// ---- rows

// The types that rows come in.
struct Halves {
  using T = std::uint16_t;
  template <class IO>
  static HWY_INLINE VF Load(IO io, const T* p) {
    return FromHalves(DF(), io.Load(DHalves(), p));
  }
};
struct Floats {
  using T = float;
  template <class IO>
  static HWY_INLINE VF Load(IO io, const T* p) {
    return io.Load(DF(), p);
  }
};
struct BFloats {
  using T = std::uint16_t;
  template <class IO>
  static HWY_INLINE VF Load(IO io, const T* p) {
    const hn::RebindToUnsigned<DF> du;
    return hn::BitCast(DF(), hn::ShiftLeft<16>(hn::PromoteTo(du, io.Load(DHalves(), p))));
  }
};

// NaN as 0, infinities as +-65504. Halves are cheaper by their bits: 6 % of errors().
template <class X, class IO>
HWY_INLINE VF LoadFinite(IO io, const typename X::T* p) {
  if constexpr (std::is_same_v<X, Halves>) {
    return FromHalves(DF(), FiniteHalves(DHalves(), io.Load(DHalves(), p)));
  } else {
    const VF x = X::Load(io, p), bound = hn::CopySign(hn::Set(DF(), kLargestHalf), x);
    return hn::IfThenZeroElse(hn::IsNaN(x), hn::IfThenElse(hn::IsInf(x), bound, x));
  }
}

// f(X()) with the struct of a dtype.
template <class F>
HWY_INLINE decltype(auto) WithDtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case KVMIX_F32:
      return f(Floats());
    case KVMIX_BF16:
      return f(BFloats());
    case KVMIX_F16:
      break;
  }
  return f(Halves());
}

// Typed rows x, and the means to subtract: row r's at mean + r * mean_stride, or null.
template <class X>
struct Source {
  using T = typename X::T;
  const T* x;
  std::size_t stride_bytes;  // modulo 2^64, as strides may be negative
  std::size_t count, dim;
  const float* mean;
  std::size_t mean_stride;

  explicit Source(const RowsIn& in, const float* m = nullptr, std::size_t m_stride = 0)
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
  HWY_INLINE VF Load(IO io, std::size_t i) const {
    return Halves::Load(io, x + i);
  }

  HWY_INLINE VI16 Max(std::size_t dim, VI16 max) const {
    const hn::RebindToUnsigned<DMax> du;
    const VI16 magnitude = hn::Set(DMax(), 0x7FFF);
    ForVectors<Tail::kOverlap, 2 * kLanes>(0, dim, [&](auto io, std::size_t i) KVMIX_LAMBDA {
      max = hn::Max(max, hn::And(magnitude, hn::BitCast(DMax(), io.Load(du, x + i))));
    });
    return max;
  }

  // The eight rows' absmax, from vectors of their maxima.
  template <class Maxima>
  static HWY_INLINE void Reduce(const Maxima& v, float* HWY_RESTRICT absmax) {
    const auto pair = [&](std::size_t r)
                          KVMIX_LAMBDA { return PairMax<std::int16_t>(DMax(), v(r), v(r + 1)); };
    const VI16 low = PairMax<std::int32_t>(DMax(), pair(0), pair(2)),
               high = PairMax<std::int32_t>(DMax(), pair(4), pair(6));
    alignas(16) std::uint16_t bits[kGroup];
    StoreBlockMax(DMax(), PairMax<std::int64_t>(DMax(), low, high),
                  reinterpret_cast<std::int16_t*>(bits));
    const hn::CappedTag<float, kGroup> d;
    const hn::Rebind<std::uint16_t, decltype(d)> d16;
    for (std::size_t i = 0; i < kGroup; i += hn::Lanes(d))
      hn::Store(FromHalves(d, hn::LoadU(d16, bits + i)), d, absmax + i);
  }

  static HWY_INLINE float Value(std::int16_t max) {
    return HalfFloat(static_cast<std::uint16_t>(max));
  }

  // The largest maximum of a row within `limit`.
  static HWY_INLINE std::int16_t Bits(float limit) {
    if (limit >= kLargestHalf) return 0x7BFF;
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
  HWY_INLINE VF Load(IO io, std::size_t i) const {
    if constexpr (kMean) return hn::Sub(X::Load(io, x + i), io.Load(DF(), mean + i));
    return X::Load(io, x + i);
  }

  HWY_INLINE VI32 Max(std::size_t dim, VI32 max) const {
    ForVectors<Tail::kOverlap>(0, dim, [&](auto io, std::size_t i) KVMIX_LAMBDA {
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

// y = x - mean (mean may be null), finite whatever x is, and not beyond +-most (a difference of
// huge numbers may be infinite). Only loads.
template <class X>
struct CarefulRows {
  const typename X::T* HWY_RESTRICT x;
  const float* HWY_RESTRICT mean;
  VF most;

  HWY_INLINE CarefulRows(const Source<X>& in, std::size_t t, float largest = kLargest)
      : x(in.row(t)),
        mean(in.mean != nullptr ? in.mean + t * in.mean_stride : nullptr),
        most(hn::Set(DF(), largest)) {}

  template <class IO>
  HWY_INLINE VF Load(IO io, std::size_t i) const {
    VF y = LoadFinite<X>(io, x + i);
    if (mean != nullptr) y = hn::Sub(y, io.Load(DF(), mean + i));
    return Clamp(y, most);
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

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
