// Attention of one KV head, block by block of 256 tokens, up to eight query rows at a time (a
// turn):
//   scores   s[r][t] = scale * k_scale[t] * q_scale[r] * (q codes . k codes)          in units of
//   log2 softmax  b = max_t (s + log2(v_scale[t]));  m' = max(m, b);  sum = sum * 2^(m - m') +
//   sum_t 2^(s - m')
//            w[t] = 2^(s - m') * v_scale[t] / w_scale, 16-bit fixed point against the block's own
//            largest, 2^(b - m'), so that a sink in one block cannot cost another its small weights
//   weigh    out = out * 2^(m - m') + w_scale * (w codes . v codes)
// All rows of a turn share one read of K and V; the rows of later turns find the block in L1 or L2.
// Scores and weights of eight rows (16 KiB) live in L1.
#include "kernels/attend.h"

#include <cmath>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attend.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "kernels/attend-inl.h"
#include "kernels/per_target.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// ---- rows as operands

template <class P>
constexpr bool kIsF16 = std::is_same<P, F16Product>::value;

template <class P>
constexpr std::size_t QueryRowBytes(std::size_t head_dim) {
  return KSteps(P::kStorage, head_dim) * P::kTermBytes;
}

// max |q| of n numbers; NaN if one is NaN or infinite.
HWY_INLINE float LargestFinite(const float* q, std::size_t n) {
  const DF df;
  VF largest = hn::Zero(df);
  hn::Mask<DF> finite = hn::FirstN(df, kLanes);
  for (std::size_t c = 0; c < n; c += kLanes) {
    const VF x = hn::LoadN(df, q + c, HWY_MIN(kLanes, n - c));
    largest = hn::Max(largest, hn::Abs(x));
    finite = hn::And(finite, hn::IsFinite(x));
  }
  return hn::AllTrue(df, finite) ? hn::ReduceMax(df, largest)
                                 : std::numeric_limits<float>::quiet_NaN();
}

// kLanes numbers of a row of q -> terms, limb by limb; the fixed-point forms keep 15 bits and a
// sign.
HWY_INLINE void PackTerms(F16Product, VF q, VF, std::uint8_t* to, VI32&, VI32&) {
  hn::StoreU(q, DF(), reinterpret_cast<float*>(to));
}

template <class P>
HWY_INLINE void PackTerms(P, VF q, VF inv_scale, std::uint8_t* to, [[maybe_unused]] VI32& sum_high,
                          [[maybe_unused]] VI32& sum_low) {
  const VI32 code = hn::NearestInt(hn::Mul(q, inv_scale));
#if KVMIX_QUADS
  const DI32 di;
  const hn::Rebind<std::int8_t, DI32> d8;
  const VI32 high = hn::ShiftRight<8>(hn::Add(code, hn::Set(di, 128))),
             low = hn::Sub(code, hn::ShiftLeft<8>(high));
  hn::StoreU(hn::DemoteTo(d8, high), d8, reinterpret_cast<std::int8_t*>(to));
  hn::StoreU(hn::DemoteTo(d8, low), d8, reinterpret_cast<std::int8_t*>(to) + kLanes);
  sum_high = hn::Add(sum_high, high);
  sum_low = hn::Add(sum_low, low);
#else
  const hn::Rebind<std::int16_t, DI32> d16;
  hn::StoreU(hn::DemoteTo(d16, code), d16, reinterpret_cast<std::int16_t*>(to));
#endif
}

// One row of a turn of `rows`; to: its first term's place, as QueryTerms has it. largest:
// LargestFinite of the row. Rows with NaN or Inf count as zeros.
template <class P>
HWY_INLINE void PackQuery(const float* q, std::size_t head_dim, float largest, std::size_t rows,
                          std::uint8_t* to, RowInfo& info) {
  constexpr std::size_t kWidth = Width(P::kStorage);
  constexpr float kLargest =
      KVMIX_QUADS ? 32512.0f : 32767.0f;  // 127 * 256, so that a rounded high limb fits
  const DF df;
  const DI32 di;
  const float scale = largest / kLargest;
  const bool nothing = !(scale >= 0x1p-100f);
  const VF inv_scale = hn::Set(df, nothing ? 0.0f : 1.0f / scale);
  VI32 sum_high = hn::Zero(di), sum_low = sum_high;
  for (std::size_t c = 0; c < head_dim; c += kLanes) {
    const std::size_t n = HWY_MIN(kLanes, head_dim - c);
    alignas(64) std::uint8_t terms[kLanes * 4];
    PackTerms(P(), nothing ? hn::Zero(df) : hn::LoadN(df, q + c, n), inv_scale, terms, sum_high,
              sum_low);
    for (std::size_t i = 0; i < n; i += kWidth, to += rows * P::kTermBytes) {
      for (std::size_t limb = 0; limb < P::kTermBytes / 4; ++limb)
        std::memcpy(to + 4 * limb, terms + limb * kLanes + i * (4 / kWidth), 4);
    }
  }
  info = {kIsF16<P> || nothing ? 1.0f : scale, 0, 0};
  if (kFlipK != 0 && !kIsF16<P>) {
    info.start_high = -128 * hn::ReduceSum(di, sum_high);
    info.start_low = -128 * hn::ReduceSum(di, sum_low);
  }
}

