// What attention's options do, and what must not change its result: windows, soft caps, sinks, NaN,
// truncation, alignment, types and strides of q, threads, a fork. (Accuracy over shapes and codecs:
// attend_test.cc.)
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cfloat>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "tests/attend_cases.h"
#include "tests/runners.h"

namespace {
std::atomic<std::size_t> allocations{0};
}

// Counts every allocation of this program. (Out of line: gcc warns of the free of what it takes for
// new's.)
__attribute__((noinline)) void* operator new(std::size_t n) {
  ++allocations;
  if (void* p = std::malloc(n != 0 ? n : 1)) return p;
  throw std::bad_alloc();
}
__attribute__((noinline)) void operator delete(void* p) noexcept { std::free(p); }
__attribute__((noinline)) void operator delete(void* p, std::size_t) noexcept { std::free(p); }

namespace kvmix::testing {
namespace {

constexpr double kBound = 1e-6;

// A KV head for every codec of K, each with another of V.
struct Model {
  Geometry g;
  Rows rows;
  Plan plan;
  std::size_t tokens;
  std::vector<Half> q;

  Model(std::size_t head_dim, std::size_t group, std::size_t num_tokens, std::size_t queries,
        unsigned seed)
      : g{1, kCodecs.size(), kCodecs.size() * group, head_dim},
        rows(RandomRows(g, num_tokens, seed)),
        tokens(num_tokens) {
    plan = MakePlan(g, rows, kCodecs,
                    {"i8-token", "f16", "i8-token+centre", "i8-token-bf16", "i8-head",
                     "i8-token-bf16+centre+fold+hadamard", "i8-token+fold", "i8-token+hadamard"});
    std::mt19937 rng(seed + 1);
    q = RandomHalves(rng, queries * g.query_heads * g.head_dim);
  }
  Cache Fill(std::string_view target = {}) const { return Filled(plan, rows, tokens, target); }
};

void CheckOnAllTargets(const Model& m, const AttendOptions& options) {
  const std::vector<float> q = ToFloats(m.q);
  const std::vector<double> expected = Expected(m.Fill(), 0, q, options);
  ForAllTargets([&](std::string_view target) {
    const std::vector<double> nmse = Nmse(m.g, Attended(m.Fill(target), 0, q, options), expected);
    for (std::size_t h = 0; h < nmse.size(); ++h) {
      EXPECT_LE(nmse[h], kBound) << "query head " << h << ", K and V "
                                 << ToString(m.plan.codec(0, h / m.g.group(), KVMIX_K).kind) << " "
                                 << ToString(m.plan.codec(0, h / m.g.group(), KVMIX_V).kind);
    }
  });
}

constexpr std::size_t kGroups[] = {1, 4, 7};

TEST(AttendOptions, SlidingWindow) {
  for (const std::size_t group : kGroups) {
    for (const std::size_t queries : {1, 5, 70}) {
      const Model m(64, group, 700, queries, 1);
      for (const std::size_t window : {std::size_t{1}, std::size_t{5}, std::size_t{256},
                                       std::size_t{300}, std::size_t{700}, SIZE_MAX}) {
        SCOPED_TRACE(::testing::Message()
                     << "window " << window << ", " << queries << " queries, group " << group);
        AttendOptions options;
        options.sliding_window = window;
        CheckOnAllTargets(m, options);
      }
    }
  }
}

TEST(AttendOptions, SlidingWindowOverSeveralSpans) {
  for (const std::size_t group : kGroups) {
    const Model m(64, group, 6000, 3, 2);
    for (const std::size_t window : {300, 3000, 5999}) {
      SCOPED_TRACE(::testing::Message() << "window " << window << ", group " << group);
      AttendOptions options;
      options.sliding_window = window;
      CheckOnAllTargets(m, options);
    }
  }
}

TEST(AttendOptions, SlidingWindowWithMoreQueriesThanTokens) {
  const Model m(64, 2, 40, 60, 3);
  AttendOptions options;
  options.sliding_window = 7;
  CheckOnAllTargets(m, options);
}

// Centred, folded and rotated K heads as well: the cap sees the whole score.
TEST(AttendOptions, SoftCap) {
  for (const std::size_t group : kGroups) {
    const Model m(128, group, 1500, 3, 4);
    for (const float cap : {1.0f, 30.0f, 50.0f, 1e4f}) {
      for (const float scale : {0.0f, 1.0f}) {  // the latter: scores far into the cap
        SCOPED_TRACE(::testing::Message()
                     << "cap " << cap << ", attention_scale " << scale << ", group " << group);
        AttendOptions options;
        options.soft_cap = cap;
        options.attention_scale = scale;
        CheckOnAllTargets(m, options);
      }
    }
  }
}

TEST(AttendOptions, AttentionScale) {
  for (const std::size_t group : kGroups) {
    for (const std::size_t queries : {1, 12}) {
      const Model m(96, group, 1300, queries, 16);
      for (const float scale : {0.01f, 1.0f / 16.0f, 0.3f}) {
        SCOPED_TRACE(::testing::Message() << "attention_scale " << scale << ", " << queries
                                          << " queries, group " << group);
        AttendOptions options;
        options.attention_scale = scale;
        CheckOnAllTargets(m, options);
      }
    }
  }
}

TEST(AttendOptions, Sinks) {
  struct Shape {
    std::size_t tokens, group;
  };
  for (const auto& [tokens, group] : {Shape{1, 4}, {300, 1}, {300, 4}, {300, 7}, {4000, 4}}) {
    const Model m(64, group, tokens, 3, 5);
    const float inf = std::numeric_limits<float>::infinity();
    for (const std::vector<float>& values : {std::vector<float>{-inf, -5.0f, 0.0f, 3.0f, 20.0f},
                                             std::vector<float>{1000.0f, -1000.0f}}) {
      std::vector<float> sinks(m.g.query_heads);
      for (std::size_t h = 0; h < sinks.size(); ++h) sinks[h] = values[h % values.size()];
      for (const float cap : {0.0f, 30.0f}) {
        SCOPED_TRACE(::testing::Message() << tokens << " tokens, group " << group << ", sinks "
                                          << values[0] << ", cap " << cap);
        AttendOptions options;
        options.sinks = sinks.data();
        options.soft_cap = cap;
        options.sliding_window = 3000;
        const std::vector<float> q = ToFloats(m.q);
        const std::vector<double> expected = Expected(m.Fill(), 0, q, options);
        ForAllTargets([&](std::string_view target) {
          const std::vector<float> out = Attended(m.Fill(target), 0, q, options);
          const std::vector<double> nmse = Nmse(m.g, out, expected);
          for (std::size_t h = 0; h < sinks.size(); ++h) {
            if (sinks[h] == 1000.0f) continue;
            EXPECT_LE(nmse[h], kBound) << "query head " << h << ", sink " << sinks[h];
          }
          for (std::size_t i = 0; i < out.size();
               ++i) {  // a sink that takes all leaves nothing, and surely not NaN
            const float sink = sinks[i / m.g.head_dim % m.g.query_heads];
            ASSERT_TRUE(sink < 1000.0f || out[i] == 0.0f) << i << ": " << out[i];
          }
        });
      }
    }
  }
}

// The mean that centred V puts back is worth what the sink leaves of the weight, and a sink's logit
// stands beside scores that lack q . mean; both tensors centred, on every head.
TEST(AttendOptions, SinksOverCentredHeads) {
  const Names k_plain = {"i8-token+centre"},
              v_plain = {"i8-token+centre", "i8-token-bf16+centre", "i8-head+centre"},
              k_steps = {"i8-token+centre+hadamard", "i8-token-bf16+centre+fold",
                         "i8-head+centre+fold+hadamard"},
              v_steps = {"i8-token+centre+fold+hadamard", "i8-token-bf16+centre+hadamard"};
  for (const std::size_t head_dim : {33, 80}) {  // without a rotation, and in blocks of 16
    for (const std::size_t group : kGroups) {
      Model m(head_dim, group, 1500, 3, 17);
      for (std::size_t i = 0; i < m.rows.v.size(); ++i)
        m.rows.v[i] = FloatToHalf(HalfToFloat(m.rows.v[i]) + (i % 3 == 0 ? 20.0f : -5.0f));
      std::vector<float> sinks(m.g.query_heads);
      for (std::size_t h = 0; h < sinks.size(); ++h)
        sinks[h] = 3.0f * static_cast<float>(h % 7) - 5.0f;
      for (const bool steps : {false, true}) {
        m.plan = MakePlan(m.g, m.rows, steps ? k_steps : k_plain, steps ? v_steps : v_plain);
        for (const float cap : {0.0f, 30.0f}) {
          SCOPED_TRACE(::testing::Message()
                       << "head_dim " << head_dim << ", group " << group << ", cap " << cap);
          AttendOptions options;
          options.soft_cap = cap;
          CheckOnAllTargets(m, options);
          options.sinks = sinks.data();
          CheckOnAllTargets(m, options);
        }
      }
    }
  }
}

// As large as f32 goes, which in units of log2 is larger still.
TEST(AttendOptions, SinksAtTheLimitsOfFloats) {
  const Model m(64, 2, 300, 2, 18);
  AttendOptions options;
  ForAllTargets([&](std::string_view target) {
    const Cache cache = m.Fill(target);
    const std::vector<float> without = Attended(cache, 0, m.q);
    std::vector<float> sinks(m.g.query_heads, -FLT_MAX);
    options.sinks = sinks.data();
    EXPECT_EQ(Attended(cache, 0, m.q, options), without);
    std::fill(sinks.begin(), sinks.end(), FLT_MAX);
    EXPECT_EQ(Attended(cache, 0, m.q, options), std::vector<float>(m.q.size(), 0.0f));
  });
}

// A rotation of q spreads them over their row, and no further.
TEST(AttendOptions, NanAndInfStayInTheirRow) {
  const float inf = std::numeric_limits<float>::infinity();
  for (const std::size_t head_dim : {33, 64, 80}) {
    const Model m(head_dim, 3, 1200, 4, 6);
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), inf, -inf}) {
      for (const float cap : {0.0f, 30.0f}) {
        SCOPED_TRACE(::testing::Message()
                     << "head_dim " << head_dim << ", " << bad << ", cap " << cap);
        AttendOptions options;
        options.soft_cap = cap;
        std::vector<float> q = ToFloats(m.q);
        const auto is_bad = [](std::size_t row) { return row % 7 == 0; };
        for (std::size_t row = 0; row < q.size() / head_dim; row += 7) {
          q[row * head_dim + row % head_dim] = bad;
        }
        std::vector<Half> q_halves(q.size());
        std::transform(q.begin(), q.end(), q_halves.begin(), FloatToHalf);
        ForAllTargets([&](std::string_view target) {
          const Cache cache = m.Fill(target);
          const std::vector<float> clean = Attended(cache, 0, ToFloats(m.q), options);
          const std::vector<float> out = Attended(cache, 0, q, options);
          const std::vector<float> of_halves = Attended(cache, 0, q_halves, options);
          EXPECT_EQ(std::memcmp(of_halves.data(), out.data(), out.size() * sizeof(float)), 0)
              << "q as halves";
          for (std::size_t i = 0; i < out.size(); ++i) {
            if (is_bad(i / head_dim)) {
              ASSERT_TRUE(std::isnan(out[i])) << "row " << i / head_dim << ": " << out[i];
            } else {
              ASSERT_EQ(out[i], clean[i]) << "row " << i / head_dim << ", beside bad ones";
            }
          }
        });
      }
    }
  }
}

