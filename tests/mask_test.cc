// Masks: the kernel that reads them, against a plain loop; and attention with them and with
// bidirectional prefixes, against double precision over the rows that a cache holds.
#include <gtest/gtest.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/kernels.h"
#include "lib/cache/head.h"
#include "tests/cache_rows.h"
#include "tests/mask_cases.h"
#include "tests/reference/masked_attention.h"

namespace kvmix::testing {
namespace {

constexpr double kBound = 1e-6;
constexpr std::size_t kBlock = 256;

// ---- the kernel

struct Scanned {
  bool good = true;
  std::vector<kernels::MaskRange> ranges;
};

Scanned Scan(const std::vector<float>& x) {
  Scanned s;
  for (std::size_t start = 0; start < x.size(); start += kBlock) {
    kernels::MaskRange range;
    for (std::size_t t = 0; t < kBlock && start + t < x.size(); ++t) {
      const float number = x[start + t];
      if (std::isnan(number) || number == kInf) s.good = false;
      if (number == -kInf) continue;
      if (range.last == 0) range.first = static_cast<std::uint16_t>(t);
      range.last = static_cast<std::uint16_t>(t + 1);
    }
    for (std::size_t t = range.first; t < range.last; ++t) range.zeros &= x[start + t] == 0.0f;
    s.ranges.push_back(range);
  }
  return s;
}

// All targets and types, at several places in memory.
void ExpectScan(const std::vector<float>& x) {
  for (const Dtype dtype : kDtypes) {
    for (const std::size_t offset : {0, 1, 3}) {
      const MaskData mask(x, 1, dtype, 0, false, offset);
      const Scanned expected = Scan(mask.numbers.numbers);
      for (const kernels::Kernels& kernels : kernels::AllKernels()) {
        SCOPED_TRACE(::testing::Message() << kernels.target << ", type " << static_cast<int>(dtype)
                                          << ", offset " << offset << ", " << x.size());
        std::vector<kernels::MaskRange> ranges(expected.ranges.size() + 1, {77, 78, false});
        const bool good = kernels.mask.scan(mask.view.data, dtype, x.size(), ranges.data());
        ASSERT_EQ(good, expected.good);
        ASSERT_EQ(ranges.back().first, 77) << "written past the end";
        if (!good) continue;
        for (std::size_t b = 0; b < expected.ranges.size(); ++b) {
          ASSERT_EQ(ranges[b].first, expected.ranges[b].first) << "block " << b;
          ASSERT_EQ(ranges[b].last, expected.ranges[b].last) << "block " << b;
          ASSERT_EQ(ranges[b].zeros, expected.ranges[b].zeros) << "block " << b;
        }
      }
    }
  }
}

constexpr std::size_t kLengths[] = {0, 1, 2, 7, 15, 16, 17, 33, 63, 255, 256, 257, 511, 512, 700};

TEST(MaskScan, AllAlike) {
  for (const std::size_t n : kLengths) {
    for (const float x : {0.0f, -0.0f, -kInf, -1.5f, 2.0f, -65504.0f, 0x1p-24f, -0x1p-14f}) {
      ExpectScan(std::vector<float>(n, x));
    }
  }
}

TEST(MaskScan, EveryRange) {
  for (const std::size_t n : {70, 256, 300}) {
    for (std::size_t first = 0; first < n; first += first < 40 ? 1 : 13) {
      for (std::size_t last = first + 1; last <= n; last += last < first + 5 ? 1 : 37) {
        for (const float number : {0.0f, -2.0f}) {
          std::vector<float> x(n, -kInf);
          std::fill(x.begin() + static_cast<std::ptrdiff_t>(first),
                    x.begin() + static_cast<std::ptrdiff_t>(last), number);
          ExpectScan(x);
        }
      }
    }
  }
}

// One number that is not as the others, at every place of a block and past it.
TEST(MaskScan, OneOfAnotherKind) {
  for (const float others : {0.0f, -kInf}) {
    for (std::size_t at = 0; at < 270; ++at) {
      for (const float odd : {0.0f, -0.0f, -kInf, -1.0f, kNaN, -kNaN, kInf}) {
        std::vector<float> x(270, others);
        x[at] = odd;
        ExpectScan(x);
      }
    }
  }
}

TEST(MaskScan, RandomNumbers) {
  std::mt19937 rng(1);
  for (const std::size_t n : kLengths) {
    for (const std::size_t kinds : {2, 3, 5, 6}) {
      constexpr float kNumbers[] = {-kInf, 0.0f, -0.0f, -1.0f, 0.5f, kNaN};
      std::vector<float> x(n);
      for (float& number : x) number = kNumbers[rng() % kinds];
      ExpectScan(x);
    }
  }
}

// ---- attention

// A KV head for every codec.
struct Case {
  Geometry g;
  Rows rows;
  Plan plan;
  std::size_t tokens, queries;
  std::vector<Half> q;

