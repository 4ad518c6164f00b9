// What attention's options do, and what must not change its result: windows, soft caps, sinks, NaN,
// truncation, alignment, threads. (Accuracy over shapes and codecs: attend_test.cc.)
#include <gtest/gtest.h>

#include <atomic>
#include <cfloat>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#include "tests/attend_cases.h"

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

// Five KV heads, each with another pair of codecs.
struct Model {
  Geometry g;
  Rows rows;
  Plan plan;
  std::size_t tokens;
  std::vector<Half> q;

  Model(std::size_t head_dim, std::size_t group, std::size_t num_tokens, std::size_t queries,
        unsigned seed)
      : g{1, 5, 5 * group, head_dim}, rows(RandomRows(g, num_tokens, seed)), tokens(num_tokens) {
    plan = MakePlan(g, rows, kCodecs,
                    {"i8-token", "f16", "i8-token+centre", "i8-token-bf16", "i8-head"});
    std::mt19937 rng(seed + 1);
    q = RandomHalves(rng, queries * g.query_heads * g.head_dim);
  }
  Cache Fill() const { return Filled(plan, rows, tokens); }
};

void CheckOnAllTargets(const Model& m, const AttendOptions& options) {
  const std::vector<float> q = ToFloats(m.q);
  const std::vector<double> expected = Expected(m.Fill(), 0, q, options);
  ForAllTargets(
      [&] { EXPECT_LE(WorstNmse(m.g, Attended(m.Fill(), 0, q, options), expected), kBound); });
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

// Centred K heads as well: the cap sees the whole score.
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
        ForAllTargets([&] {
          const std::vector<float> out = Attended(m.Fill(), 0, q, options);
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

// The mean that centred V puts back is worth what the sink leaves of the weight; both tensors
// centred, on every head.
TEST(AttendOptions, SinksOverCentredHeads) {
  for (const std::size_t group : kGroups) {
    Model m(80, group, 1500, 3, 17);
    for (std::size_t i = 0; i < m.rows.v.size(); ++i)
      m.rows.v[i] = FloatToHalf(HalfToFloat(m.rows.v[i]) + (i % 3 == 0 ? 20.0f : -5.0f));
    m.plan = MakePlan(m.g, m.rows, {"i8-token+centre"},
                      {"i8-token+centre", "i8-token-bf16+centre", "i8-head+centre"});
    std::vector<float> sinks(m.g.query_heads);
    for (std::size_t h = 0; h < sinks.size(); ++h)
      sinks[h] = 3.0f * static_cast<float>(h % 7) - 5.0f;
    for (const float cap : {0.0f, 30.0f}) {
      SCOPED_TRACE(::testing::Message() << "group " << group << ", cap " << cap);
      AttendOptions options;
      options.soft_cap = cap;
      CheckOnAllTargets(m, options);
      options.sinks = sinks.data();
      CheckOnAllTargets(m, options);
    }
  }
}

// As large as f32 goes, which in units of log2 is larger still.
TEST(AttendOptions, SinksAtTheLimitsOfFloats) {
  const Model m(64, 2, 300, 2, 18);
  AttendOptions options;
  ForAllTargets([&] {
    const Cache cache = m.Fill();
    const std::vector<float> without = Attended(cache, 0, m.q);
    std::vector<float> sinks(m.g.query_heads, -FLT_MAX);
    options.sinks = sinks.data();
    EXPECT_EQ(Attended(cache, 0, m.q, options), without);
    std::fill(sinks.begin(), sinks.end(), FLT_MAX);
    EXPECT_EQ(Attended(cache, 0, m.q, options), std::vector<float>(m.q.size(), 0.0f));
  });
}

TEST(AttendOptions, NanAndInfStayInTheirRow) {
  const Model m(80, 3, 1200, 4, 6);
  const float inf = std::numeric_limits<float>::infinity();
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), inf, -inf}) {
    for (const float cap : {0.0f, 30.0f}) {
      AttendOptions options;
      options.soft_cap = cap;
      std::vector<float> q = ToFloats(m.q);
      const std::vector<bool> is_bad = [&] {
        std::vector<bool> b(q.size() / m.g.head_dim);
        for (std::size_t row = 0; row < b.size(); row += 7) b[row] = true;
        return b;
      }();
      ForAllTargets([&] {
        const Cache cache = m.Fill();
        const std::vector<float> clean = Attended(cache, 0, ToFloats(m.q), options);
        for (std::size_t row = 0; row < is_bad.size(); ++row) {
          if (is_bad[row]) q[row * m.g.head_dim + row % m.g.head_dim] = bad;
        }
        const std::vector<float> out = Attended(cache, 0, q, options);
        std::vector<Half> q_halves(q.size());
        std::transform(q.begin(), q.end(), q_halves.begin(), FloatToHalf);
        const std::vector<float> of_halves = Attended(cache, 0, q_halves, options);
        EXPECT_EQ(std::memcmp(of_halves.data(), out.data(), out.size() * sizeof(float)), 0)
            << "q as halves, with " << bad;
        for (std::size_t i = 0; i < out.size(); ++i) {
          if (is_bad[i / m.g.head_dim]) {
            ASSERT_TRUE(std::isnan(out[i]))
                << "row " << i / m.g.head_dim << " with " << bad << ": " << out[i];
          } else {
            ASSERT_EQ(out[i], clean[i])
                << "row " << i / m.g.head_dim << " beside rows with " << bad;
          }
        }
      });
    }
  }
}