TEST(AttendOptions, EmptyCacheGivesZeros) {
  const Model m(64, 2, 0, 3, 7);
  ForAllTargets([&](std::string_view target) {
    const std::vector<float> out = Attended(m.Fill(target), 0, m.q);
    EXPECT_EQ(out, std::vector<float>(m.q.size(), 0.0f));
    std::vector<float> sinks(m.g.query_heads, 1.0f);
    AttendOptions options;
    options.sinks = sinks.data();
    EXPECT_EQ(Attended(m.Fill(target), 0, m.q, options), std::vector<float>(m.q.size(), 0.0f));
    float untouched = 5.0f;
    EXPECT_TRUE(
        Attend(m.Fill(target), 0, RowsView::F16(nullptr, 0, m.g.query_heads, 64), &untouched).ok());
    EXPECT_EQ(untouched, 5.0f);
  });
}

// What was there before a Truncate has no say: neither in the tokens that follow nor in those that
// stay.
TEST(AttendOptions, NothingStaleAfterTruncate) {
  const Model m(96, 2, 700, 2, 8);
  const std::size_t row = m.g.kv_heads * m.g.head_dim;
  const std::vector<Half> poison_values = {0x7BFF, 0xFBFF, 0x7C00, 0xFC00,
                                           0x7E00};  // +-65504, +-Inf, NaN
  std::vector<Half> poison(600 * row);
  for (std::size_t i = 0; i < poison.size(); ++i)
    poison[i] = poison_values[i % poison_values.size()];
  const RowsView k = KvView(m.g, m.rows.k), v = KvView(m.g, m.rows.v), bad = KvView(m.g, poison);
  ForAllTargets([&](std::string_view target) {
    for (const std::size_t kept : {0, 1, 255, 256, 300}) {
      Cache fresh = Filled(m.plan, {}, 1000, target), reused = Filled(m.plan, {}, 1000, target);
      ASSERT_TRUE(fresh.Append(0, k.Tokens(0, kept), v.Tokens(0, kept)).ok());
      ASSERT_TRUE(reused.Append(0, k.Tokens(0, kept), v.Tokens(0, kept)).ok());
      ASSERT_TRUE(reused.Append(0, bad, bad).ok());
      ASSERT_TRUE(reused.Truncate(kept).ok());
      EXPECT_EQ(Attended(reused, 0, m.q), Attended(fresh, 0, m.q)) << "kept " << kept;
      for (Cache* cache : {&fresh, &reused}) {
        ASSERT_TRUE(cache->Append(0, k.Tokens(kept, 70), v.Tokens(kept, 70)).ok());
      }
      EXPECT_EQ(Attended(reused, 0, m.q), Attended(fresh, 0, m.q))
          << "kept " << kept << " and 70 more";
    }
  });
}

