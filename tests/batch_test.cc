// Batches of sequences against single calls, merged outputs, and trees of drafts.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "tests/cache_rows.h"
#include "tests/mask_cases.h"
#include "tests/runners.h"

namespace kvmix::testing {
namespace {

const Names kKCodecs = {"i8-token-bf16+centre+hadamard", "f16", "i8-token+centre"};
const Names kVCodecs = {"i8-token", "i8-token-bf16+centre", "f16"};

struct Case {
  Geometry g;
  Rows rows, others;
  Plan plan;

  Case(std::size_t tokens, std::size_t group, unsigned seed = 1)
      : g{1, 3, 3 * group, 64},
        rows(RandomRows(g, tokens, seed)),
        others(RandomRows(g, tokens, seed + 100)),
        plan(MakePlan(g, rows, kKCodecs, kVCodecs)) {}
  Pool MakePool(std::string_view target = {}) const {
    return Pool::Create(plan, {0, std::string(target)}).value();
  }
};

// Queries of one sequence, and what comes of them.
struct Query {
  const Cache* cache;
  std::vector<Half> q;
  std::vector<float> out, log_sum_exp;
  MaskView mask = {};

  Query(const Cache& of, std::size_t queries, unsigned seed)
      : cache(&of), q(RandomQueries(GeometryOf(of.model()), queries, seed)) {
    Clear();
  }
  void Clear() {
    out.assign(q.size(), -7.0f);
    log_sum_exp.assign(q.size() / GeometryOf(cache->model()).head_dim, -7.0f);
  }
  AttendRequest Request() {
    return {cache, QView(GeometryOf(cache->model()), q), out.data(), log_sum_exp.data(), mask};
  }
};

std::vector<AttendRequest> Requests(std::vector<Query>& queries) {
  std::vector<AttendRequest> requests;
  for (Query& q : queries) {
    q.Clear();
    requests.push_back(q.Request());
  }
  return requests;
}

// Every sequence by itself.
std::vector<Query> OneByOne(std::vector<Query> queries, const AttendOptions& options) {
  for (Query& q : queries) {
    const AttendRequest request = q.Request();
    const Status s = Attend({&request, 1}, 0, options);
    EXPECT_TRUE(s.ok()) << s.message();
  }
  return queries;
}

void ExpectSameBits(const std::vector<Query>& found, const std::vector<Query>& expected) {
  for (std::size_t i = 0; i < found.size(); ++i) {
    EXPECT_TRUE(SameBits(found[i].out, expected[i].out)) << "request " << i;
    EXPECT_TRUE(SameBits(found[i].log_sum_exp, expected[i].log_sum_exp)) << "request " << i;
  }
}

// ---- batches

TEST(AttendBatch, HasTheBitsOfSingleCalls) {
  for (const std::size_t group : {1, 4, 7}) {
    const Case c(2500, group);
    std::mt19937 rng(2);
    ForAllTargets([&](std::string_view target) {
      const Pool pool = c.MakePool(target);
      std::vector<Cache> caches;
      for (const std::size_t tokens : {2500, 1, 0, 300, 2049, 30}) {
        caches.push_back(Cache::Create(pool, 2600).value());
        AppendToAll(caches.back(), tokens % 2 == 0 ? c.rows : c.others, 0, tokens);
      }
      ASSERT_TRUE(caches[3].Forget(0, 100).ok());
      std::vector<Query> queries;
      unsigned seed = 1;
      for (const std::size_t n : {1, 1, 3, 70, 2, 40}) {  // decode and prefill, and more than seen
        queries.emplace_back(caches[seed - 1], n, seed);
        ++seed;
      }
      std::vector<float> numbers(2 * 2049);
      for (float& x : numbers) x = rng() % 3 == 0 ? -kInf : 0.0f;
      const MaskData mask(numbers, 2, KVMIX_F16);
      queries[4].mask = mask.view;
      for (const std::size_t window : {0, 200}) {
        for (const bool causal : {true, false}) {
          AttendOptions options;
          options.sliding_window = window;
          options.causal = causal;
          const std::vector<Query> expected = OneByOne(queries, options);
          for (const int threads : {1, 2, 3}) {
            SCOPED_TRACE(::testing::Message() << "window " << window << ", threads " << threads);
            const Status s = Attend(Requests(queries), 0, options, threads);
            ASSERT_TRUE(s.ok()) << s.message();
            ExpectSameBits(queries, expected);
          }
          OrderRunner runner;
          ASSERT_TRUE(Attend(Requests(queries), 0, options, runner).ok());
          ExpectSameBits(queries, expected);
        }
      }
    });
  }
}

// Forks, which share whole blocks from the first on: all of them read once. Only sums change their
// order.
TEST(AttendBatch, SharedPrefixes) {
  struct Shape {
    std::size_t group, shared, forks;
  };
  for (const Shape& s :
       {Shape{1, 512, 2}, {4, 3000, 5}, {7, 1111, 9}, {1, 700, 40}, {4, 600, 70}}) {
    SCOPED_TRACE(::testing::Message() << s.shared << " tokens shared by " << s.forks);
    const Case c(3300, s.group);
    ForAllTargets([&](std::string_view target) {
      const Pool pool = c.MakePool(target);
      std::vector<Cache> caches;
      for (std::size_t i = 0; i < 2; ++i) {  // a second group
        caches.push_back(Cache::Create(pool, 4000).value());
        AppendToAll(caches.back(), i == 0 ? c.rows : c.others, 0, s.shared);
      }
      for (std::size_t i = 0; i < s.forks; ++i) {
        caches.push_back(std::move(*caches[i % 8 == 7].Fork()));
        AppendToAll(caches.back(), c.others, i, 1 + 37 * i % 290);
      }
      caches.push_back(Cache::Create(pool, 4000).value());  // one that shares nothing
      AppendToAll(caches.back(), c.rows, 0, 900);
      std::vector<Query> queries;
      for (std::size_t i = 0; i < caches.size(); ++i) {
        queries.emplace_back(caches[i], i % 5 == 4 ? 2 : 1, static_cast<unsigned>(i));
      }
      queries.emplace_back(caches[0], 100, 99);  // a prefill beside them
      std::vector<float> sinks(c.g.query_heads, 2.0f);
      for (const bool with_sinks : {false, true}) {
        AttendOptions options;
        options.soft_cap = with_sinks ? 20.0f : 0.0f;
        options.sinks = with_sinks ? sinks.data() : nullptr;
        const std::vector<Query> single = OneByOne(queries, options);
        ASSERT_TRUE(Attend(Requests(queries), 0, options, 1).ok());
        const std::vector<Query> found = queries;
        for (std::size_t i = 0; i < queries.size(); ++i) {
          const std::vector<double> expected(single[i].out.begin(), single[i].out.end());
          EXPECT_LE(WorstNmse(c.g, found[i].out, expected), 1e-6) << "request " << i;
          for (std::size_t r = 0; r < found[i].log_sum_exp.size(); ++r) {
            ASSERT_NEAR(found[i].log_sum_exp[r], single[i].log_sum_exp[r], 1e-3) << "request " << i;
          }
        }
        ASSERT_TRUE(Attend(Requests(queries), 0, options, 3).ok());
        ExpectSameBits(queries, found);
      }
    });
  }
}

// A group's common blocks are few parts, whoever and however many read them.
TEST(AttendBatch, ReadsASharedPrefixOnce) {
  const Case c(1000, 1);
  const Pool pool = c.MakePool();
  Cache origin = Cache::Create(pool, 2000).value();
  AppendToAll(origin, c.rows, 0, 768);
  std::vector<Cache> forks;
  std::vector<Query> queries;
  forks.reserve(20);
  for (int i = 0; i < 20; ++i) {
    forks.push_back(std::move(*origin.Fork()));
    AppendToAll(forks.back(), c.others, 0, 10);
    queries.emplace_back(forks.back(), 1, 1);
  }
  OrderRunner runner;
  ASSERT_TRUE(Attend(Requests(queries), 0, runner).ok());
  EXPECT_EQ(runner.parts, c.g.kv_heads * (1 + 20));
}

TEST(AttendBatch, ErrorsNameTheRequestAndNothingIsWritten) {
  const Case c(300, 2);
  const Pool pool = c.MakePool(), other = c.MakePool();
  Cache a = Cache::Create(pool, 400).value(), b = Cache::Create(pool, 400).value(),
        d = Cache::Create(other, 400).value();
  AppendToAll(a, c.rows, 0, 300);
  AppendToAll(b, c.rows, 0, 200);
  std::vector<Query> queries = {{a, 1, 1}, {b, 1, 2}, {a, 2, 3}};
  const auto refused = [&](const std::vector<AttendRequest>& requests, ErrorCode code,
                           const std::vector<std::string>& parts) {
    OrderRunner runner;
    runner.before = [] { ADD_FAILURE(); };
    ExpectError(Attend(requests, 0, runner), code, parts);
    for (const Query& q : queries) EXPECT_EQ(q.out, std::vector<float>(q.out.size(), -7.0f));
  };
  std::vector<AttendRequest> requests = Requests(queries);
  requests[1].cache = d.get();
  refused(requests, ErrorCode::kMismatch, {"request 1 of 3", "one pool"});
  requests = Requests(queries);
  requests[2].q.heads = 5;
  refused(requests, ErrorCode::kMismatch, {"request 2 of 3", "6 heads", "5 x 64"});
  requests = Requests(queries);
  requests[1].cache = nullptr;
  refused(requests, ErrorCode::kInvalidArgument, {"request 1 of 3"});
  requests = Requests(queries);
  Release(b);
  requests[1].cache = b.get();
  refused(requests, ErrorCode::kInvalidArgument, {"request 1 of 3", "null"});
  EXPECT_TRUE(Attend(std::span<const AttendRequest>(), 0).ok());
  ExpectError(Attend(requests, 0, -1), ErrorCode::kInvalidArgument, {"-1"});
}

TEST(AppendBatch, HasTheBytesOfSingleCalls) {
  const Case c(1500, 1);
  for (const int threads : {1, 2, 3}) {
    const Pool pool = c.MakePool();
    std::vector<Cache> caches, expected;
    constexpr std::size_t kHeld[] = {0, 255, 256, 300, 1100, 300}, kNew[] = {1, 1, 5, 1, 300, 0};
    for (std::size_t i = 0; i < 6; ++i) {
      caches.push_back(Cache::Create(pool, 2000).value());
      AppendToAll(caches.back(), c.rows, 0, kHeld[i]);
      expected.push_back(Filled(c.plan, {}, 1500));
      AppendToAll(expected.back(), c.rows, 0, kHeld[i]);
      AppendToAll(expected.back(), c.others, 0, kNew[i]);
    }
    const Cache origin = std::move(*caches[3].Fork());  // two forks of one, in the same batch
    caches[5] = std::move(*caches[3].Fork());
    std::vector<AppendRequest> requests;
    for (std::size_t i = 0; i < 6; ++i) {
      requests.push_back({&caches[i], KvView(c.g, c.others.k).Tokens(0, kNew[i]),
                          KvView(c.g, c.others.v).Tokens(0, kNew[i])});
    }
    const Status s = Append(requests, 0, threads);
    ASSERT_TRUE(s.ok()) << s.message();
    for (std::size_t i = 0; i < 6; ++i) {
      EXPECT_TRUE(Export(caches[i], 0) == Export(expected[i], 0)) << "request " << i;
    }
    // An error in the last: nothing is appended to any.
    requests.back().v.head_dim = 3;
    ExpectError(Append(requests, 0, threads), ErrorCode::kMismatch, {"request 5 of 6", "V", "x 3"});
    for (std::size_t i = 0; i < 6; ++i) {
      EXPECT_TRUE(Export(caches[i], 0) == Export(expected[i], 0)) << "request " << i;
    }
    ExpectError(Append(requests, 0, -1), ErrorCode::kInvalidArgument, {"-1"});
  }
}

// A long prompt among decode steps is not one thread's work alone.
TEST(AppendBatch, CutsALongRequestIntoParts) {
  const Case c(1500, 1);
  const Pool pool = c.MakePool();
  const RowsView k = KvView(c.g, c.others.k), v = KvView(c.g, c.others.v);
  std::vector<Cache> expected;
  for (const std::size_t tokens : {1, 1100, 0, 1, 600}) {
    expected.push_back(Filled(c.plan, {}, 1500));
    AppendToAll(expected.back(), c.rows, 0, 300);
    AppendToAll(expected.back(), c.others, 0, tokens);
  }
  const auto batch = [&](const Runner& runner) {
    std::vector<Cache> caches;
    std::vector<AppendRequest> requests;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      caches.push_back(Cache::Create(pool, 2000).value());
      AppendToAll(caches.back(), c.rows, 0, 300);
    }
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const std::size_t tokens = expected[i].tokens(0) - 300;
      requests.push_back({&caches[i], k.Tokens(0, tokens), v.Tokens(0, tokens)});
    }
    ASSERT_TRUE(Append(requests, 0, runner).ok());
    for (std::size_t i = 0; i < caches.size(); ++i) {
      EXPECT_TRUE(Export(caches[i], 0) == Export(expected[i], 0)) << "request " << i;
    }
  };
  // Blocks 1 to 5, and 1 to 3, of every head; two requests of one token.
  for (unsigned seed = 0; seed < 3; ++seed) {
    OrderRunner runner(seed);
    batch(runner);
    EXPECT_EQ(runner.parts, c.g.kv_heads * (5 + 3) + 2);
  }
  for (const int threads : {1, 2, 5}) batch(threads);
  batch(EngineThreads(3));
}

