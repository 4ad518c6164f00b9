// The cache against the canonical form: what it stores, byte by byte, is what
// tests/reference/quantize.h makes of the rows, on every target and however the rows arrive: of any
// type, with any strides, in one call or in parts on many threads. And what it refuses leaves it as
// it was.
#include "kvmix/cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tests/cache_rows.h"
#include "tests/reference/quantize.h"
#include "tests/runners.h"

namespace kvmix::testing {
namespace {

constexpr Half kHalfInf = 0x7C00, kHalfNan = 0x7E01, kHalfMax = 0x7BFF, kHalfSign = 0x8000;

// Runs of heads of one kind, whose rows of one token are encoded together, between heads of other
// kinds; with every step in both tensors.
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
                     "i8-head+centre",
                     "i8-token+hadamard",
                     "i8-token+hadamard",
                     "i8-token-bf16+fold",
                     "i8-token+centre+fold",
                     "i8-token+centre+fold",
                     "i8-token-bf16+centre+fold+hadamard",
                     "i8-token-bf16+centre+fold+hadamard",
                     "i8-head+fold+hadamard",
                     "i8-head+centre+hadamard",
                     "i4-token",
                     "i4-token",
                     "i4-token-bf16+centre+fold+hadamard",
                     "i4-token-bf16+centre+fold+hadamard"};

// Every kind that exists.
Names AllKinds() {
  Names names{"f16"};
  for (const Scale scale : {KVMIX_SCALE_HEAD, KVMIX_SCALE_TOKEN, KVMIX_SCALE_TOKEN_BF16}) {
    for (unsigned steps = 0; steps < 8; ++steps) {
      for (const Storage storage : {KVMIX_STORAGE_I8, KVMIX_STORAGE_I4}) {
        if (storage == KVMIX_STORAGE_I4 && scale == KVMIX_SCALE_HEAD) continue;
        names.push_back(
            ToString({storage, scale, (steps & 1) != 0, (steps & 2) != 0, (steps & 4) != 0}));
      }
    }
  }
  return names;
}

using LayerCodes = LayerRows;

// What a cache has to hold after these rows, and how many of their values saturate.
LayerCodes Reference(const Plan& plan, const RowsView& k, const RowsView& v,
                     std::uint64_t* saturated = nullptr) {
  LayerCodes all;
  for (std::size_t i = 0; i < 2 * GeometryOf(plan.model).kv_heads; ++i) {
    const HeadCodec& codec = plan.codec(0, i / 2, static_cast<Tensor>(i % 2));
    const RowsView& rows = i % 2 == 0 ? k : v;
    reference::Coded r = reference::Encode(rows.tokens != 0 ? rows.Head(i / 2) : rows, codec);
    if (r.scales.empty()) r.scales.assign(rows.tokens, kUntouched);
    all.push_back({std::move(r.rows), std::move(r.scales)});
    if (saturated != nullptr) *saturated += r.clamped;
  }
  return all;
}

LayerCodes Reference(const Plan& plan, const Rows& rows, std::uint64_t* saturated = nullptr) {
  return Reference(plan, KvView(GeometryOf(plan.model), rows.k),
                   KvView(GeometryOf(plan.model), rows.v), saturated);
}

void ExpectSame(const LayerCodes& found, const LayerCodes& expected, const Plan& plan) {
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    const std::string what = std::string(i % 2 == 0 ? "K" : "V") + " of head " +
                             std::to_string(i / 2) + ", " +
                             ToString(plan.codec(0, i / 2, static_cast<Tensor>(i % 2)).kind);
    EXPECT_TRUE(found[i].codes == expected[i].codes) << what;
    EXPECT_TRUE(found[i].scales == expected[i].scales) << what;
  }
}

Cache Empty(const Plan& plan, std::size_t capacity, std::string_view target = {}) {
  return Filled(plan, {}, capacity, target);
}

// Appends to one layer, `step` tokens at a time.
void AppendInSteps(Cache& cache, std::size_t layer, const Rows& rows, std::size_t step) {
  const std::size_t tokens = KvView(GeometryOf(cache.model()), rows.k).tokens;
  for (std::size_t t = 0; t < tokens; t += step) {
    const Status s = AppendTokens(cache, layer, rows, t, std::min(step, tokens - t));
    ASSERT_TRUE(s.ok()) << s.message();
  }
}

