// Cache::Shift: tokens in the middle go, V of those after them moves as it is, and their K is
// turned back to where they are now, against a rotation of the original rows in double precision.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "kvmix/rope.h"
#include "tests/cache_rows.h"

namespace kvmix::testing {
namespace {

const Names kKCodecs = {"i8-token",
                        "f16",
                        "i8-head",
                        "i8-token-bf16+hadamard",
                        "i8-token-bf16+centre+hadamard",
                        "i4-token-bf16+hadamard"};
const Names kVCodecs = {"i8-token",      "i8-token-bf16+centre", "f16", "i8-head+centre+hadamard",
                        "i8-token+fold", "i4-token+hadamard"};
constexpr std::size_t kHeads = 6, kCentred = 4;

struct Case {
  Geometry g;
  Rows rows;
  Plan plan;
  std::size_t tokens;

  // Keys without an offset: turned, they stay in the range of a head's scale.
  Case(std::size_t num_tokens, std::size_t head_dim)
      : g{2, kHeads, kHeads, head_dim},
        rows(RandomRows(g, num_tokens, 1, 0.0f)),
        plan(MakePlan(g, rows, kKCodecs, kVCodecs)),
        tokens(num_tokens) {}
};

// Keys of [tokens, heads, dim], each turned back by `positions`, straight from the formula: pair p
// is a complex number, times e^(-i * positions * frequency[p]).
std::vector<float> TurnedBack(std::vector<float> k, const Geometry& g, const Rope& rope,
                              std::size_t positions) {
  const std::size_t dims = rope.dims != 0 ? rope.dims : g.head_dim;
  for (std::size_t row = 0; row < k.size(); row += g.head_dim) {
    for (std::size_t p = 0; p < dims / 2; ++p) {
      const double frequency =
          rope.frequencies.empty()
              ? 1.0 / std::pow(rope.theta, 2.0 * static_cast<double>(p) / static_cast<double>(dims))
              : rope.frequencies[p];
      const double angle = -static_cast<double>(positions) * frequency;
      const bool halves = rope.pairs == Rope::Pairs::kHalves;
      float& a = k[row + (halves ? p : 2 * p)];
      float& b = k[row + (halves ? p + dims / 2 : 2 * p + 1)];
      const double x = a, y = b;
      a = static_cast<float>(x * std::cos(angle) - y * std::sin(angle));
      b = static_cast<float>(x * std::sin(angle) + y * std::cos(angle));
    }
  }
  return k;
}

// Error of a head's decoded K against `exact`.
double KeyError(const Cache& cache, std::size_t layer, std::size_t head,
                const std::vector<float>& exact) {
  const Geometry g = GeometryOf(cache.model());
  const std::vector<double> found = Decoded(cache, layer, KVMIX_K);
  double error = 0.0, size = 0.0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    if (i / g.head_dim % g.kv_heads != head) continue;
    error += (found[i] - exact[i]) * (found[i] - exact[i]);
    size += static_cast<double>(exact[i]) * exact[i];
  }
  return error / size;
}

template <class T>
std::vector<T> Without(const std::vector<T>& x, std::size_t row, std::size_t keep,
                       std::size_t drop) {
  std::vector<T> left(x.begin(), x.begin() + static_cast<std::ptrdiff_t>(keep * row));
  left.insert(left.end(), x.begin() + static_cast<std::ptrdiff_t>((keep + drop) * row), x.end());
  return left;
}

HeadRows Part(const HeadRows& rows, std::size_t first, std::size_t count) {
  const std::size_t bytes = rows.codes.size() / rows.scales.size();
  const auto at = [](auto& x, std::size_t i) { return x.begin() + static_cast<std::ptrdiff_t>(i); };
  return {{at(rows.codes, first * bytes), at(rows.codes, (first + count) * bytes)},
          {at(rows.scales, first), at(rows.scales, first + count)}};
}

void ExpectShift(const Case& c, const Rope& rope, std::size_t keep, std::size_t drop) {
  SCOPED_TRACE(::testing::Message()
               << "keep " << keep << ", drop " << drop << ", head_dim " << c.g.head_dim);
  const std::size_t row = c.g.kv_heads * c.g.head_dim, left = c.tokens - drop;
  // What the keys are now: those kept as they were, those after them turned.
  const std::vector<float> all = ToFloats(c.rows.k), turned = TurnedBack(all, c.g, rope, drop);
  std::vector<float> exact = Without(turned, row, keep, drop);
  std::copy_n(all.begin(), keep * row, exact.begin());
  Cache once = Filled(c.plan, {}, c.tokens);  // encoded only once
  const std::vector<Half> v = Without(c.rows.v, row, keep, drop);
  ASSERT_TRUE(once.Append(0, KvView(c.g, exact), KvView(c.g, v)).ok());

  LayerRows of_first;
  ForAllTargets([&](std::string_view target) {
    Cache cache = Filled(c.plan, c.rows, c.tokens, target);
    const LayerRows before = Export(cache, 0);
    const Status s = cache.Shift(keep, drop, {&rope, 1});
    ASSERT_TRUE(s.ok()) << s.message();
    for (const std::size_t layer : {0, 1}) {
      ASSERT_EQ(cache.tokens(layer), left);
      const LayerRows after = Export(cache, layer);
      for (std::size_t i = 0; i < after.size(); ++i) {
        EXPECT_TRUE(Part(after[i], 0, keep) == Part(before[i], 0, keep));
        if (i % 2 == 0 || left == keep) continue;
        EXPECT_TRUE(Part(after[i], keep, left - keep) == Part(before[i], keep + drop, left - keep))
            << "V of KV head " << i / 2;
      }
      for (std::size_t h = 0; h < kHeads && left > keep; ++h) {
        if (h == kCentred) continue;  // the mean does not turn: no bound
        const double error = KeyError(cache, layer, h, exact), least = KeyError(once, 0, h, exact);
        EXPECT_LE(error, 2.3 * least) << kKCodecs[h];
        EXPECT_LE(least, kKCodecs[h].starts_with("i4") ? 1.2e-2 : 3e-3) << kKCodecs[h];
      }
    }
    if (of_first.empty()) of_first = Export(cache, 0);
    EXPECT_TRUE(Export(cache, 0) == of_first) << "other bytes than on the first target";
  });
}

TEST(Shift, TurnsKeysAndMovesValues) {
  const Case c(700, 64);
  for (const Rope::Pairs pairs : {Rope::Pairs::kHalves, Rope::Pairs::kNeighbours}) {
    Rope rope;
    rope.pairs = pairs;
    for (const auto& [keep, drop] : {std::pair<std::size_t, std::size_t>{0, 1},
                                     {4, 100},
                                     {4, 256},
                                     {0, 300},
                                     {255, 2},
                                     {256, 256},
                                     {300, 399},
                                     {699, 0}}) {
      ExpectShift(c, rope, keep, drop);
    }
  }
}

TEST(Shift, SomeOfTheChannelsAndGivenFrequencies) {
  const Case c(300, 80);
  for (const Rope::Pairs pairs : {Rope::Pairs::kHalves, Rope::Pairs::kNeighbours}) {
    Rope rope;
    rope.pairs = pairs;
    rope.dims = 32;
    rope.theta = 1e6;
    ExpectShift(c, rope, 4, 77);
    rope.frequencies.clear();
    for (std::size_t p = 0; p < 16; ++p) {
      rope.frequencies.push_back(1.0 / (1.0 + static_cast<double>(p * p)));
    }
    ExpectShift(c, rope, 4, 77);
    rope.dims = 80;
    rope.frequencies.assign(40, 0.0);  // nothing turns
    rope.frequencies[39] = 0.5;
    ExpectShift(c, rope, 10, 100);
  }
}

// Across pages of one block and runs of them.
TEST(Shift, OverManyPages) { ExpectShift(Case(2600, 16), {}, 100, 1300); }

// As the header says: centred heads lose more, but not everything.
TEST(Shift, OfCentredHeads) {
  const Case c(600, 64);
  const Rope rope;
  Cache cache = Filled(c.plan, c.rows, 600);
  ASSERT_TRUE(cache.Shift(4, 100, {&rope, 1}).ok());
  const std::size_t row = c.g.kv_heads * c.g.head_dim;
  std::vector<float> exact = Without(TurnedBack(ToFloats(c.rows.k), c.g, rope, 100), row, 4, 100);
  const std::vector<float> all = ToFloats(c.rows.k);
  std::copy_n(all.begin(), 4 * row, exact.begin());
  EXPECT_LE(KeyError(cache, 0, kCentred, exact), 3e-3);
}

TEST(Shift, OfOnlySomeAndOfAll) {
  const Case c(600, 16);
  const Rope rope;
  Cache cache = Filled(c.plan, c.rows, 700);
  const LayerRows before = Export(cache, 0);
  ASSERT_TRUE(cache.Shift(100, 0, {&rope, 1}).ok());
  EXPECT_TRUE(Export(cache, 0) == before) << "a shift by nothing changes nothing";
  ASSERT_TRUE(cache.Shift(590, 10, {&rope, 1}).ok());  // only the last go
  EXPECT_TRUE(Export(cache, 0) == Export(Filled(c.plan, c.rows, 700), 0, 0, 590));
  ASSERT_TRUE(cache.Shift(0, 590, {&rope, 1}).ok());
  EXPECT_EQ(cache.tokens(1), 0u);
  EXPECT_EQ(cache.bytes(), 0u);
  ASSERT_TRUE(cache.Shift(0, 0, {&rope, 1}).ok());
  AppendToAll(cache, c.rows, 0, 600);
  EXPECT_TRUE(Export(cache, 0) == before);
}

// One rope for each layer.
TEST(Shift, RopesOfLayers) {
  const Case c(300, 16);
  Rope a, b;
  b.pairs = Rope::Pairs::kNeighbours;
  b.theta = 500.0;
  const Rope both[] = {a, b};
  Cache cache = Filled(c.plan, c.rows, 300), of_a = Filled(c.plan, c.rows, 300),
        of_b = Filled(c.plan, c.rows, 300);
  ASSERT_TRUE(cache.Shift(10, 20, both).ok());
  ASSERT_TRUE(of_a.Shift(10, 20, {&a, 1}).ok());
  ASSERT_TRUE(of_b.Shift(10, 20, {&b, 1}).ok());
  EXPECT_TRUE(Export(cache, 0) == Export(of_a, 0));
  EXPECT_TRUE(Export(cache, 1) == Export(of_b, 1));
  EXPECT_FALSE(Export(of_a, 1) == Export(of_b, 1));
}

TEST(Shift, OfForgottenTokens) {
  const Case c(900, 16);
  const Rope rope;
  struct Shape {
    std::size_t forgotten, keep, drop, left;  // forgotten afterwards
  };
  for (const Shape& s : {Shape{50, 100, 200, 50},
                         {100, 100, 200, 100},
                         {150, 100, 200, 100},
                         {300, 100, 200, 100},
                         {600, 100, 200, 400},
                         {900, 100, 200, 700}}) {
    SCOPED_TRACE(s.forgotten);
    Cache cache = Filled(c.plan, c.rows, 900), whole = Filled(c.plan, c.rows, 900);
    for (const std::size_t layer : {0, 1}) ASSERT_TRUE(cache.Forget(layer, s.forgotten).ok());
    ASSERT_TRUE(cache.Shift(s.keep, s.drop, {&rope, 1}).ok());
    ASSERT_TRUE(whole.Shift(s.keep, s.drop, {&rope, 1}).ok());
    EXPECT_EQ(cache.forgotten(0), s.left);
    ASSERT_EQ(cache.tokens(0), 700u);
    EXPECT_TRUE(Export(cache, 0) == Export(whole, 0, s.left, 700 - s.left));
    ASSERT_TRUE(whole.Forget(0, s.left).ok());
    ASSERT_TRUE(whole.Forget(1, s.left).ok());
    EXPECT_EQ(cache.bytes(), whole.bytes());
  }
}

TEST(Shift, ForksStayAsTheyWere) {
  const Case c(1400, 16);
  const Rope rope;
  const Pool pool = Pool::Create(c.plan).value();
  Cache origin = Cache::Create(pool, 1500).value();
  AppendToAll(origin, c.rows, 0, 1400);
  const LayerRows before = Export(origin, 1);
  Cache fork = std::move(*origin.Fork()), alone = Filled(c.plan, c.rows, 1500);
  ASSERT_TRUE(fork.Shift(300, 500, {&rope, 1}).ok());
  ASSERT_TRUE(alone.Shift(300, 500, {&rope, 1}).ok());
  EXPECT_TRUE(Export(origin, 1) == before);
  EXPECT_TRUE(Export(fork, 1) == Export(alone, 1));
  EXPECT_LT(pool.bytes(), origin.bytes() + fork.bytes()) << "the first page is still shared";
}

TEST(Shift, Refusals) {
  const Case c(300, 16);
  Cache cache = Filled(c.plan, c.rows, 400);
  ASSERT_TRUE(AppendTokens(cache, 0, c.rows, 0, 50).ok());  // layer 1 holds fewer
  const LayerRows before[] = {Export(cache, 0), Export(cache, 1)};
  const auto refused = [&](std::size_t keep, std::size_t drop, const std::vector<Rope>& ropes,
                           const std::vector<std::string>& parts) {
    ExpectError(cache.Shift(keep, drop, ropes), ErrorCode::kInvalidArgument, parts);
    EXPECT_TRUE(Export(cache, 0) == before[0]);
    EXPECT_TRUE(Export(cache, 1) == before[1]);
  };
  const Rope good;
  refused(100, 201, {good}, {"keep 100", "drop 201", "layer 1 holds 300"});
  refused(301, 0, {good}, {"keep 301", "layer 1"});
  refused(1, SIZE_MAX, {good}, {"layer 0 holds 350"});
  refused(1, 1, {}, {"2 layers", "found 0"});
  refused(1, 1, {good, good, good}, {"2 layers", "found 3"});
  Rope bad;
  bad.dims = 18;
  refused(1, 1, {good, bad}, {"layer 1", "up to 16", "found 18"});
  bad.dims = 7;
  refused(1, 1, {bad}, {"layer 0", "even", "found 7"});
  bad = {};
  bad.frequencies.assign(7, 1.0);
  refused(1, 1, {bad}, {"layer 0", "expected 8 frequencies", "found 7"});
  bad.frequencies.assign(8, 1.0);
  bad.frequencies[7] = kInf;
  refused(1, 1, {bad}, {"layer 0", "finite frequencies"});
  for (const double theta : {0.0, -1.0, std::numeric_limits<double>::quiet_NaN()}) {
    bad = {};
    bad.theta = theta;
    refused(1, 1, {bad}, {"layer 0", "theta > 0"});
  }
  EXPECT_TRUE(cache.Shift(100, 200, {&good, 1}).ok());
}

}  // namespace
}  // namespace kvmix::testing
