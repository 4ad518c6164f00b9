// Per target: "rows times tile", the one product that both QK and PV are.
//
//   sum[r][lane] = sum over terms of row[r][term] * tile[term][lane]
//
// A product is a struct: how a row (of q, or of softmax weights) becomes terms, how these are
// broadcast, multiplied by a tile's codes and added. Multiply() walks the tile once for up
// to kMaxRows rows and kVecs tile vectors, with all sums in registers: 4 rows x 2 vectors x 2
// limbs, or 8 x 2 of one sum each, are 16 of AVX-512's 32; 6 x 2 are 12 of AVX2's 16. One or two
// rows take more vectors where these are short, to hide the latency (4 or 5 cycles at two a cycle).
#if defined(KVMIX_KERNELS_PRODUCT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVMIX_KERNELS_PRODUCT_INL_H_
#undef KVMIX_KERNELS_PRODUCT_INL_H_
#else
#define KVMIX_KERNELS_PRODUCT_INL_H_
#endif

#include <type_traits>
#include <utility>

#include "hwy/highway.h"
#include "kernels/storage-inl.h"
#include "kernels/vectors-inl.h"

// Before a loop: one copy of its body, so that one load instruction walks memory (see
// kStreamVecs).
#undef KVMIX_ROLLED
#if defined(__clang__)
#define KVMIX_ROLLED _Pragma("clang loop unroll(disable)")
#else
#define KVMIX_ROLLED _Pragma("GCC unroll 1")
#endif

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {

constexpr bool kManyRegisters = HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64;
constexpr std::size_t kMaxRows = kManyRegisters ? 8 : 6;

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
  float scale;            // of the terms, times attention_scale
  std::int32_t start[2];  // first values of the limbs' sums (what undoes K's flipped sign)
};

// Vectors of tokens whose weights become terms at a time: 64 bytes of a limb on AVX-512.
constexpr std::size_t kWeightVecs = 4;
using WeightVectors = VF[kWeightVecs];

// Tokens of a block whose weights share a grid, by the bits of a weight: docs/numerics.md.
constexpr std::size_t ScaledTokens(std::size_t bits) { return bits == 8 ? 64 : kBlockTokens; }

// A weight of 8 bits is rounded down after something has been added that its token's place in 64
// decides: from 1/8 to 7/8, in the order of the place's bits reversed, so that weights that are
// alike keep their sum. Here with the 2^15 of WeightCodes.
struct Dither {
  alignas(64) float added[ScaledTokens(8)];
};
constexpr Dither MakeDither() {
  constexpr std::size_t kTokens = ScaledTokens(8);
  Dither dither{};
  for (std::size_t t = 0; t < kTokens; ++t) {
    std::size_t reversed = 0;
    for (std::size_t bit = 1; bit < kTokens; bit *= 2) reversed = 2 * reversed + t / bit % 2;
    dither.added[t] = 0x1p15f + 0.125f + 0.75f * (static_cast<float>(reversed) + 0.5f) / kTokens;
  }
  return dither;
}

// Codes of the weights from `token` on, in the lowest 16 bits. In 16 bits: adding 2^23 rounds to an
// integer and leaves it there. In 8 bits: adding 2^15 leaves the integer in the upper 8 of these 16
// and what is lost by rounding down below it.
template <std::size_t kBits>
HWY_INLINE VI32 WeightCodes(VF e, const float* scale, std::size_t token) {
  static constexpr Dither kDither = MakeDither();
  VF added = hn::Set(DF(), 0x1p23f);
  if constexpr (kBits == 8) added = hn::Load(DF(), kDither.added + token % ScaledTokens(kBits));
  return hn::BitCast(DI32(), hn::MulAdd(e, hn::LoadU(DF(), scale + token), added));
}