// The weights of the block of a token that takes all are 0 or next to it, but never a denormal, and
// nor is what comes of them.
TEST(AttendOptions, NoDenormals) {
  const Geometry g{1, kCodecs.size(), kCodecs.size(), 64};
  Rows rows = RandomRows(g, 600, 9, 0.0f);
  const std::size_t row = g.kv_heads * g.head_dim;
  for (std::size_t i = 0; i < rows.k.size(); ++i) {
    const std::size_t t = i / row;
    rows.k[i] = FloatToHalf(t == 300 ? 10.0f : -0.05f * static_cast<float>(t % 256));
    rows.v[i] = t == 300 ? Half{0} : FloatToHalf(60000.0f);
  }
  for (const Names& v :
       {Names{"f16"}, Names{"i8-token"}, Names{"i8-head"}, Names{"i8-token+fold"}}) {
    const Plan plan = MakePlan(g, rows, kCodecs, v);
    ForAllTargets([&](std::string_view target) {
      const Cache cache = Filled(plan, rows, 600, target);
      for (float q = 0.25f; q < 8.0f; q += 0.25f) {
        const std::vector<float> out =
            Attended(cache, 0, std::vector<float>(g.query_heads * g.head_dim, q));
        for (const float x : out)
          ASSERT_TRUE(x == 0.0f || std::fabs(x) >= FLT_MIN) << v[0] << " " << x;
      }
    });
  }
}

