// Error tables and the errors of plans against the direct computation: rows encoded with
// tests/reference/quantize.h, attention in double precision with tests/reference/attention.h,
// prompt by prompt.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dump_files.h"
#include "kvmix/quantize.h"
#include "kvmix/tune/steps.h"
#include "kvmix/version.h"
#include "lib/tune/statistics.h"
#include "same_errors.h"
#include "synthetic_dump.h"
#include "tests/expect_error.h"
#include "tests/reference/attention.h"
#include "tests/reference/quantize.h"

namespace kvmix::testing {
namespace {

using namespace tune;

const Geometry kGeometry{3, 2, 6, 32};

// Two dumps of one made-up model, with two outlier K heads.
class MeasureTest : public ::testing::Test {
 protected:
  MeasureTest() : a_(Make("a", {9, 1, 30}, 1)), b_(Make("b", {17}, 2)) {}

  Dump Make(const std::string& name, const std::vector<std::size_t>& prompts, std::uint32_t seed) {
    SyntheticDump synthetic{kGeometry, prompts, seed, 0.4, 1.0, {{0, 1}, {2, 0}}, 30.0};
    const std::string path = folder_.file(name + ".safetensors");
    synthetic.Write(path);
    return Open(path);
  }

  static Dump Open(const std::string& path) {
    Result<Dump> dump = Dump::Open(path);
    if (!dump.ok()) ADD_FAILURE() << dump.status().message();
    return std::move(*dump);
  }

  Dump Write(const std::string& name, const DumpParts& parts) {
    WriteBytes(folder_.file(name), parts.Bytes());
    return Open(folder_.file(name));
  }

  ErrorTable Table(const std::string& candidates, std::size_t first = 0,
                   std::size_t last = kGeometry.layers, int threads = 1) const {
    Result<ErrorTable> table = Measure({&a_, &b_}, *Candidates(candidates), first, last,
                                       MeasureOptions{.runner = threads});
    if (!table.ok()) ADD_FAILURE() << table.status().message();
    return std::move(*table);
  }