// Softmax weights, kWeightVecs vectors of tokens at a time -> the operand of the PV product.
constexpr std::size_t kWeightVecs = 4;  // 64 bytes of a limb on AVX-512

template <class P>
constexpr float kLargestWeight = kIsF16<P>              ? 1.0f
                                 : KVMIX_UNSIGNED_QUADS ? 65500.0f
                                 : KVMIX_QUADS          ? 32500.0f
                                                        : 32750.0f;  // room for Exp2's error

// e: 2^(score - max), in units that make e * scale a code; scale: of V, per token.
HWY_INLINE void PackWeights(F16Product, const VF (&e)[kWeightVecs], const float*, std::size_t token,
                            std::uint8_t* row) {
  float* to = reinterpret_cast<float*>(row) + token;
  Unroll<kWeightVecs>([&](auto i) KVMIX_LAMBDA { hn::StoreU(e[i], DF(), to + i * kLanes); });
}
HWY_INLINE void PackWeights(VI8Product, const VF (&e)[kWeightVecs], const float* scale,
                            std::size_t token, std::uint8_t* row) {
  // Adding 2^23 rounds to an integer and leaves it in the lowest 16 bits.
  const auto code = [&](auto i) KVMIX_LAMBDA {
    return hn::BitCast(DI32(), hn::MulAdd(e[i], hn::LoadU(DF(), scale + token + i * kLanes),
                                          hn::Set(DF(), 0x1p23f)));
  };
  constexpr std::integral_constant<std::size_t, 0> k0;
  constexpr std::integral_constant<std::size_t, 1> k1;
  constexpr std::integral_constant<std::size_t, 2> k2;
  constexpr std::integral_constant<std::size_t, 3> k3;
#if KVMIX_QUADS
  const hn::ScalableTag<std::uint16_t> d16;
  const DU8 d8;
  const hn::RebindToUnsigned<DI32> d32;
  const auto pair = [&](auto i, auto j) KVMIX_LAMBDA {
    return hn::OrderedTruncate2To(d16, hn::BitCast(d32, code(i)), hn::BitCast(d32, code(j)));
  };
  const auto lower = pair(k0, k1), upper = pair(k2, k3);
  // A signed low limb wants the high one rounded; its own bits are the same.
  const auto round = hn::Set(d16, KVMIX_UNSIGNED_QUADS ? 0 : 128);
  hn::StoreU(hn::ConcatOdd(d8, hn::BitCast(d8, hn::Add(upper, round)),
                           hn::BitCast(d8, hn::Add(lower, round))),
             d8, row + token);
  hn::StoreU(hn::ConcatEven(d8, hn::BitCast(d8, upper), hn::BitCast(d8, lower)), d8,
             row + kBlockTokens + token);
#else
  const DI16 d16;
  std::int16_t* to = reinterpret_cast<std::int16_t*>(row) + token;
  const VI32 mask = hn::Set(DI32(), 0xFFFF);
  const auto pair = [&](auto i, auto j) KVMIX_LAMBDA {
    return hn::OrderedDemote2To(d16, hn::And(code(i), mask), hn::And(code(j), mask));
  };
  hn::StoreU(pair(k0, k1), d16, to);
  hn::StoreU(pair(k2, k3), d16, to + 2 * kLanes);
#endif
}

// ---- one block, up to kMaxRows rows

constexpr std::size_t kTokenStep = kWeightVecs * kLanes;
static_assert(kBlockTokens % kTokenStep == 0);

// Tokens [first, last) of a block.
struct Range {
  std::size_t first, last;
};