// ---- merged outputs, and trees

TEST(MergeOutputs, OfTwoCachesIsThatOfOne) {
  const Case c(1400, 4);
  std::vector<float> sinks(c.g.query_heads, 1.5f);
  ForAllTargets([&](std::string_view target) {
    for (const std::size_t first : {1, 256, 700, 1399}) {
      for (const bool with_sinks : {false, true}) {
        const Pool pool = c.MakePool(target);
        Cache a = Cache::Create(pool, 1400).value(), b = Cache::Create(pool, 1400).value();
        AppendToAll(a, c.rows, 0, first);
        AppendToAll(b, c.rows, first, 1400 - first);
        const Cache whole = Filled(c.plan, c.rows, 1400, target);
        const std::vector<Half> q = RandomQueries(c.g, 3, 5);
        AttendOptions options;
        options.causal = false;
        Query of_a(a, 3, 5), of_b(b, 3, 5);
        // A sink counts once.
        std::vector<Query> both = OneByOne({of_a}, options);
        AttendOptions with = options;
        if (with_sinks) with.sinks = sinks.data();
        both.push_back(OneByOne({of_b}, with)[0]);
        MergeOutputs(both[0].out.data(), both[0].log_sum_exp.data(), both[1].out.data(),
                     both[1].log_sum_exp.data(), both[0].log_sum_exp.size(), c.g.head_dim);
        const reference::Attended expected = reference::MaskedAttention(
            c.g, ToFloats(q), Decoded(whole, 0, KVMIX_K), Decoded(whole, 0, KVMIX_V), with);
        EXPECT_LE(WorstNmse(c.g, both[0].out, expected.out), 1e-6);
        for (std::size_t r = 0; r < expected.log_sum_exp.size(); ++r) {
          ASSERT_NEAR(both[0].log_sum_exp[r], expected.log_sum_exp[r], 1e-3);
        }
      }
    }
  });
}

