// What must never change by accident: codes, scales, attention outputs and the sample's plan, as
// hashes taken before the codec got a room of its own. Codes and scales are the same on every
// target; the outputs of attention are a target's own (limbs and vector lengths differ), and so may
// be the plan.
#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kvmix/attention.h"
#include "kvmix/cache.h"
#include "kvmix/tune/dump.h"
#include "kvmix/tune/steps.h"
#include "kvmix/version.h"
#include "tests/attend_options.h"

namespace kvmix {
namespace {

// FNV-1a, 64 bits.
class Hash {
 public:
  void Add(const void* data, std::size_t bytes) {
    const auto* p = static_cast<const std::uint8_t*>(data);
    for (std::size_t i = 0; i < bytes; ++i) hash_ = (hash_ ^ p[i]) * 0x100000001B3u;
  }
  template <class Values>
  void Add(const Values& values) {
    Add(values.data(), values.size() * sizeof(values[0]));
  }
  std::uint64_t value() const { return hash_; }

 private:
  std::uint64_t hash_ = 0xCBF29CE484222325u;
};

// Numbers that no library version can change: a sum of four uniform ones, which is near normal.
class Numbers {
 public:
  explicit Numbers(std::uint64_t seed) : state_(seed) {}
  float Next() {
    float sum = 0.0f;
    for (int i = 0; i < 4; ++i) {
      state_ = state_ * 6364136223846793005u + 1442695040888963407u;
      sum += static_cast<float>(state_ >> 40) * 0x1p-24f - 0.5f;
    }
    return 1.75f * sum;
  }