// NaN, infinities and the largest halves here and there.
void Damage(std::vector<Half>& x) {
  constexpr Half kBad[] = {kHalfNan, kHalfInf, kHalfInf | kHalfSign, kHalfMax,
                           kHalfNan | kHalfSign};
  for (std::size_t i = 5, n = 0; i < x.size(); i += 97, ++n) x[i] = kBad[n % 5];
}

// ---- Create

TEST(CacheCreate, RefusesPlansThatAreInvalidOrOfAnotherModel) {
  const Geometry g{2, 2, 4, 16};
  const Plan good = UniformPlan(g, {}, {});
  Plan plan = good;
  plan.codecs.pop_back();
  ExpectError(Cache::Create(plan, 8).status(), ErrorCode::kInvalidArgument,
              {"expected 8", "found 7"});
  plan = good;
  plan.codec(1, 0, KVMIX_V) = {{KVMIX_STORAGE_I8, KVMIX_SCALE_HEAD}};  // without its scale
  ExpectError(Cache::Create(plan, 8).status(), ErrorCode::kInvalidArgument,
              {"layer 1, KV head 0, V"});
  plan = good;
  plan.codec(0, 1, KVMIX_K).vectors = std::make_shared<const CodecVectors>(
      CodecVectors{std::vector<float>(16, 1.0f), {}});  // fp16 is not centred
  ExpectError(Cache::Create(plan, 8).status(), ErrorCode::kInvalidArgument,
              {"layer 0, KV head 1, K", "mean"});
}

TEST(CacheCreate, ForATargetByItsName) {
  const Geometry g{1, 2, 4, 16};
  const Plan plan = UniformPlan(g, {}, {});
  std::vector<std::string> names;
  for (const std::string_view target : Targets()) {
    EXPECT_EQ(Empty(plan, 8, target).target(), target);
    names.emplace_back(target);
  }
  EXPECT_EQ(Empty(plan, 8).target(), Targets().front());
  for (const std::string unknown : {"AVX9", "avx2", "AVX2 "}) {
    std::vector<std::string> parts = names;
    parts.push_back("\"" + unknown + "\"");
    ExpectError(Cache::Create(plan, 8, {.target = unknown}).status(), ErrorCode::kInvalidArgument,
                parts);
  }
}

TEST(CacheCreate, RefusesMoreThanThereIsMemory) {
  const Geometry g{28, 4, 28, 128};
  for (const std::size_t capacity :
       {std::size_t{1} << 40, std::size_t{1} << 55, std::numeric_limits<std::size_t>::max() / 2,
        std::numeric_limits<std::size_t>::max() - 1, std::numeric_limits<std::size_t>::max()}) {
    for (const char* codec : {"f16", "i8-token"}) {
      const HeadCodec c = MakeCodec(codec, g, {}, 0);
      ExpectError(Cache::Create(UniformPlan(g, c, c), capacity).status(), ErrorCode::kOutOfMemory,
                  {std::to_string(capacity), ToString(g), "GiB"});
    }
  }
}

TEST(CacheCreate, CapacityZeroHoldsNothing) {
  const Geometry g{1, 2, 4, 16};
  Cache cache = Empty(UniformPlan(g, {}, MakeCodec("i8-token", g, {}, 0)), 0);
  EXPECT_EQ(cache.capacity(), 0u);
  EXPECT_EQ(cache.bytes(), 0u);
  const Rows rows = RandomRows(g, 1, 1);
  const RowsView nothing = RowsView::F16(nullptr, 0, g.kv_heads, g.head_dim);
  EXPECT_TRUE(cache.Append(0, nothing, nothing).ok());
  ExpectError(AppendTokens(cache, 0, rows, 0, 1), ErrorCode::kPastCapacity, {"0 of 0"});
  EXPECT_TRUE(cache.Truncate(0).ok());
  EXPECT_EQ(Attended(cache, 0, RandomQueries(g, 2, 2)),
            std::vector<float>(2 * g.query_heads * g.head_dim, 0.0f));
}

