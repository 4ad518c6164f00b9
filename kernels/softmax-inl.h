// Per target: the softmax between the two products of attention, over one block and up to kMaxRows
// rows, and the exponential that it uses.
#if defined(KVMIX_KERNELS_SOFTMAX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVMIX_KERNELS_SOFTMAX_INL_H_
#undef KVMIX_KERNELS_SOFTMAX_INL_H_
#else
#define KVMIX_KERNELS_SOFTMAX_INL_H_
#endif

#include <cmath>
#include <cstring>
#include <limits>

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "kernels/mask.h"
#include "kernels/product-inl.h"
#include "kernels/rows-inl.h"
#include "kernels/unpack-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();
constexpr float kSmallestExponent = -100.0f;  // of 2; see Exp2
constexpr float kLargeScore = 0x1p20f;        // of a block: see RecentreLarge

// x[i] -> 2^x[i], relative error 8e-5 (so NMSE 6e-9 at most, a hundredth of what the attention may
// cost), coarsely 1.8e-3 (1e-6, a tenth of what weights of 8 bits cost); x below -100 and NaN
// become 2^-100 or 0, so that no product with the result becomes a denormal (those cost a hundred
// cycles each on some CPUs). x < 2^22. All vectors take a step before the next one, so that few
// instructions wait for others in the CPU's schedulers.
template <bool kCoarse, std::size_t N>
HWY_INLINE void Exp2(VF (&x)[N]) {
  const DF df;
  const auto each = [](auto step) KVMIX_LAMBDA { Unroll<N>(step); };
  VF f[N], p[N];
  const auto polynomial = [&](const auto&... c) KVMIX_LAMBDA {
    constexpr std::size_t kDegree = sizeof...(c) - 1;
    const float coefficients[] = {c...};
    each([&](auto i) KVMIX_LAMBDA { p[i] = hn::Set(df, coefficients[kDegree]); });
    Unroll<kDegree>([&](auto k) KVMIX_LAMBDA {
      const VF next = hn::Set(df, coefficients[kDegree - 1 - k]);
      each([&](auto i) KVMIX_LAMBDA { p[i] = hn::MulAdd(p[i], f[i], next); });
    });
  };
  const VF smallest = hn::Set(df, kSmallestExponent);
#if HWY_TARGET <= HWY_AVX3
  // x - floor(x), and p * 2^floor(x) or 0: an instruction each that Highway does not have.
  hn::Mask<DF> large[N];
  each([&](auto i) KVMIX_LAMBDA { f[i].raw = _mm512_reduce_ps(x[i].raw, _MM_FROUND_FLOOR); });
  each([&](auto i) KVMIX_LAMBDA { large[i] = hn::Gt(x[i], smallest); });
  if constexpr (kCoarse) {
    polynomial(1.00172476f, 0.65763628f, 0.33718943f);
  } else {
    polynomial(0.99992521f, 0.69583351f, 0.22606717f, 0.07802452f);
  }
  each([&](auto i)
           KVMIX_LAMBDA { x[i].raw = _mm512_maskz_scalef_ps(large[i].raw, p[i].raw, x[i].raw); });
#else
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the lowest bits: cheaper than
  // conversions, which must mind overflow.
  const DI32 di;
  const VF round = hn::Set(df, 0x1.8p23f);
  VF n[N];
  each([&](auto i) KVMIX_LAMBDA { x[i] = hn::Max(x[i], smallest); });
  each([&](auto i) KVMIX_LAMBDA { n[i] = hn::Add(x[i], round); });
  each([&](auto i) KVMIX_LAMBDA { f[i] = hn::Sub(x[i], hn::Sub(n[i], round)); });
  if constexpr (kCoarse) {
    polynomial(1.00044314f, 0.70344801f, 0.23842894f);
  } else {
    polynomial(0.9999280571937561f, 0.6932609677314758f, 0.2426111251115799f, 0.0551716648042202f);
  }
  each([&](auto i) KVMIX_LAMBDA {
    const VI32 exponent = hn::ShiftLeft<23>(hn::BitCast(di, n[i]));
    x[i] = hn::BitCast(df, hn::Add(hn::BitCast(di, p[i]), exponent));
  });
#endif
}
HWY_INLINE VF Exp2(VF x) {
  VF one[1] = {x};
  Exp2<false>(one);
  return one[0];
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

constexpr std::size_t kTokenStep = kWeightVecs * kLanes;
static_assert(kBlockTokens % kTokenStep == 0);
// Most grids of weights in a block.
constexpr std::size_t kGrids = kBlockTokens / ScaledTokens(8);
static_assert(kGrids == 4 && ScaledTokens(8) % kTokenStep == 0);

// Tokens [first, last) of a block.
struct Range {
  std::size_t first, last;
};

// Up to kRows rows that go through softmax together, and what they see of a block. kRowFloats: from
// row to row of scores.
template <std::size_t kRows, std::size_t kRowFloats = kBlockTokens>
struct SoftmaxRows {
  static constexpr std::size_t kRowLanes = RoundUp(kRows, kLanes);
  // Scales of the block's tokens: where they lie, or a copy as f32.
  const float* k_scale;
  const float* v_scale;
  alignas(64) float k_copy[kBlockTokens];
  alignas(64) float v_copy[kBlockTokens];
  alignas(64) float v_log2[kBlockTokens];  // an upper bound of log2(v_scale)
  alignas(64) float scores[kRows][kRowFloats];
  // Row by row, with room for whole vectors of rows.
  Range seen[kRows];                            // tokens of the block; {0, 0}: none
  alignas(64) float scale[kRowLanes] = {};      // of the scores, to units of log2
  alignas(64) float centre[kRowLanes];          // what RecentreLarge took off the scores
  alignas(64) float block_max[kRowLanes] = {};  // b (arithmetic on stale denormals would be slow)
  alignas(64) float correction[kRowLanes];      // 2^(m - m')
  // Of the tokens that share a grid, scaled_tokens from a multiple of that on. The first of each is
  // all there is where that is the block.
  alignas(64) float grid_max[kRowLanes][kGrids] = {};  // b of these tokens alone
  alignas(64) float shift[kGrids][kRowLanes];          // a weight's code: v_scale * 2^(s + shift)
  alignas(64) float weight_scale[kGrids][kRowLanes];   // w_scale
  // These rows' tokens: whole steps of kTokenStep that cover what any of them sees.
  std::size_t first, last;
};

struct Work : SoftmaxRows<kMaxRows> {
  Tiles k, v;  // of the block
  // Of K's stretches, or null; then also the turn's rows of q, and what scores in units of log2 are
  // of q . k.
  const std::uint8_t* centres;
  const float* q;
  float to_log2;
  // [stretch][row]: what a centre adds to the scores of its tokens, w.scale times this.
  alignas(64) float around[kBlockTokens / kSmallestStretch][kRowLanes];
  alignas(64) std::uint8_t weights[kMaxRows][kBlockTokens * 4];
};

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

// A vector of a mask's numbers for one query, from token t on; 0 past their end.
HWY_INLINE VF MaskNumbers(const Mask& mask, std::size_t query, std::size_t t) {
  const std::ptrdiff_t at =
      static_cast<std::ptrdiff_t>(query) * mask.stride + static_cast<std::ptrdiff_t>(t);
  return WithDtype(mask.dtype, [&]<class X>(X) KVMIX_LAMBDA {
    return X::Load(First{HWY_MIN(kLanes, mask.tokens - t)},
                   static_cast<const typename X::T*>(mask.values) + at);
  });
}

// s -> s * scale + slope * mask, in units of log2, for the tokens of block b that are seen. What
// the mask hides between them becomes hugely negative, but finite: -inf less -inf is NaN.
HWY_INLINE void AddMask(const Mask& mask, std::size_t query, std::size_t b, float slope,
                        float scale, Range seen, float* scores) {
  const DF df;
  const VF least = hn::Set(df, -0x1p100f), by = hn::Set(df, slope * kLog2E),
           to_log2 = hn::Set(df, scale);
  for (std::size_t t = seen.first / kLanes * kLanes; t < seen.last; t += kLanes) {
    const VF numbers = MaskNumbers(mask, query, b * kBlockTokens + t);
    const VF added = hn::Max(hn::Mul(numbers, by), least);
    hn::Store(hn::MulAdd(hn::Load(df, scores + t), to_log2, added), df, scores + t);
  }
}

// f(grid, first, last) for the tokens [first, last) of a turn's rows that share a grid.
template <class Rows, class F>
HWY_INLINE void ForGrids(std::size_t scaled_tokens, const Rows& w, const F& f) {
  for (std::size_t first = w.first, last; first < w.last; first = last) {
    const std::size_t grid = first / scaled_tokens;
    last = HWY_MIN(w.last, (grid + 1) * scaled_tokens);
    f(grid, first, last);
  }
}

// The largest score plus log2(v_scale) of a row: of the block, or of each grid.
template <class P, class Rows>
HWY_INLINE void RowMaxima(std::size_t r, Rows& w) {
  const DF df;
  const VF scale = hn::Set(df, w.scale[r]);
  const auto largest = [&](std::size_t first, std::size_t last) KVMIX_LAMBDA {
    const auto at = [&](std::size_t t) KVMIX_LAMBDA {
      const VF s = hn::Load(df, w.scores[r] + t);
      return P::kFixedPoint ? hn::MulAdd(s, scale, hn::Load(df, w.v_log2 + t)) : hn::Mul(s, scale);
    };
    if (first >= last) return hn::Set(df, kNegInf);
    VF max[kWeightVecs];
    Unroll<kWeightVecs>([&](auto i) KVMIX_LAMBDA { max[i] = at(first + i * kLanes); });
    for (std::size_t step = first + kTokenStep; step < last; step += kTokenStep) {
      Unroll<kWeightVecs>([&](auto i)
                              KVMIX_LAMBDA { max[i] = hn::Max(max[i], at(step + i * kLanes)); });
    }
    return hn::Max(hn::Max(max[0], max[1]), hn::Max(max[2], max[3]));
  };
  if constexpr (P::kScaledTokens == kBlockTokens) {
    w.block_max[r] = hn::ReduceMax(df, largest(w.first, w.last));
  } else {
    VF max[kGrids];
    Unroll<kGrids>([&](auto grid) KVMIX_LAMBDA {
      constexpr std::size_t kFirst = grid * P::kScaledTokens;
      max[grid] = largest(HWY_MAX(w.first, kFirst), HWY_MIN(w.last, kFirst + P::kScaledTokens));
    });
    const auto larger = [](VF a, VF b) KVMIX_LAMBDA { return hn::Max(a, b); };
    hn::StoreN(Reduced<kGrids>(max, larger), df, w.grid_max[r], kGrids);
  }
}

// RowMaxima of every row, after its scores of tokens that it does not see have become -inf.
template <class P, class Rows>
HWY_INLINE void BlockMaxima(std::size_t rows, Rows& w) {
  for (std::size_t r = 0; r < rows; ++r) {
    float* scores = w.scores[r];
    for (std::size_t t = w.first; t < w.seen[r].first; ++t) scores[t] = kNegInf;
    for (std::size_t t = HWY_MAX(w.first, w.seen[r].last); t < w.last; ++t) scores[t] = kNegInf;
    RowMaxima<P>(r, w);
  }
}

// Where rows [first, last) have large scores, beside which an f32 has few bits left for a weight:
// takes the largest score of the block off all scores of the row and puts it into w.centre. Scores
// beyond +-2^127 count as that.
template <class P, class Rows>
HWY_NOINLINE void RecentreLarge(std::size_t first, std::size_t last, Rows& w) {
  const DF df;
  const VF most = hn::Set(df, 0x1p127f);
  for (std::size_t r = first; r < last; ++r) {
    w.centre[r] = 0.0f;
    if (std::fabs(w.block_max[r]) <= kLargeScore || w.seen[r].last == 0) continue;
    float* const scores = w.scores[r];
    VF largest = hn::Neg(most);
    for (std::size_t t = w.first; t < w.last; t += kLanes) {
      const VF s = Clamp(hn::Mul(hn::Load(df, scores + t), hn::Set(df, w.scale[r])), most);
      largest = hn::Max(largest, s);
      hn::Store(s, df, scores + t);
    }
    w.centre[r] = hn::ReduceMax(df, largest);
    for (std::size_t t = w.first; t < w.last; t += kLanes)
      hn::Store(hn::Sub(hn::Load(df, scores + t), hn::Set(df, w.centre[r])), df, scores + t);
    w.scale[r] = 1.0f;
    RowMaxima<P>(r, w);
  }
}

// From the block's maxima to what makes weights of scores, rows as lanes. w_scale puts the block's
// largest weight just below kLargestWeight.
template <class P, class Rows>
HWY_INLINE void RaiseMaxima(std::size_t rows, float* max, Rows& w) {
  constexpr bool kOneGrid = P::kScaledTokens == kBlockTokens;
  const DF df;
  for (std::size_t r = 0; r < rows; r += kLanes) {
    const std::size_t n = HWY_MIN(kLanes, rows - r);
    const VF before = hn::LoadN(df, max + r, n);
    VF grid_max[kGrids], block, centre = hn::Zero(df);
    const auto load = [&]() KVMIX_LAMBDA {
      if constexpr (kOneGrid) {
        block = hn::Load(df, w.block_max + r);
      } else {
        hn::LoadInterleaved4(df, w.grid_max[r], grid_max[0], grid_max[1], grid_max[2], grid_max[3]);
        block = hn::Max(hn::Max(grid_max[0], grid_max[1]), hn::Max(grid_max[2], grid_max[3]));
        hn::Store(block, df, w.block_max + r);
      }
    };
    load();
    const auto large = hn::Gt(hn::Abs(block), hn::Set(df, kLargeScore));
    if (HWY_UNLIKELY(!hn::AllFalse(df, large))) {
      RecentreLarge<P>(r, r + n, w);
      load();
      centre = hn::Load(df, w.centre + r);
    }
    const VF largest = hn::Add(block, centre);
    // A NaN in `max` stays.
    const VF now = hn::IfThenElse(hn::Gt(largest, before), largest, before);
    hn::StoreN(now, df, max + r, n);
    hn::Store(hn::IfThenElse(hn::Eq(before, now), hn::Set(df, 1.0f), Exp2(hn::Sub(before, now))),
              df, w.correction + r);
    const VF base = hn::Sub(now, centre);
    Unroll<kBlockTokens / P::kScaledTokens>([&](auto grid) KVMIX_LAMBDA {
      VF highest = block;
      // Of tokens that weigh nothing beside the block's others: any that is finite.
      if (!kOneGrid) highest = hn::Max(grid_max[grid], hn::Sub(block, hn::Set(df, 64.0f)));
      // Scores have rounded the maximum off: room for that as well.
      const VF shift = hn::Sub(hn::Set(df, std::log2(P::kLargestWeight)),
                               hn::MulAdd(hn::Abs(highest), hn::Set(df, 0x1p-22f), highest));
      hn::Store(shift, df, w.shift[grid] + r);
      hn::Store(Exp2(hn::Neg(hn::Add(shift, base))), df, w.weight_scale[grid] + r);
    });
  }
}

// e[i] = 2^(s + shift) of a step's scores. Returns total + all of them.
template <class P>
HWY_INLINE VF Weights(const float* scores, VF scale, VF shift, VF total, WeightVectors& e) {
  const DF df;
  VF x[kWeightVecs];
  Unroll<kWeightVecs>([&](auto i) KVMIX_LAMBDA {
    x[i] = hn::MulAdd(hn::Load(df, scores + i * kLanes), scale, shift);
    e[i] = x[i];
  });
  Exp2<P::kScaledTokens != kBlockTokens>(e);
  Unroll<kWeightVecs>([&](auto i) KVMIX_LAMBDA {
    if constexpr (!P::kFixedPoint) {  // codes round to 0 by themselves
      e[i] = hn::IfThenElseZero(hn::Gt(x[i], hn::Set(df, kSmallestExponent)), e[i]);
    }
    total = hn::Add(total, e[i]);
  });
  return total;
}

// Softmax of a turn's rows, in walks that each take all rows, so that one row's reductions hide
// behind another's arithmetic. Row r sees the tokens w.seen[r] of the block; one that sees none
// keeps its max, its sum and its output. Fetches `lines` on the way.
template <class P>
HWY_NOINLINE void Softmax(std::size_t rows, float* max, float* sum, std::size_t lines,
                          Prefetcher& prefetch, Work& w) {
  const DF df;
  BlockMaxima<P>(rows, w);
  RaiseMaxima<P>(rows, max, w);
  const std::size_t steps = rows * (w.last - w.first) / kTokenStep;
  std::size_t due = 0;  // lines due are due / steps
  for (std::size_t r = 0; r < rows; ++r) {
    if (w.seen[r].last == 0) {
      std::memset(w.weights[r], 0, sizeof(w.weights[r]));
      continue;
    }
    const VF scale = hn::Set(df, w.scale[r]);
    constexpr bool kOneGrid = P::kScaledTokens == kBlockTokens;
    VF total = hn::Zero(df);
    ForGrids(P::kScaledTokens, w,
             [&](std::size_t grid, std::size_t first, std::size_t last) KVMIX_LAMBDA {
               const VF shift = hn::Set(df, w.shift[grid][r]);
               VF of_grid = hn::Zero(df);
               for (std::size_t t = first; t < last; t += kTokenStep) {
                 for (due += lines; due >= steps; due -= steps) prefetch.FetchLine();
                 WeightVectors e;
                 of_grid = Weights<P>(w.scores[r] + t, scale, shift, of_grid, e);
                 P::PackWeights(e, w.v_scale, t, w.weights[r]);
               }
               total = kOneGrid ? of_grid
                                : hn::MulAdd(of_grid, hn::Set(df, w.weight_scale[grid][r]), total);
             });
    sum[r] = sum[r] * w.correction[r] +
             hn::ReduceSum(df, total) * (kOneGrid ? w.weight_scale[0][r] : 1.0f);
  }
}

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