// Whole blocks of tokens without any V still take their share of the weight.
TEST(AttendOptions, ZeroRowsOfVTakeWeight) {
  const Geometry g{1, kCodecs.size(), 2 * kCodecs.size(), 64};
  for (const std::size_t zero_first : {0, 256}) {
    Rows rows = RandomRows(g, 512, 10);
    const std::size_t row = g.kv_heads * g.head_dim;
    std::fill_n(rows.v.begin() + static_cast<std::ptrdiff_t>(zero_first * row), 256 * row, Half{0});
    std::mt19937 rng(11);
    const std::vector<float> q = ToFloats(RandomHalves(rng, 2 * g.query_heads * g.head_dim));
    for (const char* v : {"f16", "i8-token", "i8-token-bf16", "i8-head", "i8-token+hadamard",
                          "i8-token-bf16+centre+fold+hadamard"}) {
      const Plan plan = MakePlan(g, rows, kCodecs, {v});
      const std::vector<double> expected = Expected(Filled(plan, rows, 512), 0, q);
      ForAllTargets([&](std::string_view target) {
        EXPECT_LE(WorstNmse(g, Attended(Filled(plan, rows, 512, target), 0, q), expected), kBound)
            << v << ", zeros from " << zero_first;
      });
    }
  }
}

// A huge V behind a key that nobody looks at is worth exactly nothing: the bits are those of a
// cache without that token.
TEST(AttendOptions, HopelessKeysAddNothing) {
  for (const std::size_t tokens : {1, 37, 64, 255, 256, 299}) {
    const Geometry g{1, 8, 32, 64};
    Rows rows = RandomRows(g, tokens, 19);
    const std::size_t row = g.kv_heads * g.head_dim;
    for (std::size_t i = 0; i < rows.k.size(); i += g.head_dim) rows.k[i] = FloatToHalf(1.0f);
    std::mt19937 rng(20);
    std::vector<Half> q = RandomHalves(rng, g.query_heads * g.head_dim);
    for (std::size_t i = 0; i < q.size(); i += g.head_dim) q[i] = FloatToHalf(8.0f);
    Rows hopeless{std::vector<Half>(row, Half{0}), std::vector<Half>(row, FloatToHalf(60000.0f))};
    for (std::size_t i = 0; i < row; i += g.head_dim)
      hopeless.k[i] = FloatToHalf(-400.0f);  // a score of -400, in the middle of 1s
    for (const char* v : {"f16", "i8-token", "i8-token-bf16", "i8-head", "i8-token+centre",
                          "i8-token+hadamard", "i8-token-bf16+centre+fold+hadamard"}) {
      const Plan plan =
          MakePlan(g, rows,
                   {"f16", "i8-token", "i8-token-bf16", "i8-token+centre", "i8-token+hadamard",
                    "i8-token+fold", "i8-token-bf16+centre+fold", "i8-token+centre+fold+hadamard"},
                   {v});
      ForAllTargets([&](std::string_view target) {
        SCOPED_TRACE(::testing::Message() << tokens << " tokens, V " << v);
        Cache cache = Filled(plan, rows, tokens + 1, target);
        const std::vector<float> without = Attended(cache, 0, q);
        ASSERT_TRUE(cache.Append(0, KvView(g, hopeless.k), KvView(g, hopeless.v)).ok());
        EXPECT_EQ(Attended(cache, 0, q), without);
      });
    }
  }
}