TEST(MergeOutputs, WithNothingChangesNothing) {
  std::vector<float> out = {1.0f, 2.0f, 0.0f, 0.0f, 3.0f, 4.0f}, sums = {5.0f, -kInf, -kInf};
  const std::vector<float> other = {0.0f, 0.0f, 6.0f, 7.0f, 0.0f, 0.0f},
                           other_sums = {-kInf, -3.0f, -kInf};
  MergeOutputs(out.data(), sums.data(), other.data(), other_sums.data(), 3, 2);
  EXPECT_EQ(out, (std::vector<float>{1.0f, 2.0f, 6.0f, 7.0f, 3.0f, 4.0f}));
  EXPECT_EQ(sums, (std::vector<float>{5.0f, -3.0f, -kInf}));
  // Equal shares; and sums so large that their exponentials are not numbers.
  out = {1.0f, 3.0f};
  sums = {1000.0f, -1000.0f};
  const std::vector<float> more = {3.0f, 5.0f}, more_sums = {1000.0f, 1000.0f};
  MergeOutputs(out.data(), sums.data(), more.data(), more_sums.data(), 2, 1);
  EXPECT_EQ(out, (std::vector<float>{2.0f, 5.0f}));
  EXPECT_NEAR(sums[0], 1000.0f + std::log(2.0f), 1e-4f);
  EXPECT_EQ(sums[1], 1000.0f);
}