TEST(CacheCreate, BytesAreThePlansAndALittleMore) {
  for (const std::size_t head_dim : {64, 128}) {
    const Geometry g{3, static_cast<std::size_t>(kRuns.size()), kRuns.size(), head_dim};
    const Plan plan = MakePlan(g, RandomRows(g, 4, 3), kRuns, kRuns);
    ForAllTargets([&](std::string_view target) {
      const double exact = 4096.0 * static_cast<double>(BytesPerToken(plan));
      const Cache cache = Filled(plan, RandomRows(g, 4096, 3), 4096, target);
      EXPECT_GE(static_cast<double>(cache.bytes()), exact);
      EXPECT_LE(static_cast<double>(cache.bytes()), 1.01 * exact);
      const Rows some = RandomRows(g, 512, 3);  // one block a page: whole blocks of 256
      EXPECT_EQ(Filled(plan, RandomRows(g, 257, 3), 4096, target).bytes(),
                Filled(plan, some, 4096, target).bytes());
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
  ForAllTargets([&](std::string_view target) {
    for (const std::size_t step : {std::size_t{1}, std::size_t{3}, std::size_t{17}, tokens}) {
      SCOPED_TRACE(::testing::Message() << ToString(g) << ", " << step << " tokens at a time");
      Cache cache = Empty(plan, tokens, target);
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
  for (const char* name : {"i8-token+centre", "i8-token-bf16+centre", "i8-token", "f16",
                           "i8-head+centre", "i8-token-bf16+fold+hadamard", "i4-token-bf16+centre"})
    ExpectReferenceBytes({1, 37, 37, 40}, {name}, {name}, 20, false);
}

// One head of every kind, next to each other.
TEST(CacheStores, EveryKindThereIs) {
  const Names kinds = AllKinds();
  ASSERT_EQ(kinds.size(), 41u);
  Names others = kinds;
  std::rotate(others.begin(), others.begin() + 7, others.end());
  for (const std::size_t head_dim : {32, 48}) {
    for (const bool damaged : {false, true})
      ExpectReferenceBytes({1, kinds.size(), kinds.size(), head_dim}, kinds, others, 300, damaged);
  }
}

TEST(CacheStores, ZeroForNanAndTheLargestHalfForInfinity) {
  const Geometry g{1, 1, 1, 4};
  const std::vector<Half> x{kHalfNan, kHalfInf, kHalfInf | kHalfSign, FloatToHalf(1.0f)};
  ForAllTargets([&](std::string_view target) {
    for (const char* name :
         {"f16", "i8-token", "i8-token-bf16", "i8-head", "i8-token+centre", "i8-head+centre"}) {
      SCOPED_TRACE(name);
      HeadCodec codec = MakeCodec(name, g, {}, 0);
      if (codec.kind.scale == KVMIX_SCALE_HEAD) codec.head_scale = 65504.0f / 127.0f;
      Cache cache = Empty(UniformPlan(g, codec, codec), 1, target);
      ASSERT_TRUE(AppendTokens(cache, 0, {x, x}, 0, 1).ok());
      for (const Tensor tensor : {KVMIX_K, KVMIX_V}) {
        const std::vector<double> y = Decoded(cache, 0, tensor);
        EXPECT_EQ(y[0], 0.0);
        EXPECT_NEAR(y[1], 65504.0,
                    codec.kind.scale == KVMIX_SCALE_TOKEN_BF16
                        ? 512.0
                        : 0.01);  // a bf16 scale is up to 2^-7 too large
        EXPECT_EQ(y[2], -y[1]);
        EXPECT_EQ(y[3], codec.kind.storage == KVMIX_STORAGE_F16 ? 1.0 : 0.0);
      }
    }
  });
}

TEST(CacheStores, RowsOfAnyAlignment) {
  const Geometry g{1, kRuns.size(), kRuns.size(), 48};
  const Rows rows = RandomRows(g, 40, 4);
  const Plan plan = MakePlan(g, rows, kRuns, kRuns);
  const LayerCodes expected = Reference(plan, rows);
  // At odd multiples of an element's size, whatever the vectors themselves are aligned to.
  std::vector<Half> k(rows.k.size() + 32), v(rows.v.size() + 32);
  const auto moved = [](const std::vector<Half>& x, std::vector<Half>* storage) {
    const std::size_t at = reinterpret_cast<std::uintptr_t>(storage->data()) / 2 % 2 == 0 ? 17 : 18;
    std::ranges::copy(x, storage->begin() + static_cast<std::ptrdiff_t>(at));
    return storage->data() + at;
  };
  const RowsView all_k = RowsView::F16(moved(rows.k, &k), 40, g.kv_heads, g.head_dim),
                 all_v = RowsView::F16(moved(rows.v, &v), 40, g.kv_heads, g.head_dim);
  ASSERT_EQ(reinterpret_cast<std::uintptr_t>(all_k.data) % 4, 2u);
  ForAllTargets([&](std::string_view target) {
    Cache cache = Empty(plan, 40, target);
    for (const std::size_t first : {0, 1, 2}) {  // two tokens one by one, the rest at once
      const std::size_t count = first < 2 ? 1 : 38;
      ASSERT_TRUE(cache.Append(0, all_k.Tokens(first, count), all_v.Tokens(first, count)).ok());
    }
    ExpectSame(Export(cache, 0), expected, plan);
  });
}

// Numbers that f16 and bf16 have both: the same bytes, whatever type they come in and wherever the
// rows lie; Hugging Face's order is heads first.
TEST(CacheStores, RowsOfAnyTypeAndStride) {
  const Geometry g{1, kRuns.size(), kRuns.size(), 40};
  Rows rows = RandomRows(g, 300, 30);
  for (std::vector<Half>* x : {&rows.k, &rows.v}) {
    for (Half& h : *x)
      h = FloatToHalf(std::clamp(std::round(8.0f * HalfToFloat(h)), -256.0f, 256.0f));
    for (std::size_t i = 3; i < x->size(); i += 101) (*x)[i] = kHalfNan;
    for (std::size_t i = 7; i < x->size(); i += 211)
      (*x)[i] = static_cast<Half>(kHalfInf | (i % 2 != 0 ? kHalfSign : 0));
  }
  const Plan plan = MakePlan(g, RandomRows(g, 300, 30), kRuns, {kRuns.rbegin(), kRuns.rend()});
  std::uint64_t saturated = 0;
  const LayerCodes expected = Reference(plan, rows, &saturated);
  for (const Dtype dtype : {KVMIX_F16, KVMIX_BF16, KVMIX_F32}) {
    for (const bool heads_first : {false, true}) {
      for (const bool backwards : {false, true}) {
        const std::size_t gap = backwards ? 5 : 0;
        const Placed k = Place(KvView(g, rows.k), dtype, heads_first, backwards, gap),
                     v = Place(KvView(g, rows.v), dtype, heads_first, backwards, gap);
        SCOPED_TRACE(::testing::Message()
                     << "type " << static_cast<int>(dtype) << (heads_first ? ", heads first" : "")
                     << (backwards ? ", backwards" : ""));
        ForAllTargets([&](std::string_view target) {
          Cache all = Empty(plan, 300, target), parts = Empty(plan, 300, target);
          ASSERT_TRUE(all.Append(0, k.view, v.view).ok());
          ExpectSame(Export(all, 0), expected, plan);
          EXPECT_EQ(all.saturated(), saturated);
          for (std::size_t t = 0, n = 1; t < 300;
               t += n, n = std::min<std::size_t>(7 * n, 300 - t)) {
            ASSERT_TRUE(parts.Append(0, k.view.Tokens(t, n), v.view.Tokens(t, n)).ok());
          }
          ExpectSame(Export(parts, 0), expected, plan);
        });
      }
    }
  }
}

// K as f32 heads first, V as bf16 in C order.
TEST(CacheStores, KAndVOfDifferentTypes) {
  const Geometry g{1, 2, 2, 24};
  Rows rows = RandomRows(g, 20, 31);
  for (std::vector<Half>* x : {&rows.k, &rows.v}) {
    for (Half& h : *x) h = FloatToHalf(std::round(8.0f * HalfToFloat(h)));
  }
  const Plan plan = MakePlan(g, rows, {"i8-token", "f16"}, {"i8-token-bf16", "i8-head"});
  const Placed k = Place(KvView(g, rows.k), KVMIX_F32, true, false, 0),
               v = Place(KvView(g, rows.v), KVMIX_BF16, false, false, 3);
  Cache cache = Empty(plan, 20);
  ASSERT_TRUE(cache.Append(0, k.view, v.view).ok());
  ExpectSame(Export(cache, 0), Reference(plan, rows), plan);
}

// f32 numbers that no half has are not rounded to halves first; what lies beyond the halves is kept
// by int8 and cut by f16.
TEST(CacheStores, NumbersThatNoHalfHas) {
  const Geometry g{1, kRuns.size(), kRuns.size(), 32};
  const Plan plan = MakePlan(g, RandomRows(g, 40, 32), kRuns, {kRuns.rbegin(), kRuns.rend()});
  std::mt19937 rng(33);
  std::normal_distribution<float> normal;
  std::vector<float> k(40 * kRuns.size() * 32), v(k.size());
  for (std::vector<float>* x : {&k, &v}) {
    for (std::size_t i = 0; i < x->size(); ++i) {
      (*x)[i] = normal(rng) * (i / (kRuns.size() * 32) % 5 == 4 ? 1e9f : 1.0f);
    }
  }
  std::uint64_t saturated = 0;
  const LayerCodes expected = Reference(plan, KvView(g, k), KvView(g, v), &saturated);
  EXPECT_GT(saturated, 0u);
  ForAllTargets([&](std::string_view target) {
    Cache cache = Empty(plan, 40, target);
    ASSERT_TRUE(cache.Append(0, KvView(g, k), KvView(g, v)).ok());
    ExpectSame(Export(cache, 0), expected, plan);
    EXPECT_EQ(cache.saturated(), saturated);
  });
}

TEST(CacheStores, SaturatedCountsSinceCreate) {
  const Geometry g{2, 1, 1, 8};
  const HeadCodec head{{KVMIX_STORAGE_I8, KVMIX_SCALE_HEAD}, 1.0f, nullptr};
  Cache cache = Empty(UniformPlan(g, head, head), 4);
  std::vector<Half> inside(8, FloatToHalf(127.0f)), beyond = inside;
  beyond[2] = FloatToHalf(128.0f);
  beyond[5] = kHalfInf;
  ASSERT_TRUE(AppendTokens(cache, 0, {inside, inside}, 0, 1).ok());
  EXPECT_EQ(cache.saturated(), 0u);
  ASSERT_TRUE(AppendTokens(cache, 0, {beyond, inside}, 0, 1).ok());
  EXPECT_EQ(cache.saturated(), 2u);
  ASSERT_TRUE(AppendTokens(cache, 1, {beyond, beyond}, 0, 1).ok());
  EXPECT_EQ(cache.saturated(), 6u);
  ASSERT_TRUE(cache.Truncate(0).ok());
  EXPECT_EQ(cache.saturated(), 6u);
  EXPECT_EQ(static_cast<std::int8_t>(Reference(cache.plan(), {beyond, beyond})[0].codes[5]), 127);
}

// ---- in parts, on threads

// A prompt that begins inside a block and goes through many; what the reference makes of it.
struct Prompt {
  Geometry g{1, kRuns.size(), kRuns.size(), 32};
  Rows rows = RandomRows(g, 2200, 34);
  Plan plan = MakePlan(g, rows, kRuns, {kRuns.rbegin(), kRuns.rend()});
  std::size_t held = 100;  // tokens that the cache has already
  std::uint64_t saturated = 0;
  LayerCodes expected = Reference(plan, rows, &saturated);

  Cache Start(std::string_view target = {}) const {
    Cache cache = Empty(plan, 2200, target);
    EXPECT_TRUE(AppendTokens(cache, 0, rows, 0, held).ok());
    return cache;
  }
  RowsView k() const { return KvView(g, rows.k).Tokens(held, 2200 - held); }
  RowsView v() const { return KvView(g, rows.v).Tokens(held, 2200 - held); }
  void ExpectWhole(const Cache& cache) const {
    EXPECT_EQ(cache.tokens(0), 2200u);
    EXPECT_EQ(cache.saturated(), saturated);
    ExpectSame(Export(cache, 0), expected, plan);
  }
};

TEST(CacheAppend, AnyNumberOfThreadsGivesTheSameBytes) {
  const Prompt prompt;
  for (const int threads : {1, 2, 3, 7, 0}) {
    SCOPED_TRACE(threads);
    Cache cache = prompt.Start();
    ASSERT_TRUE(cache.Append(0, prompt.k(), prompt.v(), threads).ok());
    prompt.ExpectWhole(cache);
  }
  ForAllTargets([&](std::string_view target) {
    Cache cache = prompt.Start(target);
    ASSERT_TRUE(cache.Append(0, prompt.k(), prompt.v(), 2).ok());
    prompt.ExpectWhole(cache);
  });
}

TEST(CacheAppend, PartsInAnyOrderAndTokensAfterTheLast) {
  const Prompt prompt;
  for (unsigned seed = 0; seed < 3; ++seed) {
    Cache cache = prompt.Start();
    OrderRunner runner(seed);
    runner.before = [&] { EXPECT_EQ(cache.tokens(0), prompt.held); };
    ASSERT_TRUE(cache.Append(0, prompt.k(), prompt.v(), runner).ok());
    ASSERT_GT(runner.parts, prompt.g.kv_heads);
    prompt.ExpectWhole(cache);
  }
}

TEST(CacheAppend, PartsOnThreadsOfAnEngine) {
  const Prompt prompt;
  for (const std::size_t threads : {2, 5}) {
    Cache cache = prompt.Start();
    ASSERT_TRUE(cache.Append(0, prompt.k(), prompt.v(), EngineThreads(threads)).ok());
    prompt.ExpectWhole(cache);
  }
}

// Prompts of all sizes one after the other, from none to many blocks, which end inside blocks and
// on their borders.
TEST(CacheAppend, PartsOfAllSizes) {
  const Prompt prompt;
  const RowsView k = KvView(prompt.g, prompt.rows.k), v = KvView(prompt.g, prompt.rows.v);
  ForAllTargets([&](std::string_view target) {
    Cache cache = Empty(prompt.plan, 2200, target);
    OrderRunner runner(36);
    for (const std::size_t tokens : {1, 0, 200, 55, 256, 2, 254, 700, 1, 0, 731}) {
      const std::size_t held = cache.tokens(0);
      ASSERT_TRUE(cache.Append(0, k.Tokens(held, tokens), v.Tokens(held, tokens), runner).ok());
      EXPECT_EQ(cache.tokens(0), held + tokens);
    }
    prompt.ExpectWhole(cache);
  });
}

TEST(CacheAppend, RefusedCallsRunNoParts) {
  const Prompt prompt;
  Cache cache = prompt.Start();
  const std::uint64_t saturated = cache.saturated();
  OrderRunner runner;
  runner.before = [] { ADD_FAILURE(); };
  const auto append = [&](std::size_t layer, const RowsView& k, const RowsView& v) {
    return cache.Append(layer, k, v, runner);
  };
  ExpectError(append(1, prompt.k(), prompt.v()), ErrorCode::kInvalidArgument,
              {"layer 1", "1 layers"});
  const RowsView all = KvView(prompt.g, prompt.rows.k);
  ExpectError(append(0, all, all), ErrorCode::kPastCapacity, {"100 of 2200", "2200 more"});
  ExpectError(append(0, prompt.k(), prompt.v().Tokens(0, 2099)), ErrorCode::kMismatch,
              {"V", "2100", "2099"});
  EXPECT_EQ(cache.tokens(0), prompt.held);
  EXPECT_EQ(cache.saturated(), saturated);
}

// ---- what is refused

TEST(CacheRefuses, ToGrowPastItsCapacity) {
  const Geometry g{2, kRuns.size(), kRuns.size(), 32};
  const Rows rows = RandomRows(g, 100, 5), more = RandomRows(g, 60, 6);
  const Plan plan = MakePlan(g, rows, kRuns, kRuns);
  const std::vector<Half> q = RandomQueries(g, 1, 7);
  ForAllTargets([&](std::string_view target) {
    Cache cache = Filled(plan, rows, 150, target);
    const LayerCodes codes = Export(cache, 0);
    const std::vector<float> attended = Attended(cache, 0, q);
    const std::uint64_t saturated = cache.saturated();
    for (const std::size_t tokens :
         {std::size_t{51}, std::size_t{60}, std::size_t{1} << 40, std::size_t{1} << 50}) {
      for (const int threads : {1, 2}) {
        ExpectError(
            cache.Append(0, RowsView::F16(more.k.data(), tokens, g.kv_heads, g.head_dim),
                         RowsView::F16(more.v.data(), tokens, g.kv_heads, g.head_dim), threads),
            ErrorCode::kPastCapacity, {"100 of 150", std::to_string(tokens)});
      }
    }
    ExpectError(AppendTokens(cache, 2, more, 0, 1), ErrorCode::kInvalidArgument,
                {"layer 2", "2 layers"});
    ExpectError(Import(cache, 0, Reference(plan, more)), ErrorCode::kPastCapacity,
                {"100 of 150", "60"});
    ExpectError(Import(cache, 7, Reference(plan, more)), ErrorCode::kInvalidArgument, {"layer 7"});
    EXPECT_EQ(cache.tokens(0), 100u);
    EXPECT_EQ(cache.saturated(), saturated);
    ExpectSame(Export(cache, 0), codes, plan);
    EXPECT_EQ(Attended(cache, 0, q), attended);
    EXPECT_TRUE(AppendTokens(cache, 0, more, 0, 50).ok());  // to the brim
    EXPECT_EQ(cache.tokens(0), 150u);
    EXPECT_EQ(cache.tokens(1), 100u);
  });
}

TEST(CacheRefuses, RowsOfAnotherShape) {
  const Geometry g{1, 2, 4, 16};
  const std::vector<Half> x(1000);
  Cache cache = Empty(UniformPlan(g, {}, {}), 20);
  const RowsView good = RowsView::F16(x.data(), 3, 2, 16);
  const auto refused = [&](const RowsView& k, const RowsView& v,
                           const std::vector<std::string>& parts) {
    ExpectError(cache.Append(0, k, v), ErrorCode::kMismatch, parts);
    EXPECT_EQ(cache.tokens(0), 0u);
  };
  refused(RowsView::F16(x.data(), 3, 4, 16), good, {"K", "2 heads x 16", "4 x 16"});
  refused(good, RowsView::F16(x.data(), 3, 1, 16), {"V", "2 heads x 16", "1 x 16"});
  refused(RowsView::F16(x.data(), 3, 2, 8), good, {"K", "2 heads x 16", "2 x 8"});
  refused(good, RowsView::F16(x.data(), 3, 2, 17), {"V", "2 heads x 16", "2 x 17"});
  refused(good, good.Tokens(0, 2), {"V", "3 tokens", "2"});
  refused(RowsView(), good, {"K", "0 x 0"});
  ExpectError(cache.Append(0, good, good, -1), ErrorCode::kInvalidArgument, {"num_threads", "-1"});
  EXPECT_EQ(cache.tokens(0), 0u);
  EXPECT_TRUE(cache.Append(0, good, good).ok());
}

TEST(CacheRefuses, ToTruncateToMoreThanALayerHolds) {
  const Geometry g{2, 1, 2, 16};
  const Rows rows = RandomRows(g, 20, 8);
  Cache cache = Empty(UniformPlan(g, {}, {}), 20);
  ASSERT_TRUE(AppendTokens(cache, 0, rows, 0, 20).ok());
  ASSERT_TRUE(AppendTokens(cache, 1, rows, 0, 10).ok());
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
        cache.ExportRows(layer, head, KVMIX_K, first, count, codes.data(), scales.data());
    ExpectError(s, ErrorCode::kInvalidArgument, {});
  };
  refused(1, 0, 0, 1);
  refused(0, 2, 0, 1);
  refused(0, 0, 0, 21);
  refused(0, 0, 20, 1);
  refused(0, 0, 21, 0);
  refused(0, 0, 5, std::numeric_limits<std::size_t>::max());
  refused(0, 0, std::numeric_limits<std::size_t>::max(), 2);
  EXPECT_TRUE(cache.ExportRows(0, 0, KVMIX_K, 20, 0, codes.data(), scales.data()).ok());
  const auto undecoded = [&](std::size_t layer, std::size_t first, std::size_t count,
                             const std::vector<std::string>& words) {
    ExpectError(cache.Decode(layer, KVMIX_V, first, count, scales.data()),
                ErrorCode::kInvalidArgument, words);
  };
  undecoded(1, 0, 1, {"layer 1"});
  undecoded(0, 19, 2, {"19 + 2", "0 to 20"});
  undecoded(0, std::numeric_limits<std::size_t>::max(), 2, {"0 to 20"});
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
  ForAllTargets([&](std::string_view target) {
    exported.push_back(Export(Filled(plan, rows, 300, target), 0));
  });
  for (const LayerCodes& codes : exported) ExpectSame(codes, exported[0], plan);
  ForAllTargets([&](std::string_view target) {
    const Cache direct = Filled(plan, rows, 300, target);
    const std::vector<float> expected = Attended(direct, 0, q);
    Cache whole = Empty(plan, 300, target), parts = Empty(plan, 300, target);
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

// What a RowCodec makes of the exported rows, and the first tokens as they came where they are kept
// exact.
TEST(CacheRows, DecodeToWhatAttentionSees) {
  const Geometry g{2, kRuns.size(), kRuns.size(), 80};
  const Rows rows = RandomRows(g, 300, 17);
  for (const std::size_t exact : {0, 4}) {
    Plan plan = MakePlan(g, rows, kRuns, {kRuns.rbegin(), kRuns.rend()});
    plan.exact_first = exact;
    ForAllTargets([&](std::string_view target) {
      const Cache cache = Filled(plan, rows, 300, target);
      for (const Tensor tensor : {KVMIX_K, KVMIX_V}) {
        const RowsView given = KvView(g, tensor == KVMIX_K ? rows.k : rows.v);
        for (const auto& [first, count] :
             {std::pair<std::size_t, std::size_t>{0, 300}, {2, 5}, {3, 1}, {250, 50}, {300, 0}}) {
          std::vector<float> found(count * g.kv_heads * g.head_dim + 1, kUntouched);
          ASSERT_TRUE(cache.Decode(1, tensor, first, count, found.data()).ok());
          EXPECT_EQ(found.back(), kUntouched);
          const LayerRows codes = Export(cache, 1, first, count);
          std::vector<float> expected(count * g.head_dim);
          for (std::size_t h = 0; h < g.kv_heads; ++h) {
            const HeadRows& of = codes[2 * h + static_cast<std::size_t>(tensor == KVMIX_V)];
            RowCodec::Create(plan.codec(1, h, tensor), g.head_dim, target)
                .value()
                .Decode(of.codes.data(), of.scales.data(), count, expected.data(), g.head_dim);
            for (std::size_t i = 0; i < expected.size(); ++i) {
              const std::size_t t = i / g.head_dim, c = i % g.head_dim;
              const float x = first + t < exact ? given.At(first + t, h, c) : expected[i];
              ASSERT_EQ(found[(t * g.kv_heads + h) * g.head_dim + c], x) << t << ", head " << h;
            }
          }
        }
      }
    });
  }
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
      ForAllTargets([&](std::string_view target) {
        Cache cache = Empty(plan, 900, target);
        ASSERT_TRUE(AppendTokens(cache, 0, rows, 0, kept).ok());
        ASSERT_TRUE(AppendTokens(cache, 0, {huge, huge}, 0, 500).ok());
        ASSERT_TRUE(cache.Truncate(kept).ok());
        ASSERT_TRUE(AppendTokens(cache, 0, rows, kept, added).ok());
        const Cache fresh = Filled(plan, seen, 900, target);
        ExpectSame(Export(cache, 0), Export(fresh, 0), plan);
        EXPECT_EQ(Attended(cache, 0, q), Attended(fresh, 0, q));
      });
    }
  }
}

// ---- where tiles are read from

// Reading tiles as if they came from memory takes other register blocks and other turns of rows,
// and gives the same bits.
void ExpectSameFromAnywhere(const Geometry& g, const Rows& rows, const Names& k, const Names& v,
                            std::size_t queries) {
  const Plan plan = MakePlan(g, rows, k, v);
  const std::vector<Half> q = RandomQueries(g, queries, 37);
  ForAllTargets([&](std::string_view target) {
    const Cache cache = Filled(plan, rows, 800, target);
    for (const float cap : {0.0f, 30.0f}) {
      AttendOptions options{.soft_cap = cap, .residence = KVMIX_RESIDENCE_L2};
      const std::vector<float> from_l2 = Attended(cache, 0, q, options);
      for (const Residence residence : {KVMIX_RESIDENCE_MEMORY, KVMIX_RESIDENCE_AUTO}) {
        options.residence = residence;
        EXPECT_EQ(Attended(cache, 0, q, options), from_l2)
            << ToString(g) << ", " << queries << " queries, cap " << cap;
      }
    }
  });
}

TEST(CacheResidence, GivesTheSameBitsForAnyNumberOfRows) {
  for (const std::size_t head_dim : {64, 80}) {
    for (std::size_t group = 1; group <= 18; ++group) {
      const Geometry g{1, 6, 6 * group, head_dim};
      ExpectSameFromAnywhere(g, RandomRows(g, 700, 36),
                             {"i8-token", "f16", "f16", "i8-token", "i8-token+hadamard", "i8-head"},
                             {"i8-token", "f16", "i8-token", "f16", "i8-token-bf16", "i8-head"}, 1);
    }
  }
}

TEST(CacheResidence, GivesTheSameBitsForEveryCodec) {
  const Geometry g{1, kRuns.size(), 3 * kRuns.size(), 64};
  const Rows rows = RandomRows(g, 700, 38);
  for (const std::size_t queries : {1, 2, 40})
    ExpectSameFromAnywhere(g, rows, kRuns, {kRuns.rbegin(), kRuns.rend()}, queries);
}

}  // namespace
}  // namespace kvmix::testing