constexpr std::size_t kRowLanes = RoundUp(kMaxRows, kLanes);

struct Work {
  // Scales of the block's tokens: where they lie, or a copy as f32.
  const float* k_scale;
  const float* v_scale;
  alignas(64) float k_copy[kBlockTokens];
  alignas(64) float v_copy[kBlockTokens];
  alignas(64) float v_log2[kBlockTokens];  // an upper bound of log2(v_scale)
  alignas(64) float scores[kMaxRows][kBlockTokens];
  alignas(64) std::uint8_t weights[kMaxRows][kBlockTokens * 4];
  // Of softmax, row by row, with room for whole vectors of rows.
  Range seen[kMaxRows];                         // tokens of the block; {0, 0}: none
  float scale[kMaxRows];                        // of the scores, to units of log2
  alignas(64) float block_max[kRowLanes] = {};  // b (arithmetic on stale denormals would be slow)
  alignas(64) float shift[kRowLanes];           // a weight's code is v_scale * 2^(s + shift)
  alignas(64) float weight_scale[kRowLanes];    // w_scale
  alignas(64) float correction[kRowLanes];      // 2^(m - m')
  // This turn's tokens: whole steps of kTokenStep that cover what any of its rows sees.
  std::size_t first, last;
};

template <class P, std::size_t kRows, std::size_t kVecs>
HWY_NOINLINE void Score(const BlockFormat& f, const std::uint8_t* block,
                        const std::uint8_t* queries, const RowInfo* info, Prefetcher& prefetch,
                        Work& w) {
  static_assert(kTokenStep % (kVecs * kLanes) == 0);
  const std::size_t tile_bytes = KTileBytes(P::kStorage, f.head_dim),
                    steps = KSteps(P::kStorage, f.head_dim);
  for (std::size_t token = w.first; token < w.last; token += kVecs * kLanes) {
    const std::uint8_t* tile = block + f.k.codes_offset + token / kLanes * tile_bytes;
    Multiply<P, QueryTerms<P, kRows>, kRows, kVecs>(
        tile, tile_bytes, queries, info, 0, steps, prefetch,
        [&](auto r, auto v, VF sum) KVMIX_LAMBDA {
          const std::size_t at = token + v * kLanes;
          hn::Store(hn::Mul(sum, hn::LoadU(DF(), w.k_scale + at)), DF(), w.scores[r] + at);
        });
  }
}

template <class P, std::size_t kRows, std::size_t kVecs>
HWY_NOINLINE void Weigh(const BlockFormat& f, const std::uint8_t* block, float* out,
                        std::size_t out_stride, Prefetcher& prefetch, const Work& w) {
  constexpr std::size_t kWidth = Width(P::kStorage);
  constexpr RowInfo kFromZero[kMaxRows] = {};
  const std::size_t tile_bytes = VTileBytes(P::kStorage), padded = RoundUp(f.head_dim, kLanes);
  std::size_t channel = 0;
  const auto columns = [&](auto vecs) KVMIX_LAMBDA {
    const std::uint8_t* tile = block + f.v.codes_offset + channel / kLanes * tile_bytes;
    Multiply<P, WeightTerms, kRows, vecs>(
        tile, tile_bytes, w.weights[0], kFromZero, w.first / kWidth, w.last / kWidth, prefetch,
        [&](auto r, auto v, VF sum) KVMIX_LAMBDA {
          float* to = out + r * out_stride + channel + v * kLanes;
          const VF before = hn::Mul(hn::LoadU(DF(), to), hn::Set(DF(), w.correction[r]));
          hn::StoreU(hn::MulAdd(sum, hn::Set(DF(), w.weight_scale[r]), before), DF(), to);
        });
    channel += vecs * kLanes;
  };
  while (channel + kVecs * kLanes <= padded) columns(std::integral_constant<std::size_t, kVecs>());
  while (channel < padded) columns(std::integral_constant<std::size_t, 1>());
}

// s -> cap * tanh((s * scale + bias) / cap). scale: to units of log2, which the result has as well;
// bias and cap: in those of exp.
HWY_INLINE void SoftCap(float* scores, std::size_t first, std::size_t last, float scale, float cap,
                        float bias) {
  const DF df;
  const VF to_x = hn::Set(df, scale / (cap * kLog2E)), shift = hn::Set(df, bias / cap),
           log_cap = hn::Set(df, cap * kLog2E);
  for (std::size_t t = first; t < last; t += kLanes) {
    hn::Store(hn::Mul(log_cap, hn::Tanh(df, hn::MulAdd(hn::Load(df, scores + t), to_x, shift))), df,
              scores + t);
  }
}

