// What attention's options do, and what must not change its result: windows, soft caps, sinks, NaN, truncation, alignment, threads.
// (Accuracy over shapes and codecs: attend_test.cc.)
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

// Counts every allocation of this program. (Out of line: gcc warns of the free of what it takes for new's.)
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

  Model(std::size_t head_dim, std::size_t group, std::size_t num_tokens, std::size_t queries, unsigned seed)
      : g{1, 5, 5 * group, head_dim}, rows(RandomRows(g, num_tokens, seed)), tokens(num_tokens) {
    plan = MakePlan(g, rows, kCodecs, {"i8-token", "f16", "i8-token+centre", "i8-token-bf16", "i8-head"});
    std::mt19937 rng(seed + 1);
    q = RandomHalves(rng, queries * g.query_heads * g.head_dim);
  }
  Cache Fill() const { return Filled(plan, rows, tokens); }
};

void CheckOnAllTargets(const Model& m, const AttendOptions& options) {
  const std::vector<float> q = ToFloats(m.q);
  const std::vector<double> expected = Expected(m.Fill(), 0, q, options);
  ForAllTargets([&] { EXPECT_LE(WorstNmse(m.g, Attended(m.Fill(), 0, q, options), expected), kBound); });
}

TEST(AttendOptions, SlidingWindow) {
  for (const std::size_t queries : {1, 5, 100}) {
    const Model m(64, 2, 700, queries, 1);
    for (const std::size_t window : {std::size_t{1}, std::size_t{5}, std::size_t{256}, std::size_t{699}, std::size_t{700}, std::size_t{5000}, SIZE_MAX}) {
      SCOPED_TRACE(::testing::Message() << "window " << window << ", " << queries << " queries");
      AttendOptions options;
      options.sliding_window = window;
      CheckOnAllTargets(m, options);
    }
  }
}

TEST(AttendOptions, SlidingWindowOverSeveralSpans) {
  const Model m(64, 2, 6000, 3, 2);
  for (const std::size_t window : {100, 3000, 5999}) {
    SCOPED_TRACE(window);
    AttendOptions options;
    options.sliding_window = window;
    CheckOnAllTargets(m, options);
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
  const Model m(128, 2, 1500, 3, 4);
  for (const float cap : {1.0f, 30.0f, 50.0f, 1e4f}) {
    for (const float scale : {0.0f, 1.0f}) {  // the latter: scores far into the cap
      SCOPED_TRACE(::testing::Message() << "cap " << cap << ", attention_scale " << scale);
      AttendOptions options;
      options.soft_cap = cap;
      options.attention_scale = scale;
      CheckOnAllTargets(m, options);
    }
  }
}

TEST(AttendOptions, Sinks) {
  for (const std::size_t tokens : {1, 300, 4000}) {
    const Model m(64, 4, tokens, 3, 5);
    const float inf = std::numeric_limits<float>::infinity();
    for (const std::vector<float>& values : {std::vector<float>{-inf, -5.0f, 0.0f, 3.0f, 20.0f}, std::vector<float>{1000.0f, -1000.0f}}) {
      std::vector<float> sinks(m.g.query_heads);
      for (std::size_t h = 0; h < sinks.size(); ++h) sinks[h] = values[h % values.size()];
      for (const float cap : {0.0f, 30.0f}) {
        SCOPED_TRACE(::testing::Message() << tokens << " tokens, sinks " << values[0] << ", cap " << cap);
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
          for (std::size_t i = 0; i < out.size(); ++i) {  // a sink that takes all leaves nothing, and surely not NaN
            const float sink = sinks[i / m.g.head_dim % m.g.query_heads];
            ASSERT_TRUE(sink < 1000.0f || out[i] == 0.0f) << i << ": " << out[i];
          }
        });
      }
    }
  }
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
        for (std::size_t i = 0; i < out.size(); ++i) {
          if (is_bad[i / m.g.head_dim]) {
            ASSERT_TRUE(std::isnan(out[i])) << "row " << i / m.g.head_dim << " with " << bad << ": " << out[i];
          } else {
            ASSERT_EQ(out[i], clean[i]) << "row " << i / m.g.head_dim << " beside rows with " << bad;
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

// What was there before a Truncate has no say: neither in the tokens that follow nor in those that stay.
TEST(AttendOptions, NothingStaleAfterTruncate) {
  const Model m(96, 2, 700, 2, 8);
  const std::size_t row = m.g.kv_heads * m.g.head_dim;
  const std::vector<Half> poison_values = {0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00};  // +-65504, +-Inf, NaN
  std::vector<Half> poison(600 * row);
  for (std::size_t i = 0; i < poison.size(); ++i) poison[i] = poison_values[i % poison_values.size()];
  ForAllTargets([&] {
    for (const std::size_t kept : {0, 1, 255, 256, 300}) {
      Result<Cache> fresh = Cache::Create(m.g, m.plan, 1000), reused = Cache::Create(m.g, m.plan, 1000);
      ASSERT_TRUE(fresh.ok() && reused.ok());
      ASSERT_TRUE(fresh->Append(0, m.rows.k.data(), m.rows.v.data(), kept).ok());
      ASSERT_TRUE(reused->Append(0, m.rows.k.data(), m.rows.v.data(), kept).ok());
      ASSERT_TRUE(reused->Append(0, poison.data(), poison.data(), 600).ok());
      ASSERT_TRUE(reused->Truncate(kept).ok());
      EXPECT_EQ(Attended(*reused, 0, m.q), Attended(*fresh, 0, m.q)) << "kept " << kept;
      for (Cache* cache : {&*fresh, &*reused}) {
        ASSERT_TRUE(cache->Append(0, m.rows.k.data() + kept * row, m.rows.v.data() + kept * row, 70).ok());
      }
      EXPECT_EQ(Attended(*reused, 0, m.q), Attended(*fresh, 0, m.q)) << "kept " << kept << " and 70 more";
    }
  });
}

// The weights of the block of a token that takes all are 0 or next to it, but never a denormal, and nor is what comes of them.
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
        const std::vector<float> out = Attended(cache, 0, std::vector<float>(g.query_heads * g.head_dim, q));
        for (const float x : out) ASSERT_TRUE(x == 0.0f || std::fabs(x) >= FLT_MIN) << v[0] << " " << x;
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
      ForAllTargets([&] { EXPECT_LE(WorstNmse(g, Attended(Filled(plan, rows, 512), 0, q), expected), kBound) << v << ", zeros from " << zero_first; });
    }
  }
}

