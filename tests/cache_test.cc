// The cache against the canonical form: what it stores, byte by byte, is what
// tests/reference/quantize.h makes of the rows, on every target and however the rows arrive; and
// what it refuses leaves it as it was.
#include "kvmix/cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "tests/attend_cases.h"
#include "tests/reference/quantize.h"

namespace kvmix::testing {
namespace {

constexpr Half kHalfInf = 0x7C00, kHalfNan = 0x7E01, kHalfMax = 0x7BFF, kHalfSign = 0x8000;
constexpr float kUntouched = -7.0f;

// Runs of heads of one kind, whose rows of one token are encoded together, between heads of other
// kinds; centred ones in both tensors.
const Names kRuns = {"i8-token+centre",
                     "i8-token+centre",
                     "i8-token+centre",
                     "i8-token",
                     "i8-token",
                     "i8-token-bf16",
                     "i8-token-bf16+centre",
                     "i8-token-bf16+centre",
                     "f16",
                     "f16",
                     "i8-head",
                     "i8-head",
                     "i8-head+centre",
                     "i8-head+centre"};

// One KV head's K or V in the canonical form.
struct Codes {
  std::vector<std::uint8_t> codes;  // [count, head_dim]
  std::vector<float> scales;        // [count], kUntouched where the codec stores none
  bool operator==(const Codes&) const = default;
};
using LayerCodes = std::vector<Codes>;  // [kv_heads][K, V]

std::size_t RowBytes(const Geometry& g, const HeadCodec& codec) {
  return g.head_dim * (codec.storage == Storage::kF16 ? 2 : 1);
}

LayerCodes Export(const Cache& cache, std::size_t layer, std::size_t first, std::size_t count) {
  LayerCodes all;
  const Geometry& g = cache.geometry();
  for (std::size_t i = 0; i < 2 * g.kv_heads; ++i) {
    const Tensor tensor = static_cast<Tensor>(i % 2);
    Codes c{
        std::vector<std::uint8_t>(count * RowBytes(g, cache.plan().codec(layer, i / 2, tensor))),
        std::vector<float>(count, kUntouched)};
    const Status s =
        cache.ExportRows(layer, i / 2, tensor, first, count, c.codes.data(), c.scales.data());
    EXPECT_TRUE(s.ok()) << s.message();
    all.push_back(std::move(c));
  }
  return all;
}

LayerCodes Export(const Cache& cache, std::size_t layer) {
  return Export(cache, layer, 0, cache.tokens(layer));
}

Status Import(Cache& cache, std::size_t layer, const LayerCodes& all) {
  std::vector<const void*> codes[2];
  std::vector<const float*> scales[2];
  for (std::size_t i = 0; i < all.size(); ++i) {
    codes[i % 2].push_back(all[i].codes.data());
    scales[i % 2].push_back(all[i].scales.data());
  }
  return cache.ImportRows(layer, all[0].scales.size(), codes[0].data(), scales[0].data(),
                          codes[1].data(), scales[1].data());
}

// What a cache has to hold after these rows, and how many of their values saturate.
LayerCodes Reference(const Plan& plan, const Rows& rows, std::uint64_t* saturated = nullptr) {
  const Geometry& g = plan.geometry;
  const std::size_t stride = g.kv_heads * g.head_dim;
  LayerCodes all;
  for (std::size_t i = 0; i < 2 * g.kv_heads; ++i) {
    const HeadCodec& codec = plan.codec(0, i / 2, static_cast<Tensor>(i % 2));
    const HalfRows head{(i % 2 == 0 ? rows.k : rows.v).data() + i / 2 * g.head_dim, stride,
                        rows.k.size() / stride, g.head_dim};
    Codes c{{}, std::vector<float>(head.tokens, kUntouched)};
    if (codec.storage == Storage::kF16) {
      for (std::size_t j = 0; j < head.tokens * g.head_dim; ++j) {
        const Half x =
            FloatToHalf(reference::FiniteFloat(head.row(j / g.head_dim)[j % g.head_dim]));
        c.codes.push_back(static_cast<std::uint8_t>(x & 0xFF));
        c.codes.push_back(static_cast<std::uint8_t>(x >> 8));
      }
    } else {
      const float* mean = codec.centred() ? codec.mean.data() : nullptr;
      const bool own = codec.scale == ScaleKind::kToken;
      const reference::Codes r = own ? reference::QuantizePerToken(head, mean, codec.scale_type)
                                     : reference::QuantizeGlobal(head, mean, codec.head_scale);
      for (const std::int8_t code : r.codes) c.codes.push_back(static_cast<std::uint8_t>(code));
      if (own) c.scales = r.scales;
      if (!own && saturated) *saturated += r.clamped;
    }
    all.push_back(std::move(c));
  }
  return all;
}

void ExpectSame(const LayerCodes& found, const LayerCodes& expected, const Plan& plan) {
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    const std::string what = std::string(i % 2 == 0 ? "K" : "V") + " of head " +
                             std::to_string(i / 2) + ", " +
                             CodecName(plan.codec(0, i / 2, static_cast<Tensor>(i % 2)));
    EXPECT_TRUE(found[i].codes == expected[i].codes) << what;
    EXPECT_TRUE(found[i].scales == expected[i].scales) << what;
  }
}

Cache Empty(const Plan& plan, std::size_t capacity) { return Filled(plan, {}, capacity); }

// Appends to one layer, `step` tokens at a time.
void AppendInSteps(Cache& cache, std::size_t layer, const Rows& rows, std::size_t step) {
  const std::size_t row = cache.geometry().kv_heads * cache.geometry().head_dim,
                    tokens = rows.k.size() / row;
  for (std::size_t t = 0; t < tokens; t += step) {
    const Status s =
        cache.Append(layer, &rows.k[t * row], &rows.v[t * row], std::min(step, tokens - t));
    ASSERT_TRUE(s.ok()) << s.message();
  }
}

std::vector<Half> RandomQueries(const Geometry& g, std::size_t queries, unsigned seed) {
  std::mt19937 rng(seed);
  return RandomHalves(rng, queries * g.query_heads * g.head_dim);
}

// NaN, infinities and the largest halves here and there.
void Damage(std::vector<Half>& x) {
  constexpr Half kBad[] = {kHalfNan, kHalfInf, kHalfInf | kHalfSign, kHalfMax,
                           kHalfNan | kHalfSign};
  for (std::size_t i = 5, n = 0; i < x.size(); i += 97, ++n) x[i] = kBad[n % 5];
}

void ExpectError(const Status& s, ErrorCode code, const std::vector<std::string>& parts) {
  EXPECT_EQ(s.code(), code) << s.message();
  EXPECT_EQ(s.message().find('\n'), std::string::npos) << s.message();
  for (const std::string& part : parts)
    EXPECT_NE(s.message().find(part), std::string::npos)
        << s.message() << " does not name " << part;
}

// ---- Create

TEST(CacheCreate, RefusesPlansThatAreInvalidOrOfAnotherModel) {
  const Geometry g{2, 2, 4, 16}, other{3, 2, 4, 16};
  const Plan good = UniformPlan(g, {}, {});
  Plan plan = good;
  plan.codecs.pop_back();
  ExpectError(Cache::Create(g, plan, 8).status(), ErrorCode::kInvalidArgument,
              {"expected 8", "found 7"});
  plan = good;
  plan.codec(1, 0, Tensor::kV) = {Storage::kI8, ScaleKind::kHead, ScaleType::kF32, 0.0f, {}};
  ExpectError(Cache::Create(g, plan, 8).status(), ErrorCode::kInvalidArgument,
              {"layer 1, KV head 0, V"});
  plan = good;
  plan.codec(0, 1, Tensor::kK).mean.assign(16, 1.0f);  // fp16 is not centred
  ExpectError(Cache::Create(g, plan, 8).status(), ErrorCode::kInvalidArgument,
              {"layer 0, KV head 1, K", "mean"});
  ExpectError(Cache::Create(other, good, 8).status(), ErrorCode::kMismatch,
              {ToString(g), ToString(other)});
}

TEST(CacheCreate, RefusesMoreThanThereIsMemory) {
  const Geometry g{28, 4, 28, 128};
  for (const std::size_t capacity :
       {std::size_t{1} << 40, std::size_t{1} << 55, std::numeric_limits<std::size_t>::max() / 2,
        std::numeric_limits<std::size_t>::max() - 1, std::numeric_limits<std::size_t>::max()}) {
    for (const char* codec : {"f16", "i8-token"}) {
      const HeadCodec c = MakeCodec(codec, g, {}, 0);
      ExpectError(Cache::Create(g, UniformPlan(g, c, c), capacity).status(),
                  ErrorCode::kOutOfMemory, {std::to_string(capacity), ToString(g), "GiB"});
    }
  }
}

TEST(CacheCreate, CapacityZeroHoldsNothing) {
  const Geometry g{1, 2, 4, 16};
  Cache cache = Empty(UniformPlan(g, {}, MakeCodec("i8-token", g, {}, 0)), 0);
  EXPECT_EQ(cache.capacity(), 0u);
  EXPECT_EQ(cache.bytes(), 0u);
  const Rows rows = RandomRows(g, 1, 1);
  EXPECT_TRUE(cache.Append(0, nullptr, nullptr, 0).ok());
  ExpectError(cache.Append(0, rows.k.data(), rows.v.data(), 1), ErrorCode::kOutOfMemory,
              {"0 of 0"});
  EXPECT_TRUE(cache.Truncate(0).ok());
  EXPECT_EQ(Attended(cache, 0, RandomQueries(g, 2, 2)),
            std::vector<float>(2 * g.query_heads * g.head_dim, 0.0f));
}

TEST(CacheCreate, BytesAreThePlansAndALittleMore) {
  for (const std::size_t head_dim : {64, 128}) {
    const Geometry g{3, static_cast<std::size_t>(kRuns.size()), kRuns.size(), head_dim};
    const Plan plan = MakePlan(g, RandomRows(g, 4, 3), kRuns, kRuns);
    ForAllTargets([&] {
      const double exact = 4096.0 * static_cast<double>(BytesPerToken(plan));
      const Cache cache = Empty(plan, 4096);
      EXPECT_GE(static_cast<double>(cache.bytes()), exact);
      EXPECT_LE(static_cast<double>(cache.bytes()), 1.01 * exact);
      EXPECT_EQ(Empty(plan, 4096 - 255).bytes(), cache.bytes());  // whole blocks of 256
      EXPECT_EQ(Empty(plan, 4096 - 256).bytes(), cache.bytes() / 16 * 15);
    });
  }
}

// ---- what is stored

// The reference's bytes on every target, whether the rows come one by one, some at a time or all at
// once.
void ExpectReferenceBytes(const Geometry& g, const Names& k, const Names& v, std::size_t tokens,
                          bool damaged) {
  Rows rows = RandomRows(g, tokens, static_cast<unsigned>(tokens + g.head_dim));
  const Plan plan = MakePlan(g, rows, k, v);
  if (damaged) Damage(rows.k);
  if (damaged) Damage(rows.v);
  std::uint64_t saturated = 0;
  const LayerCodes expected = Reference(plan, rows, &saturated);
  ForAllTargets([&] {
    for (const std::size_t step : {std::size_t{1}, std::size_t{3}, std::size_t{17}, tokens}) {
      SCOPED_TRACE(::testing::Message() << ToString(g) << ", " << step << " tokens at a time");
      Cache cache = Empty(plan, tokens);
      AppendInSteps(cache, 0, rows, step);
      ExpectSame(Export(cache, 0), expected, plan);
      EXPECT_EQ(cache.saturated(), saturated);
    }
  });
}

TEST(CacheStores, TheCanonicalBytesHoweverTheRowsCome) {
  Names reversed(kRuns.rbegin(), kRuns.rend());
  for (const std::size_t head_dim : {1, 33, 64, 128}) {
    for (const bool damaged : {false, true})
      ExpectReferenceBytes({1, kRuns.size(), kRuns.size(), head_dim}, kRuns, reversed, 300,
                           damaged);
  }
}

// More neighbours of a kind than are encoded at a time, each with a mean of its own.
TEST(CacheStores, ManyHeadsAlike) {
  for (const char* name :
       {"i8-token+centre", "i8-token-bf16+centre", "i8-token", "f16", "i8-head+centre"})
    ExpectReferenceBytes({1, 37, 37, 40}, {name}, {name}, 20, false);
}

TEST(CacheStores, ZeroForNanAndTheLargestHalfForInfinity) {
  const Geometry g{1, 1, 1, 4};
  const std::vector<Half> x{kHalfNan, kHalfInf, kHalfInf | kHalfSign, FloatToHalf(1.0f)};
  ForAllTargets([&] {
    for (const char* name :
         {"f16", "i8-token", "i8-token-bf16", "i8-head", "i8-token+centre", "i8-head+centre"}) {
      SCOPED_TRACE(name);
      HeadCodec codec = MakeCodec(name, g, {}, 0);
      if (codec.scale == ScaleKind::kHead) codec.head_scale = 65504.0f / 127.0f;
      Cache cache = Empty(UniformPlan(g, codec, codec), 1);
      ASSERT_TRUE(cache.Append(0, x.data(), x.data(), 1).ok());
      for (const Tensor tensor : {Tensor::kK, Tensor::kV}) {
        const std::vector<double> y = Decoded(cache, 0, tensor);
        EXPECT_EQ(y[0], 0.0);
        EXPECT_NEAR(y[1], 65504.0,
                    codec.scale_type == ScaleType::kBF16
                        ? 512.0
                        : 0.01);  // a bf16 scale is up to 2^-7 too large
        EXPECT_EQ(y[2], -y[1]);
        EXPECT_EQ(y[3], codec.storage == Storage::kF16 ? 1.0 : 0.0);
      }
    }
  });
}

TEST(CacheStores, RowsOfAnyAlignment) {
  const Geometry g{1, kRuns.size(), kRuns.size(), 48};
  const Rows rows = RandomRows(g, 40, 4);
  const Plan plan = MakePlan(g, rows, kRuns, kRuns);
  const LayerCodes expected = Reference(plan, rows);
  std::vector<std::uint8_t> k(rows.k.size() * 2 + 1), v(rows.v.size() * 2 + 1);
  std::memcpy(k.data() + 1, rows.k.data(), rows.k.size() * 2);
  std::memcpy(v.data() + 1, rows.v.data(), rows.v.size() * 2);
  ForAllTargets([&] {
    Cache cache = Empty(plan, 40);
    const std::size_t row_bytes = g.kv_heads * g.head_dim * 2;
    for (const std::size_t first : {0, 1, 2}) {  // two tokens one by one, the rest at once
      const std::size_t at = 1 + first * row_bytes;
      ASSERT_TRUE(cache
                      .Append(0, reinterpret_cast<const Half*>(k.data() + at),
                              reinterpret_cast<const Half*>(v.data() + at), first < 2 ? 1 : 38)
                      .ok());
    }
    ExpectSame(Export(cache, 0), expected, plan);
  });
}

TEST(CacheStores, SaturatedCountsSinceCreate) {
  const Geometry g{2, 1, 1, 8};
  const HeadCodec head{Storage::kI8, ScaleKind::kHead, ScaleType::kF32, 1.0f, {}};
  Cache cache = Empty(UniformPlan(g, head, head), 4);
  std::vector<Half> inside(8, FloatToHalf(127.0f)), beyond = inside;
  beyond[2] = FloatToHalf(128.0f);
  beyond[5] = kHalfInf;
  ASSERT_TRUE(cache.Append(0, inside.data(), inside.data(), 1).ok());
  EXPECT_EQ(cache.saturated(), 0u);
  ASSERT_TRUE(cache.Append(0, beyond.data(), inside.data(), 1).ok());
  EXPECT_EQ(cache.saturated(), 2u);
  ASSERT_TRUE(cache.Append(1, beyond.data(), beyond.data(), 1).ok());
  EXPECT_EQ(cache.saturated(), 6u);
  ASSERT_TRUE(cache.Truncate(0).ok());
  EXPECT_EQ(cache.saturated(), 6u);
  EXPECT_EQ(static_cast<std::int8_t>(Reference(cache.plan(), {beyond, beyond})[0].codes[5]), 127);
}

// ---- what is refused

TEST(CacheRefuses, ToGrowPastItsCapacity) {
  const Geometry g{2, kRuns.size(), kRuns.size(), 32};
  const Rows rows = RandomRows(g, 100, 5), more = RandomRows(g, 60, 6);
  const Plan plan = MakePlan(g, rows, kRuns, kRuns);
  const std::vector<Half> q = RandomQueries(g, 1, 7);
  ForAllTargets([&] {
    Cache cache = Filled(plan, rows, 150);
    const LayerCodes codes = Export(cache, 0);
    const std::vector<float> attended = Attended(cache, 0, q);
    const std::uint64_t saturated = cache.saturated();
    for (const std::size_t tokens :
         {std::size_t{51}, std::size_t{60}, std::numeric_limits<std::size_t>::max(),
          std::numeric_limits<std::size_t>::max() - 99}) {
      ExpectError(cache.Append(0, more.k.data(), more.v.data(), tokens), ErrorCode::kOutOfMemory,
                  {"100 of 150", std::to_string(tokens)});
    }
    ExpectError(cache.Append(2, more.k.data(), more.v.data(), 1), ErrorCode::kInvalidArgument,
                {"layer 2", "2 layers"});
    ExpectError(Import(cache, 0, Reference(plan, more)), ErrorCode::kOutOfMemory,
                {"100 of 150", "60"});
    ExpectError(Import(cache, 7, Reference(plan, more)), ErrorCode::kInvalidArgument, {"layer 7"});
    EXPECT_EQ(cache.tokens(0), 100u);
    EXPECT_EQ(cache.saturated(), saturated);
    ExpectSame(Export(cache, 0), codes, plan);
    EXPECT_EQ(Attended(cache, 0, q), attended);
    EXPECT_TRUE(cache.Append(0, more.k.data(), more.v.data(), 50).ok());  // to the brim
    EXPECT_EQ(cache.tokens(0), 150u);
    EXPECT_EQ(cache.tokens(1), 100u);
  });
}

TEST(CacheRefuses, ToTruncateToMoreThanALayerHolds) {
  const Geometry g{2, 1, 2, 16};
  const Rows rows = RandomRows(g, 20, 8);
  Cache cache = Empty(UniformPlan(g, {}, {}), 20);
  ASSERT_TRUE(cache.Append(0, rows.k.data(), rows.v.data(), 20).ok());
  ASSERT_TRUE(cache.Append(1, rows.k.data(), rows.v.data(), 10).ok());
  ExpectError(cache.Truncate(11), ErrorCode::kInvalidArgument, {"11", "layer 1 holds 10"});
  EXPECT_EQ(cache.tokens(0), 20u);
  EXPECT_EQ(cache.tokens(1), 10u);
  EXPECT_TRUE(cache.Truncate(10).ok());
  EXPECT_EQ(cache.tokens(0), 10u);
  EXPECT_EQ(cache.tokens(1), 10u);
}

TEST(CacheRefuses, ToExportWhatItDoesNotHold) {
  const Geometry g{1, 2, 2, 16};
  const Cache cache = Filled(MakePlan(g, RandomRows(g, 20, 9), {"i8-token"}, {"i8-token"}),
                             RandomRows(g, 20, 9), 64);
  std::vector<std::uint8_t> codes(64 * 16, 0xAA);
  std::vector<float> scales(64, kUntouched);
  const auto refused = [&](std::size_t layer, std::size_t head, std::size_t first,
                           std::size_t count) {
    const Status s =
        cache.ExportRows(layer, head, Tensor::kK, first, count, codes.data(), scales.data());
    ExpectError(s, ErrorCode::kInvalidArgument, {});
  };
  refused(1, 0, 0, 1);
  refused(0, 2, 0, 1);
  refused(0, 0, 0, 21);
  refused(0, 0, 20, 1);
  refused(0, 0, 21, 0);
  refused(0, 0, 5, std::numeric_limits<std::size_t>::max());
  refused(0, 0, std::numeric_limits<std::size_t>::max(), 2);
  EXPECT_TRUE(cache.ExportRows(0, 0, Tensor::kK, 20, 0, codes.data(), scales.data()).ok());
  EXPECT_EQ(codes, std::vector<std::uint8_t>(64 * 16, 0xAA));
  EXPECT_EQ(scales, std::vector<float>(64, kUntouched));
}

// ---- export, import, truncate

TEST(CacheRows, MoveFromAnyTargetToAnyOther) {
  const Geometry g{1, kRuns.size(), 2 * kRuns.size(), 64};
  const Rows rows = RandomRows(g, 300, 10);
  const Plan plan = MakePlan(g, rows, kRuns, {kRuns.rbegin(), kRuns.rend()});
  const std::vector<Half> q = RandomQueries(g, 3, 11);
  std::vector<LayerCodes> exported;
  ForAllTargets([&] { exported.push_back(Export(Filled(plan, rows, 300), 0)); });
  for (const LayerCodes& codes : exported) ExpectSame(codes, exported[0], plan);
  ForAllTargets([&] {
    const Cache direct = Filled(plan, rows, 300);
    const std::vector<float> expected = Attended(direct, 0, q);
    Cache whole = Empty(plan, 300), parts = Empty(plan, 300);
    ASSERT_TRUE(Import(whole, 0, exported[0]).ok());
    for (const std::size_t first : {0, 70, 290})
      ASSERT_TRUE(Import(parts, 0,
                         Export(direct, 0, first,
                                first == 0    ? 70
                                : first == 70 ? 220
                                              : 10))
                      .ok());
    for (const Cache* cache : {&whole, &parts}) {
      EXPECT_EQ(cache->tokens(0), 300u);
      ExpectSame(Export(*cache, 0), exported[0], plan);
      EXPECT_EQ(Attended(*cache, 0, q), expected);
    }
  });
}

// What truncated tokens leave behind is never read: not by attention, not as part of a block's
// scales, whatever they were.
TEST(CacheRows, AreForgottenOnceTruncated) {
  const Geometry g{1, kRuns.size(), kRuns.size(), 64};
  const Rows rows = RandomRows(g, 330, 12);
  const Plan plan = MakePlan(g, rows, kRuns, {kRuns.rbegin(), kRuns.rend()});
  const std::size_t row = g.kv_heads * g.head_dim;
  constexpr Half kHuge[] = {kHalfMax, kHalfMax | kHalfSign, kHalfNan, kHalfInf,
                            kHalfInf | kHalfSign};
  std::vector<Half> huge(500 * row);
  for (std::size_t i = 0; i < huge.size(); ++i) huge[i] = kHuge[i / 3 % 5];
  for (const std::size_t kept : {0, 1, 100, 255, 256, 320}) {
    for (const std::size_t added : {0, 1, 10}) {
      SCOPED_TRACE(::testing::Message() << kept << " tokens kept, " << added << " added");
      const std::size_t tokens = kept + added;
      const auto last = static_cast<std::ptrdiff_t>(tokens * row);
      const Rows seen{{rows.k.begin(), rows.k.begin() + last},
                      {rows.v.begin(), rows.v.begin() + last}};
      const std::vector<Half> q = RandomQueries(g, 2, 13);
      ForAllTargets([&] {
        Cache cache = Empty(plan, 900);
        ASSERT_TRUE(cache.Append(0, rows.k.data(), rows.v.data(), kept).ok());
        ASSERT_TRUE(cache.Append(0, huge.data(), huge.data(), 500).ok());
        ASSERT_TRUE(cache.Truncate(kept).ok());
        ASSERT_TRUE(cache.Append(0, &rows.k[kept * row], &rows.v[kept * row], added).ok());
        const Cache fresh = Filled(plan, seen, 900);
        ExpectSame(Export(cache, 0), Export(fresh, 0), plan);
        EXPECT_EQ(Attended(cache, 0, q), Attended(fresh, 0, q));
      });
    }
  }
}

}  // namespace
}  // namespace kvmix::testing
