// Sequences of one pool: forks and who writes what afterwards, release and memory, a pool that is
// full, cells in any order, forgotten tokens, and rolling back. What counts is that a sequence has
// the bits of a cache that was filled without any of that.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <numeric>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "tests/cache_rows.h"
#include "tests/mask_cases.h"

namespace kvmix::testing {
namespace {

const Names kKCodecs = {"i8-token-bf16+centre+hadamard", "f16", "i8-head"};
const Names kVCodecs = {"i8-token", "i8-token-bf16+centre", "f16"};
// Around the borders of blocks, and of pages: four of one block, then runs of blocks.
constexpr std::size_t kBorders[] = {0, 1, 255, 256, 257, 1023, 1024, 1025, 1279, 1280, 2049};

struct Case {
  Geometry g{2, 3, 6, 48};
  Rows rows, others;
  Plan plan;

  explicit Case(std::size_t tokens, unsigned seed = 1)
      : rows(RandomRows(g, tokens, seed)),
        others(RandomRows(g, tokens, seed + 100)),
        plan(MakePlan(g, rows, kKCodecs, kVCodecs)) {}
  Pool MakePool(std::size_t bytes = 0, std::string_view target = {}) const {
    return Pool::Create(plan, {bytes, std::string(target)}).value();
  }
  Cache Fresh() const { return Filled(plan, {}, 1 << 14); }
};

// ---- forks

TEST(Fork, BothGoOnAsIfAlone) {
  const Case c(2700);
  for (const std::size_t common : kBorders) {
    for (const std::size_t more : {1, 2, 300}) {
      SCOPED_TRACE(::testing::Message() << common << " tokens in common, " << more << " more");
      const Pool pool = c.MakePool();
      Cache a = Cache::Create(pool, 4000).value(), alone = c.Fresh(), other = c.Fresh();
      AppendToAll(a, c.rows, 0, common);
      const std::size_t bytes = pool.bytes();
      Cache b = std::move(*a.Fork());
      EXPECT_EQ(pool.bytes(), bytes);
      EXPECT_EQ(b.bytes(), a.bytes());
      EXPECT_EQ(b.capacity(), a.capacity());
      // The fork first, where one page is written; then its origin.
      AppendToAll(b, c.others, common, more);
      AppendToAll(a, c.rows, common, more);
      AppendToAll(alone, c.rows, 0, common + more);
      AppendToAll(other, c.rows, 0, common);
      AppendToAll(other, c.others, common, more);
      ExpectSame(a, alone);
      ExpectSame(b, other);
    }
  }
}

TEST(Fork, WritesStayOnOneSide) {
  const Case c(1600);
  for (const bool origin_writes : {true, false}) {
    for (const std::size_t kept : {1500, 1100, 300, 100}) {
      SCOPED_TRACE(::testing::Message() << "origin writes: " << origin_writes << ", " << kept);
      const Pool pool = c.MakePool();
      Cache a = Cache::Create(pool, 2000).value(), untouched = c.Fresh(), written = c.Fresh();
      AppendToAll(a, c.rows, 0, 1500);
      AppendToAll(untouched, c.rows, 0, 1500);
      Cache b = std::move(*a.Fork());
      Cache& writer = origin_writes ? a : b;
      ASSERT_TRUE(writer.Truncate(kept).ok());
      AppendToAll(writer, c.others, kept, 50);
      AppendToAll(written, c.rows, 0, kept);
      AppendToAll(written, c.others, kept, 50);
      ExpectSame(origin_writes ? b : a, untouched);
      ExpectSame(writer, written);
      // And what is left is whole after the other has gone.
      Release(origin_writes ? b : a);
      ExpectSame(writer, written);
    }
  }
}

TEST(Fork, CostsAPageOfEachLayerWhenWritten) {
  const Case c(600);
  const Pool pool = c.MakePool();
  Cache a = Cache::Create(pool, 1000).value();
  AppendToAll(a, c.rows, 0, 1);
  const std::size_t page = pool.bytes() / c.g.layers;
  AppendToAll(a, c.rows, 1, 599);  // three pages of each layer
  const std::size_t full = pool.bytes();
  EXPECT_EQ(full, 3 * c.g.layers * page);
  std::vector<Cache> forks;
  for (int i = 0; i < 5; ++i) forks.push_back(std::move(*a.Fork()));
  EXPECT_EQ(pool.bytes(), full);
  for (std::size_t i = 0; i < forks.size(); ++i) {
    ASSERT_TRUE(AppendTokens(forks[i], 0, c.rows, i, 1).ok());
    EXPECT_EQ(pool.bytes(), full + (i + 1) * page);
    ASSERT_TRUE(AppendTokens(forks[i], 0, c.rows, i, 1).ok());
    EXPECT_EQ(pool.bytes(), full + (i + 1) * page) << "copied again";
  }
  Release(a);
  EXPECT_EQ(pool.bytes(), full + 4 * page) << "a page that only the origin had";
  forks.clear();
  EXPECT_EQ(pool.bytes(), 0u);
}

TEST(Release, RefusesEveryCallAfterwards) {
  const Case c(10);
  const Pool pool = c.MakePool();
  Cache a = Cache::Create(pool, 100).value();
  AppendToAll(a, c.rows, 0, 10);
  const Cache other = std::move(*a.Fork());
  Release(a);
  EXPECT_GT(pool.bytes(), 0u);
  const auto refused = [](const Status& s) {
    ExpectError(s, ErrorCode::kInvalidArgument, {"null"});
  };
  const RowsView k = KvView(c.g, c.rows.k), v = KvView(c.g, c.rows.v);
  const std::vector<Half> q = RandomQueries(c.g, 1, 1);
  std::vector<float> out(q.size(), -7.0f);
  const std::int64_t cell = 0;
  const Rope rope;
  std::uint8_t code = 0;
  const void* codes[] = {&code, &code, &code};
  const float* scales[] = {out.data(), out.data(), out.data()};
  refused(a.Append(0, k, v));
  refused(a.Store(0, {&cell, 1}, k.Tokens(0, 1), v.Tokens(0, 1)));
  refused(a.Truncate(0));
  refused(a.Forget(0, 0));
  refused(a.Shift(0, 0, {&rope, 1}));
  refused(a.Fork().status());
  refused(a.ExportRows(0, 0, KVMIX_K, 0, 0, &code, out.data()));
  refused(a.ImportRows(0, 0, codes, scales, codes, scales));
  refused(Attend(a, 0, QView(c.g, q), out.data()));
  const AppendRequest request{&a, k, v};
  ExpectError(Append({&request, 1}, 0), ErrorCode::kInvalidArgument, {"request 0 of 1", "null"});
  EXPECT_EQ(out, std::vector<float>(q.size(), -7.0f));
  Release(a);
  a = std::move(*other.Fork());  // a handle can be used again
  ExpectSame(a, other);
}

// ---- a pool that is full

TEST(FullPool, RefusesAndLeavesEverythingAsItWas) {
  const Case c(3000);
  std::size_t page = 0;
  {
    const Pool probe = c.MakePool();
    Cache one = Cache::Create(probe, 1).value();
    ASSERT_TRUE(AppendTokens(one, 0, c.rows, 0, 1).ok());
    page = probe.bytes();
  }
  const Pool pool = c.MakePool(6 * page);
  EXPECT_EQ(pool.most_bytes(), 6 * page);
  Cache a = Cache::Create(pool, 4000).value(), b = Cache::Create(pool, 4000).value(),
        expected = c.Fresh();
  AppendToAll(a, c.rows, 0, 500);  // four pages
  AppendToAll(b, c.rows, 0, 100);  // two
  AppendToAll(expected, c.rows, 0, 500);
  EXPECT_EQ(pool.bytes(), 6 * page);
  const Cache fork = std::move(*a.Fork());  // for which no page is needed
  const auto full = [&](const Status& s) {
    ExpectError(s, ErrorCode::kPoolFull, {"layer 0", std::to_string(6 * page)});
    EXPECT_EQ(pool.bytes(), 6 * page);
    ExpectSame(a, expected);
    ExpectSame(fork, expected);
  };
  full(AppendTokens(a, 0, c.rows, 500, 13));  // to a new page, after a shared one
  full(AppendTokens(a, 0, c.rows, 500, 1));   // to a shared page
  full(AppendTokens(a, 0, c.rows, 0, 3000));  // to many pages
  const std::int64_t cells[] = {3000, 5, 499};
  full(a.Store(0, cells, KvView(c.g, c.rows.k).Tokens(0, 3), KvView(c.g, c.rows.v).Tokens(0, 3)));
  full(Import(a, 0, Export(a, 0)));
  const Rope rope;
  full(a.Shift(100, 50, {&rope, 1}));
  // A batch whose first part there would be room for.
  Release(b);
  b = Cache::Create(pool, 4000).value();
  Cache d = Cache::Create(pool, 4000).value();
  EXPECT_EQ(pool.bytes(), 4 * page);
  const RowsView k = KvView(c.g, c.rows.k), v = KvView(c.g, c.rows.v);
  const AppendRequest batch[] = {{&b, k.Tokens(0, 300), v.Tokens(0, 300)},
                                 {&d, k.Tokens(0, 1), v.Tokens(0, 1)}};
  ExpectError(Append(batch, 0), ErrorCode::kPoolFull, {"request 1 of 2", "layer 0"});
  const AppendRequest twice[] = {batch[1], {&b, k.Tokens(0, 1), v.Tokens(0, 1)}, batch[1]};
  ExpectError(Append(twice, 0), ErrorCode::kInvalidArgument, {"request 2 of 3", "request 0"});
  EXPECT_EQ(d.tokens(0), 0u);
  EXPECT_EQ(b.tokens(0), 0u);
  EXPECT_EQ(pool.bytes(), 4 * page) << "what the first request got goes back";
  // There is room again once somebody has left.
  Release(a);
  EXPECT_EQ(pool.bytes(), 4 * page) << "the fork has the pages";
  EXPECT_TRUE(AppendTokens(b, 0, c.rows, 0, 300).ok());
  Release(b);
  Cache e = std::move(*fork.Fork());
  AppendToAll(e, c.rows, 500, 12);
  AppendToAll(expected, c.rows, 500, 12);
  ExpectSame(e, expected);
}

// Pools of unlike plans in the same memory, and under the same bound.
TEST(Pool, Beside) {
  const Case c(600);
  const Plan other = UniformPlan(Geometry{1, 1, 1, 64}, {}, {});
  Result<Pool> first = Pool::Create(c.plan, {.bytes = std::size_t{64} << 20});
  ASSERT_TRUE(first.ok());
  Pool second = Pool::Create(other, {.beside = &*first}).value();
  EXPECT_EQ(second.most_bytes(), first->most_bytes());
  Cache a = Cache::Create(*first, 600).value();
  const Cache expected = Filled(c.plan, c.rows, 600);
  AppendToAll(a, c.rows, 0, 600);
  const std::size_t bytes = first->bytes();
  EXPECT_EQ(second.bytes(), bytes);
  Cache b = Cache::Create(second, std::size_t{1} << 30).value();
  const std::vector<float> rows(64 * 256, 1.0f);
  const RowsView view = RowsView::F32(rows.data(), 256, 1, 64);
  ASSERT_TRUE(b.Append(0, view, view).ok());
  EXPECT_EQ(first->bytes(), bytes + b.bytes());
  first = Status(ErrorCode::kNotFound, "");  // the memory stays as long as anybody has some
  Status s;
  while (s.ok()) s = b.Append(0, view, view);
  EXPECT_EQ(s.code(), ErrorCode::kPoolFull);
  ExpectSame(a, expected);
  Release(b);
  EXPECT_EQ(second.bytes(), bytes);
  ExpectSame(a, expected);
}

std::size_t ResidentBytes() {
  std::ifstream in("/proc/self/statm");
  std::size_t all = 0, resident = 0;
  in >> all >> resident;
  return resident * static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
}

// To the pool and to the system: after a release, a truncation, a forgetting.
TEST(Memory, GoesBack) {
  const Case c(2048);
  const Pool pool = c.MakePool();
  constexpr std::size_t kTokens = (1 << 15) - 48;  // not whole blocks
  const auto fill = [&] {
    Cache cache = Cache::Create(pool, kTokens).value();
    for (std::size_t t = 0; t < kTokens; t += 2048) {
      AppendToAll(cache, c.rows, 0, std::min<std::size_t>(2048, kTokens - t));
    }
    return cache;
  };
  for (const char* how : {"release", "truncate", "forget", "destroy"}) {
    SCOPED_TRACE(how);
    const std::size_t before = ResidentBytes();
    std::vector<Cache> caches;
    for (int i = 0; i < 2; ++i) caches.push_back(fill());
    const std::size_t used = pool.bytes();
    EXPECT_EQ(used, caches[0].bytes() + caches[1].bytes());
    EXPECT_GT(used, std::size_t{30} << 20);
    EXPECT_GT(ResidentBytes(), before + used * 3 / 4);
    for (Cache& cache : caches) {
      if (how[0] == 'r') Release(cache);
      if (how[0] == 't') {
        ASSERT_TRUE(cache.Truncate(0).ok());
      }
      for (std::size_t l = 0; how[0] == 'f' && l < c.g.layers; ++l) {
        ASSERT_TRUE(cache.Forget(l, kTokens).ok());
      }
    }
    if (how[0] == 'd') caches.clear();
    EXPECT_EQ(pool.bytes(), 0u);
    EXPECT_LT(ResidentBytes(), before + used / 8);
  }
}

// One pool, and caches of it on several threads.
TEST(Memory, IsTakenByManyThreads) {
  const Case c(700);
  const Pool pool = c.MakePool();
  Cache origin = Cache::Create(pool, 1000).value(), expected = c.Fresh();
  AppendToAll(origin, c.rows, 0, 300);
  AppendToAll(expected, c.rows, 0, 700);
  std::vector<std::thread> threads;
  std::vector<Cache> last;
  for (int i = 0; i < 3; ++i) last.push_back(std::move(*origin.Fork()));
  for (Cache& cache : last) {
    threads.emplace_back([&c, &cache] {
      for (int round = 0; round < 20; ++round) {
        Cache fork = std::move(*cache.Fork());
        AppendToAll(fork, c.rows, 300, 400);
        if (round == 19) cache = std::move(fork);
      }
    });
  }
  for (std::thread& t : threads) t.join();
  for (const Cache& cache : last) ExpectSame(cache, expected);
}

// ---- cells

// Rows in any cells, under a mask that says who is where, are those of a cache that has them in
// order. One cell a token for every order, so also the order of sums is the same.
TEST(Store, InAnyOrderHasTheBytesOfAppend) {
  const Case c(1400);
  Cache expected = c.Fresh();
  AppendToAll(expected, c.rows, 0, 1400);
  std::vector<std::int64_t> order(1400);
  std::iota(order.begin(), order.end(), 0);
  std::mt19937 rng(3);
  for (const std::size_t run : {1, 7, 300}) {
    for (std::size_t i = 0; i < order.size(); i += run) {  // runs change places
      const std::size_t other = rng() % ((order.size() - i) / run + 1) * run + i;
      if (other + run > order.size() || i + run > order.size()) continue;
      std::swap_ranges(order.begin() + static_cast<std::ptrdiff_t>(i),
                       order.begin() + static_cast<std::ptrdiff_t>(i + run),
                       order.begin() + static_cast<std::ptrdiff_t>(other));
    }
    const Pool pool = c.MakePool();
    Cache cache = Cache::Create(pool, 2000).value();
    const std::size_t row = c.g.kv_heads * c.g.head_dim;
    for (std::size_t at = 0; at < order.size();) {
      const std::size_t n = std::min<std::size_t>(1 + rng() % 90, order.size() - at);
      Rows rows;
      for (std::size_t i = at; i < at + n; ++i) {
        const std::ptrdiff_t first = order[i] * static_cast<std::ptrdiff_t>(row);
        rows.k.insert(rows.k.end(), c.rows.k.begin() + first, c.rows.k.begin() + first + row);
        rows.v.insert(rows.v.end(), c.rows.v.begin() + first, c.rows.v.begin() + first + row);
      }
      for (std::size_t layer = 0; layer < c.g.layers; ++layer) {
        const Status s = cache.Store(layer, std::span(order).subspan(at, n), KvView(c.g, rows.k),
                                     KvView(c.g, rows.v));
        ASSERT_TRUE(s.ok()) << s.message();
      }
      at += n;
    }
    ExpectSame(cache, expected);
  }
}

TEST(Store, WritesCellsAgain) {
  const Case c(600);
  const Pool pool = c.MakePool();
  Cache cache = Cache::Create(pool, 2000).value(), expected = c.Fresh();
  AppendToAll(cache, c.rows, 0, 600);
  Cache fork = std::move(*cache.Fork());
  AppendToAll(expected, c.rows, 0, 600);
  const RowsView k = KvView(c.g, c.others.k), v = KvView(c.g, c.others.v);
  std::vector<std::int64_t> cells = {599, 3, 255, 256, 3};  // the last one of a cell stays
  for (std::size_t layer = 0; layer < c.g.layers; ++layer) {
    ASSERT_TRUE(fork.Store(layer, cells, k.Tokens(0, 5), v.Tokens(0, 5)).ok());
    EXPECT_EQ(fork.tokens(layer), 600u);
    const LayerRows found = Export(fork, layer), before = Export(cache, layer);
    Cache own = c.Fresh();
    ASSERT_TRUE(own.Append(layer, k.Tokens(0, 5), v.Tokens(0, 5)).ok());
    for (std::size_t i = 0; i < found.size(); ++i) {
      const std::size_t bytes = found[i].codes.size() / 600;
      const HeadRows of_cell = Export(own, layer)[i];
      for (std::size_t t = 0; t < 600; ++t) {
        const auto at = std::find(cells.rbegin(), cells.rend(), static_cast<std::int64_t>(t));
        const bool is_new = at != cells.rend();
        const std::size_t from = is_new ? static_cast<std::size_t>(cells.rend() - at - 1) : t;
        const HeadRows& source = is_new ? of_cell : before[i];
        ASSERT_EQ(std::memcmp(&found[i].codes[t * bytes], &source.codes[from * bytes], bytes), 0)
            << "cell " << t;
        ASSERT_EQ(found[i].scales[t], source.scales[from]) << "cell " << t;
      }
    }
  }
  ExpectSame(cache, expected);
  const auto refused = [&](std::int64_t cell, const std::vector<std::string>& parts) {
    cells[1] = cell;
    ExpectError(fork.Store(0, cells, k.Tokens(5, 5), v.Tokens(5, 5)), ErrorCode::kInvalidArgument,
                parts);
  };
  const LayerRows before = Export(fork, 0);
  refused(2000, {"layer 0", "2000"});
  refused(-1, {"layer 0", "found -1"});
  ASSERT_TRUE(fork.Forget(0, 2).ok());
  refused(1, {"from 2", "found 1"});
  ExpectError(fork.Store(0, {cells.data(), 4}, k.Tokens(5, 5), v.Tokens(5, 5)),
              ErrorCode::kMismatch, {"expected 5", "found 4"});
  EXPECT_TRUE(Export(fork, 0, 2, 598)[0].codes ==
              std::vector<std::uint8_t>(before[0].codes.begin() + 2 * 48, before[0].codes.end()));
}

// ---- forgotten tokens

TEST(Forget, NoQuerySeesThem) {
  const Case c(1400);
  const std::vector<Half> q = RandomQueries(c.g, 3, 4);
  ForAllTargets([&](std::string_view target) {
    for (const std::size_t first : {1, 255, 256, 700, 1024, 1398, 1399, 1400}) {
      SCOPED_TRACE(first);
      Cache cache = Filled(c.plan, c.rows, 1500, target);
      const std::vector<double> k = Decoded(cache, 0, KVMIX_K), v = Decoded(cache, 0, KVMIX_V);
      const std::size_t bytes = cache.bytes();
      ASSERT_TRUE(cache.Forget(0, first).ok());
      EXPECT_EQ(cache.forgotten(0), first);
      EXPECT_EQ(cache.forgotten(1), 0u);
      EXPECT_EQ(cache.bytes() < bytes, first >= 256);
      ASSERT_TRUE(cache.Forget(0, first - 1).ok()) << "nothing comes back, and it is no error";
      EXPECT_EQ(cache.forgotten(0), first);
      const reference::Attended expected =
          reference::MaskedAttention(c.g, ToFloats(q), k, v, {}, {}, first);
      EXPECT_LE(WorstNmse(c.g, Attended(cache, 0, q), expected.out), 1e-6);
    }
  });
}

TEST(Forget, AndTruncate) {
  const Case c(900);
  Cache cache = Filled(c.plan, c.rows, 1000);
  ASSERT_TRUE(cache.Forget(1, 600).ok());
  ExpectError(cache.Forget(1, 901), ErrorCode::kInvalidArgument, {"901", "layer 1", "900"});
  ExpectError(cache.Forget(2, 1), ErrorCode::kInvalidArgument, {"layer 2", "2 layers"});
  ExpectError(cache.Truncate(599), ErrorCode::kInvalidArgument, {"599", "layer 1", "600"});
  std::uint8_t code = 0;
  float scale = 0.0f;
  ExpectError(cache.ExportRows(1, 0, KVMIX_K, 599, 1, &code, &scale), ErrorCode::kInvalidArgument,
              {"599", "from 600 to 900"});
  EXPECT_EQ(cache.tokens(0), 900u) << "nothing is dropped";
  ASSERT_TRUE(cache.Truncate(600).ok());
  const std::vector<Half> q = RandomQueries(c.g, 1, 4);
  EXPECT_EQ(Attended(cache, 1, q), std::vector<float>(q.size(), 0.0f));
  // From the start again, when all is gone.
  ASSERT_TRUE(cache.Truncate(0).ok());
  EXPECT_EQ(cache.forgotten(1), 0u);
  AppendToAll(cache, c.rows, 0, 900);
  ExpectSame(cache, Filled(c.plan, c.rows, 1000));
}

// Drafts are appended, and those that are not accepted dropped again.
TEST(Truncate, RollsDraftsBack) {
  const Case c(1100);
  const Pool pool = c.MakePool();
  Cache cache = Cache::Create(pool, 2000).value(), expected = c.Fresh();
  std::mt19937 rng(5);
  std::size_t accepted = 0;
  AppendToAll(cache, c.rows, 0, accepted = 240);
  while (accepted < 1060) {
    const std::size_t drafts = 1 + rng() % 12, good = rng() % (drafts + 1);
    AppendToAll(cache, c.rows, accepted, good);
    AppendToAll(cache, c.others, accepted + good, drafts - good);
    ASSERT_TRUE(cache.Truncate(accepted + good).ok());
    accepted += good;
  }
  AppendToAll(expected, c.rows, 0, accepted);
  ExpectSame(cache, expected);
}

}  // namespace
}  // namespace kvmix::testing