// A tile of floats, rows of f32. Weights are not multiplied by V's scale, which is 1.
struct FloatProduct {
  using Stored = F16;
  static constexpr bool kFixedPoint = false;
  static constexpr bool kIsOfK = false;         // the same tile vectors for both
  static constexpr std::size_t kTermBytes = 4;  // of a row, for a step
  static constexpr bool kTwoSums = false;       // a row's, for one tile vector
  static constexpr float kLargestQuery = 1.0f, kLargestWeight = 1.0f;
  static constexpr std::size_t kScaledTokens = kBlockTokens;  // that share a weight_scale
  using Sum = VF;
  static HWY_INLINE void Start(const RowInfo&, Sum& sum) { sum = hn::Zero(DF()); }
  static HWY_INLINE VF Terms(const std::uint8_t* at, std::size_t) {
    return hn::Set(DF(), LoadScalar<float>(at));
  }
  static HWY_INLINE void MulAdd(Sum& sum, VF tile, VF terms) { sum = hn::MulAdd(tile, terms, sum); }
  static HWY_INLINE VF ToFloat(const Sum& sum) { return sum; }

  static HWY_INLINE void PackQuery(VF q, VF, std::uint8_t* to, VI32*) {
    hn::StoreU(q, DF(), reinterpret_cast<float*>(to));
  }
  static HWY_INLINE void PackWeights(const WeightVectors& e, const float*, std::size_t token,
                                     std::uint8_t* row) {
    float* to = reinterpret_cast<float*>(row) + token;
    Unroll<kWeightVecs>([&](auto i) KVMIX_LAMBDA { hn::StoreU(e[i], DF(), to + i * kLanes); });
  }
};

#if KVMIX_QUADS
// A tile of bytes in quads; rows are one byte limb (kBits 8) or two (kBits 16: row = 256 * high +
// low), a quad of each for a step. vpdpbusd: in QK the tile is the unsigned operand (code ^ 0x80;
// RowInfo's start is -128 * sum of a limb) and the limbs are signed, in PV the limbs are unsigned.
// sdot: all are signed, so that weights of 8 bits take two limbs as well.
template <class S, bool kOfK, std::size_t kBits>
struct IntProduct {
  using Stored = S;
  static constexpr bool kFixedPoint = true, kIsOfK = kOfK;
  static constexpr std::size_t kLimbs = kBits == 8 && (kOfK || KVMIX_UNSIGNED_QUADS) ? 1 : 2;
  static constexpr std::size_t kTermBytes = 4 * kLimbs;
  static constexpr bool kTwoSums = kLimbs == 2;
  // 127 * 256: a rounded high limb fits.
  static constexpr float kLargestQuery = kBits == 8 ? 127.0f : 32512.0f;
  // With room for the error of Exp2, and for what is added before rounding down.
  static constexpr float kLargestWeight = kBits == 8             ? 254.5f
                                          : KVMIX_UNSIGNED_QUADS ? 65500.0f
                                                                 : 32500.0f;
  static constexpr std::size_t kScaledTokens = ScaledTokens(kBits);
  struct Sum {
    LoopI32 limb[kLimbs];  // the high one first
  };
  struct Limbs {
    VI32 limb[kLimbs];
  };
  static HWY_INLINE void Start(const RowInfo& r, Sum& sum) {
    Unroll<kLimbs>([&](auto i) KVMIX_LAMBDA { sum.limb[i].Set(hn::Set(DI32(), r.start[i])); });
  }
  static HWY_INLINE Limbs Terms(const std::uint8_t* at, std::size_t to_low) {
    Limbs limbs;
    Unroll<kLimbs>([&](auto i) KVMIX_LAMBDA {
      limbs.limb[i] = hn::Set(DI32(), LoadScalar<std::int32_t>(at + i * to_low));
    });
    return limbs;
  }
  static HWY_INLINE VI32 Dot(VI32 sum, VI32 tile, VI32 limb) {
#if !KVMIX_UNSIGNED_QUADS
    return hn::SumOfMulQuadAccumulate(DI32(), hn::BitCast(DI8(), tile), hn::BitCast(DI8(), limb),
                                      sum);
#else
    const VI32 u = kOfK ? tile : limb, i = kOfK ? limb : tile;
    return hn::SumOfMulQuadAccumulate(DI32(), hn::BitCast(DU8(), u), hn::BitCast(DI8(), i), sum);
#endif
  }
  static HWY_INLINE void MulAdd(Sum& sum, VI32 tile, const Limbs& limbs) {
    Unroll<kLimbs>(
        [&](auto i) KVMIX_LAMBDA { sum.limb[i].Set(Dot(sum.limb[i].Get(), tile, limbs.limb[i])); });
  }
  static HWY_INLINE void Add(Sum& sum, const Sum& other) {
    Unroll<kLimbs>([&](auto i) KVMIX_LAMBDA {
      sum.limb[i].Set(hn::Add(sum.limb[i].Get(), other.limb[i].Get()));
    });
  }
  static HWY_INLINE VF ToFloat(const Sum& sum) {
    const VF first = hn::ConvertTo(DF(), sum.limb[0].Get());
    if constexpr (kLimbs == 1) return first;
    return hn::MulAdd(first, hn::Set(DF(), 256.0f),
                      hn::ConvertTo(DF(), sum.limb[kLimbs - 1].Get()));
  }

