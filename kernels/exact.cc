// Some rows by some tokens of halves, 64 tokens and up to kMaxRows rows at a time (a turn), which
// share the conversion of a token's halves. Products with K are sums over a vector's lanes: vectors
// of them are folded to one that has a sum a lane. Softmax takes tokens as lanes, V's weighted sum
// channels.
#include "kernels/exact.h"

#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/exact.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "kernels/rows-inl.h"
#include "kernels/softmax-inl.h"
#include "kernels/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {
namespace {

constexpr std::size_t kChunk = 64;                      // tokens of a turn
constexpr std::size_t kSums = kManyRegisters ? 16 : 8;  // vectors in registers
// Tokens whose channels share a vector of K, a half each: a fold less for all their sums.
constexpr std::size_t kTwins = kLanes >= 8 ? 2 : 1;
constexpr std::size_t kChannels = kLanes / kTwins;
// Tokens whose products with kRows rows are summed at a time.
template <std::size_t kRows>
constexpr std::size_t kTokens = HWY_MIN(16, kSums* kTwins / std::bit_ceil(kRows));
static_assert(kChunk % 16 == 0 && kChunk % kLanes == 0);

// A turn's rows and tokens of the task.
struct Turn {
  std::size_t row, rows, token, tokens;
  alignas(64) float weights[kMaxRows][kChunk];  // products with K first
  float correction[kMaxRows];                   // of the output so far
};

// What is added to the scores of row r's tokens from i on. What lies past the end is not seen.
HWY_INLINE VF Added(const ExactTask& t, const Turn& turn, std::size_t r, std::size_t i) {
  const float* const at = t.added + (turn.row + r) * t.tokens + turn.token + i;
  if (i + kLanes <= turn.tokens) return hn::LoadU(DF(), at);
  return hn::LoadNOr(hn::Set(DF(), kNegInf), DF(), at, turn.tokens - i);
}

// Leaves only tokens of the turn that a row sees, but for whole vectors before one; false: none.
HWY_INLINE bool Trim(const ExactTask& t, Turn& turn) {
  const auto seen = [&](std::size_t i) KVMIX_LAMBDA {
    auto none = hn::Eq(Added(t, turn, 0, i), hn::Set(DF(), kNegInf));
    for (std::size_t r = 1; r < turn.rows; ++r)
      none = hn::And(none, hn::Eq(Added(t, turn, r, i), hn::Set(DF(), kNegInf)));
    return !hn::AllTrue(DF(), none);
  };
  std::size_t first = 0, last = RoundUp(turn.tokens, kLanes);
  while (first < last && !seen(first)) first += kLanes;
  while (last > first && !seen(last - kLanes)) last -= kLanes;
  turn.tokens = HWY_MIN(turn.tokens, last) - first;
  turn.token += first;
  return first < last;
}

// q's next channels for each of the tokens that share a vector.
template <class IO>
HWY_INLINE VF LoadQuery(IO io, const float* q) {
#if HWY_TARGET <= HWY_AVX3
  if constexpr (std::is_same_v<IO, Whole>) return VF{_mm512_broadcast_f32x8(_mm256_loadu_ps(q))};
#endif
  if constexpr (kTwins == 1) {
    return io.Load(DF(), q);
  } else {
    const auto once = io.Load(hn::Half<DF>(), q);
    return hn::Combine(DF(), once, once);
  }
}
// Channels of the tokens at k and what follows.
template <class IO>
HWY_INLINE VF LoadTokens(IO io, const std::uint16_t* const* k, std::size_t c) {
  if constexpr (kTwins == 1) {
    return Halves::Load(io, k[0] + c);
  } else {
    const hn::Half<DHalves> half;
    return FromHalves(DF(),
                      hn::Combine(DHalves(), io.Load(half, k[1] + c), io.Load(half, k[0] + c)));
  }
}

// The rows' products with K.
template <std::size_t kRows>
HWY_NOINLINE void Score(const ExactTask& t, Turn& turn) {
  constexpr std::size_t kVecs = kTokens<kRows> / kTwins;
  const float* const q = t.q + turn.row * t.k_dim;
  for (std::size_t token = 0; token < turn.tokens; token += kTokens<kRows>) {
    const std::uint16_t* k[kTokens<kRows>];
    Unroll<kTokens<kRows>>([&](auto i) KVMIX_LAMBDA {  // past the end: the last one again
      k[i] = t.k + (turn.token + HWY_MIN(token + i, turn.tokens - 1)) * t.k_dim;
    });
    constexpr std::size_t kAll = std::bit_ceil(kRows) * kVecs;
    VF sums[kAll];
    Unroll<kAll>([&](auto i) KVMIX_LAMBDA { sums[i] = hn::Zero(DF()); });
    ForVectors<Tail::kPartial, kChannels>(0, t.k_dim, [&](auto io, std::size_t c) KVMIX_LAMBDA {
      VF terms[kRows];
      Unroll<kRows>([&](auto r) KVMIX_LAMBDA { terms[r] = LoadQuery(io, q + r * t.k_dim + c); });
      Unroll<kVecs>([&](auto i) KVMIX_LAMBDA {
        const VF own = LoadTokens(io, k + i * kTwins, c);
        Unroll<kRows>([&](auto r) KVMIX_LAMBDA {
          VF& sum = sums[r * kVecs + i];
          sum = hn::MulAdd(terms[r], own, sum);
        });
      });
    });
    alignas(64) float products[kAll * kTwins];
    Unroll<kAll / kChannels>([&](auto i) KVMIX_LAMBDA {
      const auto add = [](VF a, VF b) KVMIX_LAMBDA { return hn::Add(a, b); };
      hn::Store(Folded<kChannels>(sums + i * kChannels, add), DF(), products + i * kLanes);
    });
    Unroll<kRows>([&](auto r) KVMIX_LAMBDA {
      std::memcpy(turn.weights[r] + token, products + r * kTokens<kRows>,
                  kTokens<kRows> * sizeof(float));
    });
  }
}

// Scores of row r's tokens from i on, in units of log2, from their products.
HWY_INLINE VF Scores(const ExactTask& t, const Turn& turn, std::size_t r, std::size_t i) {
  const DF df;
  VF s = hn::Mul(hn::Load(df, turn.weights[r] + i), hn::Set(df, t.scale));
  const std::size_t n = HWY_MIN(kLanes, turn.tokens - i);
  if (t.k_scale != nullptr) s = hn::Mul(s, hn::LoadN(df, t.k_scale + turn.token + i, n));
  if (t.soft_cap != 0.0f) {
    const VF cap = hn::Set(df, t.soft_cap);
    s = hn::Mul(cap, hn::Tanh(df, hn::Div(s, cap)));
  }
  const VF added = Added(t, turn, r, i), log2 = hn::Mul(hn::Add(s, added), hn::Set(df, kLog2E));
  const auto number = hn::And(hn::IsFinite(s), hn::Eq(added, added));
  const VF nan = hn::Set(df, std::numeric_limits<float>::quiet_NaN());
  const VF known = hn::IfThenElse(number, Clamp(log2, hn::Set(df, 0x1p127f)), nan);
  return hn::IfThenElse(hn::Eq(added, hn::Set(df, kNegInf)), added, known);
}

// From the products of row r to weights; the row's max and sum.
HWY_INLINE void Weights(const ExactTask& t, std::size_t r, Turn& turn) {
  const DF df;
  float* const to = turn.weights[r];
  float &max = t.max[turn.row + r], &sum = t.sum[turn.row + r];
  VF largest = hn::Set(df, max);
  auto nan = hn::IsNaN(largest);
  for (std::size_t i = 0; i < turn.tokens; i += kLanes) {
    const VF s = Scores(t, turn, r, i);
    nan = hn::Or(nan, hn::IsNaN(s));
    largest = hn::Max(largest, s);
    hn::Store(s, df, to + i);
  }
  const float before = max;
  max =
      hn::AllFalse(df, nan) ? hn::ReduceMax(df, largest) : std::numeric_limits<float>::quiet_NaN();
  turn.correction[r] = before == max ? 1.0f : std::exp2(before - max);
  const VF base = hn::Set(df, max == kNegInf ? 0.0f : max);
  VF total = hn::Zero(df);
  for (std::size_t i = 0; i < turn.tokens; i += kLanes) {
    const VF x = hn::Sub(hn::Load(df, to + i), base);
    VF weight = hn::IfThenElseZero(hn::Gt(x, hn::Set(df, kSmallestExponent)), Exp2(x));
    total = hn::Add(total, weight);
    if (t.v_scale != nullptr) {
      const std::size_t n = HWY_MIN(kLanes, turn.tokens - i);
      weight = hn::Mul(weight, hn::LoadN(df, t.v_scale + turn.token + i, n));
    }
    hn::Store(weight, df, to + i);
  }
  sum = sum * turn.correction[r] + hn::ReduceSum(df, total);
}

// out = out * correction + weights * V
template <std::size_t kRows>
HWY_NOINLINE void Weigh(const ExactTask& t, const Turn& turn) {
  const std::uint16_t* const v = t.v + turn.token * t.v_dim;
  float* const out = t.out + turn.row * t.v_dim;
  const auto columns = [&](auto vecs, auto io, std::size_t channel) KVMIX_LAMBDA {
    VF sums[kRows][vecs];
    const auto each = [&](const auto& f) KVMIX_LAMBDA {
      Unroll<kRows>([&](auto r) KVMIX_LAMBDA {
        Unroll<vecs>([&](auto i) KVMIX_LAMBDA {
          f(sums[r][i], out + r * t.v_dim + channel + i * kLanes, r);
        });
      });
    };
    each([&](VF& sum, const float* at, auto r)
             KVMIX_LAMBDA { sum = hn::Mul(io.Load(DF(), at), hn::Set(DF(), turn.correction[r])); });
    for (std::size_t token = 0; token < turn.tokens; ++token) {
      VF own[vecs];
      Unroll<vecs>([&](auto i) KVMIX_LAMBDA {
        own[i] = Halves::Load(io, v + token * t.v_dim + channel + i * kLanes);
      });
      Unroll<kRows>([&](auto r) KVMIX_LAMBDA {
        const VF weight = hn::Set(DF(), turn.weights[r][token]);
        Unroll<vecs>([&](auto i)
                         KVMIX_LAMBDA { sums[r][i] = hn::MulAdd(weight, own[i], sums[r][i]); });
      });
    }
    each([&](const VF& sum, float* at, auto) KVMIX_LAMBDA { io.Store(sum, DF(), at); });
  };
  constexpr std::integral_constant<std::size_t, HWY_MIN(4, kSums / std::bit_ceil(kRows))> kVecs;
  constexpr std::integral_constant<std::size_t, 1> kOne;
  std::size_t channel = 0;
  for (; channel + kVecs * kLanes <= t.v_dim; channel += kVecs * kLanes)
    columns(kVecs, Whole(), channel);
  ForVectors(channel, t.v_dim, [&](auto io, std::size_t i) KVMIX_LAMBDA { columns(kOne, io, i); });
}

struct Stages {
  void (*score)(const ExactTask& t, Turn& turn);
  void (*weigh)(const ExactTask& t, const Turn& turn);
};
template <std::size_t... R>
constexpr std::array<Stages, kMaxRows> MakeStages(std::index_sequence<R...>) {
  return {{{&Score<R + 1>, &Weigh<R + 1>}...}};
}

void Attend(const ExactTask& t) {
  static constexpr auto kStages = MakeStages(std::make_index_sequence<kMaxRows>());
  const std::size_t turns = (t.rows + kMaxRows - 1) / kMaxRows;
  Turn turn;
  for (std::size_t token = 0; token < t.tokens; token += kChunk) {
    for (const auto& [rows, dim] : {std::pair(t.k, t.k_dim), std::pair(t.v, t.v_dim)}) {
      const auto* const at = reinterpret_cast<const std::uint8_t*>(rows + token * dim);
      const std::size_t bytes = HWY_MIN(kChunk, t.tokens - token) * dim * sizeof(*rows);
      for (std::size_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line, 0, 2);
    }
    for (std::size_t i = 0; i < turns; ++i) {
      turn.row = i * t.rows / turns;
      turn.rows = (i + 1) * t.rows / turns - turn.row;
      turn.token = token;
      turn.tokens = HWY_MIN(kChunk, t.tokens - token);
      if (!Trim(t, turn)) continue;
      const Stages& stages = kStages[turn.rows - 1];
      stages.score(t, turn);
      for (std::size_t r = 0; r < turn.rows; ++r) Weights(t, r, turn);
      stages.weigh(t, turn);
    }
  }
}

}  // namespace

ExactKernels ExactTable() { return {&Attend}; }

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvmix::kernels {
HWY_EXPORT(ExactTable);
ExactKernels ExactKernelsFor(std::int64_t target) { return KVMIX_CALL_FOR(target, ExactTable)(); }
}  // namespace kvmix::kernels
#endif  // HWY_ONCE