// What a query may not see, later tokens and those before the window, does not change a bit of its
// output.
TEST(AttendOptions, MaskedTokensAddNothing) {
  const std::size_t tokens = 700, queries = 30, window = 200;
  const Model m(64, 4, tokens, queries, 21);
  const std::size_t row = m.g.kv_heads * m.g.head_dim, q_row = m.g.query_heads * m.g.head_dim;
  const auto poisoned = [&](std::size_t first, std::size_t last, std::string_view target) {
    Rows rows = m.rows;
    std::fill(rows.k.begin() + static_cast<std::ptrdiff_t>(first * row),
              rows.k.begin() + static_cast<std::ptrdiff_t>(last * row), FloatToHalf(-60000.0f));
    std::fill(rows.v.begin() + static_cast<std::ptrdiff_t>(first * row),
              rows.v.begin() + static_cast<std::ptrdiff_t>(last * row), FloatToHalf(60000.0f));
    return Filled(m.plan, rows, tokens, target);
  };
  ForAllTargets([&](std::string_view target) {
    for (const float cap : {0.0f, 30.0f}) {
      AttendOptions options;
      options.soft_cap = cap;
      const std::vector<float> all = Attended(m.Fill(target), 0, m.q, options);
      const std::vector<float> later =
          Attended(poisoned(tokens - 10, tokens, target), 0, m.q, options);
      for (std::size_t i = 0; i < (queries - 10) * q_row; ++i)
        ASSERT_EQ(later[i], all[i]) << "query " << i / q_row << ", cap " << cap;
      EXPECT_NE(later, all);
      options.sliding_window = window;
      const std::vector<float> windowed = Attended(m.Fill(target), 0, m.q, options);
      const std::size_t first_seen = tokens - queries + 1 - window;  // by the first query
      EXPECT_EQ(Attended(poisoned(0, first_seen, target), 0, m.q, options), windowed)
          << "cap " << cap;
      EXPECT_NE(Attended(poisoned(0, first_seen + 1, target), 0, m.q, options), windowed)
          << "cap " << cap;
    }
  });
}

