// Per target: "rows times tile", the one product that both QK and PV are, for each storage of the
// tile.
//
//   sum[r][lane] = sum over terms of row[r][term] * tile[term][lane]
//
// A storage is a struct of a few one-liners: how a tile vector is loaded (this is where a 4-bit
// tile would unpack), how a row's terms are broadcast, and how the two are multiplied and added.
// Multiply() walks the tile once for up to kMaxRows rows and kVecs tile vectors, all sums in
// registers: 4 rows x 2 vectors x 2 limbs, or 8 x 2 of one sum each, are 16 of AVX-512's 32
// registers, 4 x 2 sums 8 of AVX2's 16, which leaves gcc and clang room for the tile and a row. One
// or two rows take more vectors where these are short, so that enough independent sums hide the
// latency (4 or 5 cycles at two a cycle).
#if defined(KVMIX_KERNELS_ATTEND_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVMIX_KERNELS_ATTEND_INL_H_
#undef KVMIX_KERNELS_ATTEND_INL_H_
#else
#define KVMIX_KERNELS_ATTEND_INL_H_
#endif

#include <cstring>
#include <utility>

#include "hwy/highway.h"
#include "kernels/per_target.h"
#include "kernels/tiles-inl.h"

// Before a loop: one copy of its body, one load instruction for what walks memory (see
// StreamVecsFor).
#undef KVMIX_ROLLED
#if defined(__clang__)
#define KVMIX_ROLLED _Pragma("clang loop unroll(disable)")
#else
#define KVMIX_ROLLED _Pragma("GCC unroll 1")
#endif

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {

using DI16 = hn::ScalableTag<std::int16_t>;
using DU8 = hn::ScalableTag<std::uint8_t>;
using DI8 = hn::ScalableTag<std::int8_t>;
using VF = hn::Vec<DF>;
using VI32 = hn::Vec<DI32>;

constexpr float kSmallestExponent = -100.0f;  // of 2; see Exp2
constexpr bool kManyRegisters = HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64;
constexpr std::size_t kMaxRows = kManyRegisters ? 8 : 4;
// Whether a row has two sums for a tile vector: byte limbs, or smlal's and smlal2's.
HWY_INLINE constexpr bool TwoSums(TileStorage s) {
  return s == TileStorage::kI8 && (KVMIX_QUADS || !HWY_ARCH_X86);
}
// Rows of a turn, of `rows` in all: as many as share a tile vector's load (f16: and its conversion)
// in registers. Eight rows with two sums leave room for one tile vector only, and their broadcast
// loads bind (17 for 16 products; 10 with four rows and two vectors). That pays where a vector is a
// cache line from memory and one turn is all: 10-17 % there, -5 % elsewhere (Granite Rapids).
HWY_INLINE constexpr std::size_t TurnRows(TileStorage s, std::size_t rows, bool stream) {
  return !TwoSums(s) || (VectorBytes(s) == 64 && stream && rows <= kMaxRows) ? kMaxRows : 4;
}
HWY_INLINE constexpr std::size_t VecsFor(TileStorage s, std::size_t rows) {
  return TwoSums(s) && rows > 4 ? 1 : VectorBytes(s) < 64 && rows <= 2 ? 4 : 2;
}
// Where the tile comes from memory: one cache line a step, so that one load instruction walks
// memory from front to end. On Granite Rapids, whose prefetchers follow instructions, that reads a
// cold cache at 0.92-0.97 of DRAM's speed, two lines a step at 0.70-0.83.
HWY_INLINE constexpr std::size_t StreamVecsFor(TileStorage s, std::size_t rows) {
  return HWY_MIN(VecsFor(s, rows), 64 / VectorBytes(s));
}

// f(0), f(1), … f(N - 1) with the number as a compile-time constant: arrays of vectors indexed by
// it stay in registers.
template <class F, std::size_t... I>
HWY_INLINE void UnrollImpl(F&& f, std::index_sequence<I...>) {
  (f(std::integral_constant<std::size_t, I>()), ...);
}
template <std::size_t N, class F>
HWY_INLINE void Unroll(F&& f) {
  UnrollImpl(f, std::make_index_sequence<N>());
}

template <typename T>
HWY_INLINE T LoadScalar(const std::uint8_t* p) {
  T t;
  std::memcpy(&t, p, sizeof(T));
  return t;
}

// An i32 vector that lives in a loop, as the compiler's own vector type. gcc keeps Highway's
// __m256i and __m512i (of i64) as loop variables of that type, converts them to i32 and back in
// each round, and pays with a register move for every product.
struct LoopI32 {
#if HWY_ARCH_X86
  typedef std::int32_t Native __attribute__((vector_size(sizeof(VI32))));
#else
  using Native = decltype(VI32::raw);
#endif
  Native native;
  HWY_INLINE void Set(VI32 v) { native = reinterpret_cast<Native>(v.raw); }
  HWY_INLINE VI32 Get() const { return VI32{reinterpret_cast<decltype(VI32::raw)>(native)}; }
};

// What a row of q says of itself beside its terms.
struct RowInfo {
  float scale;                         // of the terms, times attention_scale
  std::int32_t start_high, start_low;  // first values of the sums (what undoes K's flipped sign)
};

// f16 tile, f32 rows.
struct F16Product {
  static constexpr TileStorage kStorage = TileStorage::kF16;
  static constexpr std::size_t kTermBytes = 4;  // of a row, for a step
  using Sum = VF;
  static HWY_INLINE void Start(const RowInfo&, Sum& sum) { sum = hn::Zero(DF()); }
  static HWY_INLINE VF Tile(const std::uint8_t* p) {
    const hn::Rebind<hwy::float16_t, DF> dh;
    return hn::PromoteTo(DF(), hn::LoadU(dh, reinterpret_cast<const hwy::float16_t*>(p)));
  }
  static HWY_INLINE VF Terms(const std::uint8_t* at, std::size_t) {
    return hn::Set(DF(), LoadScalar<float>(at));
  }
  static HWY_INLINE void MulAdd(Sum& sum, VF tile, VF terms) { sum = hn::MulAdd(tile, terms, sum); }
  static HWY_INLINE VF ToFloat(const Sum& sum) { return sum; }
};

#if KVMIX_QUADS
// i8 tile in quads, rows as two byte limbs: row = 256 * high + low, a quad of high and one of low
// for a step. vpdpbusd: in QK the tile is the unsigned operand (code ^ 0x80; RowInfo's start is
// -128 * sum of limbs) and the limbs are signed, in PV the limbs are unsigned. sdot: all are
// signed.
template <bool kTileUnsigned>
struct QuadProduct {
  static constexpr TileStorage kStorage = TileStorage::kI8;
  static constexpr std::size_t kTermBytes = 8;
  struct Sum {
    LoopI32 high, low;
  };
  struct Limbs {
    VI32 high, low;
  };
  static HWY_INLINE void Start(const RowInfo& r, Sum& sum) {
    sum.high.Set(hn::Set(DI32(), r.start_high));
    sum.low.Set(hn::Set(DI32(), r.start_low));
  }
  static HWY_INLINE VI32 Tile(const std::uint8_t* p) {
    return hn::LoadU(DI32(), reinterpret_cast<const std::int32_t*>(p));
  }
  static HWY_INLINE Limbs Terms(const std::uint8_t* at, std::size_t to_low) {
    return {hn::Set(DI32(), LoadScalar<std::int32_t>(at)),
            hn::Set(DI32(), LoadScalar<std::int32_t>(at + to_low))};
  }
  static HWY_INLINE VI32 Dot(VI32 sum, VI32 tile, VI32 limb) {
#if !KVMIX_UNSIGNED_QUADS
    return hn::SumOfMulQuadAccumulate(DI32(), hn::BitCast(DI8(), tile), hn::BitCast(DI8(), limb),
                                      sum);
#else
    const VI32 u = kTileUnsigned ? tile : limb, i = kTileUnsigned ? limb : tile;
    return hn::SumOfMulQuadAccumulate(DI32(), hn::BitCast(DU8(), u), hn::BitCast(DI8(), i), sum);
#endif
  }
  static HWY_INLINE void MulAdd(Sum& sum, VI32 tile, const Limbs& limbs) {
    sum.high.Set(Dot(sum.high.Get(), tile, limbs.high));
    sum.low.Set(Dot(sum.low.Get(), tile, limbs.low));
  }
  static HWY_INLINE VF ToFloat(const Sum& sum) {
    return hn::MulAdd(hn::ConvertTo(DF(), sum.high.Get()), hn::Set(DF(), 256.0f),
                      hn::ConvertTo(DF(), sum.low.Get()));
  }
};
using KI8Product = QuadProduct<true>;
using VI8Product = QuadProduct<false>;
#else
// i8 tile in pairs, widened once for all rows; rows are i16. vpmaddwd adds the two products of a
// pair by itself; elsewhere (smlal, smlal2) two vectors of sums take turns and are added in pairs
// at the end.
struct PairProduct {
  static constexpr TileStorage kStorage = TileStorage::kI8;
  static constexpr std::size_t kTermBytes = 4;
  using VI16 = hn::Vec<DI16>;
#if HWY_ARCH_X86
  using Sum = LoopI32;
  static HWY_INLINE void Start(const RowInfo&, Sum& sum) { sum.Set(hn::Zero(DI32())); }
  static HWY_INLINE void MulAdd(Sum& sum, VI16 tile, VI16 terms) {
    sum.Set(hn::Add(sum.Get(), hn::WidenMulPairwiseAdd(DI32(), tile, terms)));
  }
  static HWY_INLINE VF ToFloat(const Sum& sum) { return hn::ConvertTo(DF(), sum.Get()); }
#else
  struct Sum {
    LoopI32 a, b;
  };
  static HWY_INLINE void Start(const RowInfo&, Sum& sum) {
    sum.a.Set(hn::Zero(DI32()));
    sum.b.Set(hn::Zero(DI32()));
  }
  static HWY_INLINE void MulAdd(Sum& sum, VI16 tile, VI16 terms) {
    VI32 b = sum.b.Get();
    sum.a.Set(hn::ReorderWidenMulAccumulate(DI32(), tile, terms, sum.a.Get(), b));
    sum.b.Set(b);
  }
  static HWY_INLINE VF ToFloat(const Sum& sum) {
    return hn::ConvertTo(DF(), hn::RearrangeToOddPlusEven(sum.a.Get(), sum.b.Get()));
  }
#endif
  static HWY_INLINE VI16 Tile(const std::uint8_t* p) {
    const hn::Rebind<std::int8_t, DI16> d8;
    return hn::PromoteTo(DI16(), hn::LoadU(d8, reinterpret_cast<const std::int8_t*>(p)));
  }
  static HWY_INLINE VI16 Terms(const std::uint8_t* at, std::size_t) {
    return hn::BitCast(DI16(), hn::Set(DI32(), LoadScalar<std::int32_t>(at)));
  }
};
using KI8Product = PairProduct;
using VI8Product = PairProduct;
#endif

// Fetches the next block into L2 while this one is read: the first turn of rows would else wait for
// memory; the others find the block in L2 anyway, and fetch their share. Not into L1, which would
// hold its few miss buffers for longer. Even so these buffers bind: lines must be asked for once
// and at an even pace, a line for a line that is read, and those of the scales, which are read
// aside, in softmax's steps. (Bursts in softmax that asked for some lines twice cost 5-15 % of a
// cold decode on Granite Rapids.)
struct Prefetcher {
  const std::uint8_t* next;
  std::size_t turns;  // that share in fetching; 0: this turn fetches nothing

  // A step of reading kBytes; `step` of them are this turn's share.
  template <std::size_t kBytes>
  HWY_INLINE void Advance(std::size_t step) {
    for (std::size_t line = 0; line < kBytes; line += 64) __builtin_prefetch(next + line, 0, 2);
    next += step;
  }
  HWY_INLINE void FetchLine() {
    __builtin_prefetch(next, 0, 2);
    next += 64;
  }
};

// Where the terms of row r for a step lie: at r * kRow + step * kStep, low limbs kToLow bytes after
// the high ones. All are constants, so that one register addresses the rows.
template <class P, std::size_t kRows>
struct QueryTerms {  // [steps][kRows][kTermBytes]
  static constexpr std::size_t kRow = P::kTermBytes, kStep = kRows * kRow, kToLow = 4;
};
struct WeightTerms {  // [kMaxRows][limbs][kBlockTokens], 4 bytes a token in all
  static constexpr std::size_t kRow = 4 * kBlockTokens, kStep = 4, kToLow = kBlockTokens;
};

// One register block: kRows rows times kVecs neighbouring tile vectors (tile_bytes apart), over
// steps [first, last). emit(row, vec, sums as floats) is called for every pair.
template <class P, class Terms, std::size_t kRows, std::size_t kVecs, class Emit>
HWY_INLINE void Multiply(const std::uint8_t* tile, std::size_t tile_bytes, const std::uint8_t* rows,
                         const RowInfo* info, std::size_t first, std::size_t last,
                         Prefetcher& prefetcher, const Emit& emit) {
  constexpr std::size_t kVectorBytes = VectorBytes(P::kStorage);
  Prefetcher prefetch = prefetcher;  // in registers
  const std::size_t share = prefetch.turns != 0 ? kVecs * kVectorBytes / prefetch.turns : 0;
  typename P::Sum sum[kRows][kVecs];
  Unroll<kRows>([&](auto r) KVMIX_LAMBDA {
    Unroll<kVecs>([&](auto v) KVMIX_LAMBDA { P::Start(info[r], sum[r][v]); });
  });
  KVMIX_ROLLED
  for (std::size_t step = first; step < last; ++step) {
    decltype(P::Tile(tile)) t[kVecs];
    Unroll<kVecs>(
        [&](auto v) KVMIX_LAMBDA { t[v] = P::Tile(tile + v * tile_bytes + step * kVectorBytes); });
    if (prefetch.turns != 0) prefetch.template Advance<kVecs * kVectorBytes>(share);
    Unroll<kRows>([&](auto r) KVMIX_LAMBDA {
      const auto terms = P::Terms(rows + r * Terms::kRow + step * Terms::kStep, Terms::kToLow);
      Unroll<kVecs>([&](auto v) KVMIX_LAMBDA { P::MulAdd(sum[r][v], t[v], terms); });
    });
  }
  prefetcher = prefetch;
  Unroll<kRows>([&](auto r) KVMIX_LAMBDA {
    Unroll<kVecs>([&](auto v) KVMIX_LAMBDA { emit(r, v, P::ToFloat(sum[r][v])); });
  });
}

// 2^x, relative error 8e-5 (so NMSE 6e-9 at most, a hundredth of what the attention may cost); x
// below -100 and NaN count as -100, so that no product with the result becomes a denormal (those
// cost a hundred cycles each on some CPUs). x < 2^22.
HWY_INLINE VF Exp2(VF x) {
  const DF df;
  const DI32 di;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the lowest bits: cheaper than
  // conversions, which must mind overflow.
  const VF round = hn::Set(df, 0x1.8p23f);
  const VF clamped = hn::Max(x, hn::Set(df, kSmallestExponent));
  const VF n = hn::Add(clamped, round);
  const VF f = hn::Sub(clamped, hn::Sub(n, round));
  VF p = hn::MulAdd(f, hn::Set(df, 0.0551716648042202f), hn::Set(df, 0.2426111251115799f));
  p = hn::MulAdd(p, f, hn::Set(df, 0.6932609677314758f));
  p = hn::MulAdd(p, f, hn::Set(df, 0.9999280571937561f));
  return hn::BitCast(df, hn::Add(hn::BitCast(di, p), hn::ShiftLeft<23>(hn::BitCast(di, n))));
}

// An upper bound of log2(v_scale), at most 0.09 above it: the exponent, and the mantissa on a
// straight line. At least -32, below the scales of halves (2^-24 / 127), so that tokens without any
// V leave room for the sum of all weights.
HWY_INLINE VF Log2Bound(VF x) {
  const DF df;
  const DI32 di;
  const VF log2 = hn::MulAdd(hn::ConvertTo(df, hn::BitCast(di, x)), hn::Set(df, 0x1p-23f),
                             hn::Set(df, 0.0863f - 127.0f));
  return hn::Max(log2, hn::Set(df, -32.0f));
}

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
