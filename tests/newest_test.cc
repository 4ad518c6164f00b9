// The newest tokens exact: what a query sees is decided by its place alone, through chunks, forks,
// truncation, sessions, cells in any order; and K around its own centre.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <functional>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kvmix/attention.h"
#include "kvmix/cache.h"
#include "kvmix/quantize.h"
#include "kvmix/session.h"
#include "tests/cache_rows.h"
#include "tests/expect_error.h"

namespace kvmix::testing {
namespace {

constexpr Geometry kShape{1, 2, 6, 64};
constexpr std::size_t kRow = kShape.kv_heads * kShape.head_dim;

Plan NewestPlan(const std::string& k, const std::string& v, std::size_t stretch = 64,
                std::size_t first = 4) {
  Plan plan = UniformPlan(Model(kShape), {ParseCodecKind(k).value()}, {ParseCodecKind(v).value()});
  plan.exact_first = first;
  plan.exact_newest = stretch;
  return plan;
}
Plan Usual(std::size_t stretch = 64) {
  return NewestPlan("i8-token-bf16+own-centre+hadamard", "i8-token-bf16+hadamard", stretch);
}

Cache Make(const Plan& plan, std::string_view target = {}, std::size_t capacity = 2000) {
  return std::move(Cache::Create(plan, capacity, {.target = std::string(target)}).value());
}

std::vector<float> Numbers(const Cache& cache, Tensor tensor) {
  std::vector<float> x(cache.tokens(0) * kRow);
  const Status s = cache.Decode(0, tensor, 0, cache.tokens(0), x.data());
  EXPECT_TRUE(s.ok()) << s.message();
  return x;
}

std::vector<float> Floats(const std::vector<Half>& x) {
  std::vector<float> all(x.size());
  std::ranges::transform(x, all.begin(), HalfToFloat);
  return all;
}

// A query at token p over rows [tokens, kv_heads, head_dim] in double precision; sees(t): whether,
// exact(t): as it is, else as it was decoded.
struct Truth {
  std::vector<float> k, v, coded_k, coded_v;