TEST(AttendOptions, EmptyCacheGivesZeros) {
  const Model m(64, 2, 0, 3, 7);
  ForAllTargets([&] {
    const std::vector<float> out = Attended(m.Fill(), 0, m.q);
    EXPECT_EQ(out, std::vector<float>(m.q.size(), 0.0f));
    std::vector<float> sinks(m.g.query_heads, 1.0f);
    AttendOptions options;
    options.sinks = sinks.data();
    EXPECT_EQ(Attended(m.Fill(), 0, m.q, options), std::vector<float>(m.q.size(), 0.0f));
    float untouched = 5.0f;
    EXPECT_TRUE(Attend(m.Fill(), 0, m.q.data(), 0, &untouched).ok());
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
  ForAllTargets([&] {
    for (const std::size_t kept : {0, 1, 255, 256, 300}) {
      Result<Cache> fresh = Cache::Create(m.g, m.plan, 1000),
                    reused = Cache::Create(m.g, m.plan, 1000);
      ASSERT_TRUE(fresh.ok() && reused.ok());
      ASSERT_TRUE(fresh->Append(0, m.rows.k.data(), m.rows.v.data(), kept).ok());
      ASSERT_TRUE(reused->Append(0, m.rows.k.data(), m.rows.v.data(), kept).ok());
      ASSERT_TRUE(reused->Append(0, poison.data(), poison.data(), 600).ok());
      ASSERT_TRUE(reused->Truncate(kept).ok());
      EXPECT_EQ(Attended(*reused, 0, m.q), Attended(*fresh, 0, m.q)) << "kept " << kept;
      for (Cache* cache : {&*fresh, &*reused}) {
        ASSERT_TRUE(
            cache->Append(0, m.rows.k.data() + kept * row, m.rows.v.data() + kept * row, 70).ok());
      }
      EXPECT_EQ(Attended(*reused, 0, m.q), Attended(*fresh, 0, m.q))
          << "kept " << kept << " and 70 more";
    }
  });
}

// The weights of the block of a token that takes all are 0 or next to it, but never a denormal, and
// nor is what comes of them.
TEST(AttendOptions, NoDenormals) {
  const Geometry g{1, 5, 5, 64};
  Rows rows = RandomRows(g, 600, 9, 0.0f);
  const std::size_t row = g.kv_heads * g.head_dim;
  for (std::size_t i = 0; i < rows.k.size(); ++i) {
    const std::size_t t = i / row;
    rows.k[i] = FloatToHalf(t == 300 ? 10.0f : -0.05f * static_cast<float>(t % 256));
    rows.v[i] = t == 300 ? Half{0} : FloatToHalf(60000.0f);
  }
  for (const Names& v : {Names{"f16"}, Names{"i8-token"}, Names{"i8-head"}}) {
    const Plan plan = MakePlan(g, rows, kCodecs, v);
    ForAllTargets([&] {
      const Cache cache = Filled(plan, rows, 600);
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
  const Geometry g{1, 5, 10, 64};
  for (const std::size_t zero_first : {0, 256}) {
    Rows rows = RandomRows(g, 512, 10);
    const std::size_t row = g.kv_heads * g.head_dim;
    std::fill_n(rows.v.begin() + static_cast<std::ptrdiff_t>(zero_first * row), 256 * row, Half{0});
    std::mt19937 rng(11);
    const std::vector<float> q = ToFloats(RandomHalves(rng, 2 * g.query_heads * g.head_dim));
    for (const char* v : {"f16", "i8-token", "i8-token-bf16", "i8-head"}) {
      const Plan plan = MakePlan(g, rows, kCodecs, {v});
      const std::vector<double> expected = Expected(Filled(plan, rows, 512), 0, q);
      ForAllTargets([&] {
        EXPECT_LE(WorstNmse(g, Attended(Filled(plan, rows, 512), 0, q), expected), kBound)
            << v << ", zeros from " << zero_first;
      });
    }
  }
}

// A huge V behind a key that nobody looks at is worth exactly nothing: the bits are those of a
// cache without that token.
TEST(AttendOptions, HopelessKeysAddNothing) {
  for (const std::size_t tokens : {1, 37, 64, 255, 256, 299}) {
    const Geometry g{1, 5, 20, 64};
    Rows rows = RandomRows(g, tokens, 19);
    const std::size_t row = g.kv_heads * g.head_dim;
    for (std::size_t i = 0; i < rows.k.size(); i += g.head_dim) rows.k[i] = FloatToHalf(1.0f);
    std::mt19937 rng(20);
    std::vector<Half> q = RandomHalves(rng, g.query_heads * g.head_dim);
    for (std::size_t i = 0; i < q.size(); i += g.head_dim) q[i] = FloatToHalf(8.0f);
    Rows hopeless{std::vector<Half>(row, Half{0}), std::vector<Half>(row, FloatToHalf(60000.0f))};
    for (std::size_t i = 0; i < row; i += g.head_dim)
      hopeless.k[i] = FloatToHalf(-400.0f);  // a score of -400, in the middle of 1s
    for (const char* v : {"f16", "i8-token", "i8-token-bf16", "i8-head", "i8-token+centre"}) {
      const Plan plan = MakePlan(
          g, rows, {"f16", "i8-token", "i8-token-bf16", "i8-token", "i8-token+centre"}, {v});
      ForAllTargets([&] {
        SCOPED_TRACE(::testing::Message() << tokens << " tokens, V " << v);
        Cache cache = Filled(plan, rows, tokens + 1);
        const std::vector<float> without = Attended(cache, 0, q);
        ASSERT_TRUE(cache.Append(0, hopeless.k.data(), hopeless.v.data(), 1).ok());
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
  const auto poisoned = [&](std::size_t first, std::size_t last) {
    Rows rows = m.rows;
    std::fill(rows.k.begin() + static_cast<std::ptrdiff_t>(first * row),
              rows.k.begin() + static_cast<std::ptrdiff_t>(last * row), FloatToHalf(-60000.0f));
    std::fill(rows.v.begin() + static_cast<std::ptrdiff_t>(first * row),
              rows.v.begin() + static_cast<std::ptrdiff_t>(last * row), FloatToHalf(60000.0f));
    return Filled(m.plan, rows, tokens);
  };
  ForAllTargets([&] {
    for (const float cap : {0.0f, 30.0f}) {
      AttendOptions options;
      options.soft_cap = cap;
      const std::vector<float> all = Attended(m.Fill(), 0, m.q, options);
      const std::vector<float> later = Attended(poisoned(tokens - 10, tokens), 0, m.q, options);
      for (std::size_t i = 0; i < (queries - 10) * q_row; ++i)
        ASSERT_EQ(later[i], all[i]) << "query " << i / q_row << ", cap " << cap;
      EXPECT_NE(later, all);
      options.sliding_window = window;
      const std::vector<float> windowed = Attended(m.Fill(), 0, m.q, options);
      const std::size_t first_seen = tokens - queries + 1 - window;  // by the first query
      EXPECT_EQ(Attended(poisoned(0, first_seen), 0, m.q, options), windowed) << "cap " << cap;
      EXPECT_NE(Attended(poisoned(0, first_seen + 1), 0, m.q, options), windowed) << "cap " << cap;
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
  ForAllTargets([&] {
    const std::vector<float> expected = Attended(m.Fill(), 0, m.q);
    for (const std::size_t by : {1, 3, 17}) {
      std::vector<char> k, v, q, q_floats, out;
      Result<Cache> cache = Cache::Create(m.g, m.plan, m.tokens);
      ASSERT_TRUE(cache
                      ->Append(0, reinterpret_cast<const Half*>(misaligned(m.rows.k, by, &k)),
                               reinterpret_cast<const Half*>(misaligned(m.rows.v, by, &v)),
                               m.tokens)
                      .ok());
      float* to = reinterpret_cast<float*>(misaligned(std::vector<float>(m.q.size()), by, &out));
      std::vector<float> got(m.q.size());
      ASSERT_TRUE(
          Attend(*cache, 0, reinterpret_cast<const Half*>(misaligned(m.q, by, &q)), 3, to).ok());
      std::memcpy(got.data(), to, got.size() * sizeof(float));
      EXPECT_EQ(got, expected) << by;
      ASSERT_TRUE(Attend(*cache, 0,
                         reinterpret_cast<const float*>(misaligned(ToFloats(m.q), by, &q_floats)),
                         3, to)
                      .ok());
      std::memcpy(got.data(), to, got.size() * sizeof(float));
      EXPECT_EQ(got, expected) << by;
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
    AttendOptions options;
    const std::vector<float> expected = Attended(cache, 0, m.q, options);
    for (const int threads : {0, 2, 3, 7}) {
      options.num_threads = threads;
      EXPECT_EQ(Attended(cache, 0, m.q, options), expected) << threads << " threads";
    }
    AttendJob job;
    EXPECT_EQ(job.parts(), 0u);
    for (int round = 0; round < 2; ++round) {
      std::vector<float> out(m.q.size(), -1.0f);
      ASSERT_TRUE(job.Start(cache, 0, m.q.data(), s.queries, out.data()).ok());
      std::vector<std::thread> pool;
      for (std::size_t i = 0; i < 3; ++i) {
        pool.emplace_back([&, i] {
          for (std::size_t p = job.parts(); p-- > 0;) {
            if (p % 3 == i) job.RunPart(p);
          }
        });
      }
      for (std::thread& t : pool) t.join();
      EXPECT_EQ(out, expected) << "round " << round;
    }
  }
}

// One job for layers and calls of all sizes, larger and smaller in turn.
TEST(AttendOptions, JobReusedOverShapes) {
  struct Shape {
    std::size_t head_dim, group, tokens, queries;
  };
  ForAllTargets([&] {
    AttendJob job;
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
      SCOPED_TRACE(::testing::Message() << s.head_dim << " dims, group " << s.group << ", "
                                        << s.tokens << " tokens, " << s.queries << " queries");
      const Model m(s.head_dim, s.group, s.tokens, s.queries, 22);
      const Cache cache = m.Fill();
      const auto run = [&](AttendJob& j) {
        std::vector<float> out(m.q.size(), -1.0f);
        EXPECT_TRUE(j.Start(cache, 0, m.q.data(), s.queries, out.data()).ok());
        for (std::size_t p = 0; p < j.parts(); ++p) j.RunPart(p);
        return out;
      };
      AttendJob fresh;
      const std::vector<float> expected = run(fresh);
      EXPECT_EQ(run(job), expected);
      std::vector<float> out(m.q.size() + 1);
      EXPECT_EQ(job.Start(cache, 1, m.q.data(), s.queries, out.data()).code(),
                ErrorCode::kInvalidArgument);
      EXPECT_EQ(job.parts(), 0u);
    }
  });
}

TEST(AttendOptions, BadArguments) {
  const Model m(64, 1, 10, 1, 14);
  const Cache cache = m.Fill();
  std::vector<float> out(m.q.size(), 5.0f);
  const auto attend = [&](std::size_t layer, const AttendOptions& options) {
    return Attend(cache, layer, m.q.data(), 1, out.data(), options).code();
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
  options = {};
  options.num_threads = -1;
  EXPECT_EQ(attend(0, options), ErrorCode::kInvalidArgument);
  EXPECT_EQ(out, std::vector<float>(m.q.size(), 5.0f));
}

TEST(AttendOptions, NoAllocationAfterTheFirstCall) {
  const Model m(128, 4, 3000, 50, 15);
  std::vector<float> out(m.q.size());
  AttendOptions options;
  options.soft_cap = 30.0f;
  ForAllTargets([&] {
    Cache cache = m.Fill();
    const auto all = [&] {
      for (const std::size_t queries : {1, 50}) {
        ASSERT_TRUE(Attend(cache, 0, m.q.data(), queries, out.data(), options).ok());
        ASSERT_TRUE(Attend(cache, 0, m.q.data(), queries, out.data()).ok());
      }
    };
    all();
    const std::size_t before = allocations;
    for (int i = 0; i < 3; ++i) all();
    ASSERT_TRUE(cache.Truncate(2000).ok());
    ASSERT_TRUE(cache.Append(0, m.rows.k.data(), m.rows.v.data(), 1000).ok());
    all();
    EXPECT_EQ(allocations, before);
  });
  const Cache cache = m.Fill();
  AttendJob job;
  const auto run = [&] {
    ASSERT_TRUE(job.Start(cache, 0, m.q.data(), 50, out.data()).ok());
    for (std::size_t p = 0; p < job.parts(); ++p) job.RunPart(p);
  };
  run();
  const std::size_t before = allocations;
  run();
  EXPECT_EQ(allocations, before);
}

}  // namespace
}  // namespace kvmix::testing