// No more than an element's own: by an odd number of them.
TEST(AttendOptions, AnyAlignment) {
  const Model m(80, 2, 300, 3, 12);
  const auto misaligned = [](const auto& x, std::size_t elements, std::vector<char>* storage) {
    storage->assign(x.size() * sizeof(x[0]) + 128, 0);
    char* at = storage->data() +
               (64 - reinterpret_cast<std::uintptr_t>(storage->data()) % 64) % 64 +
               elements * sizeof(x[0]);
    std::memcpy(at, x.data(), x.size() * sizeof(x[0]));
    return at;
  };
  ForAllTargets([&](std::string_view target) {
    const std::vector<float> expected = Attended(m.Fill(target), 0, m.q);
    for (const std::size_t by : {1, 3, 17}) {
      std::vector<char> k, v, q, q_floats, out;
      const auto moved = [&](RowsView view, const auto& x, std::vector<char>* storage) {
        view.data = misaligned(x, by, storage);
        return view;
      };
      Cache cache = Filled(m.plan, {}, m.tokens, target);
      ASSERT_TRUE(cache
                      .Append(0, moved(KvView(m.g, m.rows.k), m.rows.k, &k),
                              moved(KvView(m.g, m.rows.v), m.rows.v, &v))
                      .ok());
      float* to = reinterpret_cast<float*>(misaligned(std::vector<float>(m.q.size()), by, &out));
      std::vector<float> got(m.q.size());
      ASSERT_TRUE(Attend(cache, 0, moved(QView(m.g, m.q), m.q, &q), to).ok());
      std::memcpy(got.data(), to, got.size() * sizeof(float));
      EXPECT_EQ(got, expected) << by;
      const std::vector<float> floats = ToFloats(m.q);
      ASSERT_TRUE(Attend(cache, 0, moved(QView(m.g, floats), floats, &q_floats), to).ok());
      std::memcpy(got.data(), to, got.size() * sizeof(float));
      EXPECT_EQ(got, expected) << by;
    }
  });
}

// q as f16, bf16 or f32, token by token, head by head, or backwards: the same bits.
TEST(AttendOptions, QueriesOfAnyTypeAndStride) {
  Model m(80, 2, 700, 9, 23);
  for (Half& x : m.q) x = FloatToHalf(std::round(8.0f * HalfToFloat(x)));  // a bf16 number as well
  ForAllTargets([&](std::string_view target) {
    const Cache cache = m.Fill(target);
    const std::vector<float> expected = Attended(cache, 0, m.q);
    for (const Dtype dtype : {KVMIX_F16, KVMIX_BF16, KVMIX_F32}) {
      for (const bool heads_first : {false, true}) {
        for (const bool backwards : {false, true}) {
          const Placed q = Place(QView(m.g, m.q), dtype, heads_first, backwards, backwards ? 5 : 0);
          std::vector<float> out(m.q.size(), -1.0f);
          ASSERT_TRUE(Attend(cache, 0, q.view, out.data()).ok());
          EXPECT_EQ(out, expected)
              << "type " << static_cast<int>(dtype) << (heads_first ? ", heads first" : "")
              << (backwards ? ", backwards" : "");
        }
      }
    }
  });
}

