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
    Result<Cache> cache = Cache::Create(windowed.model, windowed, 8000,
                                        {.target = std::string(target), .rollback = rollback});
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

}  // namespace
}  // namespace kvmix::testing