  // to: a vector of codes for each limb, which are added to its sum.
  static HWY_INLINE void PackQuery(VF q, VF inv_scale, std::uint8_t* to, VI32* sums) {
    const hn::Rebind<std::int8_t, DI32> d8;
    const auto put = [&](auto limb, VI32 codes) KVMIX_LAMBDA {
      hn::StoreU(hn::DemoteTo(d8, codes), d8, reinterpret_cast<std::int8_t*>(to + limb * kLanes));
      sums[limb] = hn::Add(sums[limb], codes);
    };
    const VI32 code = hn::NearestInt(hn::Mul(q, inv_scale));
    if constexpr (kLimbs == 1) {
      put(std::integral_constant<std::size_t, 0>(), code);
    } else {
      const VI32 high = hn::ShiftRight<8>(hn::Add(code, hn::Set(DI32(), 128)));
      put(std::integral_constant<std::size_t, 0>(), high);
      put(std::integral_constant<std::size_t, 1>(), hn::Sub(code, hn::ShiftLeft<8>(high)));
    }
  }
  static HWY_INLINE void PackWeights(const WeightVectors& e, const float* scale, std::size_t token,
                                     std::uint8_t* row) {
    const hn::ScalableTag<std::uint16_t> d16;
    const DU8 d8;
    const auto pair = [&](auto i) KVMIX_LAMBDA {
      const hn::RebindToUnsigned<DI32> d32;
      const std::size_t t = token + i * kLanes;
      const auto codes =
          hn::OrderedTruncate2To(d16, hn::BitCast(d32, WeightCodes<kBits>(e[i], scale, t)),
                                 hn::BitCast(d32, WeightCodes<kBits>(e[i + 1], scale, t + kLanes)));
      if constexpr (kBits == 8 && kLimbs == 2) return hn::ShiftRight<8>(codes);
      return codes;
    };
    const auto lower = pair(std::integral_constant<std::size_t, 0>());
    const auto upper = pair(std::integral_constant<std::size_t, 2>());
    // A signed low limb wants the high one rounded; its own bits are the same.
    const auto round = hn::Set(d16, KVMIX_UNSIGNED_QUADS ? 0 : 128);
    hn::StoreU(hn::ConcatOdd(d8, hn::BitCast(d8, hn::Add(upper, round)),
                             hn::BitCast(d8, hn::Add(lower, round))),
               d8, row + token);
    if constexpr (kLimbs == 1) return;
    hn::StoreU(hn::ConcatEven(d8, hn::BitCast(d8, upper), hn::BitCast(d8, lower)), d8,
               row + kBlockTokens + token);
  }
};
// The bits of an operand that products of their own multiply.
template <std::size_t kBits>
constexpr std::size_t kMultipliedBits = kBits;
#else
// A tile of bytes in pairs, widened once for all rows; rows are i16, whatever their bits.
// vpmaddwd adds the two products of a pair by itself, and `b` stays 0; elsewhere (smlal, smlal2)
// two vectors of sums take turns and are added in pairs at the end.
template <class S, bool kOfK, std::size_t kBits>
struct IntProduct {
  using Stored = S;
  static constexpr bool kFixedPoint = true, kIsOfK = kOfK;
  static constexpr std::size_t kTermBytes = 4;
  static constexpr bool kTwoSums = !HWY_ARCH_X86;
  static constexpr float kLargestQuery = kBits == 8 ? 127.0f : 32767.0f;
  // With room for the error of Exp2, and for what is added before rounding down.
  static constexpr float kLargestWeight = kBits == 8 ? 254.5f : 32750.0f;
  static constexpr std::size_t kScaledTokens = ScaledTokens(kBits);
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
  static HWY_INLINE VI16 Terms(const std::uint8_t* at, std::size_t) {
    return hn::BitCast(DI16(), hn::Set(DI32(), LoadScalar<std::int32_t>(at)));
  }

