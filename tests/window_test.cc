// Layers with a window forget what their next query does not see: the bits stay those of a cache
// that keeps everything, and memory stays that of the window.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <sstream>
#include <string_view>
#include <utility>
#include <vector>

#include "kvmix/session.h"
#include "lib/cache/cache_impl.h"
#include "tests/cache_rows.h"

namespace kvmix::testing {
namespace {

// Layer 0 has a window, layer 1 has none.
struct Case {
  Geometry g{2, 2, 4, 32};
  Rows rows;
  Plan plan;

  explicit Case(std::size_t tokens)
      : rows(RandomRows(g, tokens, 1)),
        plan(MakePlan(g, rows, {"i8-token-bf16+centre+hadamard", "f16"}, {"i8-token", "i8-head"})) {
  }
  Cache Windowed(std::size_t window, std::string_view target = {}, std::size_t rollback = 0) const {
    Plan windowed = plan;
    windowed.model.layers[0].window = window;
    Result<Cache> cache =
        Cache::Create(windowed, 8000, {.target = std::string(target), .rollback = rollback});
    EXPECT_TRUE(cache.ok()) << cache.status().message();
    return std::move(*cache);
  }
};

// The last queries of what was appended: all that they see is there.
void ExpectSameAttention(const Cache& windowed, const Cache& whole, std::size_t queries,
                         std::size_t window) {
  const std::vector<Half> q = RandomQueries(GeometryOf(whole.model()), queries, 3);
  AttendOptions options;
  options.sliding_window = window;
  EXPECT_TRUE(SameBits(Attended(windowed, 0, q), Attended(whole, 0, q, options)))
      << queries << " queries, " << windowed.tokens(0) << " tokens";
  EXPECT_TRUE(SameBits(Attended(windowed, 1, q), Attended(whole, 1, q)));
}

TEST(Window, HasTheBitsOfACacheThatKeepsAll) {
  const Case c(3000);
  std::mt19937 rng(2);
  ForAllTargets([&](std::string_view target) {
    for (const std::size_t window : {1, 2, 100, 256, 257, 1000, 5000}) {
      SCOPED_TRACE(window);
      Cache cache = c.Windowed(window, target), whole = Filled(c.plan, {}, 8000, target);
      for (std::size_t tokens = 0; tokens < 2600;) {
        constexpr std::size_t kSteps[] = {1, 1, 5, 80, 300};
        const std::size_t n = kSteps[rng() % 5];
        AppendToAll(cache, c.rows, tokens, n);
        AppendToAll(whole, c.rows, tokens, n);
        const std::size_t next = tokens;  // the first query of these
        ASSERT_EQ(cache.forgotten(0), next + 1 > window ? next + 1 - window : 0u);
        ASSERT_EQ(cache.forgotten(1), 0u);
        tokens += n;
        if (rng() % 4 == 0) ExpectSameAttention(cache, whole, n, window);
      }
    }
  });
}

TEST(Window, TakesMemoryForTheWindowOnly) {
  const Case c(3000);
  constexpr std::size_t kWindow = 300;
  Cache cache = c.Windowed(kWindow);
  ASSERT_TRUE(AppendTokens(cache, 0, c.rows, 0, 1).ok());
  const std::size_t page = cache.bytes();
  for (std::size_t tokens = 1; tokens < 7000; tokens += 1) {
    ASSERT_TRUE(AppendTokens(cache, 0, c.rows, tokens % 3000, 1).ok());
    ASSERT_LE(cache.bytes(), page * (kWindow / 256 + 2)) << tokens;
  }
  EXPECT_GE(cache.bytes(), 2 * page);
}

TEST(Window, TruncateAsFarAsTheNextQuerySeesAll) {
  const Case c(1000);
  Cache cache = c.Windowed(100), whole = Filled(c.plan, {}, 8000);
  AppendToAll(cache, c.rows, 0, 600);
  AppendToAll(cache, c.rows, 600, 20);  // drafts: forgets those before 501
  AppendToAll(whole, c.rows, 0, 620);
  const Cache fork = std::move(*cache.Fork());
  ExpectError(cache.Truncate(599), ErrorCode::kInvalidArgument,
              {"599", "layer 0", "window of 100", "501"});
  EXPECT_EQ(cache.tokens(1), 620u);
  for (Cache* each : {&cache, &whole}) {
    ASSERT_TRUE(each->Truncate(600).ok());
    AppendToAll(*each, c.rows, 700, 5);
  }
  ExpectSameAttention(cache, whole, 5, 100);
  EXPECT_EQ(fork.tokens(0), 620u);
  ASSERT_TRUE(cache.Truncate(0).ok());
  EXPECT_EQ(cache.forgotten(0), 0u);
  EXPECT_EQ(cache.bytes(), 0u);
}

TEST(Window, ForksSessionsAndShifts) {
  const Case c(1500);
  constexpr std::size_t kWindow = 300;
  Cache cache = c.Windowed(kWindow), whole = Filled(c.plan, {}, 8000);
  for (std::size_t t = 0; t < 1200; t += 100) {
    AppendToAll(cache, c.rows, t, 100);
    AppendToAll(whole, c.rows, t, 100);
  }
  const std::size_t forgotten = cache.forgotten(0);
  EXPECT_EQ(forgotten, 801u);
  Cache fork = std::move(*cache.Fork());
  AppendToAll(fork, c.rows, 1200, 300);
  ExpectSameAttention(cache, whole, 100, kWindow);
  std::stringstream stream;
  ASSERT_TRUE(SaveSession(cache, stream).ok());
  ASSERT_TRUE(LoadSession(fork, stream).ok());
  EXPECT_EQ(fork.forgotten(0), forgotten);
  ExpectSameAttention(fork, whole, 100, kWindow);
  const Rope rope;
  ASSERT_TRUE(fork.Shift(10, 200, {&rope, 1}).ok());
  ASSERT_TRUE(whole.Shift(10, 200, {&rope, 1}).ok());
  EXPECT_EQ(fork.forgotten(0), forgotten - 200);
  ExpectSameAttention(fork, whole, 100, kWindow);
  for (Cache* each : {&fork, &whole}) AppendToAll(*each, c.rows, 1000, 70);
  ExpectSameAttention(fork, whole, 70, kWindow);
  EXPECT_EQ(cache.forgotten(0), forgotten);
}

// A fork writes over pages that the origin has let go, and never over those it still has.
TEST(Window, ForksTakeForgottenPages) {
  const Case c(3000);
  Cache cache = c.Windowed(256), whole = Filled(c.plan, {}, 8000);
  for (std::size_t t = 0; t < 2900; t += 100) {
    AppendToAll(cache, c.rows, t, 100);
    AppendToAll(whole, c.rows, t, 100);
    Cache fork = std::move(*cache.Fork());
    AppendToAll(fork, c.rows, 0, 100);  // writes pages that `cache` reads until it lets them go
    ExpectSameAttention(cache, whole, 100, 256);
  }
}

// Drafts that were appended one by one can be taken back, as many as the cache was told.
TEST(Window, RollsBack) {
  const Case c(3000);
  constexpr std::size_t kWindow = 512, kRollback = 8;
  Cache cache = c.Windowed(kWindow, {}, kRollback), whole = Filled(c.plan, {}, 8000);
  for (std::size_t tokens = 0; tokens < 1500; ++tokens) {
    AppendToAll(cache, c.rows, tokens, 1);
    AppendToAll(whole, c.rows, tokens, 1);
  }
  EXPECT_FALSE(cache.Truncate(1500 - kRollback - 2).ok());
  ASSERT_TRUE(cache.Truncate(1500 - kRollback).ok());
  ASSERT_TRUE(whole.Truncate(1500 - kRollback).ok());
  AppendToAll(cache, c.rows, 0, 3);
  AppendToAll(whole, c.rows, 0, 3);
  ExpectSameAttention(cache, whole, 3, kWindow);
}

// ---- queries whose tokens are gone

Status AttendTo(const Cache& cache, const std::vector<Half>& q, std::vector<float>& out,
                const AttendOptions& options = {}) {
  out.assign(q.size(), kUntouched);
  return Attend(cache, 0, QView(GeometryOf(cache.model()), q), out.data(), options);
}

// Whatever is appended and asked: the bits of a cache that keeps everything where all tokens are
// there, and else an error that names the first query and the tokens that it lacks.
TEST(Window, GivesRightRowsOrAnError) {
  const Case c(1500);
  std::mt19937 rng(41);
  std::size_t right = 0, refused = 0;
  for (int round = 0; round < 60; ++round) {
    const std::size_t kept = 1 + rng() % 300, rollback = round % 3 == 0 ? rng() % 300 : 0;
    Cache cache = c.Windowed(kept, {}, rollback), whole = Filled(c.plan, {}, 8000);
    for (std::size_t tokens = 0; tokens < 1200;) {
      const std::size_t n = std::min<std::size_t>(1200 - tokens, 1 + rng() % (round % 2 ? 5 : 400));
      AppendToAll(cache, c.rows, tokens, n);
      AppendToAll(whole, c.rows, tokens, n);
      tokens += n;
      if (round % 2 != 0 && rng() % 20 != 0) continue;
      const std::size_t queries = 1 + rng() % (rng() % 2 ? n : tokens + 3);
      AttendOptions options;
      options.sliding_window = rng() % 3 == 0 ? 1 + rng() % 400 : kept;
      // The first query at a token that sees another one before those that are held.
      std::size_t lacking = SIZE_MAX, first = 0;
      for (std::size_t q = 0; q < queries && lacking == SIZE_MAX; ++q) {
        if (tokens + q < queries) continue;
        const std::size_t end = tokens + q + 1 - queries;
        first = end > options.sliding_window ? end - options.sliding_window : 0;
        if (first < std::min(end, cache.forgotten(0))) lacking = q;
      }
      const std::vector<Half> q = RandomQueries(c.g, queries, 3);
      std::vector<float> found, expected;
      const Status s = AttendTo(cache, q, found, options);
      ASSERT_TRUE(AttendTo(whole, q, expected, options).ok());
      if (lacking == SIZE_MAX) {
        ASSERT_TRUE(s.ok()) << s.message();
        ASSERT_TRUE(SameBits(found, expected));
        ++right;
      } else {
        ExpectError(s, ErrorCode::kInvalidArgument,
                    {"query " + std::to_string(lacking) + " of " + std::to_string(queries),
                     "tokens " + std::to_string(first) + " to ",
                     "before " + std::to_string(cache.forgotten(0))});
        ASSERT_EQ(found, std::vector<float>(q.size(), kUntouched));
        ++refused;
      }
    }
  }
  EXPECT_GT(right, 100u);
  EXPECT_GT(refused, 100u);
}

TEST(Window, OfABatchTheRequestIsNamed) {
  const Case c(600);
  Plan plan = c.plan;
  plan.model.layers[0].window = 64;
  const Pool pool = Pool::Create(plan).value();
  Cache good = Cache::Create(pool, 1000).value(), bad = Cache::Create(pool, 1000).value();
  AppendToAll(good, c.rows, 0, 512);
  for (std::size_t t = 0; t < 512; t += 128) AppendToAll(bad, c.rows, t, 128);
  const std::vector<Half> q = RandomQueries(c.g, 512, 3);
  std::vector<float> a(q.size(), kUntouched), b = a;
  const AttendRequest both[] = {{&good, QView(c.g, q), a.data()}, {&bad, QView(c.g, q), b.data()}};
  ExpectError(Attend(both, 0), ErrorCode::kInvalidArgument,
              {"request 1 of 2", "query 0 of 512", "tokens 0 to 1", "before 321"});
  EXPECT_EQ(a, std::vector<float>(q.size(), kUntouched));
}

// After one token is taken back the next one has its whole window; the query of the last token that
// is left has not, unless it was kept for a rollback.
TEST(Window, TheLastTokenAgainAfterATruncate) {
  const Case c(600);
  for (const std::size_t rollback : {0, 1}) {
    Cache cache = c.Windowed(100, {}, rollback), whole = Filled(c.plan, {}, 8000);
    for (std::size_t t = 0; t < 500; ++t) {
      AppendToAll(cache, c.rows, t, 1);
      AppendToAll(whole, c.rows, t, 1);
    }
    ASSERT_TRUE(cache.Truncate(499).ok());
    ASSERT_TRUE(whole.Truncate(499).ok());
    if (rollback != 0) {
      ExpectSameAttention(cache, whole, 1, 100);
    } else {
      std::vector<float> out;
      ExpectError(AttendTo(cache, RandomQueries(c.g, 1, 3), out), ErrorCode::kInvalidArgument,
                  {"query 0 of 1", "tokens 399 to 400"});
    }
    for (Cache* each : {&cache, &whole}) AppendToAll(*each, c.rows, 550, 1);
    ExpectSameAttention(cache, whole, 1, 100);
  }
}

// Tokens that were dropped on purpose are not seen, which is no error; those that left with the
// window still are one.
TEST(Window, ForgetIsNoError) {
  const Case c(1000);
  for (const std::size_t first : {150, 420, 500, 590, 600}) {
    SCOPED_TRACE(first);
    Cache cache = c.Windowed(100), whole = Filled(c.plan, {}, 8000);
    for (std::size_t t = 0; t < 600; t += 100) {  // the last chunk forgets those before 401
      AppendToAll(cache, c.rows, t, 100);
      AppendToAll(whole, c.rows, t, 100);
    }
    for (Cache* each : {&cache, &whole}) ASSERT_TRUE(each->Forget(0, first).ok());
    std::stringstream stream;
    ASSERT_TRUE(SaveSession(cache, stream).ok());
    Cache loaded = c.Windowed(100);
    ASSERT_TRUE(LoadSession(loaded, stream).ok());
    ExpectSameAttention(cache, whole, 100, 100);
    ExpectSameAttention(loaded, whole, 1, 100);
    if (first < 401) {
      std::vector<float> out;
      ExpectError(AttendTo(cache, RandomQueries(c.g, 200, 3), out), ErrorCode::kInvalidArgument,
                  {"query 0 of 200", "tokens 301 to 401"});
    } else {
      ExpectSameAttention(cache, whole, 200, 100);
    }
    if (first > 500) ExpectSameAttention(loaded, whole, 200, 100);
    // Dropped tokens do not keep Truncate from going back to them.
    EXPECT_EQ(cache.Truncate(510).ok(), first <= 510);
    for (Cache* each : {&loaded, &whole}) AppendToAll(*each, c.rows, 600, 50);
    ExpectSameAttention(loaded, whole, 50, 100);
  }
}

// A shift brings queries nearer to the first tokens; those that had left the window stay unseen.
TEST(Window, ShiftBringsNoTokenBack) {
  const Case c(1000);
  Cache cache = c.Windowed(300), whole = Filled(c.plan, {}, 8000);
  for (std::size_t t = 0; t < 400; t += 1) {
    AppendToAll(cache, c.rows, t, 1);
    AppendToAll(whole, c.rows, t, 1);
  }
  const Rope rope;
  for (Cache* each : {&cache, &whole}) ASSERT_TRUE(each->Shift(10, 200, {&rope, 1}).ok());
  ASSERT_EQ(cache.forgotten(0), 10u);
  ASSERT_TRUE(whole.Forget(0, 10).ok());
  ExpectSameAttention(cache, whole, 1, 300);
  // Moved tokens that had left the window are still an error.
  Cache far = c.Windowed(300);
  for (std::size_t t = 0; t < 900; t += 1) AppendToAll(far, c.rows, t, 1);
  ASSERT_TRUE(far.Shift(10, 200, {&rope, 1}).ok());
  ASSERT_EQ(far.forgotten(0), 400u);
  std::vector<float> out;
  ASSERT_TRUE(AttendTo(far, RandomQueries(c.g, 1, 3), out).ok());
  ExpectError(AttendTo(far, RandomQueries(c.g, 50, 3), out), ErrorCode::kInvalidArgument,
              {"query 0 of 50", "tokens 351 to 400"});
}

// A prefix that sees itself both ways is held as long as no window lets its first token go.
TEST(Window, PrefixesAreForgottenAsWell) {
  const Case c(600);
  Cache cache = c.Windowed(64), whole = Filled(c.plan, {}, 8000);
  AttendOptions options;
  options.bidirectional_prefix = 200;
  options.sliding_window = 64;
  for (Cache* each : {&cache, &whole}) AppendToAll(*each, c.rows, 0, 210);
  const std::vector<Half> q = RandomQueries(c.g, 210, 3);
  std::vector<float> found, expected;
  ASSERT_TRUE(AttendTo(cache, q, found, options).ok());
  ASSERT_TRUE(AttendTo(whole, q, expected, options).ok());
  EXPECT_TRUE(SameBits(found, expected));
  for (Cache* each : {&cache, &whole}) AppendToAll(*each, c.rows, 210, 20);
  ExpectError(AttendTo(cache, RandomQueries(c.g, 31, 3), found, options),
              ErrorCode::kInvalidArgument, {"query 0 of 31", "tokens 0 to 147"});
  const std::vector<Half> after = RandomQueries(c.g, 20, 3);
  ASSERT_TRUE(AttendTo(cache, after, found, options).ok());
  ASSERT_TRUE(AttendTo(whole, after, expected, options).ok());
  EXPECT_TRUE(SameBits(found, expected));
}

}  // namespace
}  // namespace kvmix::testing