// Softmax of a turn's rows, in walks that each take all rows, so that one row's reductions hide
// behind another's arithmetic. w_scale puts the block's largest weight just below kLargestWeight.
// Row r sees the tokens w.seen[r] of the block; one that sees none keeps its max, its sum and its
// output. Fetches `lines` on the way.
template <class P>
HWY_NOINLINE void Softmax(std::size_t rows, float* max, float* sum, std::size_t lines,
                          Prefetcher& prefetch, Work& w) {
  const DF df;
  for (std::size_t r = 0; r < rows; ++r) {
    float* scores = w.scores[r];
    for (std::size_t t = w.first; t < w.seen[r].first; ++t) scores[t] = kNegInf;
    for (std::size_t t = HWY_MAX(w.first, w.seen[r].last); t < w.last; ++t) scores[t] = kNegInf;
    VF block_max = hn::Set(df, kNegInf);
    const VF scale = hn::Set(df, w.scale[r]);
    for (std::size_t t = w.first; t < w.last; t += kLanes) {
      const VF s = hn::Load(df, scores + t);
      block_max = hn::Max(block_max, kIsF16<P> ? hn::Mul(s, scale)
                                               : hn::MulAdd(s, scale, hn::Load(df, w.v_log2 + t)));
    }
    w.block_max[r] = hn::ReduceMax(df, block_max);
  }

  for (std::size_t r = 0; r < rows; r += kLanes) {  // rows as lanes
    const std::size_t n = HWY_MIN(kLanes, rows - r);
    const VF block = hn::Load(df, w.block_max + r), before = hn::LoadN(df, max + r, n);
    const VF now = hn::IfThenElse(hn::Gt(block, before), block, before);  // a NaN in `max` stays
    hn::StoreN(now, df, max + r, n);
    hn::Store(hn::IfThenElse(hn::Eq(before, now), hn::Set(df, 1.0f), Exp2(hn::Sub(before, now))),
              df, w.correction + r);
    // Large scores have rounded block_max off: room for that as well.
    const VF shift = hn::Sub(hn::Set(df, std::log2(kLargestWeight<P>)),
                             hn::MulAdd(hn::Abs(block), hn::Set(df, 0x1p-22f), block));
    hn::Store(shift, df, w.shift + r);
    hn::Store(Exp2(hn::Neg(hn::Add(shift, now))), df, w.weight_scale + r);
  }

  const std::size_t steps = rows * (w.last - w.first) / kTokenStep;
  std::size_t due = 0;  // lines due are due / steps
  for (std::size_t r = 0; r < rows; ++r) {
    if (w.seen[r].last == 0) {
      std::memset(w.weights[r], 0, sizeof(w.weights[r]));
      continue;
    }
    const VF scale = hn::Set(df, w.scale[r]), shift = hn::Set(df, w.shift[r]),
             smallest = hn::Set(df, kSmallestExponent);
    VF total = hn::Zero(df);
    for (std::size_t t = w.first; t < w.last; t += kTokenStep) {
      for (due += lines; due >= steps; due -= steps) prefetch.FetchLine();
      VF e[kWeightVecs];
      Unroll<kWeightVecs>([&](auto i) KVMIX_LAMBDA {
        const VF x = hn::MulAdd(hn::Load(df, w.scores[r] + t + i * kLanes), scale, shift);
        e[i] = Exp2(x);
        if constexpr (kIsF16<P>)
          e[i] = hn::IfThenElseZero(hn::Gt(x, smallest), e[i]);  // codes round to 0 by themselves
        total = hn::Add(total, e[i]);
      });
      PackWeights(P(), e, w.v_scale, t, w.weights[r]);
    }
    sum[r] = sum[r] * w.correction[r] + hn::ReduceSum(df, total) * w.weight_scale[r];
  }
}