  static HWY_INLINE void PackQuery(VF q, VF inv_scale, std::uint8_t* to, VI32*) {
    const hn::Rebind<std::int16_t, DI32> d16;
    hn::StoreU(hn::DemoteTo(d16, hn::NearestInt(hn::Mul(q, inv_scale))), d16,
               reinterpret_cast<std::int16_t*>(to));
  }
  static HWY_INLINE void PackWeights(const WeightVectors& e, const float* scale, std::size_t token,
                                     std::uint8_t* row) {
    const DI16 d16;
    std::int16_t* to = reinterpret_cast<std::int16_t*>(row) + token;
    const auto codes = [&](auto i) KVMIX_LAMBDA {
      const VI32 code =
          hn::And(WeightCodes<kBits>(e[i], scale, token + i * kLanes), hn::Set(DI32(), 0xFFFF));
      if constexpr (kBits == 8) return hn::ShiftRight<8>(code);
      return code;
    };
    Unroll<2>([&](auto i) KVMIX_LAMBDA {
      constexpr std::integral_constant<std::size_t, 2 * i> kFirst;
      constexpr std::integral_constant<std::size_t, 2 * i + 1> kSecond;
      hn::StoreU(hn::OrderedDemote2To(d16, codes(kFirst), codes(kSecond)), d16,
                 to + kFirst * kLanes);
    });
  }
};
template <std::size_t>
constexpr std::size_t kMultipliedBits = 16;
#endif

// The products of tiles as K and as V, with operands of kBits.
template <class S, std::size_t kBits>
using KProduct =
    std::conditional_t<std::is_same_v<S, F16>, FloatProduct, IntProduct<S, true, kBits>>;
template <class S, std::size_t kBits>
using VProduct =
    std::conditional_t<std::is_same_v<S, F16>, FloatProduct, IntProduct<S, false, kBits>>;

// Most rows of a turn: as many as share a tile vector's load (f16: and its conversion) in
// registers. Eight rows with two sums leave room for one tile vector only, and their broadcast
// loads bind (17 for 16 products; four rows and two vectors need 10). Eight pay where a vector is a
// cache line from memory and one turn is all: 10-17 % there, -5 % elsewhere (Granite Rapids).
template <class P>
constexpr std::size_t kTurnRows = P::kTwoSums ? 4 : kMaxRows;
template <class P>
constexpr std::size_t kOneTurnRows = P::Stored::kGroupBytes >= 64 ? kMaxRows : kTurnRows<P>;
// Tile vectors of a register block.
template <class P, std::size_t kRows>
constexpr std::size_t kHotVecs = (P::kTwoSums && kRows > 4)                  ? 1
                                 : P::Stored::kGroupBytes < 64 && kRows <= 2 ? 4
                                                                             : 2;
// Where the tile comes from memory, one cache line a step: one load instruction then walks it from
// front to end, at 0.92-0.97 of DRAM's speed on Granite Rapids, whose prefetchers follow
// instructions; two lines a step read it at 0.70-0.83.
template <class P, std::size_t kRows>
constexpr std::size_t kStreamVecs = HWY_MAX(std::size_t{1}, HWY_MIN((kHotVecs<P, kRows>),
                                                                    64 / P::Stored::kGroupBytes));