// Several spans per head, several query parts, both: neither threads nor order change a bit.
TEST(AttendOptions, ThreadsAndOrderOfPartsDoNotMatter) {
  struct Shape {
    std::size_t tokens, queries;
  };
  for (const Shape& s : {Shape{9000, 1}, {3000, 3}, {400, 150}, {2500, 40}}) {
    const Model m(64, 4, s.tokens, s.queries, 13);
    SCOPED_TRACE(::testing::Message() << s.tokens << " tokens, " << s.queries << " queries");
    const Cache cache = m.Fill();
    const std::vector<float> expected = Attended(cache, 0, m.q);
    for (const int threads : {0, 2, 3, 7}) {
      EXPECT_EQ(Attended(cache, 0, m.q, {}, threads), expected) << threads << " threads";
    }
    EXPECT_EQ(Attended(cache, 0, m.q, {}, EngineThreads(3)), expected);
    for (unsigned seed = 0; seed < 3; ++seed) {
      OrderRunner runner(seed);
      EXPECT_EQ(Attended(cache, 0, m.q, {}, runner), expected) << "order " << seed;
    }
  }
}

// Calls of all sizes by one thread, larger and smaller in turn, give what a thread's first call
// does.
TEST(AttendOptions, CallsOfAllShapesOneAfterTheOther) {
  struct Shape {
    std::size_t head_dim, group, tokens, queries;
  };
  std::vector<Model> models;
  for (const Shape& s : {Shape{64, 4, 300, 1},
                         {64, 4, 300, 70},
                         {128, 7, 3000, 3},
                         {64, 1, 10, 1},
                         {80, 1, 0, 2},
                         {256, 4, 1200, 20},
                         {33, 7, 1100, 1},
                         {128, 7, 3000, 3},
                         {64, 4, 300, 0},
                         {64, 4, 300, 1}}) {
    models.emplace_back(s.head_dim, s.group, s.tokens, s.queries, 22);
  }
  ForAllTargets([&](std::string_view target) {
    for (const Model& m : models) {
      SCOPED_TRACE(::testing::Message() << ToString(m.g) << ", " << m.tokens << " tokens, "
                                        << QView(m.g, m.q).tokens << " queries");
      const Cache cache = m.Fill(target);
      std::vector<float> expected;
      std::thread([&] { expected = Attended(cache, 0, m.q); }).join();
      EXPECT_EQ(Attended(cache, 0, m.q), expected);
      OrderRunner runner;
      runner.before = [] { ADD_FAILURE(); };
      std::vector<float> out(m.q.size() + 1);
      EXPECT_EQ(Attend(cache, 1, QView(m.g, m.q), out.data(), runner).code(),
                ErrorCode::kInvalidArgument);
    }
  });
}

// A runner may do other work on a thread that waits.
TEST(AttendOptions, CallsInsideACall) {
  const Model m(64, 4, 3000, 20, 25), other(64, 2, 2500, 3, 26);
  const Cache cache = m.Fill(), inner = other.Fill();
  const RowsView k = KvView(other.g, other.rows.k), v = KvView(other.g, other.rows.v);
  Cache copy = other.Fill();
  ASSERT_TRUE(copy.Truncate(0).ok());
  const std::vector<float> expected = Attended(cache, 0, m.q), inside = Attended(inner, 0, other.q);
  OrderRunner runner;
  runner.before = [&] {
    EXPECT_EQ(Attended(inner, 0, other.q), inside);
    if (copy.tokens(0) != 0) return;
    OrderRunner appending;
    appending.before = [&, done = false]() mutable {
      if (std::exchange(done, true)) return;
      Cache third = other.Fill();
      ASSERT_TRUE(third.Truncate(0).ok());
      ASSERT_TRUE(third.Append(0, k, v).ok());
      EXPECT_EQ(Attended(third, 0, other.q), inside);
    };
    ASSERT_TRUE(copy.Append(0, k, v, appending).ok());
  };
  EXPECT_EQ(Attended(cache, 0, m.q, {}, runner), expected);
  EXPECT_EQ(Attended(copy, 0, other.q), inside);
}