// f(rows, vectors as the storage wants them) with both as constants; rows in [1, kMaxRows].
template <class P, class F>
HWY_INLINE void WithShape(std::size_t rows, bool stream, const F& f) {
  const auto with_rows = [&](auto n) HWY_ATTR {
    if (stream) return f(n, std::integral_constant<std::size_t, StreamVecsFor(P::kStorage, n)>());
    return f(n, std::integral_constant<std::size_t, VecsFor(P::kStorage, n)>());
  };
  if constexpr (kMaxRows > 4) {
    switch (rows) {
      case 5:
        return with_rows(std::integral_constant<std::size_t, 5>());
      case 6:
        return with_rows(std::integral_constant<std::size_t, 6>());
      case 7:
        return with_rows(std::integral_constant<std::size_t, 7>());
      case 8:
        return with_rows(std::integral_constant<std::size_t, 8>());
      default:
        break;
    }
  }
  switch (rows) {
    case 1:
      return with_rows(std::integral_constant<std::size_t, 1>());
    case 2:
      return with_rows(std::integral_constant<std::size_t, 2>());
    case 3:
      return with_rows(std::integral_constant<std::size_t, 3>());
    default:
      return with_rows(std::integral_constant<std::size_t, 4>());
  }
}

// Turns that share in fetching the next block: with more, the arithmetic outweighs the memory
// anyway.
constexpr std::size_t kMaxFetchingTurns = 4;

// ---- one task

// The scales of a block's tokens as f32: in place, or in `copy` (of a constant one, only the first
// time).
HWY_INLINE const float* Scales(const TileFormat& f, const std::uint8_t* block, bool first_time,
                               float* copy) {
  const DF df;
  if (f.scale == TileScale::kF32) return reinterpret_cast<const float*>(block + f.scales_offset);
  if (f.scale == TileScale::kConstant && !first_time) return copy;
  for (std::size_t t = 0; t < kBlockTokens; t += kLanes) {
    VF s = hn::Set(df, f.constant);
    if (f.scale == TileScale::kBF16) {
      const hn::Rebind<hwy::bfloat16_t, DF> db;
      s = hn::PromoteTo(
          df, hn::LoadU(db, reinterpret_cast<const hwy::bfloat16_t*>(block + f.scales_offset) + t));
    }
    hn::Store(s, df, copy + t);
  }
  return copy;
}

// Tokens of the block at `base` that row r sees.
HWY_INLINE Range Visible(const AttendTask& t, std::size_t row, std::size_t base) {
  const std::int64_t row_end = t.first_end + static_cast<std::int64_t>(row / t.group);
  const std::int64_t start = static_cast<std::int64_t>(base),
                     window = static_cast<std::int64_t>(t.window);
  const std::int64_t row_begin = window != 0 ? HWY_MAX(row_end - window, std::int64_t{0}) : 0;
  const std::int64_t first = HWY_MAX(
      HWY_MAX(row_begin, static_cast<std::int64_t>(t.first_token)) - start, std::int64_t{0});
  const std::int64_t last =
      HWY_MIN(HWY_MIN(row_end, static_cast<std::int64_t>(t.last_token)) - start,
              static_cast<std::int64_t>(kBlockTokens));
  return first < last ? Range{static_cast<std::size_t>(first), static_cast<std::size_t>(last)}
                      : Range{0, 0};
}