// Drafts of several continuations in one cache: each sees the prompt, those it follows, and itself.
// It is as if its path were alone.
TEST(TokenTree, EveryPathIsAsIfAlone) {
  constexpr std::size_t kPrompt = 500, kDrafts = 20;
  const Case c(kPrompt + kDrafts, 2);
  std::mt19937 rng(6);
  std::vector<std::size_t> parents;  // of draft i; i itself: it follows the prompt
  for (std::size_t i = 0; i < kDrafts; ++i) parents.push_back(i < 3 ? i : rng() % i);
  const auto path = [&](std::size_t draft) {
    std::vector<std::size_t> drafts = {draft};
    for (; parents[draft] != draft; draft = parents[draft]) drafts.push_back(parents[draft]);
    std::reverse(drafts.begin(), drafts.end());
    return drafts;
  };
  std::vector<float> numbers(kDrafts * (kPrompt + kDrafts), -kInf);
  for (std::size_t i = 0; i < kDrafts; ++i) {
    float* const row = &numbers[i * (kPrompt + kDrafts)];
    std::fill_n(row, kPrompt, 0.0f);
    for (const std::size_t d : path(i)) row[kPrompt + d] = 0.0f;
  }
  const MaskData mask(numbers, kDrafts, KVMIX_F16);
  ForAllTargets([&](std::string_view target) {
    const Cache cache = Filled(c.plan, c.rows, kPrompt + kDrafts, target);
    Query tree(cache, kDrafts, 7);
    tree.mask = mask.view;
    AttendOptions options;
    options.causal = false;
    tree = OneByOne({tree}, options)[0];
    const std::size_t row = c.g.query_heads * c.g.head_dim;
    for (std::size_t i = 0; i < kDrafts; ++i) {
      Cache alone = Filled(c.plan, {}, kPrompt + kDrafts, target);
      AppendToAll(alone, c.rows, 0, kPrompt);
      for (const std::size_t d : path(i)) AppendToAll(alone, c.rows, kPrompt + d, 1);
      const auto at = static_cast<std::ptrdiff_t>(i * row),
                 end = static_cast<std::ptrdiff_t>(i * row + row);
      const std::vector<Half> q(tree.q.begin() + at, tree.q.begin() + end);
      const std::vector<float> out(tree.out.begin() + at, tree.out.begin() + end);
      EXPECT_LE(WorstNmse(c.g, out, Expected(alone, 0, ToFloats(q))), 1e-6) << "draft " << i;
    }
  });
}

}  // namespace
}  // namespace kvmix::testing