 private:
  std::uint64_t state_;
};

// Rows with channels that have an offset, tokens that differ in size, and what needs care: zero
// rows, tiny rows, NaN and infinities.
std::vector<Half> Rows(std::size_t tokens, std::size_t heads, std::size_t dim, std::uint64_t seed) {
  Numbers numbers(seed);
  std::vector<Half> rows(tokens * heads * dim);
  for (std::size_t t = 0; t < tokens; ++t) {
    const float size = t % 37 == 5   ? 0x1p-20f
                       : t % 41 == 7 ? 0.0f
                                     : 1.0f + 0.5f * static_cast<float>(t % 5);
    for (std::size_t i = 0; i < heads * dim; ++i) {
      rows[t * heads * dim + i] =
          FloatToHalf(size * (numbers.Next() + (i % 16 == 3 ? 9.0f : 0.0f)));
    }
    if (t % 53 == 11) rows[t * heads * dim + t % (heads * dim)] = 0x7E00;
    if (t % 59 == 13) rows[t * heads * dim + t % (heads * dim)] = 0xFC00;
  }
  return rows;
}

std::vector<float> Queries(std::size_t n, std::uint64_t seed) {
  Numbers numbers(seed);
  std::vector<float> q(n);
  for (float& x : q) x = numbers.Next();
  return q;
}

constexpr std::array kNames = {"f16",           "i8-head",         "i8-token",
                               "i8-token-bf16", "i8-token+centre", "i8-token-bf16+centre",
                               "i8-head+centre"};

HeadCodec CodecNamed(std::string_view name, std::size_t dim) {
  HeadCodec codec{ParseCodecKind(name).value(), 0.0f, nullptr};
  if (codec.kind.scale == KVMIX_SCALE_HEAD) codec.head_scale = 0.0625f;
  if (!codec.kind.centre) return codec;
  CodecVectors vectors;
  for (std::size_t c = 0; c < dim; ++c) {
    vectors.mean.push_back(0.013f * static_cast<float>(c % 7) + (c % 16 == 3 ? 9.0f : 0.0f));
  }
  codec.vectors = std::make_shared<const CodecVectors>(std::move(vectors));
  return codec;
}

// Came later, and have hashes of their own.
constexpr std::array kI4Names = {"i4x16-token", "i4x16-token-bf16+centre",
                                 "i4x16-token-bf16+hadamard", "i4x16-token+centre+hadamard"};

// Every pair of some codecs as K and V of one KV head.
Plan MixedPlan(std::span<const char* const> names, std::size_t group, std::size_t dim) {
  Plan plan;
  plan.model = Geometry{1, names.size(), names.size() * group, dim};
  for (std::size_t h = 0; h < names.size(); ++h) {
    plan.codecs.push_back(CodecNamed(names[h], dim));
    plan.codecs.push_back(CodecNamed(names[(h * 3 + 1) % names.size()], dim));
  }
  return plan;
}

// In pieces: one token, some, many.
Cache Filled(const Plan& plan, std::size_t tokens, std::string_view target) {
  const Geometry g = plan.model.geometry().value();
  Cache cache = std::move(Cache::Create(plan, tokens, {.target = std::string(target)}).value());
  const std::vector<Half> k = Rows(tokens, g.kv_heads, g.head_dim, 1),
                          v = Rows(tokens, g.kv_heads, g.head_dim, 2);
  const RowsView all_k = RowsView::F16(k.data(), tokens, g.kv_heads, g.head_dim),
                 all_v = RowsView::F16(v.data(), tokens, g.kv_heads, g.head_dim);
  for (std::size_t t = 0, piece = 1; t < tokens; t += piece, piece = piece * 3 % 1000 + 1) {
    piece = std::min(piece, tokens - t);
    EXPECT_TRUE(cache.Append(0, all_k.Tokens(t, piece), all_v.Tokens(t, piece)).ok());
  }
  return cache;
}

std::uint64_t RowsHash(const Cache& cache) {
  const Geometry g = cache.model().geometry().value();
  const std::size_t tokens = cache.tokens(0);
  Hash hash;
  for (std::size_t h = 0; h < g.kv_heads; ++h) {
    for (const Tensor t : {KVMIX_K, KVMIX_V}) {
      std::vector<std::uint8_t> codes(tokens * cache.RowBytes(0, h, t));
      std::vector<float> scales(tokens);
      EXPECT_TRUE(cache.ExportRows(0, h, t, 0, tokens, codes.data(), scales.data()).ok());
      hash.Add(codes);
      hash.Add(scales);
    }
  }
  return hash.value();
}

std::uint64_t OutputHash(const Cache& cache, std::size_t queries, const AttendOptions& options) {
  const Geometry g = cache.model().geometry().value();
  const std::vector<float> q = Queries(queries * g.query_heads * g.head_dim, 3);
  std::vector<float> out(q.size());
  EXPECT_TRUE(Attend(cache, 0, RowsView::F32(q.data(), queries, g.query_heads, g.head_dim),
                     out.data(), options)
                  .ok());
  Hash hash;
  hash.Add(out);
  return hash.value();
}

// The codecs that the tuner chooses for the sample, with decode times that are given.
std::uint64_t SamplePlanHash(const std::string& target) {
  const tune::Dump dump = std::move(
      tune::Dump::Open(KVMIX_SOURCE_ROOT "/data/sample/qwen2.5-coder-1.5b.calibration.safetensors")
          .value());
  const tune::CandidateKinds candidates = tune::Candidates("int8").value();
  const Geometry g = dump.model().geometry().value();
  const tune::ErrorTable table =
      tune::Measure({&dump}, candidates, 0, g.layers, {2, target, {}}).value();
  tune::Wisdom wisdom;
  double ns = 1000.0;
  for (const char* k : {"f16", "i8-token-bf16", "i8-token"}) {
    for (const char* v : {"f16", "i8-token", "i8-token-bf16"}) {
      wisdom.speeds.push_back({k, v, g.group(), g.head_dim, g.head_dim, 4096, ns *= 0.93});
    }
  }
  tune::Constraints constraints;
  constraints.budget = 0.45;
  const tune::Choice choice = tune::Choose(table, wisdom, 4096, constraints).value();
  Hash hash;
  for (const HeadCodec& codec : choice.plan.codecs) {
    const std::string name = ToString(codec.kind);
    hash.Add(name.data(), name.size());
    hash.Add(&codec.head_scale, sizeof(float));
    hash.Add(codec.mean());
  }
  return hash.value();
}

struct Expected {
  std::uint64_t decode, prefill, options, plan;
};
constexpr std::uint64_t kRowsHash = 8626993407055650010u, kI4RowsHash = 7972970176493465098u;
const std::map<std::string_view, Expected> kExpected = {
    {"AVX3_DL", {0x66088166507D52BB, 0x739D8F7D18212733, 0x9E6493042DAB6F1A, 0x8D9122C27166CA2}},
    {"AVX3", {0xD6DFB35E614F321A, 0xB04EC8933882BC51, 0x849F7BA8276E22DD, 0x8D9122C27166CA2}},
    {"AVX2", {0xF5EBB39CEA673685, 0xD7AD389823AD7CBE, 0xFD832F12D2730B6, 0xCED5B27A473A6CC2}},
    {"SSE4", {0xD5923A7E4F21FAF4, 0xF95DEB99AC13535B, 0x698940793CA7802D, 0xCED5B27A473A6CC2}},
    {"SSE2", {0xD5923A7E4F21FAF4, 0xF95DEB99AC13535B, 0x698940793CA7802D, 0xCED5B27A473A6CC2}},
};

TEST(Bytes, AreThoseOfBefore) {
  for (const std::string_view target : Targets()) {
    SCOPED_TRACE(target);
    const Cache decode = Filled(MixedPlan(kNames, 7, 64), 5000, target),
                prefill = Filled(MixedPlan(kNames, 2, 80), 700, target);
    EXPECT_EQ(RowsHash(decode), kRowsHash);
    AttendOptions options;
    options.sliding_window = 300;
    options.soft_cap = 20.0f;
    const std::vector<float> sinks = Queries(prefill.model().geometry().value().query_heads, 4);
    options.sinks = sinks.data();
    const Expected found = {OutputHash(decode, 1, {}), OutputHash(prefill, 70, {}),
                            OutputHash(prefill, 70, options), SamplePlanHash(std::string(target))};
    const auto expected = kExpected.find(target == "AMX" ? "AVX3_DL" : target);
    if (expected == kExpected.end()) {
      std::printf("  no stored hashes of %s: outputs and plan are not compared\n", target.data());
      continue;
    }
    EXPECT_EQ(found.decode, expected->second.decode);
    EXPECT_EQ(found.prefill, expected->second.prefill);
    EXPECT_EQ(found.options, expected->second.options);
    EXPECT_EQ(found.plan, expected->second.plan);
  }
}

TEST(Bytes, OfFourBits) {
  for (const std::string_view target : Targets())
    EXPECT_EQ(RowsHash(Filled(MixedPlan(kI4Names, 1, 80), 700, target)), kI4RowsHash) << target;
}

}  // namespace
}  // namespace kvmix