template <class KP, class VP>
void AttendRows(const AttendTask& t) {
  const BlockFormat& f = *t.format;
  const std::size_t row_bytes = QueryRowBytes<KP>(f.head_dim), padded = RoundUp(f.head_dim, kLanes);
  const std::size_t turn_rows =
      HWY_MIN(TurnRows(KP::kStorage, t.rows, t.stream), TurnRows(VP::kStorage, t.rows, t.stream));
  const std::size_t turns = (t.rows + turn_rows - 1) / turn_rows;
  const auto first_row = [&](std::size_t turn) HWY_ATTR { return turn * t.rows / turns; };

  // Operand: the turns' terms, row_bytes a row | RowInfo of all rows.
  std::uint8_t* queries = static_cast<std::uint8_t*>(t.operand);
  RowInfo* info = reinterpret_cast<RowInfo*>(queries + t.rows * row_bytes);
  for (std::size_t r = 0; r < t.rows; ++r)
    t.max[r] = LargestFinite(t.q + r * f.head_dim, f.head_dim);
  for (std::size_t turn = 0; turn < turns; ++turn) {
    const std::size_t row = first_row(turn), rows = first_row(turn + 1) - row;
    for (std::size_t i = 0; i < rows; ++i) {
      const std::size_t r = row + i;
      PackQuery<KP>(t.q + r * f.head_dim, f.head_dim, t.max[r], rows,
                    queries + row * row_bytes + i * KP::kTermBytes, info[r]);
      info[r].scale = HWY_MAX(info[r].scale * t.scale * kLog2E,
                              0x1p-100f);  // not 0, which times a masked score of -inf would be NaN
      if (!std::isnan(t.max[r])) t.max[r] = kNegInf;
      t.sum[r] = 0.0f;
    }
  }
  std::memset(t.out, 0, t.rows * padded * sizeof(float));

  Work w;
  const std::size_t fetching = t.stream ? HWY_MIN(turns, kMaxFetchingTurns) : 0;
  const std::size_t scale_lines =
      (f.v.codes_offset - f.k.scales_offset + f.block_bytes - f.v.scales_offset) / 64;
  const std::size_t first_block = t.first_token / kBlockTokens;
  for (std::size_t b = first_block; b * kBlockTokens < t.last_token; ++b) {
    const std::uint8_t* block = t.blocks + b * f.block_bytes;
    w.k_scale = Scales(f.k, block, b == first_block, w.k_copy);
    w.v_scale = Scales(f.v, block, b == first_block, w.v_copy);
    if (f.v.scale != TileScale::kConstant || b == first_block) {
      for (std::size_t i = 0; i < kBlockTokens; i += kLanes)
        hn::Store(Log2Bound(hn::LoadU(DF(), w.v_scale + i)), DF(), w.v_log2 + i);
    }
    for (std::size_t turn = 0; turn < turns; ++turn) {
      const std::size_t row = first_row(turn), rows = first_row(turn + 1) - row;
      w.first = kBlockTokens;
      w.last = 0;
      for (std::size_t r = 0; r < rows; ++r) {
        w.seen[r] = Visible(t, row + r, b * kBlockTokens);
        if (w.seen[r].last == 0) continue;
        w.first = HWY_MIN(w.first, w.seen[r].first / kTokenStep * kTokenStep);
        w.last = HWY_MAX(w.last, RoundUp(w.seen[r].last, kTokenStep));
      }
      if (w.last == 0) continue;
      const bool stream = t.stream && turn == 0;
      Prefetcher prefetch{block + f.block_bytes, 0};
      std::size_t lines = 0;  // for softmax to fetch
      if (turn < fetching) {
        prefetch = {block + f.block_bytes + turn * f.block_bytes / fetching, fetching};
        lines = scale_lines / fetching;
      }
      WithShape<KP>(rows, stream, [&](auto n, auto vecs) HWY_ATTR {
        Score<KP, n, vecs>(f, block, queries + row * row_bytes, info + row, prefetch, w);
      });
      for (std::size_t r = 0; r < rows; ++r) {
        w.scale[r] = info[row + r].scale;
        if (t.soft_cap == 0.0f) continue;
        SoftCap(w.scores[r], w.first, w.last, w.scale[r], t.soft_cap,
                t.bias != nullptr ? t.bias[row + r] : 0.0f);
        w.scale[r] = 1.0f;
      }
      Softmax<VP>(rows, t.max + row, t.sum + row, lines, prefetch, w);
      WithShape<VP>(rows, stream, [&](auto n, auto vecs) HWY_ATTR {
        Weigh<VP, n, vecs>(f, block, t.out + row * padded, padded, prefetch, w);
      });
    }
  }
}

void Attend(const AttendTask& t) {
  const bool k16 = t.format->k.storage == TileStorage::kF16,
             v16 = t.format->v.storage == TileStorage::kF16;
  if (k16 && v16) return AttendRows<F16Product, F16Product>(t);
  if (k16) return AttendRows<F16Product, VI8Product>(t);
  if (v16) return AttendRows<KI8Product, F16Product>(t);
  return AttendRows<KI8Product, VI8Product>(t);
}

std::size_t OperandBytes(const BlockFormat& f, std::size_t rows) {
  const std::size_t row = f.k.storage == TileStorage::kF16 ? QueryRowBytes<F16Product>(f.head_dim)
                                                           : QueryRowBytes<KI8Product>(f.head_dim);
  return RoundUp(rows * (row + sizeof(RowInfo)), 64);
}

std::size_t PaddedDim(const BlockFormat& f) { return RoundUp(f.head_dim, kLanes); }

}  // namespace

AttendKernels AttendTable() { return {&Attend, &OperandBytes, &PaddedDim}; }

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvmix::kernels {
HWY_EXPORT(AttendTable);
AttendKernels AttendKernelsFor(std::int64_t target) {
  return KVMIX_CALL_FOR(target, AttendTable)();
}
}  // namespace kvmix::kernels
#endif  // HWY_ONCE