TEST(AttendOptions, AnyAlignment) {
  const Model m(80, 2, 300, 3, 12);
  const auto misaligned = [](const auto& x, std::size_t by, std::vector<char>* storage) {
    storage->assign(x.size() * sizeof(x[0]) + 128, 0);
    char* at = storage->data() + (64 - reinterpret_cast<std::uintptr_t>(storage->data()) % 64) % 64 + by;
    std::memcpy(at, x.data(), x.size() * sizeof(x[0]));
    return at;
  };
  ForAllTargets([&] {
    const std::vector<float> expected = Attended(m.Fill(), 0, m.q);
    for (const std::size_t by : {1, 2, 6, 33}) {
      std::vector<char> k, v, q, q_floats, out;
      Result<Cache> cache = Cache::Create(m.g, m.plan, m.tokens);
      ASSERT_TRUE(cache->Append(0, reinterpret_cast<const Half*>(misaligned(m.rows.k, by, &k)), reinterpret_cast<const Half*>(misaligned(m.rows.v, by, &v)),
                                m.tokens).ok());
      float* to = reinterpret_cast<float*>(misaligned(std::vector<float>(m.q.size()), by, &out));
      std::vector<float> got(m.q.size());
      ASSERT_TRUE(Attend(*cache, 0, reinterpret_cast<const Half*>(misaligned(m.q, by, &q)), 3, to).ok());
      std::memcpy(got.data(), to, got.size() * sizeof(float));
      EXPECT_EQ(got, expected) << by;
      ASSERT_TRUE(Attend(*cache, 0, reinterpret_cast<const float*>(misaligned(ToFloats(m.q), by, &q_floats)), 3, to).ok());
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

TEST(AttendOptions, BadArguments) {
  const Model m(64, 1, 10, 1, 14);
  const Cache cache = m.Fill();
  std::vector<float> out(m.q.size(), 5.0f);
  const auto attend = [&](std::size_t layer, const AttendOptions& options) { return Attend(cache, layer, m.q.data(), 1, out.data(), options).code(); };
  EXPECT_EQ(attend(1, {}), ErrorCode::kInvalidArgument);
  AttendOptions options;
  for (const float bad : {-1.0f, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
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
