// Accuracy of attention on every target, against double precision over the same codes. (What the
// options do: attend_options_test.cc.)
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <map>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "kvmix/tune/dump.h"
#include "tests/attend_cases.h"

namespace kvmix::testing {
namespace {

// The bound that kvmix/attention.h states.
constexpr double kBound = 1e-6;

// Runs `q` over `rows` on every target and compares with one reference; both forms of q give the
// same bits.
class Attention : public ::testing::Test {
 protected:
  void Check(const Plan& plan, const Rows& rows, const std::vector<Half>& q, double bound = kBound,
             const AttendOptions& options = {}) {
    const Geometry g = GeometryOf(plan.model);
    const std::size_t tokens = rows.k.size() / (g.kv_heads * g.head_dim);
    const std::vector<float> q_floats = ToFloats(q);
    const std::vector<double> expected = Expected(Filled(plan, rows, tokens), 0, q_floats, options);
    ForAllTargets([&](std::string_view target) {
      const Cache cache = Filled(plan, rows, tokens, target);
      const std::vector<float> out = Attended(cache, 0, q_floats, options);
      const std::vector<double> nmse = Nmse(g, out, expected);
      for (std::size_t h = 0; h < g.query_heads; ++h) {
        const std::string codecs = ToString(plan.codec(0, h / g.group(), KVMIX_K).kind) + " " +
                                   ToString(plan.codec(0, h / g.group(), KVMIX_V).kind);
        EXPECT_LE(nmse[h], bound) << "query head " << h << ", K and V " << codecs;
        double& worst = worst_[cache.target()];
        worst = std::max(worst, nmse[h] / bound);
      }
      EXPECT_EQ(Attended(cache, 0, q, options), out);
    });
  }

  void TearDown() override {
    for (const auto& [target, worst] : worst_)
      std::printf("  %-16s worst NMSE: %.1e of the bound\n", target.c_str(), worst);
  }