// Fetches the next block into L2 while this one is read; each turn fetches a share. Not into L1,
// which would hold its few miss buffers for longer. They bind even so: lines must be asked for once
// and at an even pace, a line for a line that is read; the scales' lines in softmax's steps.
// (Bursts in softmax that asked for some lines twice cost 5-15 % of a cold decode on Granite
// Rapids.)
struct Prefetcher {
  const std::uint8_t* next;
  std::size_t turns;                  // that share in fetching; 0: this turn fetches nothing
  std::size_t packed_stride, stride;  // bytes of a tile in memory, and of those that are read

  // This turn's share of what is to be fetched beside a step that reads kBytes.
  template <std::size_t kBytes>
  HWY_INLINE std::size_t Share() const {
    return turns != 0 ? kBytes * packed_stride / (stride * turns) : 0;
  }
  // A step of reading kBytes.
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
struct QueryTerms {  // [steps][kRows][kTermBytes]; see KSteps
  static constexpr std::size_t kRow = P::kTermBytes, kStep = kRows * kRow, kToLow = 4;
};
struct WeightTerms {  // [kMaxRows][limbs][kBlockTokens], 4 bytes a token in all
  static constexpr std::size_t kRow = 4 * kBlockTokens, kStep = 4, kToLow = kBlockTokens;
};

// The steps of all of K's channels, those that fill the last group as well.
template <class S>
HWY_INLINE constexpr std::size_t KSteps(std::size_t dim) {
  return RoundUp(dim, S::kTerms) / S::kWidth;
}

// One register block: kRows rows times kVecs neighbouring tiles (tile_bytes apart), over their
// groups [first, last). emit(row, vec, sums as floats) is called for every pair.
template <class P, class Terms, std::size_t kRows, std::size_t kVecs, class Emit>
HWY_INLINE void Multiply(const std::uint8_t* tile, std::size_t tile_bytes, const std::uint8_t* rows,
                         const RowInfo* info, std::size_t first, std::size_t last,
                         Prefetcher& prefetcher, const Emit& emit) {
  using S = typename P::Stored;
  constexpr std::size_t kBytes = kVecs * S::kGroupBytes;  // of a group of all tiles
  Prefetcher prefetch = prefetcher;                       // in registers
  const std::size_t share = prefetch.template Share<kBytes>();
  typename P::Sum sum[kRows][kVecs];
  Unroll<kRows>([&](auto r) KVMIX_LAMBDA {
    Unroll<kVecs>([&](auto v) KVMIX_LAMBDA { P::Start(info[r], sum[r][v]); });
  });
  // One row times one vector is one chain of additions for a limb, and waits for itself: two take
  // turns. (MHA in L3 on Zen 4: 0.88 of the time.)
  constexpr bool kTakeTurns = KVMIX_QUADS && P::kFixedPoint && kRows * kVecs == 1;
  [[maybe_unused]] typename P::Sum resting;
  if constexpr (kTakeTurns) P::Start({}, resting);
  KVMIX_ROLLED
  for (std::size_t group = first; group < last; ++group) {
    Unroll<S::kParts>([&](auto part) KVMIX_LAMBDA {
      decltype(S::template Codes<P::kIsOfK, part>(tile)) t[kVecs];
      Unroll<kVecs>([&](auto v) KVMIX_LAMBDA {
        t[v] = S::template Codes<P::kIsOfK, part>(tile + v * tile_bytes + group * S::kGroupBytes);
      });
      if (part == 0 && prefetch.turns != 0) prefetch.template Advance<kBytes>(share);
      Unroll<kRows>([&](auto r) KVMIX_LAMBDA {
        const std::size_t step = group * S::kParts + part;
        const auto terms = P::Terms(rows + r * Terms::kRow + step * Terms::kStep, Terms::kToLow);
        Unroll<kVecs>([&](auto v) KVMIX_LAMBDA { P::MulAdd(sum[r][v], t[v], terms); });
      });
      if constexpr (kTakeTurns) std::swap(sum[0][0], resting);
    });
  }
  if constexpr (kTakeTurns) P::Add(sum[0][0], resting);
  prefetcher = prefetch;
  Unroll<kRows>([&](auto r) KVMIX_LAMBDA {
    Unroll<kVecs>([&](auto v) KVMIX_LAMBDA { emit(r, v, P::ToFloat(sum[r][v])); });
  });
}

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