  Case(std::size_t head_dim, std::size_t group, std::size_t num_tokens, std::size_t num_queries,
       unsigned seed)
      : g{1, kCodecs.size(), kCodecs.size() * group, head_dim},
        rows(RandomRows(g, num_tokens, seed)),
        tokens(num_tokens),
        queries(num_queries),
        q(RandomQueries(g, num_queries, seed + 1)) {
    plan = MakePlan(g, rows, kCodecs,
                    {"i8-token", "f16", "i8-token+centre", "i8-token-bf16", "i8-head",
                     "i8-token-bf16+centre+fold+hadamard", "i8-token+fold", "i8-token+hadamard"});
  }
  Cache Fill(std::string_view target = {}) const { return Filled(plan, rows, tokens + 7, target); }

  // f(query, cell) for all of both.
  std::vector<float> Numbers(const std::function<float(std::size_t, std::size_t)>& f,
                             std::size_t cells) const {
    std::vector<float> x;
    for (std::size_t i = 0; i < queries * cells; ++i) x.push_back(f(i / cells, i % cells));
    return x;
  }
};

MaskData NoMask() {
  MaskData none({}, 0, KVMIX_F32);
  none.view = {};
  return none;
}

struct Output {
  std::vector<float> out, log_sum_exp;
};

Output Attended(const Cache& cache, const std::vector<Half>& q, const AttendOptions& options,
                const MaskView& mask) {
  const Geometry g = GeometryOf(cache.model());
  Output o{std::vector<float>(q.size(), kNaN), std::vector<float>(q.size() / g.head_dim, kNaN)};
  const AttendRequest request{&cache, QView(g, q), o.out.data(), o.log_sum_exp.data(), mask};
  const Status s = Attend({&request, 1}, 0, options);
  EXPECT_TRUE(s.ok()) << s.message();
  return o;
}

// Attention on every target within the bound of double precision.
void ExpectAttention(const Case& c, const MaskData& mask, const AttendOptions& options) {
  const Cache cache = c.Fill();
  std::vector<double> k = Decoded(cache, 0, KVMIX_K), v = Decoded(cache, 0, KVMIX_V);
  for (std::size_t i = 0; i < c.plan.exact_first * c.g.kv_heads * c.g.head_dim; ++i) {
    k[i] = HalfToFloat(c.rows.k[i]);
    v[i] = HalfToFloat(c.rows.v[i]);
  }
  reference::MaskNumbers numbers = mask.numbers;
  if (mask.view.slopes != nullptr) {
    numbers.slopes.assign(mask.view.slopes, mask.view.slopes + c.g.query_heads);
  }
  const reference::Attended expected =
      reference::MaskedAttention(c.g, ToFloats(c.q), k, v, options, numbers);
  ForAllTargets([&](std::string_view target) {
    const Output found = Attended(c.Fill(target), c.q, options, mask.view);
    const std::vector<double> nmse = Nmse(c.g, found.out, expected.out);
    for (std::size_t h = 0; h < nmse.size(); ++h) {
      EXPECT_LE(nmse[h], kBound) << "query head " << h;
    }
    for (std::size_t r = 0; r < found.log_sum_exp.size(); ++r) {
      const double e = expected.log_sum_exp[r];
      if (std::isinf(e)) {
        ASSERT_EQ(found.log_sum_exp[r], -kInf) << "row " << r;
      } else {
        ASSERT_NEAR(found.log_sum_exp[r], e, 1e-3 + 1e-6 * std::fabs(e)) << "row " << r;
      }
    }
  });
}

TEST(MaskedAttention, ACausalMaskHasTheBitsOfCausality) {
  struct Shape {
    std::size_t tokens, queries, group, window;
  };
  for (const Shape& s : {Shape{1, 1, 1, 0},
                         {100, 5, 4, 0},
                         {256, 3, 1, 0},
                         {257, 70, 2, 0},
                         {700, 70, 7, 0},
                         {700, 40, 2, 300},
                         {6000, 1, 1, 0},
                         {6000, 3, 2, 3000},
                         {40, 60, 2, 0}}) {
    const Case c(64, s.group, s.tokens, s.queries, 3);
    const auto sees = [&](std::size_t query, std::size_t cell) {
      const std::size_t place = cell + s.queries, end = s.tokens + query;
      return place <= end && (s.window == 0 || place + s.window > end) ? 0.0f : -kInf;
    };
    const MaskData mask(c.Numbers(sees, s.tokens), s.queries, KVMIX_F16, 5);
    ForAllTargets([&](std::string_view target) {
      SCOPED_TRACE(::testing::Message() << s.tokens << " tokens, " << s.queries << " queries");
      const Cache cache = c.Fill(target);
      AttendOptions options, by_mask;
      options.sliding_window = s.window;
      by_mask.causal = false;
      const Output expected = Attended(cache, c.q, options, {});
      // (A long window that only a mask knows of leaves the spans of tokens as they are without.)
      const bool only_window = s.window > 1024;
      for (const AttendOptions& o :
           {options, only_window ? options : by_mask, only_window ? options : AttendOptions{}}) {
        const Output found = Attended(cache, c.q, o, mask.view);
        EXPECT_TRUE(SameBits(found.out, expected.out)) << "causal " << o.causal;
        EXPECT_TRUE(SameBits(found.log_sum_exp, expected.log_sum_exp)) << "causal " << o.causal;
      }
    });
  }
}

TEST(MaskedAttention, RandomSparse) {
  for (const Dtype dtype : kDtypes) {
    for (const double hidden : {0.5, 0.95, 0.999}) {
      for (const std::size_t queries : {1, 9, 70}) {
        SCOPED_TRACE(::testing::Message() << "hidden " << hidden << ", queries " << queries);
        const Case c(80, queries == 9 ? 7 : 2, 1100, queries, 4);
        std::mt19937 rng(static_cast<unsigned>(1000 * hidden));
        std::bernoulli_distribution hides(hidden);
        const std::vector<float> x = c.Numbers(
            [&](std::size_t, std::size_t) { return hides(rng) ? -kInf : 0.0f; }, c.tokens);
        AttendOptions options;
        options.causal = false;
        ExpectAttention(c, MaskData(x, queries, dtype, 3, queries == 9), options);
      }
    }
  }
}

// Numbers of every size, also such that leave a cell next to nothing.
TEST(MaskedAttention, AnyNumbers) {
  for (const Dtype dtype : kDtypes) {
    const Case c(64, 3, 900, 6, 5);
    std::mt19937 rng(6);
    const float most = dtype == KVMIX_F16 ? -65504.0f : -1e9f;
    const float numbers[] = {0.0f, -kInf, -1.0f, 2.5f, -30.0f, most, -0.0f};
    const std::vector<float> x =
        c.Numbers([&](std::size_t, std::size_t) { return numbers[rng() % 7]; }, c.tokens);
    ExpectAttention(c, MaskData(x, 6, dtype), {});
    // Nothing but large ones: softmax does not see what all have in common.
    const std::vector<float> large = c.Numbers(
        [&](std::size_t, std::size_t) { return -1000.0f - 2.0f * static_cast<float>(rng() % 3); },
        c.tokens);
    ExpectAttention(c, MaskData(large, 6, dtype), {});
  }
}

// Engines that have no -inf at hand take the least number.
TEST(MaskedAttention, TheLeastNumberHides) {
  const Case c(64, 2, 600, 4, 7);
  std::mt19937 rng(8);
  const std::vector<float> least = c.Numbers(
      [&](std::size_t q, std::size_t) { return q == 1 || rng() % 2 == 0 ? -FLT_MAX : 0.0f; }, 600);
  std::vector<float> hidden = least;
  std::replace(hidden.begin(), hidden.end(), -FLT_MAX, -kInf);
  const MaskData a(least, 4, KVMIX_F32), b(hidden, 4, KVMIX_F32);
  ForAllTargets([&](std::string_view target) {
    const Cache cache = c.Fill(target);
    const Output found = Attended(cache, c.q, {}, a.view),
                 expected = Attended(cache, c.q, {}, b.view);
    EXPECT_EQ(found.out, expected.out);
    EXPECT_EQ(found.log_sum_exp, expected.log_sum_exp);
    EXPECT_EQ(found.log_sum_exp[c.g.query_heads], -kInf);
  });
}

TEST(MaskedAttention, SlopesOfHeads) {
  for (const std::size_t group : {1, 4, 7}) {
    for (const Dtype dtype : kDtypes) {
      const Case c(64, group, 700, 5, 9);
      std::vector<float> slopes(c.g.query_heads);
      for (std::size_t h = 0; h < slopes.size(); ++h) {
        slopes[h] =
            std::exp2(-8.0f * static_cast<float>(h + 1) / static_cast<float>(slopes.size()));
      }
      const std::vector<float> x = c.Numbers(
          [&](std::size_t q, std::size_t cell) {
            const float distance = static_cast<float>(cell) - static_cast<float>(695 + q);
            return distance > 0.0f ? -kInf : distance;
          },
          c.tokens);
      MaskData mask(x, 5, dtype);
      mask.view.slopes = slopes.data();
      AttendOptions options;
      options.causal = false;
      ExpectAttention(c, mask, options);
    }
  }
}

// Everything that hides, and everything that changes scores, at once. The mask's numbers come after
// the cap.
TEST(MaskedAttention, WithCausalityWindowCapAndSinks) {
  for (const std::size_t queries : {1, 5, 70}) {
    const Case c(96, 2, 1500, queries, 10);
    std::mt19937 rng(11);
    constexpr float kNumbers[] = {0.0f, -kInf, -3.0f, 1.0f};
    const std::vector<float> x =
        c.Numbers([&](std::size_t, std::size_t) { return kNumbers[rng() % 4]; }, c.tokens);
    std::vector<float> sinks(c.g.query_heads, 1.0f);
    for (const bool causal : {true, false}) {
      for (const std::size_t window : {0, 3, 300}) {
        for (const float cap : {0.0f, 2.0f}) {
          SCOPED_TRACE(::testing::Message() << queries << " queries, causal " << causal
                                            << ", window " << window << ", cap " << cap);
          AttendOptions options;
          options.causal = causal;
          options.sliding_window = window;
          options.soft_cap = cap;
          if (window == 300) options.sinks = sinks.data();
          ExpectAttention(c, MaskData(x, queries, KVMIX_F16), options);
        }
      }
    }
  }
}

// Not causal, with a window and without a mask: the tokens after a query are all seen.
TEST(MaskedAttention, NotCausal) {
  for (const std::size_t queries : {1, 5, 70}) {
    const Case c(64, 2, 1500, queries, 12);
    for (const std::size_t window : {std::size_t{0}, std::size_t{1}, std::size_t{300}, SIZE_MAX}) {
      SCOPED_TRACE(::testing::Message() << queries << " queries, window " << window);
      AttendOptions options;
      options.causal = false;
      options.sliding_window = window;
      ExpectAttention(c, NoMask(), options);
    }
  }
}

TEST(MaskedAttention, FewerCellsThanTokens) {
  for (const std::size_t cells : {1, 255, 256, 300, 899}) {
    SCOPED_TRACE(cells);
    const Case c(64, 2, 900, 3, 13);
    std::mt19937 rng(14);
    const std::vector<float> x =
        c.Numbers([&](std::size_t, std::size_t) { return rng() % 3 == 0 ? -kInf : 0.0f; }, cells);
    AttendOptions options;
    options.causal = false;
    ExpectAttention(c, MaskData(x, 3, KVMIX_BF16, 1), options);
  }
}

TEST(MaskedAttention, RowsThatSeeNothing) {
  const Case c(64, 2, 900, 5, 15);
  // Query 1 sees nothing, query 3 only what causality hides, query 4 one cell of the last block.
  const std::vector<float> x = c.Numbers(
      [](std::size_t q, std::size_t cell) {
        if (q == 1) return -kInf;
        if (q == 3) return cell == 899 ? 0.0f : -kInf;
        return q != 4 || cell == 800 ? 0.0f : -kInf;
      },
      c.tokens);
  const MaskData mask(x, 5, KVMIX_F16);
  ExpectAttention(c, mask, {});
  ForAllTargets([&](std::string_view target) {
    const Cache cache = c.Fill(target);
    Output o = Attended(cache, c.q, {}, mask.view);
    const std::size_t row = c.g.query_heads * c.g.head_dim;
    for (const std::size_t q : {1, 3}) {
      for (std::size_t i = q * row; i < (q + 1) * row; ++i) ASSERT_EQ(o.out[i], 0.0f);
      EXPECT_EQ(o.log_sum_exp[q * c.g.query_heads], -kInf);
    }
    // A sink takes all the weight there is.
    const std::vector<float> sinks(c.g.query_heads, 0.75f);
    AttendOptions options;
    options.sinks = sinks.data();
    o = Attended(cache, c.q, options, mask.view);
    for (std::size_t i = row; i < 2 * row; ++i) ASSERT_EQ(o.out[i], 0.0f);
    EXPECT_NEAR(o.log_sum_exp[c.g.query_heads], 0.75f, 1e-5f);
    // No cells at all.
    const MaskData none({}, 0, KVMIX_F16);
    o = Attended(cache, c.q, {}, {none.bytes.data(), KVMIX_F16, 5, 0, 0});
    EXPECT_EQ(o.out, std::vector<float>(c.q.size(), 0.0f));
  });
}

TEST(BidirectionalPrefix, InAnyPlaceOfAPrompt) {
  struct Shape {
    std::size_t tokens, queries, group;
  };
  for (const Shape& s : {Shape{1, 1, 1}, {40, 40, 3}, {300, 270, 1}, {700, 1, 2}}) {
    const Case c(64, s.group, s.tokens, s.queries, 31);
    for (const std::size_t prefix : {1, 39, 256, 290, 700}) {
      if (prefix > s.tokens) continue;
      for (const std::size_t window : {0, 20}) {
        SCOPED_TRACE(::testing::Message() << s.tokens << " tokens, " << s.queries << " queries, "
                                          << "prefix " << prefix << ", window " << window);
        AttendOptions options;
        options.bidirectional_prefix = prefix;
        options.sliding_window = window;
        ExpectAttention(c, NoMask(), options);
      }
    }
  }
}

// Long enough that the context of one query is read in several spans.
TEST(BidirectionalPrefix, OverSeveralSpans) {
  const Case c(64, 1, 6000, 4, 32);
  for (const std::size_t prefix : {5000, 5998}) {
    for (const std::size_t window : {0, 700}) {
      SCOPED_TRACE(::testing::Message() << "prefix " << prefix << ", window " << window);
      AttendOptions options;
      options.bidirectional_prefix = prefix;
      options.sliding_window = window;
      ExpectAttention(c, NoMask(), options);
    }
  }
}

// Queries before the first token are in no prefix; nor does a prefix change what is seen without
// causality, but for a window.
TEST(BidirectionalPrefix, WithEverythingElseThatHides) {
  for (const std::size_t exact : {0, 4}) {
    for (const std::size_t tokens : {70, 300}) {
      Case c(96, 2, tokens, 100, 33);
      c.plan.exact_first = exact;
      std::mt19937 rng(34);
      constexpr float kNumbers[] = {0.0f, -kInf, -3.0f, 1.0f};
      const MaskData mask(
          c.Numbers([&](std::size_t, std::size_t) { return kNumbers[rng() % 4]; }, tokens), 100,
          KVMIX_F16);
      const std::vector<float> sinks(c.g.query_heads, 1.0f);
      for (const bool causal : {true, false}) {
        for (const std::size_t window : {0, 20}) {
          SCOPED_TRACE(::testing::Message() << tokens << " tokens, causal " << causal << ", window "
                                            << window << ", exact " << exact);
          AttendOptions options;
          options.bidirectional_prefix = 60;
          options.causal = causal;
          options.sliding_window = window;
          ExpectAttention(c, NoMask(), options);
          options.soft_cap = 2.0f;
          options.sinks = sinks.data();
          ExpectAttention(c, mask, options);
        }
      }
    }
  }
}

// A prompt in chunks has the outputs of one call, once the first chunk holds the whole prefix.
TEST(BidirectionalPrefix, PromptsInChunks) {
  constexpr std::size_t kTokens = 300, kPrefix = 130;
  for (const std::size_t window : {0, 100}) {
    for (const std::size_t exact : {0, 3}) {
      SCOPED_TRACE(::testing::Message() << "window " << window << ", exact " << exact);
      Case c(64, 1, kTokens, kTokens, 35);
      c.plan.exact_first = exact;
      c.plan.model.layers[0].window = window;
      AttendOptions options;
      options.bidirectional_prefix = kPrefix;
      options.sliding_window = window;
      ExpectAttention(c, NoMask(), options);
      ForAllTargets([&](std::string_view target) {
        const Output whole = Attended(c.Fill(target), c.q, options, {});
        Cache cache = Filled(c.plan, {}, kTokens, target);
        std::vector<float> out;
        const std::size_t row = c.g.query_heads * c.g.head_dim;
        for (std::size_t first = 0, n; first < kTokens; first += n) {
          n = first == 0 ? 150 : std::min<std::size_t>(kTokens - first, 1 + first % 90);
          ASSERT_TRUE(AppendTokens(cache, 0, c.rows, first, n).ok());
          const auto begin = c.q.begin() + static_cast<std::ptrdiff_t>(first * row);
          const std::vector<Half> q(begin, begin + static_cast<std::ptrdiff_t>(n * row));
          const Output chunk = Attended(cache, q, options, {});
          out.insert(out.end(), chunk.out.begin(), chunk.out.end());
        }
        const std::vector<double> expected(whole.out.begin(), whole.out.end());
        EXPECT_LE(WorstNmse(c.g, out, expected), kBound);
      });
    }
  }
}

// Forks that share a prefix read it together; queries in it see all of it.
TEST(BidirectionalPrefix, Batches) {
  const Case c(64, 2, 1100, 3, 36);
  for (const std::size_t prefix : {600, 1099, 1100}) {
    for (const std::size_t window : {0, 900, 5000}) {
      SCOPED_TRACE(::testing::Message() << "prefix " << prefix << ", window " << window);
      AttendOptions options;
      options.bidirectional_prefix = prefix;
      options.sliding_window = window;
      ExpectAttention(c, NoMask(), options);
      ForAllTargets([&](std::string_view target) {
        const Cache cache = c.Fill(target), fork = std::move(*cache.Fork());
        const std::vector<float> alone = Attended(cache, c.q, options, {}).out;
        std::vector<float> a(c.q.size()), b(c.q.size());
        const AttendRequest both[] = {{&cache, QView(c.g, c.q), a.data()},
                                      {&fork, QView(c.g, c.q), b.data()}};
        ASSERT_TRUE(Attend(both, 0, options).ok());
        const std::vector<double> expected(alone.begin(), alone.end());
        EXPECT_LE(WorstNmse(c.g, a, expected), kBound);
        EXPECT_LE(WorstNmse(c.g, b, expected), kBound);
      });
    }
  }
}

TEST(BidirectionalPrefix, MustBeHeldAsAWhole) {
  const Case c(16, 1, 300, 3, 37);
  Cache cache = Filled(c.plan, {}, 1000);
  AttendOptions options;
  options.bidirectional_prefix = 200;
  const auto refused = [&](const std::vector<std::string>& parts) {
    std::vector<float> out(c.q.size(), kUntouched);
    ExpectError(Attend(cache, 0, QView(c.g, c.q), out.data(), options), ErrorCode::kInvalidArgument,
                parts);
    EXPECT_EQ(out, std::vector<float>(c.q.size(), kUntouched));
  };
  Attended(cache, c.q, options, {});  // no token, and so no query in the prefix
  ASSERT_TRUE(AppendTokens(cache, 0, c.rows, 0, 199).ok());
  refused({"bidirectional_prefix 200", "found 199"});
  ASSERT_TRUE(AppendTokens(cache, 0, c.rows, 199, 1).ok());
  Attended(cache, c.q, options, {});
  options.bidirectional_prefix = SIZE_MAX;
  refused({"bidirectional_prefix", "found 200"});
}

void ExpectRefused(const Cache& cache, const std::vector<Half>& q, const MaskView& mask,
                   ErrorCode code, const std::vector<std::string>& parts) {
  std::vector<float> out(q.size(), -7.0f),
      sums(q.size() / GeometryOf(cache.model()).head_dim, -7.0f);
  const AttendRequest request{&cache, QView(GeometryOf(cache.model()), q), out.data(), sums.data(),
                              mask};
  ExpectError(Attend({&request, 1}, 0), code, parts);
  // Of a batch, the request is named.
  std::vector<float> good(q.size(), -7.0f);
  std::vector<std::string> with_place = parts;
  with_place.emplace_back("request 1 of 2");
  const AttendRequest both[] = {{&cache, request.q, good.data()}, request};
  ExpectError(Attend(both, 0), code, with_place);
  for (const float x : out) ASSERT_EQ(x, -7.0f);
  for (const float x : sums) ASSERT_EQ(x, -7.0f);
  for (const float x : good) ASSERT_EQ(x, -7.0f);
}

TEST(MaskedAttention, Refusals) {
  const Case c(16, 1, 600, 3, 16);
  Cache cache = Filled(c.plan, c.rows, 1000);
  const auto refused = [&](const MaskView& mask, ErrorCode code,
                           const std::vector<std::string>& parts) {
    ExpectRefused(cache, c.q, mask, code, parts);
  };
  const auto numbers = [&](std::size_t cells, std::size_t cell, float x) {
    return MaskData(
        c.Numbers([&](std::size_t q, std::size_t t) { return q == 2 && t == cell ? x : -kInf; },
                  cells),
        3, KVMIX_F32);
  };
  const MaskData good = numbers(600, 5, 0.0f);
  MaskView bad = good.view;
  bad.queries = 2;
  refused(bad, ErrorCode::kMismatch, {"mask", "3 queries", "2 x 600"});
  const MaskData large = numbers(1001, 5, 0.0f);
  refused(large.view, ErrorCode::kMismatch, {"mask", "1000 cells", "3 x 1001"});
  for (const float x : {kNaN, -kNaN, kInf}) {
    for (const std::size_t cell : {0, 599}) {
      refused(numbers(600, cell, x).view, ErrorCode::kInvalidArgument, {"mask", "NaN", "query 2"});
    }
  }
  // Cells up to the capacity may be there, but not be seen.
  EXPECT_FALSE(Attended(cache, c.q, {}, numbers(1000, 599, 0.0f).view).out.empty());
  refused(numbers(1000, 600, 0.0f).view, ErrorCode::kInvalidArgument,
          {"query 2", "600 to 601", "0 to 600"});
  for (const float x : {0.0f, -1.0f, kNaN, kInf}) {
    std::vector<float> slopes(c.g.query_heads, 1.0f);
    slopes[3] = x;
    bad = good.view;
    bad.slopes = slopes.data();
    refused(bad, ErrorCode::kInvalidArgument, {"mask", "slopes", "query head 3"});
  }
  ASSERT_TRUE(cache.Forget(0, 300).ok());
  refused(numbers(600, 299, 0.0f).view, ErrorCode::kInvalidArgument,
          {"query 2", "299 to 300", "300 to 600"});
  EXPECT_FALSE(Attended(cache, c.q, {}, numbers(600, 300, 0.0f).view).out.empty());
}

// Cells at -4e29 are seen, and a query that has no others sees their average; cells below hide.
TEST(Mask, HidesBelowMinus4e29) {
  const Geometry g{.layers = 1, .kv_heads = 1, .query_heads = 1, .head_dim = 64};
  const std::vector<float> x(600 * 64, 0.5f), q(64, 0.0f);
  ForAllTargets([&](std::string_view target) {
    for (const char* name : {"f16", "i8-token"}) {
      for (const std::size_t exact : {0, 4}) {
        const HeadCodec codec{ParseCodecKind(name).value()};
        Plan plan = UniformPlan(g, codec, codec);
        plan.exact_first = exact;
        Cache cache = std::move(*Cache::Create(plan, 600, {.target = std::string(target)}));
        ASSERT_TRUE(cache.Append(0, View(x, 1, 64), View(x, 1, 64)).ok());
        for (const float number : {-1e8f, -1e9f, -1e29f, -4e29f, -4.01e29f, -4.2e29f, -1e30f}) {
          const std::vector<float> mask(600, number);
          std::vector<float> out(64, kNaN);
          const AttendRequest request{
              &cache, View(q, 1, 64), out.data(), nullptr, {mask.data(), KVMIX_F32, 1, 600, 600}};
          ASSERT_TRUE(Attend(std::span(&request, 1), 0, AttendOptions{.causal = false}).ok());
          for (const float o : out) EXPECT_NEAR(o, number < -4e29f ? 0.0f : 0.5f, 1e-3f) << number;
        }
      }
    }
  });
}

}  // namespace
}  // namespace kvmix::testing