 private:
  std::map<std::string, double> worst_;
};

// A KV head for every codec, each pair of codecs in turn: `shift` picks which of V's codecs meets
// which of K's.
void MixedCase(const Geometry& g, std::size_t tokens, std::size_t queries, std::size_t shift,
               Plan* plan, Rows* rows, std::vector<Half>* q) {
  const unsigned seed = static_cast<unsigned>(tokens * 31 + g.head_dim * 7 + queries);
  *rows = RandomRows(g, tokens, seed);
  // An output of one number would cancel almost to zero, now and then, and its relative error grow.
  for (Half& v : rows->v) v = g.head_dim == 1 ? FloatToHalf(HalfToFloat(v) + 8.0f) : v;
  Names v_codecs = kCodecs;
  std::rotate(v_codecs.begin(),
              v_codecs.begin() + static_cast<std::ptrdiff_t>(shift % kCodecs.size()),
              v_codecs.end());
  *plan = MakePlan(g, *rows, kCodecs, v_codecs);
  std::mt19937 rng(seed + 1);
  *q = RandomHalves(rng, queries * g.query_heads * g.head_dim);
}

TEST_F(Attention, EveryHeadDimLengthAndCodec) {
  constexpr std::size_t kGroups[] = {1, 4, 6, 7}, kQueries[] = {1, 2, 5};
  std::size_t count = 0;
  for (const std::size_t head_dim : {1, 33, 64, 80, 96, 128, 256}) {
    // Around one vector of tokens of every target, one block, and several spans.
    for (const std::size_t tokens :
         {0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 255, 256, 257, 1000, 5000}) {
      const Geometry g{1, kCodecs.size(), kCodecs.size() * kGroups[count % 4], head_dim};
      const std::size_t queries = kQueries[count / 4 % 3];
      SCOPED_TRACE(::testing::Message()
                   << ToString(g) << ", " << tokens << " tokens, " << queries << " queries");
      Plan plan;
      Rows rows;
      std::vector<Half> q;
      MixedCase(g, tokens, queries, count + count / 16, &plan, &rows, &q);
      Check(plan, rows, q);
      ++count;
    }
  }
}

TEST_F(Attention, PrefillAndMoreQueriesThanTokens) {
  struct Shape {
    std::size_t head_dim, group, tokens, queries;
  };
  for (const Shape& s : {Shape{64, 7, 64, 64},
                         {128, 6, 100, 100},
                         {80, 4, 257, 64},
                         {128, 1, 300, 300},
                         {64, 1, 3, 64},
                         {96, 4, 17, 100},
                         {64, 6, 0, 5},
                         {256, 4, 70, 71},
                         {33, 7, 100, 100},
                         {512, 1, 40, 40},
                         {64, 65, 20, 5}}) {
    for (std::size_t shift = 0; shift < 2; ++shift) {
      const Geometry g{1, kCodecs.size(), kCodecs.size() * s.group, s.head_dim};
      SCOPED_TRACE(::testing::Message()
                   << ToString(g) << ", " << s.tokens << " tokens, " << s.queries << " queries");
      Plan plan;
      Rows rows;
      std::vector<Half> q;
      MixedCase(g, s.tokens, s.queries, shift + s.queries, &plan, &rows, &q);
      Check(plan, rows, q);
    }
  }
}

// One channel of q 100 times larger than the others: what the fixed-point q of int8 heads has least
// room for.
TEST_F(Attention, QueryWithAnOutlierChannel) {
  const Geometry g{1, kCodecs.size(), 2 * kCodecs.size(), 128};
  Rows rows = RandomRows(g, 700, 5);
  // K's channel is nearly constant there, as in models whose bias makes such outliers; else it
  // alone would decide the softmax.
  for (std::size_t i = 3; i < rows.k.size(); i += g.head_dim)
    rows.k[i] = FloatToHalf(4.0f + 0.01f * HalfToFloat(rows.k[i]));
  std::mt19937 rng(6);
  std::vector<Half> q = RandomHalves(rng, 2 * g.query_heads * g.head_dim);
  for (std::size_t i = 3; i < q.size(); i += g.head_dim) q[i] = FloatToHalf(100.0f);
  // The other channels, a hundredth as large, keep 8 or 9 of the row's 15 bits.
  Check(MakePlan(g, rows, kCodecs, {"i8-token"}), rows, q, 2 * kBound);
  Check(MakePlan(g, rows, kCodecs, {"f16"}), rows, q, 2 * kBound);
}

// K in the hundreds, as the outlier heads of Qwen2.5 have it.
TEST_F(Attention, KeysInTheHundreds) {
  const Geometry g{1, kCodecs.size(), 6 * kCodecs.size(), 128};
  const Rows rows = RandomRows(g, 1500, 7, 300.0f);
  std::mt19937 rng(8);
  const std::vector<Half> q = RandomHalves(rng, 2 * g.query_heads * g.head_dim);
  Check(MakePlan(g, rows, {"f16", "i8-token+centre"}, kCodecs), rows, q);
  Check(MakePlan(g, rows,
                 {"i8-token+hadamard", "i8-token+fold", "i8-token+centre+fold",
                  "i8-token-bf16+centre+fold+hadamard"},
                 {"f16", "i8-token+hadamard"}),
        rows, q);
}

// Scores of which f32 itself knows no more than two or three decimals. Nothing may overflow: the
// weights stay weights.
TEST_F(Attention, ScoresInTheTensOfThousands) {
  const Geometry g{1, 2, 8, 64};
  for (const float size : {30.0f, 100.0f, 300.0f}) {
    SCOPED_TRACE(size);
    Rows rows = RandomRows(g, 600, 9, 0.0f);
    for (std::size_t i = 0; i < rows.k.size(); ++i)
      rows.k[i] = FloatToHalf(size + 0.02f * HalfToFloat(rows.k[i]));
    for (Half& v : rows.v) v = FloatToHalf(1.0f + 0.1f * HalfToFloat(v));
    std::mt19937 rng(10);
    std::vector<Half> q = RandomHalves(rng, g.query_heads * g.head_dim);
    for (Half& x : q) x = FloatToHalf(size + HalfToFloat(x));
    Check(MakePlan(g, rows, {"f16", "i8-token"}, {"i8-token"}), rows, q, 1e-2);
    Check(MakePlan(g, rows, {"f16", "i8-token"}, {"i8-head"}), rows, q, 1e-2);
    Check(MakePlan(g, rows, {"i8-token+hadamard", "i8-token+centre+fold+hadamard"}, {"i8-token"}),
          rows, q, 1e-2);
  }
}

// Smaller than any model's, down to f32's own limits: the softmax of nothing is even.
TEST_F(Attention, TinyQueries) {
  const Geometry g{1, kCodecs.size(), kCodecs.size(), 64};
  const Rows rows = RandomRows(g, 300, 11);
  const Plan plan = MakePlan(g, rows, kCodecs, {"i8-token"});
  const std::vector<double> even =
      Expected(Filled(plan, rows, 300), 0, std::vector<float>(g.query_heads * g.head_dim));
  for (const float size : {0.0f, 1e-45f, 1e-38f, 1e-30f, 1e-29f, 1e-20f}) {
    ForAllTargets([&](std::string_view target) {
      const Cache cache = Filled(plan, rows, 300, target);
      std::vector<float> q(g.query_heads * g.head_dim);
      for (std::size_t i = 0; i < q.size(); ++i) q[i] = i % 3 == 0 ? -size : size;
      for (const float scale : {0.0f, 1e-30f, 1e-45f}) {
        AttendOptions options;
        options.attention_scale = scale;
        EXPECT_LE(WorstNmse(g, Attended(cache, 0, q, options), even), kBound)
            << "q " << size << ", attention_scale " << scale;
        options.soft_cap = 30.0f;
        EXPECT_LE(WorstNmse(g, Attended(cache, 0, q, options), even), kBound)
            << "q " << size << ", attention_scale " << scale << ", soft cap";
      }
    });
  }
}

TEST_F(Attention, LongContext) {
  const Geometry g{1, 1, 2, 64};
  const Names pairs[] = {{"i8-token", "i8-token"},
                         {"f16", "f16"},
                         {"i8-head", "i8-token-bf16"},
                         {"i8-token+centre+fold+hadamard", "i8-token+hadamard"}};
  for (const std::size_t tokens : {20000, 131072}) {
    const Rows rows = RandomRows(g, tokens, 12);
    std::mt19937 rng(13);
    const std::vector<float> q = ToFloats(RandomHalves(rng, g.query_heads * g.head_dim));
    for (const Names& pair : pairs) {
      const Plan plan = MakePlan(g, rows, {pair[0]}, {pair[1]});
      const std::vector<double> expected = Expected(Filled(plan, rows, tokens), 0, q);
      for (const std::string_view target : Targets()) {
        if (target != Targets().front() && target != "AVX2") continue;
        SCOPED_TRACE(target);
        EXPECT_LE(WorstNmse(g, Attended(Filled(plan, rows, tokens, target), 0, q), expected),
                  kBound)
            << tokens << " tokens, " << pair[0] << " " << pair[1];
      }
    }
  }
}

// An attention sink: the first key takes 0.9 of the weight, 32767 others share the rest; also with
// hardly any V behind it, as models make their sinks, so that the output is what the others add up
// to.
TEST_F(Attention, Sink) {
  const Names k_codecs = {"f16",     "i8-token",        "i8-token-bf16",
                          "i8-head", "i8-token+centre", "i8-token-bf16+centre+fold+hadamard"};
  const Geometry g{1, k_codecs.size(), k_codecs.size(), 64};
  constexpr std::size_t kTokens = 32768;
  Rows rows = RandomRows(g, kTokens, 14, 0.0f);
  std::mt19937 rng(15);
  const std::vector<Half> q = RandomHalves(rng, g.query_heads * g.head_dim);
  for (std::size_t h = 0; h < g.kv_heads; ++h) {
    const Half* qr = &q[h * g.head_dim];
    double others = 0.0, q2 = 0.0;
    for (std::size_t t = 1; t < kTokens; ++t) {
      double s = 0.0;
      for (std::size_t c = 0; c < g.head_dim; ++c)
        s += static_cast<double>(HalfToFloat(qr[c])) *
             HalfToFloat(rows.k[(t * g.kv_heads + h) * g.head_dim + c]);
      others += std::exp(s / 8.0);
    }
    for (std::size_t c = 0; c < g.head_dim; ++c)
      q2 += static_cast<double>(HalfToFloat(qr[c])) * HalfToFloat(qr[c]);
    const double factor = 8.0 * std::log(9.0 * others) / q2;
    for (std::size_t c = 0; c < g.head_dim; ++c)
      rows.k[h * g.head_dim + c] = FloatToHalf(static_cast<float>(factor) * HalfToFloat(qr[c]));
  }
  for (const float v_size : {1.0f, 1e-3f, 0.0f}) {
    for (std::size_t c = 0; c < g.kv_heads * g.head_dim; ++c)
      rows.v[c] = FloatToHalf(v_size * HalfToFloat(rows.v[c]));
    for (const std::string v_codec :
         {"f16", "i8-token", "i8-token-bf16", "i8-head", "i8-token+fold+hadamard"}) {
      // With one scale for the head nothing says how small the sink's V is: its weight sets the
      // step of its block's other weights.
      if (v_codec == "i8-head" && v_size < 1.0f) continue;
      SCOPED_TRACE(::testing::Message() << "V of the sink x " << v_size << ", V " << v_codec);
      Check(MakePlan(g, rows, k_codecs, {v_codec}), rows, q, 1e-5);
    }
  }
}

// Real rows: layers with and without outlier heads of the sample.
TEST_F(Attention, RealRows) {
  const Result<tune::Dump> dump =
      tune::Dump::Open(KVMIX_SOURCE_ROOT "/data/sample/qwen2.5-coder-1.5b.calibration.safetensors");
  ASSERT_TRUE(dump.ok()) << dump.status().message();
  Geometry g = GeometryOf(dump->model());
  g.layers = 1;
  const auto halves = [](const RowsView& x) {
    const Half* first = static_cast<const Half*>(x.data);
    return std::vector<Half>(first, first + x.tokens * x.heads * x.head_dim);
  };
  for (const std::size_t layer : {0, 1, 7, 15, 27}) {
    SCOPED_TRACE(layer);
    const Rows rows{halves(dump->Load(layer)->k), halves(dump->Load(layer)->v)};
    const std::vector<Half> q = halves(dump->Load(layer)->q);
    for (const Names& pair : {Names{"f16", "f16"},
                              {"i8-token", "i8-token"},
                              {"i8-token+centre", "i8-token-bf16"},
                              {"i8-head", "f16"},
                              {"f16", "i8-head"},
                              {"i8-token+hadamard", "i8-token+hadamard"},
                              {"i8-token-bf16+centre+fold+hadamard", "i8-token-bf16+hadamard"}}) {
      Check(MakePlan(g, rows, {pair[0]}, {pair[1]}), rows, q, kBound);
    }
  }
}

}  // namespace
}  // namespace kvmix::testing