  TempFolder folder_;
  Dump a_, b_;
};

// One head's rows as a codec stores them and gives them back, `stride` numbers apart.
void EncodeAndDecode(const RowsView& rows, const HeadCodec& codec, std::size_t stride, float* out) {
  const reference::Coded coded = reference::Encode(rows, codec);
  const RowCodec decoder = RowCodec::Create(codec, rows.head_dim).value();
  decoder.Decode(coded.rows.data(), coded.scales.data(), rows.tokens, out, stride);
}

// Attention of a layer, [tokens, query_heads, head_dim], through codecs [kv_heads][K, V].
std::vector<double> DirectAttention(const Dump& dump, std::size_t layer,
                                    const std::vector<HeadCodec>& codecs) {
  const LayerShape& shape = dump.model().layers[layer];
  const std::size_t dims[] = {shape.k_dim, shape.v_dim};
  const std::size_t q_row = shape.query_heads * shape.k_dim;
  std::vector<float> x[2];
  for (std::size_t tensor = 0; tensor < 2; ++tensor) {
    const std::size_t kv_row = shape.kv_heads * dims[tensor];
    x[tensor].resize(dump.tokens() * kv_row);
    for (std::size_t h = 0; h < shape.kv_heads; ++h)
      EncodeAndDecode(dump.Load(layer)->head(h, static_cast<Tensor>(tensor)),
                      codecs[h * 2 + tensor], kv_row, &x[tensor][h * dims[tensor]]);
  }
  std::vector<double> out;
  std::size_t first = 0;
  for (const std::size_t tokens : dump.prompt_tokens()) {
    const DumpLayer loaded = *dump.Load(layer);
    const RowsView rows = loaded.q.Tokens(first, tokens);
    std::vector<float> q(tokens * q_row);
    for (std::size_t i = 0; i < q.size(); ++i)
      q[i] = rows.At(i / q_row, i % q_row / shape.k_dim, i % shape.k_dim);
    const auto part = [&](std::size_t tensor) {
      const std::size_t kv_row = shape.kv_heads * dims[tensor];
      const auto begin = x[tensor].begin() + static_cast<std::ptrdiff_t>(first * kv_row);
      return std::vector<float>(begin, begin + static_cast<std::ptrdiff_t>(tokens * kv_row));
    };
    const std::vector<double> o = reference::Attention(shape, q, part(0), part(1));
    out.insert(out.end(), o.begin(), o.end());
    first += tokens;
  }
  return out;
}

// [query_heads] errors of a layer.
std::vector<AttentionError> DirectErrors(const Dump& dump, std::size_t layer,
                                         const std::vector<HeadCodec>& codecs) {
  const LayerShape& shape = dump.model().layers[layer];
  const std::vector<double> exact = DirectAttention(dump, layer,
                                                    std::vector<HeadCodec>(2 * shape.kv_heads)),
                            found = DirectAttention(dump, layer, codecs);
  std::vector<AttentionError> errors(shape.query_heads);
  for (std::size_t row = 0; row * shape.v_dim < exact.size(); ++row) {
    double xx = 0.0, yy = 0.0, xy = 0.0, dd = 0.0;
    for (std::size_t i = row * shape.v_dim; i < (row + 1) * shape.v_dim; ++i) {
      xx += exact[i] * exact[i];
      yy += found[i] * found[i];
      xy += exact[i] * found[i];
      dd += (exact[i] - found[i]) * (exact[i] - found[i]);
    }
    errors[row % shape.query_heads] += {dd, xx, xy / std::sqrt(xx * yy), 1};
  }
  return errors;
}

// The kernels' softmax weights are off by up to 8e-5 of themselves, the exact side's as well: that
// scales outputs a little, and nearly cancels in the errors. Operands of 8 bits have an error of
// their own, below 1e-4, that adds to the codes' as vectors do.
void ExpectClose(const AttentionError& found, const AttentionError& expected,
                 const CodecKind& kind = {}) {
  const double own = OperandBits(kind) == 8 ? 1e-4 : 0.0;
  const double added = 1e-8 + own + 2.0 * std::sqrt(own * expected.nmse());
  EXPECT_EQ(found.rows, expected.rows);
  EXPECT_NEAR(found.sum_squared_output, expected.sum_squared_output,
              3e-4 * expected.sum_squared_output);
  EXPECT_NEAR(found.nmse(), expected.nmse(), 0.02 * expected.nmse() + added);
  EXPECT_NEAR(1.0 - found.cosine(), 1.0 - expected.cosine(),
              0.02 * (1.0 - expected.cosine()) + added);
}

// ---- measure

TEST_F(MeasureTest, EveryCandidateAsComputedDirectly) {
  for (const std::string candidates : {"seed", "int8", "all"}) {
    SCOPED_TRACE(candidates);
    const CandidateKinds all_kinds = *Candidates(candidates);
    const ErrorTable table = Table(candidates);
    ASSERT_EQ(table.heads.size(), kGeometry.layers * kGeometry.kv_heads * 2);
    for (std::size_t i = 0; i < table.heads.size(); ++i) {
      const HeadErrors& head = table.heads[i];
      ASSERT_EQ((head.layer * kGeometry.kv_heads + head.kv_head) * 2 +
                    static_cast<std::size_t>(head.tensor),
                i);  // sorted, each once
      const std::vector<CodecKind>& kinds = head.tensor == KVMIX_K ? all_kinds.k : all_kinds.v;
      ASSERT_EQ(head.candidates.size(), kinds.size());
      for (std::size_t c = 0; c < kinds.size(); ++c) {
        const CandidateError& candidate = head.candidates[c];
        SCOPED_TRACE(::testing::Message()
                     << "layer " << head.layer << ", KV head " << head.kv_head << ", "
                     << (i % 2 == 0 ? "K " : "V ") << ToString(candidate.codec.kind));
        EXPECT_EQ(candidate.codec.kind, kinds[c]);
        std::vector<HeadCodec> codecs(2 * kGeometry.kv_heads);
        codecs[head.kv_head * 2 + i % 2] = candidate.codec;
        std::vector<AttentionError> expected = DirectErrors(a_, head.layer, codecs);
        const std::vector<AttentionError> more = DirectErrors(b_, head.layer, codecs);
        ASSERT_EQ(candidate.queries.size(), kGeometry.group());
        for (std::size_t q = 0; q < kGeometry.group(); ++q) {
          AttentionError& e = expected[head.kv_head * kGeometry.group() + q];
          ExpectClose(candidate.queries[q], e += more[head.kv_head * kGeometry.group() + q],
                      candidate.codec.kind);
        }
      }
    }
  }
}

TEST_F(MeasureTest, UnlikeLayersAsComputedDirectly) {
  const Model model = UnlikeModel();
  SyntheticDump{model, {40, 7}, 5, 0.4, 1.0, {{0, 0}}, 30.0}.Write(folder_.file("unlike"));
  const Dump dump = Open(folder_.file("unlike"));
  ASSERT_EQ(dump.model(), model);
  const ErrorTable table = Measure({&dump}, *Candidates("seed"), 0, 5, {.runner = 2}).value();
  ASSERT_EQ(table.heads.size(), 6u);
  for (const HeadErrors& head : table.heads) {
    for (const CandidateError& candidate : head.candidates) {
      SCOPED_TRACE(::testing::Message()
                   << head.layer << ' ' << head.kv_head << ' ' << ToString(candidate.codec.kind));
      std::vector<HeadCodec> codecs(2 * model.layers[head.layer].kv_heads);
      codecs[head.kv_head * 2 + static_cast<std::size_t>(head.tensor)] = candidate.codec;
      std::size_t q = 0;
      for (const std::size_t reader : {head.layer, head.layer + 3}) {
        const std::vector<AttentionError> expected = DirectErrors(dump, reader, codecs);
        const std::size_t group = model.layers[reader].group();
        for (std::size_t i = 0; i < group; ++i, ++q) {
          ASSERT_LT(q, candidate.queries.size());
          ExpectClose(candidate.queries[q], expected[head.kv_head * group + i]);
        }
      }
      EXPECT_EQ(candidate.queries.size(), q);
    }
  }
  // The plan as a whole: of layers 0, 1, 3 and 4.
  const HeadCodec int8{{KVMIX_STORAGE_I8, KVMIX_SCALE_TOKEN}};
  const Plan plan = UniformPlan(Stored(model), int8, int8);  // it says nothing of attention
  const auto errors = MeasurePlan(dump, plan, {.runner = 2});
  ASSERT_TRUE(errors.ok()) << errors.status().message();
  ASSERT_EQ(errors->size(), 11u);
  const std::vector<AttentionError> expected =
      DirectErrors(dump, 4, std::vector<HeadCodec>(4, int8));
  for (std::size_t q = 0; q < 2; ++q) ExpectClose((*errors)[9 + q], expected[q]);
  std::vector<AttentionError> worst(11);
  worst[7] = {1.0, 1.0, 0.5, 1};
  EXPECT_EQ(Summarize(worst, model).worst_layer, 3u);
  EXPECT_EQ(Summarize(worst, model).worst_query_head, 1u);
  Plan other = plan;
  other.model.layers[0].window = 9;
  ExpectError(MeasurePlan(dump, other).status(), ErrorCode::kMismatch, {"window 8", "window 9"});
}

TEST_F(MeasureTest, ScalesMeansAndErrorsOfTheValuesCoverAllDumps) {
  const std::vector<CodecKind> kinds = {{},
                                        {KVMIX_STORAGE_I8, KVMIX_SCALE_HEAD},
                                        {KVMIX_STORAGE_I8, KVMIX_SCALE_HEAD, true},
                                        {KVMIX_STORAGE_I8, KVMIX_SCALE_TOKEN_BF16, true},
                                        {KVMIX_STORAGE_I8, KVMIX_SCALE_TOKEN, false, true, true},
                                        {KVMIX_STORAGE_I8, KVMIX_SCALE_TOKEN, true, true, true}};
  const Result<ErrorTable> table =
      Measure({&a_, &b_}, {kinds, kinds}, 0, kGeometry.layers, {.runner = 1});
  ASSERT_TRUE(table.ok()) << table.status().message();
  EXPECT_EQ(table->dumps, (std::vector<std::string>{"a.safetensors", "b.safetensors"}));
  EXPECT_EQ(table->model_name, "synthetic");
  EXPECT_EQ(table->tokens, 57u);
  EXPECT_EQ(table->longest_prompt, 30u);
  for (const HeadErrors& head : table->heads) {
    const DumpLayer of_a = *a_.Load(head.layer), of_b = *b_.Load(head.layer);
    const RowsView rows[] = {of_a.head(head.kv_head, head.tensor),
                             of_b.head(head.kv_head, head.tensor)};
    std::vector<double> mean(kGeometry.head_dim);
    for (const RowsView& r : rows)
      for (std::size_t t = 0; t < r.tokens; ++t)
        for (std::size_t c = 0; c < r.head_dim; ++c) mean[c] += double{r.At(t, 0, c)} / 57.0;
    for (const CandidateError& candidate : head.candidates) {
      const HeadCodec& codec = candidate.codec;
      SCOPED_TRACE(ToString(codec.kind));
      EXPECT_TRUE(CheckCodec(codec, kGeometry.head_dim).ok());
      for (std::size_t c = 0; c < codec.mean().size(); ++c)
        EXPECT_NEAR(codec.mean()[c], mean[c], 1e-6 * (1.0 + std::fabs(mean[c])));
      EXPECT_EQ(codec.head_scale, codec.kind.scale == KVMIX_SCALE_HEAD
                                      ? std::max(reference::HeadScale(rows[0], codec),
                                                 reference::HeadScale(rows[1], codec))
                                      : 0.0f);
      ErrorSums expected;
      for (const RowsView& r : rows)
        expected += reference::Errors(r, reference::Encode(r, codec), codec);
      EXPECT_EQ(expected.sum_squared_error == 0.0, codec.kind.storage == KVMIX_STORAGE_F16);
      EXPECT_NEAR(candidate.values.sum_squared_error, expected.sum_squared_error,
                  1e-5 * expected.sum_squared_error);
      EXPECT_EQ(candidate.values.count, 57u * kGeometry.head_dim);
      EXPECT_EQ(head.max_abs, candidate.values.max_abs);
      EXPECT_EQ(candidate.values.max_abs, expected.max_abs);
    }
  }
}

// Numbers of the statistics of one KV head, of a dump with its Q.
void ExpectStatistics(const HeadStatistics& found, const RowsView& rows,
                      const std::vector<RowsView>& queries) {
  const std::size_t dim = rows.head_dim;
  EXPECT_EQ(found.tokens, rows.tokens);
  for (std::size_t c = 0; c < dim; ++c) {
    std::vector<double> x;
    for (std::size_t t = 0; t < rows.tokens; ++t) x.push_back(rows.At(t, 0, c));
    EXPECT_NEAR(found.sum[c], std::accumulate(x.begin(), x.end(), 0.0), 1e-9);
    EXPECT_EQ(found.min[c], std::ranges::min(x));
    EXPECT_EQ(found.max[c], std::ranges::max(x));
  }
  ASSERT_EQ(found.query_moment.size(), queries.empty() ? 0 : dim * dim);
  for (std::size_t i = 0; i < found.query_moment.size(); ++i) {
    double expected = 0.0;
    for (const RowsView& q : queries)
      for (std::size_t t = 0; t < q.tokens; ++t)
        expected += double{q.At(t, 0, i / dim)} * q.At(t, 0, i % dim);
    EXPECT_NEAR(found.query_moment[i], expected, 1e-9);
    EXPECT_EQ(found.query_moment[i], found.query_moment[i % dim * dim + i / dim]);
  }
}

TEST_F(MeasureTest, StatisticsAsComputedDirectly) {
  SyntheticDump{UnlikeModel(), {150, 7}, 5, 0.4, 1.0, {{0, 0}}, 30.0}.Write(folder_.file("unlike"));
  const Dump dump = Open(folder_.file("unlike"));
  for (const std::size_t layer : {0, 1}) {
    const std::vector<DumpLayer> readers = {*dump.Load(layer), *dump.Load(layer + 3)};
    for (std::size_t h = 0; h < dump.model().layers[layer].kv_heads; ++h) {
      std::vector<RowsView> queries;
      for (const DumpLayer& reader : readers) {
        const std::size_t group = reader.q.heads / reader.k.heads;
        for (std::size_t q = h * group; q < (h + 1) * group; ++q)
          queries.push_back(reader.q.Head(q));
      }
      ExpectStatistics(tune::Statistics(readers, h, KVMIX_K), readers[0].head(h, KVMIX_K), queries);
      ExpectStatistics(tune::Statistics(readers, h, KVMIX_V), readers[0].head(h, KVMIX_V), {});
    }
  }
  HeadStatistics one{2, {1.0}, {-1.0f}, {3.0f}, {4.0}};
  one += {3, {2.0}, {-2.0f}, {2.0f}, {5.0}};
  EXPECT_EQ(one, (HeadStatistics{5, {3.0}, {-2.0f}, {3.0f}, {9.0}}));
}

// The range of each channel of one head in both dumps.
std::vector<double> Ranges(const std::vector<RowsView>& rows, std::span<const float> mean) {
  std::vector<double> range(rows[0].head_dim);
  for (const RowsView& r : rows)
    for (std::size_t t = 0; t < r.tokens; ++t)
      for (std::size_t c = 0; c < range.size(); ++c)
        range[c] =
            std::max(range[c], std::fabs(double{r.At(t, 0, c)} - (mean.empty() ? 0.0f : mean[c])));
  return range;
}

// Roots of the channels' ranges, with a geometric mean of 1.
TEST_F(MeasureTest, FoldFactorsBalanceTheChannels) {
  const std::vector<CodecKind> kinds = {{KVMIX_STORAGE_I8, KVMIX_SCALE_TOKEN, false, true},
                                        {KVMIX_STORAGE_I8, KVMIX_SCALE_TOKEN, true, true},
                                        {KVMIX_STORAGE_I8, KVMIX_SCALE_TOKEN, true, true, true}};
  const ErrorTable table =
      Measure({&a_, &b_}, {kinds, kinds}, 0, kGeometry.layers, {.runner = 1}).value();
  for (const HeadErrors& head : table.heads) {
    for (const CandidateError& candidate : head.candidates) {
      const std::span<const float> factor = candidate.codec.factor();
      ASSERT_EQ(factor.size(), kGeometry.head_dim);
      const DumpLayer of_a = *a_.Load(head.layer), of_b = *b_.Load(head.layer);
      const std::vector<double> range =
          Ranges({of_a.head(head.kv_head, head.tensor), of_b.head(head.kv_head, head.tensor)},
                 candidate.codec.mean());
      double sum_log = 0.0, log_range = 0.0;
      for (const float f : factor) sum_log += std::log(double{f});
      EXPECT_NEAR(sum_log, 0.0, 1e-4);
      for (const double r : range)
        log_range += std::log(r) / static_cast<double>(kGeometry.head_dim);
      for (std::size_t c = 0; c < range.size(); ++c)
        EXPECT_NEAR(factor[c], std::sqrt(range[c] / std::exp(log_range)), 1e-4 * factor[c]);
    }
    // Codecs of the same steps share their numbers.
    EXPECT_EQ(head.candidates[1].codec.vectors, head.candidates[2].codec.vectors);
  }
}

// Channels that never move, and heads of zeros: factors stay within a ratio of 64.
TEST_F(MeasureTest, FoldFactorsAreBounded) {
  DumpParts parts;
  Half* k = parts.tensor("layers.0.k");  // [6, 2, 8]
  for (std::size_t t = 0; t < 6; ++t) {
    k[t * 16 + 3] = FloatToHalf(5.0f);                    // head 0: one constant channel
    std::fill(k + t * 16 + 8, k + t * 16 + 16, Half{0});  // head 1: zeros
    for (std::size_t c = 0; c < 8; ++c)
      parts.tensor("layers.0.v")[t * 16 + c] = k[3];                 // all constant
    parts.tensor("layers.0.v")[t * 16 + 9] = FloatToHalf(60000.0f);  // one huge channel
  }
  const Dump dump = Write("flat.safetensors", parts);
  const std::vector<CodecKind> kinds = {{KVMIX_STORAGE_I8, KVMIX_SCALE_TOKEN, true, true},
                                        {KVMIX_STORAGE_I8, KVMIX_SCALE_TOKEN, false, true}};
  const Result<ErrorTable> table = Measure({&dump}, {kinds, kinds}, 0, 1);
  ASSERT_TRUE(table.ok()) << table.status().message();
  for (const HeadErrors& head : table->heads) {
    for (const CandidateError& candidate : head.candidates) {
      const std::span<const float> factor = candidate.codec.factor();
      const auto [least, most] = std::ranges::minmax(factor);
      SCOPED_TRACE(::testing::Message()
                   << "KV head " << head.kv_head << ", tensor " << static_cast<int>(head.tensor)
                   << ", " << ToString(candidate.codec.kind));
      EXPECT_TRUE(CheckCodec(candidate.codec, 8).ok());
      EXPECT_LE(most, 64.001f * least);
      const bool flat = head.kv_head == 0 && head.tensor == KVMIX_V,
                 zero = head.kv_head == 1 && head.tensor == KVMIX_K;
      if (zero || flat) {
        EXPECT_EQ(least, most);
        EXPECT_EQ(least, 1.0f);
      }
      if (head.kv_head == 0 && head.tensor == KVMIX_K && candidate.codec.kind.centre) {
        EXPECT_EQ(least, factor[3]);
        EXPECT_GT(most, 10.0f * least);
      }
      if (head.kv_head == 1 && head.tensor == KVMIX_V && !candidate.codec.kind.centre) {
        EXPECT_EQ(most, factor[1]);
        EXPECT_NEAR(most, 64.0f * least, 0.01f * most);
      }
    }
  }
}

// What the steps are for: K with a constant offset in some channels. A rotation spreads it over all
// channels, a mean takes it away.
TEST_F(MeasureTest, StepsReduceTheErrorOfHeadsWithAnOffset) {
  const ErrorTable table = Table("all");
  const auto worst_nmse = [&](std::size_t layer, std::size_t kv_head, const std::string& name) {
    const HeadErrors& head = table.heads[(layer * kGeometry.kv_heads + kv_head) * 2];
    for (const CandidateError& c : head.candidates) {
      if (ToString(c.codec.kind) != name) continue;
      double worst = 0.0;
      for (const AttentionError& e : c.queries) worst = std::max(worst, e.nmse());
      return worst;
    }
    ADD_FAILURE() << name << " is no candidate";
    return 0.0;
  };
  for (const auto& [layer, head] : {std::pair<std::size_t, std::size_t>{0, 1}, {2, 0}}) {
    for (const std::string scale : {"i8-token", "i8-token-bf16"}) {
      SCOPED_TRACE(::testing::Message()
                   << "layer " << layer << ", KV head " << head << ", " << scale);
      const double plain = worst_nmse(layer, head, scale);
      EXPECT_LT(worst_nmse(layer, head, scale + "+hadamard"), 0.5 * plain);
      for (const std::string steps :
           {"+centre", "+centre+hadamard", "+centre+fold", "+centre+fold+hadamard"})
        EXPECT_LT(worst_nmse(layer, head, scale + steps), 0.03 * plain) << steps;
    }
  }
}

TEST_F(MeasureTest, DoesNotDependOnTheThreads) {
  const ErrorTable one = Table("all");
  for (const int threads : {2, 3, 7, 0})
    ExpectSame(Table("all", 0, kGeometry.layers, threads), one);
}

// One layer has all threads to itself: they share its prompts, heads and rows.
TEST_F(MeasureTest, DoesNotDependOnTheThreadsWithinALayer) {
  SyntheticDump synthetic{Geometry{1, 2, 6, 32}, {700, 300}, 3, 0.4, 1.0, {{0, 1}}, 30.0};
  synthetic.Write(folder_.file("long.safetensors"));
  const Dump dump = Open(folder_.file("long.safetensors"));
  const CandidateKinds kinds = *Candidates("int8");
  const ErrorTable one = Measure({&dump}, kinds, 0, 1, {.runner = 1}).value();
  const auto plan_errors = [&](int threads) {
    const HeadCodec k = one.heads[0].candidates.back().codec,
                    v{{KVMIX_STORAGE_I8, KVMIX_SCALE_TOKEN}};
    return MeasurePlan(dump, UniformPlan(dump.model(), k, v), {.runner = threads}).value();
  };
  const std::vector<AttentionError> plan_one = plan_errors(1);
  for (const int threads : {2, 3, 7, 0}) {
    SCOPED_TRACE(threads);
    ExpectSame(Measure({&dump}, kinds, 0, 1, {.runner = threads}).value(), one);
    const std::vector<AttentionError> plan = plan_errors(threads);
    for (std::size_t i = 0; i < plan.size(); ++i) ExpectSame(plan[i], plan_one[i]);
  }
}

// The same numbers as f32, heads first.
TEST_F(MeasureTest, DoesNotDependOnTheTypeAndOrderOfTheDump) {
  DumpParts parts;
  const Dump halves = Write("same.safetensors", parts);
  const ErrorTable expected = Measure({&halves}, *Candidates("all"), 0, 2).value();
  for (const bool heads_first : {false, true}) {
    const Dump dump = Write("same.safetensors", parts.As(KVMIX_F32, heads_first));
    ExpectSame(Measure({&dump}, *Candidates("all"), 0, 2).value(), expected);
  }
}

TEST_F(MeasureTest, OnATargetByItsName) {
  const CandidateKinds kinds = *Candidates("int8");
  const ErrorTable best = Measure({&a_}, kinds, 0, 1).value();
  for (const std::string_view target : Targets()) {
    SCOPED_TRACE(target);
    const ErrorTable table =
        Measure({&a_}, kinds, 0, 1, {.runner = 2, .target = std::string(target)}).value();
    if (target == Targets().front()) ExpectSame(table, best);
    for (std::size_t i = 0; i < table.heads.size(); ++i) {
      for (std::size_t c = 0; c < table.heads[i].candidates.size(); ++c) {
        EXPECT_EQ(table.heads[i].candidates[c].codec, best.heads[i].candidates[c].codec);
        for (std::size_t q = 0; q < kGeometry.group(); ++q)
          ExpectClose(table.heads[i].candidates[c].queries[q],
                      best.heads[i].candidates[c].queries[q]);
      }
    }
  }
  const MeasureOptions unknown{.runner = 1, .target = "AVX9"};
  ExpectError(Measure({&a_}, kinds, 0, 1, unknown).status(), ErrorCode::kInvalidArgument,
              {"AVX9", std::string(Targets().back())});
  ExpectError(MeasurePlan(a_, UniformPlan(kGeometry, {}, {}), unknown).status(),
              ErrorCode::kInvalidArgument, {"AVX9", std::string(Targets().back())});
}

TEST_F(MeasureTest, ReportsProgressLayerByLayer) {
  std::vector<std::pair<std::size_t, std::size_t>> calls;
  ASSERT_TRUE(Measure({&a_}, *Candidates("seed"), 1, 3,
                      {.runner = 2,
                       .progress =
                           [&](std::size_t done, std::size_t total) {
                             calls.emplace_back(done, total);
                             return true;
                           }})
                  .ok());
  EXPECT_EQ(calls, (std::vector<std::pair<std::size_t, std::size_t>>{{1, 2}, {2, 2}}));
}

TEST_F(MeasureTest, ProgressMayStopTheWork) {
  const MeasureOptions options{.runner = 1,
                               .progress = [&](std::size_t done, std::size_t) { return done < 2; }};
  ExpectError(Measure({&a_}, *Candidates("seed"), 0, 3, options).status(), ErrorCode::kCancelled,
              {"stopped"});
  ExpectError(MeasurePlan(a_, UniformPlan(kGeometry, {}, {}), options).status(),
              ErrorCode::kCancelled, {"stopped"});
}

TEST_F(MeasureTest, CandidateLists) {
  const auto names = [](const std::vector<CodecKind>& kinds) {
    std::vector<std::string> all;
    for (const CodecKind& kind : kinds) all.push_back(ToString(kind));
    return all;
  };
  using Names = std::vector<std::string>;
  EXPECT_EQ(names(Candidates("seed")->k), (Names{"f16", "i8-head", "i8-token"}));
  EXPECT_EQ(names(Candidates("seed")->v), (Names{"f16", "i8-head", "i8-token"}));
  EXPECT_EQ(names(Candidates("int8")->k),
            (Names{"f16", "i8-token", "i8-token-bf16", "i8-token+centre", "i8-token-bf16+centre"}));
  EXPECT_EQ(names(Candidates("int8")->v), (Names{"f16", "i8-token", "i8-token-bf16"}));
  Names k = {"f16",
             "i8-token",
             "i8-token-bf16",
             "i8-token+centre",
             "i8-token-bf16+centre",
             "i8-token+hadamard",
             "i8-token-bf16+hadamard",
             "i8-token+centre+hadamard",
             "i8-token-bf16+centre+hadamard",
             "i8-token+centre+fold",
             "i8-token-bf16+centre+fold",
             "i8-token+centre+fold+hadamard",
             "i8-token-bf16+centre+fold+hadamard",
             "i8-token+centre+fold+hadamard+shape",
             "i8-token-bf16+centre+fold+hadamard+shape",
             "i8x8-token-bf16+centre+hadamard",
             "i8x8-token-bf16+centre+fold+hadamard",
             "i8x8-token-bf16+centre+fold+hadamard+shape"};
  Names v = {"f16",
             "i8-token",
             "i8-token-bf16",
             "i8-token+hadamard",
             "i8-token-bf16+hadamard",
             "i8x8-token-bf16+hadamard"};
  for (const std::string below : {"i6", "i4", "i3"}) {
    for (const std::string steps :
         {"+hadamard", "+centre+hadamard", "+centre+fold+hadamard", "+centre+fold+hadamard+shape"})
      k.push_back(below + "-token-bf16" + steps);
    v.push_back(below + "-token-bf16+hadamard");
  }
  EXPECT_EQ(names(Candidates("all")->k), k);
  EXPECT_EQ(names(Candidates("all")->v), v);
  ExpectError(Candidates("int2").status(), ErrorCode::kInvalidArgument,
              {"int2", "seed", "int8", "all"});
}

TEST_F(MeasureTest, ErrorsOfTheValuesThemselves) {
  const CodecKind token{KVMIX_STORAGE_I8, KVMIX_SCALE_TOKEN};
  const ErrorTable table = Measure({&a_}, {{token}, {token}}, 0, 1, {.runner = 1}).value();
  for (const HeadErrors& head : table.heads) {
    const DumpLayer loaded = *a_.Load(head.layer);
    const RowsView rows = loaded.head(head.kv_head, head.tensor);
    const HeadCodec codec{token};
    const ErrorSums expected = reference::Errors(rows, reference::Encode(rows, codec), codec),
                    &found = head.candidates[0].values;
    EXPECT_EQ(found.count, expected.count);
    EXPECT_NEAR(found.sum_squared_error, expected.sum_squared_error,
                1e-5 * expected.sum_squared_error);
    EXPECT_EQ(found.max_abs, expected.max_abs);
    EXPECT_EQ(head.max_abs, expected.max_abs);
  }
}

TEST_F(MeasureTest, CountsWhatAPlanClamps) {
  const HeadCodec narrow{{KVMIX_STORAGE_I8, KVMIX_SCALE_HEAD}, 0.01f, nullptr};
  std::uint64_t expected = 5, saturated = 5;  // is added to
  for (std::size_t h = 0; h < kGeometry.kv_heads; ++h)
    for (const Tensor t : {KVMIX_K, KVMIX_V})
      expected += reference::Encode(a_.Load(1)->head(h, t), narrow).clamped;
  std::vector<float> out;
  const std::vector<HeadCodec> codecs(2 * kGeometry.kv_heads, narrow);
  ASSERT_TRUE(AttendDump(a_, 1, codecs, {.runner = 2}, &out, &saturated).ok());
  EXPECT_GT(expected, 100u);
  EXPECT_EQ(saturated, expected);
  EXPECT_EQ(out.size(), a_.tokens() * kGeometry.query_heads * kGeometry.head_dim);
}

// ---- whole plans

TEST_F(MeasureTest, PlansAsComputedDirectly) {
  const ErrorTable table = Table("all");
  Plan plan = UniformPlan(kGeometry, {}, {});
  for (std::size_t i = 0; i < table.heads.size(); ++i) {
    plan.codecs[i] =
        table.heads[i].candidates[i * 7 % table.heads[i].candidates.size()].codec;  // a mixture
    // With operands of 16 bits, whose own error is far below the codes'.
    CodecKind& kind = plan.codecs[i].kind;
    if (OperandBits(kind) == 8) {
      kind.operands = kind.storage == KVMIX_STORAGE_I8 ? KVMIX_OPERANDS_USUAL : KVMIX_OPERANDS_16;
    }
  }
  const Result<std::vector<AttentionError>> errors = MeasurePlan(a_, plan, {.runner = 1});
  ASSERT_TRUE(errors.ok()) << errors.status().message();
  ASSERT_EQ(errors->size(), kGeometry.layers * kGeometry.query_heads);
  for (std::size_t layer = 0; layer < kGeometry.layers; ++layer) {
    const HeadCodec* first = &plan.codec(layer, 0, KVMIX_K);
    const std::vector<AttentionError> expected =
        DirectErrors(a_, layer, {first, first + 2 * kGeometry.kv_heads});
    for (std::size_t q = 0; q < kGeometry.query_heads; ++q)
      ExpectClose((*errors)[layer * kGeometry.query_heads + q], expected[q]);
  }
  for (const int threads : {2, 3, 7, 0}) {
    const Result<std::vector<AttentionError>> again = MeasurePlan(a_, plan, {.runner = threads});
    for (std::size_t i = 0; i < errors->size(); ++i) ExpectSame((*again)[i], (*errors)[i]);
  }
}

TEST_F(MeasureTest, Fp16IsExact) {
  const Result<std::vector<AttentionError>> errors =
      MeasurePlan(a_, UniformPlan(kGeometry, {}, {}));
  ASSERT_TRUE(errors.ok()) << errors.status().message();
  for (const AttentionError& e : *errors) {
    EXPECT_EQ(e.nmse(), 0.0);
    EXPECT_EQ(e.cosine(), 1.0);
    EXPECT_EQ(e.rows, a_.tokens());
  }
  const ErrorTable table = Table("seed");
  for (const HeadErrors& head : table.heads)
    for (const AttentionError& e : head.candidates[0].queries) EXPECT_EQ(e.sum_squared_error, 0.0);
}

TEST_F(MeasureTest, RefusesPlansThatDoNotFit) {
  Geometry other = kGeometry;
  other.layers = 4;
  ExpectError(MeasurePlan(a_, UniformPlan(other, {}, {})).status(), ErrorCode::kMismatch,
              {a_.path(), ToString(other), ToString(kGeometry)});
  Plan broken = UniformPlan(kGeometry, {}, {});
  broken.codecs.pop_back();
  ExpectError(MeasurePlan(a_, broken).status(), ErrorCode::kInvalidArgument,
              {"expected 12", "found 11"});
}

// ---- what cannot be measured

TEST_F(MeasureTest, NamesWhereANanIs) {
  struct Case {
    const char *tensor, *head;
    std::size_t heads;
  };
  for (const Case& c :
       {Case{"k", "KV head 1", 2}, {"v", "KV head 1", 2}, {"q", "query head 1", 4}}) {
    DumpParts parts;
    parts.tensor(std::string("layers.1.") + c.tensor)[(3 * c.heads + 1) * parts.head_dim + 5] =
        0x7E00;
    const Dump dump = Write("nan.safetensors", parts);
    const std::vector<std::string> names{dump.path(), "NaN", "layer 1", c.head, "token 3"};
    ExpectError(Measure({&dump}, *Candidates("seed"), 0, 2).status(), ErrorCode::kNonFinite, names);
    ExpectError(MeasurePlan(dump, UniformPlan(dump.model(), {}, {}), {.runner = 2}).status(),
                ErrorCode::kNonFinite, names);
    EXPECT_TRUE(Measure({&dump}, *Candidates("seed"), 0, 1).ok());  // the other layer is whole
  }
}

TEST_F(MeasureTest, RefusesDumpsWithoutQ) {
  const Dump dump = Write("no_q.safetensors", DumpParts(false));
  const std::vector<std::string> names{dump.path(), "no Q"};
  ExpectError(Measure({&dump}, *Candidates("seed"), 0, 2).status(), ErrorCode::kInvalidArgument,
              names);
  ExpectError(MeasurePlan(dump, UniformPlan(dump.model(), {}, {})).status(),
              ErrorCode::kInvalidArgument, names);
  std::vector<float> out;
  ExpectError(AttendDump(dump, 0, std::vector<HeadCodec>(4), {}, &out), ErrorCode::kInvalidArgument,
              names);
}

TEST_F(MeasureTest, RefusesDumpsThatDifferAndLayersThatAreNone) {
  const CandidateKinds seed = *Candidates("seed");
  DumpParts parts;
  const Dump one = Write("one.safetensors", parts);
  parts.header["__metadata__"]["attention_scale"] = "0.5";
  const Dump scaled = Write("scaled.safetensors", parts);
  ExpectError(Measure({&a_, &one}, seed, 0, 1).status(), ErrorCode::kMismatch,
              {a_.path(), one.path(), ToString(kGeometry), ToString(one.model())});
  ExpectError(Measure({&one, &scaled}, seed, 0, 1).status(), ErrorCode::kMismatch,
              {one.path(), scaled.path(), "0.25", "0.5"});
  ExpectError(Measure({&a_}, seed, 0, 4).status(), ErrorCode::kInvalidArgument,
              {a_.path(), "layers 0 to 4"});
  ExpectError(Measure({&a_}, seed, 2, 1).status(), ErrorCode::kInvalidArgument, {"layers 2 to 1"});
  ExpectError(Measure({}, seed, 0, 0).status(), ErrorCode::kInvalidArgument, {"dump"});
  ExpectError(Measure({&a_}, {}, 0, 1).status(), ErrorCode::kInvalidArgument, {"candidate"});
  ExpectError(Measure({&a_}, {seed.k, {}}, 0, 1).status(), ErrorCode::kInvalidArgument,
              {"candidate"});
  for (const CodecKind& kind : {CodecKind{KVMIX_STORAGE_I8, KVMIX_SCALE_HEAD, false, true},
                                CodecKind{KVMIX_STORAGE_I8, KVMIX_SCALE_HEAD, false, false, true}})
    ExpectError(Measure({&a_}, {{kind}, seed.v}, 0, 1).status(), ErrorCode::kInvalidArgument,
                {"candidate " + ToString(kind), "scale per token"});
  ExpectError(Measure({&a_}, seed, 0, 1, {.runner = -2}).status(), ErrorCode::kInvalidArgument,
              {"num_threads", "-2"});
}

// ---- errors and their summaries

TEST(AttentionErrors, RowsOfZeros) {
  const std::vector<float> zero(13), one(13, 1.0f);
  const auto compare = [](const std::vector<float>& x, const std::vector<float>& y) {
    return CompareOutputs(x.data(), y.data(), 1, 13, 13);
  };
  EXPECT_EQ(compare(zero, zero).cosine(), 1.0);
  EXPECT_EQ(compare(zero, zero).nmse(), 0.0);
  EXPECT_EQ(compare(zero, one).cosine(), 0.0);
  EXPECT_TRUE(std::isinf(compare(zero, one).nmse()));
  EXPECT_EQ(compare(one, zero).cosine(), 0.0);
  EXPECT_EQ(compare(one, zero).nmse(), 1.0);
}

TEST(AttentionErrors, AddUpOverRowsWithAStride) {
  // Rows of 9 numbers, 11 apart; what lies between them is not looked at.
  std::vector<float> x(33), y(33);
  for (std::size_t i = 0; i < 33; ++i) {
    x[i] = i % 11 < 9 ? static_cast<float>(i) : 1e9f;
    y[i] = i % 11 < 9 ? static_cast<float>(i) + 1.0f : -1e9f;
  }
  const AttentionError all = CompareOutputs(x.data(), y.data(), 3, 11, 9);
  EXPECT_EQ(all.sum_squared_error, 27.0);
  EXPECT_EQ(all.rows, 3u);
  AttentionError sum;
  for (std::size_t r = 0; r < 3; ++r) sum += CompareOutputs(&x[r * 11], &y[r * 11], 1, 11, 9);
  ExpectSame(sum, all);
}

TEST(AttentionErrors, Summary) {
  const Geometry g{2, 1, 2, 8};
  const std::vector<AttentionError> errors{
      {1.0, 10.0, 9.0, 10}, {4.0, 10.0, 9.9, 10}, {0.0, 10.0, 10.0, 10}, {1.0, 10.0, 8.0, 10}};
  const Fidelity f = Summarize(errors, g);
  EXPECT_DOUBLE_EQ(f.worst_cosine, 0.8);
  EXPECT_EQ(f.worst_layer, 1u);
  EXPECT_EQ(f.worst_query_head, 1u);
  EXPECT_DOUBLE_EQ(f.mean_cosine, (0.9 + 0.99 + 1.0 + 0.8) / 4.0);
  EXPECT_DOUBLE_EQ(f.worst_nmse, 0.4);
  EXPECT_DOUBLE_EQ(f.mean_nmse, 0.15);
}

}  // namespace
}  // namespace kvmix::testing