TEST(AttendOptions, BadArguments) {
  const Model m(64, 1, 10, 1, 14);
  const Cache cache = m.Fill();
  std::vector<float> out(m.q.size(), 5.0f);
  const RowsView q = QView(m.g, m.q);
  const auto attend = [&](std::size_t layer, const AttendOptions& options) {
    return Attend(cache, layer, q, out.data(), options).code();
  };
  EXPECT_EQ(attend(1, {}), ErrorCode::kInvalidArgument);
  AttendOptions options;
  for (const float bad :
       {-1.0f, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    options = {};
    options.soft_cap = bad;
    EXPECT_EQ(attend(0, options), ErrorCode::kInvalidArgument) << "soft_cap " << bad;
    options = {};
    options.attention_scale = bad;
    EXPECT_EQ(attend(0, options), ErrorCode::kInvalidArgument) << "attention_scale " << bad;
  }
  EXPECT_EQ(Attend(cache, 0, q, out.data(), -1).code(), ErrorCode::kInvalidArgument);
  const auto refused = [&](const RowsView& view, const std::string& text) {
    const Status s = Attend(cache, 0, view, out.data());
    EXPECT_EQ(s.code(), ErrorCode::kMismatch);
    EXPECT_NE(s.message().find(text), std::string::npos) << s.message();
  };
  refused(RowsView::F16(m.q.data(), 1, 7, 64), "Q: expected 10 heads x 64, found 7 x 64");
  refused(RowsView::F16(m.q.data(), 1, 8, 63), "Q: expected 10 heads x 64, found 8 x 63");
  refused(RowsView::F16(m.q.data(), 0, 64, 8), "found 64 x 8");
  EXPECT_EQ(out, std::vector<float>(m.q.size(), 5.0f));
}

TEST(AttendOptions, NoAllocationAfterTheFirstCall) {
  const Model m(128, 4, 3000, 50, 15);
  std::vector<float> out(m.q.size());
  AttendOptions options;
  options.soft_cap = 30.0f;
  const RowsView k = KvView(m.g, m.rows.k), v = KvView(m.g, m.rows.v), q = QView(m.g, m.q);
  const auto run = [](void*, std::size_t parts, void (*part)(void*, std::size_t), void* job) {
    ASSERT_GT(parts, 1u);
    for (std::size_t p = 0; p < parts; ++p) part(job, p);
  };
  const Runner in_order = kvmix_runner{run, nullptr, 2};
  const auto append = [&](Cache& cache) {  // many parts, one, and the single token of a decode
    ASSERT_TRUE(cache.Truncate(1000).ok());
    ASSERT_TRUE(cache.Append(0, k.Tokens(1000, 1900), v.Tokens(1000, 1900), in_order).ok());
    ASSERT_TRUE(cache.Append(0, k.Tokens(2900, 20), v.Tokens(2900, 20)).ok());
    for (std::size_t t = 2920; t < 3000; ++t) {
      ASSERT_TRUE(cache.Append(0, k.Tokens(t, 1), v.Tokens(t, 1)).ok());
    }
  };
  ForAllTargets([&](std::string_view target) {
    Cache cache = m.Fill(target);
    const auto all = [&] {
      for (const std::size_t queries : {1, 50}) {
        ASSERT_TRUE(Attend(cache, 0, q.Tokens(0, queries), out.data(), options).ok());
        ASSERT_TRUE(Attend(cache, 0, q.Tokens(0, queries), out.data(), in_order).ok());
      }
    };
    all();
    append(cache);
    const std::size_t before = allocations;
    for (int i = 0; i < 3; ++i) {
      all();
      append(cache);
    }
    EXPECT_EQ(allocations, before);
  });
}

// OpenMP's threads stay behind in a fork: the child must neither wait for them nor compute anything
// else than its parent.
TEST(AttendOptions, AForkedChildGoesOn) {
  const Model m(64, 4, 3000, 20, 24);
  Cache cache = m.Fill();
  const auto again = [&] {
    if (!cache.Truncate(1000).ok()) return false;
    const RowsView k = KvView(m.g, m.rows.k), v = KvView(m.g, m.rows.v);
    return cache.Append(0, k.Tokens(1000, 2000), v.Tokens(1000, 2000), 2).ok();
  };
  ASSERT_TRUE(again());  // on two threads, which are there from now on
  const std::vector<float> expected = Attended(cache, 0, m.q, {}, 2);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(10);
    _exit(again() && Attended(cache, 0, m.q, {}, 2) == expected ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << "ended by signal " << WTERMSIG(status);
  EXPECT_EQ(WEXITSTATUS(status), 0);
  EXPECT_EQ(Attended(cache, 0, m.q, {}, 2), expected);  // the parent has its threads still
}

}  // namespace
}  // namespace kvmix::testing