  std::vector<double> Attend(const Half* q, const std::function<bool(std::size_t)>& sees,
                             const std::function<bool(std::size_t)>& exact) const {
    std::vector<double> out(kShape.query_heads * kShape.head_dim);
    const std::size_t dim = kShape.head_dim, group = kShape.query_heads / kShape.kv_heads;
    for (std::size_t h = 0; h < kShape.query_heads; ++h) {
      std::vector<double> scores;
      std::vector<const float*> values;
      for (std::size_t t = 0; t < k.size() / kRow; ++t) {
        if (!sees(t)) continue;
        const std::size_t at = t * kRow + h / group * dim;
        const float* const key = (exact(t) ? k : coded_k).data() + at;
        values.push_back((exact(t) ? v : coded_v).data() + at);
        double s = 0.0;
        for (std::size_t c = 0; c < dim; ++c) s += double{HalfToFloat(q[h * dim + c])} * key[c];
        scores.push_back(s / std::sqrt(static_cast<double>(dim)));
      }
      const double max = scores.empty() ? 0.0 : *std::ranges::max_element(scores);
      double sum = 0.0;
      for (double& s : scores) sum += s = std::exp(s - max);
      for (std::size_t t = 0; t < scores.size(); ++t) {
        for (std::size_t c = 0; c < dim; ++c) out[h * dim + c] += scores[t] / sum * values[t][c];
      }
    }
    return out;
  }
};

double Error(const std::vector<float>& found, const std::vector<double>& expected) {
  double error = 0.0, size = 0.0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    error += (found[i] - expected[i]) * (found[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  return error / size;
}

// Appends rows in chunks and attends over each. Returns all outputs.
std::vector<float> Fill(Cache& cache, const Rows& rows, const std::vector<Half>& q,
                        std::size_t chunk, const Runner& runner = 1) {
  const std::size_t tokens = rows.k.size() / kRow, out_row = kShape.query_heads * kShape.head_dim;
  std::vector<float> out(tokens * out_row);
  for (std::size_t t = cache.tokens(0), n; t < tokens; t += n) {
    n = std::min(chunk, tokens - t);
    Status s = AppendTokens(cache, 0, rows, t, n, runner);
    EXPECT_TRUE(s.ok()) << s.message();
    s = Attend(cache, 0, QView(kShape, q).Tokens(t, n), out.data() + t * out_row, runner);
    EXPECT_TRUE(s.ok()) << s.message();
  }
  return out;
}

std::vector<float> Query(const Cache& cache, const std::vector<Half>& q) {
  std::vector<float> out(q.size());
  const Status s = Attend(cache, 0, QView(kShape, q), out.data());
  EXPECT_TRUE(s.ok()) << s.message();
  return out;
}

void ExpectSameNumbers(const Cache& a, const Cache& b) {
  ASSERT_EQ(a.tokens(0), b.tokens(0));
  for (const Tensor t : {KVMIX_K, KVMIX_V}) EXPECT_TRUE(SameBits(Numbers(a, t), Numbers(b, t)));
}

TEST(Newest, TheChunksChangeNothing) {
  constexpr std::size_t kTokens = 700;
  const Rows rows = RandomRows(kShape, kTokens, 1, 20.0f);
  const std::vector<Half> q = RandomQueries(kShape, kTokens, 2);
  const std::pair<const char*, const char*> codecs[] = {
      {"i8-token-bf16+own-centre+hadamard", "i8-token-bf16+hadamard"},
      {"i4-token-bf16+own-centre+hadamard", "i4-token-bf16+hadamard"},
      {"i6-token-bf16+hadamard", "i3-token-bf16"},
      {"f16", "i8x8-token"},
      {"i8-token+own-centre", "f16"}};
  ForAllTargets([&](std::string_view target) {
    for (const auto& [k, v] : codecs) {
      for (const std::size_t stretch : {16, 64, 256}) {
        SCOPED_TRACE(std::string(k) + " " + v + " " + std::to_string(stretch));
        const Plan plan = NewestPlan(k, v, stretch);
        const bool narrow = plan.codecs[0].kind.storage != KVMIX_STORAGE_I8 ||
                            plan.codecs[1].kind.operands != KVMIX_OPERANDS_USUAL;
        const double bound = narrow ? 5e-4 : 1e-6;
        Cache whole = Make(plan, target);
        const std::vector<float> expected = Fill(whole, rows, q, kTokens);
        const Truth truth{Floats(rows.k), Floats(rows.v), Numbers(whole, KVMIX_K),
                          Numbers(whole, KVMIX_V)};
        for (const std::size_t p : {0, 5, 63, 64, 100, 300, 511, 699}) {
          const std::size_t row = kShape.query_heads * kShape.head_dim;
          const auto sees = [&](std::size_t t) { return t <= p; };
          const auto exact = [&](std::size_t t) { return t < 4 || t / stretch == p / stretch; };
          const auto at = expected.begin() + static_cast<std::ptrdiff_t>(p * row);
          const std::vector<float> found(at, at + static_cast<std::ptrdiff_t>(row));
          EXPECT_LT(Error(found, truth.Attend(&q[p * row], sees, exact)), bound) << p;
        }
        for (const std::size_t chunk : {1, 7, 64, 300}) {
          if (chunk == 1 && stretch != 64) continue;
          Cache cache = Make(plan, target);
          const std::vector<float> found = Fill(cache, rows, q, chunk, chunk == 300 ? 2 : 1);
          ExpectSameNumbers(cache, whole);
          EXPECT_LT(Error(found, {expected.begin(), expected.end()}), bound) << chunk;
        }
      }
    }
  });
}

// The same bytes on every target.
TEST(Newest, TheTargetChangesNothing) {
  const Rows rows = RandomRows(kShape, 500, 3, 10.0f);
  std::vector<float> k, v;
  ForAllTargets([&](std::string_view target) {
    Cache cache = Make(Usual(), target);
    AppendToAll(cache, rows, 0, 500);
    if (k.empty()) {
      k = Numbers(cache, KVMIX_K);
      v = Numbers(cache, KVMIX_V);
    }
    EXPECT_TRUE(SameBits(Numbers(cache, KVMIX_K), k));
    EXPECT_TRUE(SameBits(Numbers(cache, KVMIX_V), v));
  });
}

// Keys with a bias that moves: an own centre leaves the noise alone to be coded.
TEST(Newest, AnOwnCentreFollowsTheKeys) {
  Rows rows = RandomRows(kShape, 640, 4, 0.0f);
  for (std::size_t i = 0; i < rows.k.size(); ++i) {
    const float bias = 100.0f * std::sin(static_cast<float>(i / kRow / 64 + i % kRow));
    rows.k[i] = FloatToHalf(HalfToFloat(rows.k[i]) + bias);
  }
  const auto error = [&](const char* codec) {
    Cache cache = Make(NewestPlan(codec, "f16", 64, 0));
    AppendToAll(cache, rows, 0, 640);
    const std::vector<float> found = Numbers(cache, KVMIX_K);
    double sum = 0.0;
    for (std::size_t i = 0; i < found.size(); ++i) {
      const double d = found[i] - HalfToFloat(rows.k[i]);
      sum += d * d;
    }
    return sum / static_cast<double>(found.size());
  };
  EXPECT_LT(error("i8-token-bf16+own-centre+hadamard"), 1e-3);
  EXPECT_GT(error("i8-token-bf16+hadamard"), 0.1);
}

// Tokens that are taken back, as many as the last call brought, leave no trace.
TEST(Newest, RollbacksLoseNothing) {
  const Rows rows = RandomRows(kShape, 1000, 5), wrong = RandomRows(kShape, 1000, 6);
  std::mt19937 rng(7);
  for (const std::size_t stretch : {16, 64}) {
    Cache cache = Make(Usual(stretch)), fresh = Make(Usual(stretch));
    while (cache.tokens(0) < 900) {
      const std::size_t at = cache.tokens(0), drafted = 1 + rng() % 12,
                        taken = rng() % (drafted + 1);
      ASSERT_TRUE(AppendTokens(cache, 0, wrong, at, drafted).ok());
      if (rng() % 2 == 0) Query(cache, RandomQueries(kShape, drafted, 8));
      ASSERT_TRUE(cache.Truncate(at).ok());
      ASSERT_TRUE(AppendTokens(cache, 0, rows, at, taken).ok());
    }
    AppendToAll(fresh, rows, 0, cache.tokens(0));
    ExpectSameNumbers(cache, fresh);
    const std::vector<Half> q = RandomQueries(kShape, 1, 9);
    EXPECT_TRUE(SameBits(Query(cache, q), Query(fresh, q)));
  }
}

// A cut into a stretch that only codes are left of: its tokens are as decoded, and go on from
// there.
TEST(Newest, ACutIntoCodesKeepsThem) {
  const Rows rows = RandomRows(kShape, 400, 10);
  Cache cache = Make(Usual());
  const std::vector<Half> q = RandomQueries(kShape, 400, 11);
  Fill(cache, rows, q, 50);
  const std::vector<float> before = Numbers(cache, KVMIX_K);
  ASSERT_TRUE(cache.Truncate(100).ok());
  std::vector<float> after = Numbers(cache, KVMIX_K);
  double worst = 0.0;  // f16 rounds what was decoded
  for (std::size_t i = 0; i < after.size(); ++i) {
    worst = std::max(worst, std::fabs(double{after[i]} - before[i]));
  }
  EXPECT_LT(worst, 0.01);
  ASSERT_TRUE(AppendTokens(cache, 0, rows, 100, 300).ok());
  after = Numbers(cache, KVMIX_K);
  for (std::size_t i = 128 * kRow; i < after.size(); ++i) ASSERT_EQ(after[i], before[i]) << i;
  Query(cache, RandomQueries(kShape, 300, 12));
}

TEST(Newest, AForkInTheMiddleOfAStretch) {
  const Rows rows = RandomRows(kShape, 400, 13), others = RandomRows(kShape, 400, 14);
  Cache left = Make(Usual());
  ASSERT_TRUE(AppendTokens(left, 0, rows, 0, 150).ok());
  Cache right = std::move(left.Fork().value());
  ASSERT_TRUE(AppendTokens(left, 0, rows, 150, 250).ok());
  ASSERT_TRUE(AppendTokens(right, 0, others, 150, 250).ok());
  Rows both = rows;
  std::copy(others.k.begin() + 150 * kRow, others.k.end(), both.k.begin() + 150 * kRow);
  std::copy(others.v.begin() + 150 * kRow, others.v.end(), both.v.begin() + 150 * kRow);
  Cache fresh_left = Make(Usual()), fresh_right = Make(Usual());
  AppendToAll(fresh_left, rows, 0, 400);
  AppendToAll(fresh_right, both, 0, 400);
  ExpectSameNumbers(left, fresh_left);
  ExpectSameNumbers(right, fresh_right);
}

TEST(Newest, SessionsTravel) {
  const Rows rows = RandomRows(kShape, 400, 15);
  const std::vector<Half> q = RandomQueries(kShape, 1, 16);
  ForAllTargets([&](std::string_view target) {
    for (const std::size_t tokens : {1, 64, 100, 384}) {
      Cache cache = Make(Usual(), target);
      ASSERT_TRUE(AppendTokens(cache, 0, rows, 0, tokens).ok());
      std::ostringstream out;
      ASSERT_TRUE(SaveSession(cache, out).ok());
      Cache loaded = Make(Usual(), target);
      std::istringstream in(out.str());
      const Status s = LoadSession(loaded, in);
      ASSERT_TRUE(s.ok()) << s.message();
      ExpectSameNumbers(loaded, cache);
      EXPECT_TRUE(SameBits(Query(loaded, q), Query(cache, q)));
      ASSERT_TRUE(AppendTokens(cache, 0, rows, tokens, 400 - tokens).ok());
      ASSERT_TRUE(AppendTokens(loaded, 0, rows, tokens, 400 - tokens).ok());
      ExpectSameNumbers(loaded, cache);
      const std::string bytes = out.str();
      for (const std::size_t at : {bytes.size() / 3, bytes.size() - 9}) {
        std::string damaged = bytes;
        damaged[at] = static_cast<char>(damaged[at] ^ 0x55);
        std::istringstream bad(damaged);
        EXPECT_FALSE(LoadSession(loaded, bad).ok());
      }
    }
  });
}

// f32 and bf16 rows beyond f16's range, NaN and infinities.
TEST(Newest, RowsBeyondHalves) {
  std::vector<float> k(80 * kRow), v(80 * kRow);
  std::mt19937 rng(17);
  std::normal_distribution<float> normal;
  for (std::size_t i = 0; i < k.size(); ++i) {
    k[i] = normal(rng);
    v[i] = (i / kRow % 3 == 0 ? 1e7f : 1.0f) * normal(rng);
  }
  v[70 * kRow] = kInf;
  v[71 * kRow] = kNaN;
  for (const std::size_t chunk : {1, 80}) {
    Cache cache = Make(Usual());
    for (std::size_t t = 0; t < 80; t += chunk) {
      ASSERT_TRUE(cache
                      .Append(0, RowsView::F32(k.data(), 80, 2, 64).Tokens(t, chunk),
                              RowsView::F32(v.data(), 80, 2, 64).Tokens(t, chunk))
                      .ok());
    }
    const std::vector<float> found = Numbers(cache, KVMIX_V);
    EXPECT_EQ(found[70 * kRow], 65504.0f);
    EXPECT_EQ(found[71 * kRow], 0.0f);
    for (std::size_t i = 64 * kRow; i < found.size(); ++i) {
      if (!std::isfinite(v[i])) continue;
      ASSERT_NEAR(found[i], v[i], 1e-3 * std::max(0.01, std::fabs(double{v[i]}))) << i;
    }
    for (const float x : Query(cache, RandomQueries(kShape, 1, 18))) EXPECT_TRUE(std::isfinite(x));
  }
}

// Two sequences that share the cells of a cache, token by token; a mask says whose they are.
TEST(Newest, CellsInAnyOrder) {
  constexpr std::size_t kTokens = 330;
  const Rows rows = RandomRows(kShape, kTokens, 19);
  const std::vector<Half> q = RandomQueries(kShape, kTokens, 20);
  std::vector<std::int64_t> cells(kTokens);
  std::iota(cells.begin(), cells.end(), 0);
  std::mt19937 rng(21);
  for (std::size_t i = 0; i + 8 < kTokens; i += 8) {
    std::shuffle(cells.begin() + static_cast<std::ptrdiff_t>(i),
                 cells.begin() + static_cast<std::ptrdiff_t>(i) + 8, rng);
  }
  Cache cache = Make(Usual());
  std::vector<float> mask(kTokens);
  const std::size_t row = kShape.query_heads * kShape.head_dim;
  for (std::size_t i = 0; i < kTokens; ++i) {
    ASSERT_TRUE(cache
                    .Store(0, std::span(cells).subspan(i, 1), KvView(kShape, rows.k).Tokens(i, 1),
                           KvView(kShape, rows.v).Tokens(i, 1))
                    .ok());
    const std::size_t held = cache.tokens(0);
    Truth truth{std::vector<float>(held * kRow), std::vector<float>(held * kRow),
                Numbers(cache, KVMIX_K), Numbers(cache, KVMIX_V)};
    std::vector<bool> sees(held), closed(held / 64 + 1, true);
    std::fill(mask.begin(), mask.end(), -kInf);
    std::vector<std::size_t> written(held / 64 + 1);
    for (std::size_t j = 0; j <= i; ++j) {
      const std::size_t cell = static_cast<std::size_t>(cells[j]);
      ++written[cell / 64];
      sees[cell] = j % 2 == i % 2;
      if (sees[cell]) mask[cell] = 0.0f;
      for (std::size_t c = 0; c < kRow; ++c) {
        truth.k[cell * kRow + c] = HalfToFloat(rows.k[j * kRow + c]);
        truth.v[cell * kRow + c] = HalfToFloat(rows.v[j * kRow + c]);
      }
    }
    if (i % 7 != 0 && i + 1 != kTokens) continue;
    const std::size_t own = static_cast<std::size_t>(cells[i]) / 64;
    const auto exact = [&](std::size_t t) {
      return t < 4 || t / 64 == own || written[t / 64] < 64;
    };
    std::vector<float> found(row);
    const AttendRequest request(
        &cache, QView(kShape, q).Tokens(i, 1), found.data(), nullptr,
        MaskView(mask.data(), KVMIX_F32, 1, held, static_cast<std::ptrdiff_t>(held)),
        cells.data() + i);
    Sight sight = cache.sight(0);
    sight.causal = 0;
    const Status s = Attend({&request, 1}, 0, sight);
    ASSERT_TRUE(s.ok()) << s.message();
    const auto expected = truth.Attend(
        &q[i * row], [&](std::size_t t) { return sees[t]; }, exact);
    EXPECT_LT(Error(found, expected), 1e-6) << i;
  }
}

// A cell that is written again opens its stretch, which is encoded when the cells after it came.
TEST(Newest, CellsAreWrittenAgain) {
  const Rows rows = RandomRows(kShape, 256, 22), others = RandomRows(kShape, 256, 23);
  Cache cache = Make(Usual()), fresh = Make(Usual());
  AppendToAll(cache, rows, 0, 256);
  Rows both = rows;
  std::copy(others.k.begin() + 128 * kRow, others.k.begin() + 192 * kRow,
            both.k.begin() + 128 * kRow);
  std::copy(others.v.begin() + 128 * kRow, others.v.begin() + 192 * kRow,
            both.v.begin() + 128 * kRow);
  for (std::int64_t cell = 128; cell < 192; ++cell) {
    const std::size_t t = static_cast<std::size_t>(cell);
    ASSERT_TRUE(cache
                    .Store(0, {&cell, 1}, KvView(kShape, others.k).Tokens(t, 1),
                           KvView(kShape, others.v).Tokens(t, 1))
                    .ok());
  }
  AppendToAll(fresh, both, 0, 256);
  ExpectSameNumbers(cache, fresh);
}

TEST(Newest, AShiftMovesTokensIntoOtherStretches) {
  const Rows rows = RandomRows(kShape, 300, 24);
  Cache cache = Make(Usual());
  AppendToAll(cache, rows, 0, 300);
  ASSERT_TRUE(cache.Shift(4, 100, std::vector{Rope{}}).ok());
  ASSERT_EQ(cache.tokens(0), 200u);
  const std::vector<float> v = Numbers(cache, KVMIX_V);
  double error = 0.0, size = 0.0;
  for (std::size_t i = 4 * kRow; i < v.size(); ++i) {
    const double x = HalfToFloat(rows.v[i + 100 * kRow]);
    error += (v[i] - x) * (v[i] - x);
    size += x * x;
  }
  EXPECT_LT(error / size, 2e-4);
  // The 72 tokens up to 200 that are open now were open, or encoded, before.
  Query(cache, RandomQueries(kShape, 1, 25));
  ASSERT_TRUE(AppendTokens(cache, 0, rows, 0, 100).ok());
  Query(cache, RandomQueries(kShape, 100, 26));
}

// Queries that see what comes after them: its encoded part as encoded, and the rest exactly.
TEST(Newest, QueriesThatAreNotCausal) {
  const Rows rows = RandomRows(kShape, 300, 35);
  const std::vector<Half> q = RandomQueries(kShape, 300, 36);
  const std::size_t row = kShape.query_heads * kShape.head_dim;
  Cache cache = Make(Usual());
  AppendToAll(cache, rows, 0, 300);
  Sight sight = cache.sight(0);
  sight.causal = 0;
  std::vector<float> out(q.size());
  ASSERT_TRUE(Attend(cache, 0, QView(kShape, q), out.data(), sight).ok());
  const Truth truth{Floats(rows.k), Floats(rows.v), Numbers(cache, KVMIX_K),
                    Numbers(cache, KVMIX_V)};
  for (const std::size_t p : {0, 70, 200, 299}) {
    const auto exact = [&](std::size_t t) { return t < 4 || t / 64 == p / 64 || t >= 256; };
    const auto at = out.begin() + static_cast<std::ptrdiff_t>(p * row);
    EXPECT_LT(Error({at, at + static_cast<std::ptrdiff_t>(row)},
                    truth.Attend(
                        &q[p * row], [](std::size_t) { return true; }, exact)),
              1e-6)
        << p;
  }
  const AttendRequest without_mask(&cache, QView(kShape, q), out.data(), nullptr, {},
                                   std::vector<std::int64_t>(300).data());
  ExpectError(Attend({&without_mask, 1}, 0), ErrorCode::kInvalidArgument, {"cells", "mask"});
}

// Sequences that share a prefix of whole blocks, in one call and one by one.
TEST(Newest, BatchesWithASharedPrefix) {
  const Rows rows = RandomRows(kShape, 700, 37), others = RandomRows(kShape, 700, 38);
  Cache first = Make(Usual());
  AppendToAll(first, rows, 0, 600);
  std::vector<Cache> caches;
  for (std::size_t i = 0; i < 5; ++i) {
    caches.push_back(std::move(first.Fork().value()));
    ASSERT_TRUE(AppendTokens(caches[i], 0, others, 100 * i, 10 + 20 * i).ok());
  }
  const std::vector<Half> q = RandomQueries(kShape, 5, 39);
  const std::size_t row = kShape.query_heads * kShape.head_dim;
  std::vector<float> out(5 * row);
  std::vector<AttendRequest> requests;
  for (std::size_t i = 0; i < 5; ++i) {
    requests.push_back({&caches[i], QView(kShape, q).Tokens(i, 1), out.data() + i * row});
  }
  ASSERT_TRUE(Attend(requests, 0).ok());
  for (std::size_t i = 0; i < 5; ++i) {
    std::vector<float> alone(row);
    ASSERT_TRUE(Attend(caches[i], 0, QView(kShape, q).Tokens(i, 1), alone.data()).ok());
    const auto at = out.begin() + static_cast<std::ptrdiff_t>(i * row);
    EXPECT_LT(Error({at, at + static_cast<std::ptrdiff_t>(row)}, {alone.begin(), alone.end()}),
              1e-7);
  }
}

TEST(Newest, LayersWithAWindow) {
  Model model(kShape);
  model.layers[0].window = 100;
  Plan plan = Usual();
  plan.model = model;
  const Rows rows = RandomRows(kShape, 1500, 27);
  const std::vector<Half> q = RandomQueries(kShape, 1500, 28);
  const std::size_t row = kShape.query_heads * kShape.head_dim;
  for (const std::size_t chunk : {1, 90}) {
    Cache cache = Make(plan), whole = Make(Usual());
    const std::vector<float> found = Fill(cache, rows, q, chunk);
    AppendToAll(whole, rows, 0, 1500);
    const Truth truth{Floats(rows.k), Floats(rows.v), Numbers(whole, KVMIX_K),
                      Numbers(whole, KVMIX_V)};
    for (const std::size_t p : {50, 150, 700, 1023, 1499}) {
      const auto sees = [&](std::size_t t) { return t <= p && t + 100 > p; };
      const auto exact = [&](std::size_t t) { return t < 4 || t / 64 == p / 64; };
      const auto at = found.begin() + static_cast<std::ptrdiff_t>(p * row);
      EXPECT_LT(Error({at, at + static_cast<std::ptrdiff_t>(row)},
                      truth.Attend(&q[p * row], sees, exact)),
                1e-6)
          << p;
    }
  }
}

TEST(Newest, RowsThatAreGoneAreAnError) {
  const Rows rows = RandomRows(kShape, 300, 29);
  Cache cache = Make(Usual());
  const std::vector<Half> q = RandomQueries(kShape, 300, 30);
  Fill(cache, rows, q, 60);
  std::vector<float> out(q.size());
  ExpectError(Attend(cache, 0, QView(kShape, q), out.data()), ErrorCode::kInvalidArgument,
              {"query 0 of 300 stands among the tokens 0 to 64", "exact rows are gone"});
}

// Appends that no attention follows keep the last 2048 tokens' rows, and no more.
TEST(Newest, RowsDoNotPileUp) {
  const Rows rows = RandomRows(kShape, 100, 31);
  Cache cache = Make(Usual(), {}, 20000);
  std::size_t most = 0;
  for (int i = 0; i < 150; ++i) {
    ASSERT_TRUE(AppendTokens(cache, 0, rows, 0, 100).ok());
    most = std::max(most, cache.bytes());
  }
  const std::size_t exact = 2048 * 2 * kRow * sizeof(Half);
  EXPECT_LT(most, 15000 * 2 * (kRow + 8) + 2 * exact);
  Query(cache, RandomQueries(kShape, 100, 32));
  const std::size_t before = cache.bytes();
  ASSERT_TRUE(AppendTokens(cache, 0, rows, 0, 1).ok());
  EXPECT_LT(cache.bytes() + exact / 2, before);
}

TEST(Newest, AFullPoolChangesNothing) {
  const Plan plan = Usual();
  const Rows rows = RandomRows(kShape, 600, 33);
  for (std::size_t kib = 64; kib < 400; kib += 8) {
    const Result<Pool> pool = Pool::Create(plan, {.bytes = kib << 10});
    ASSERT_TRUE(pool.ok());
    Cache cache = Cache::Create(*pool, 600).value(), fresh = Make(plan);
    for (std::size_t t = 0; t < 600; t += 75) {
      const std::size_t held = cache.tokens(0);
      const Status s = AppendTokens(cache, 0, rows, t, 75);
      if (!s.ok()) {
        EXPECT_EQ(s.code(), ErrorCode::kPoolFull);
        EXPECT_EQ(cache.tokens(0), held);
        break;
      }
    }
    AppendToAll(fresh, rows, 0, cache.tokens(0));
    ExpectSameNumbers(cache, fresh);
    if (cache.tokens(0) > 70) {
      const Status s = cache.Truncate(70);
      if (!s.ok()) ExpectSameNumbers(cache, fresh);
    }
  }
}

TEST(Newest, PlansAreChecked) {
  Plan plan = Usual();
  plan.exact_newest = 0;
  ExpectError(CheckPlan(plan), ErrorCode::kInvalidArgument, {"own-centre", "exact_newest"});
  plan.exact_newest = 48;
  ExpectError(CheckPlan(plan), ErrorCode::kInvalidArgument, {"exact_newest", "48"});
  EXPECT_FALSE(ParseCodecKind("i8-token+centre+own-centre").ok());
  plan = NewestPlan("i8-token", "i8-token");
  plan.codecs[1].kind.own_centre = true;
  ExpectError(CheckPlan(plan), ErrorCode::kInvalidArgument, {"V", "own-centre"});
  plan = Usual();
  const Result<Plan> read = ParsePlan([&] {
    const std::string path = ::testing::TempDir() + "newest_plan.json";
    EXPECT_TRUE(SavePlan(plan, path).ok());
    std::ostringstream text;
    text << std::ifstream(path).rdbuf();
    return text.str();
  }());
  ASSERT_TRUE(read.ok()) << read.status().message();
  EXPECT_EQ(read->exact_newest, 64u);
  EXPECT_EQ(Fingerprint(*read), Fingerprint(plan));
  plan.exact_newest = 128;
  EXPECT_NE(Fingerprint(*read), Fingerprint(plan));
  // Half a stretch of f16 and the first tokens beside the codes; a centre for every stretch.
  EXPECT_EQ(ContextBytes(Usual(), 4096),
            4096 * 2 * 2 * (64 + 2) + 64 * 2 * (4 + 64) + (32 + 4) * 2 * 2 * 64 * 2);
}

TEST(Newest, RowsWithoutACacheHaveNoStretches) {
  const HeadCodec codec{ParseCodecKind("i8-token+own-centre").value()};
  ExpectError(RowCodec::Create(codec, 64).status(), ErrorCode::kInvalidArgument, {"own-centre"});
  Cache cache = Make(Usual());
  const Rows rows = RandomRows(kShape, 64, 34);
  AppendToAll(cache, rows, 0, 64);
  std::vector<std::uint8_t> codes(64 * 64);
  std::vector<float> scales(64);
  ExpectError(cache.ExportRows(0, 0, KVMIX_K, 0, 64, codes.data(), scales.data()),
              ErrorCode::kInvalidArgument, {"export", "exact_newest"});
}

}  // namespace
}  // namespace kvmix::testing
