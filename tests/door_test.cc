// The C waist: it refuses every kind of bad input with a code and a line, and otherwise gives the
// bits that the C++ headers give.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <string>
#include <vector>

#include "kvmix/attention.h"
#include "kvmix/kvmix.h"
#include "kvmix/session.h"
#include "tests/attend_cases.h"

namespace {

// Allocations until one fails; below 0: none fails.
thread_local long fail_after = -1;

}  // namespace

// NOLINTBEGIN: the whole program's
void* operator new(std::size_t bytes) {
  if (fail_after == 0) throw std::bad_alloc();
  if (fail_after > 0) --fail_after;
  if (void* memory = std::malloc(bytes != 0 ? bytes : 1)) return memory;
  throw std::bad_alloc();
}
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
// NOLINTEND

namespace kvmix::testing {
namespace {

constexpr std::size_t kHeads = 2, kQueryHeads = 4, kDim = 32, kTokens = 300;
constexpr kvmix_code kBad = KVMIX_INVALID_ARGUMENT;

kvmix_layer Layer() {
  kvmix_layer layer = KVMIX_INIT(kvmix_layer);
  layer.kv_heads = kHeads;
  layer.query_heads = kQueryHeads;
  layer.k_dim = layer.v_dim = kDim;
  return layer;
}

kvmix_codec Codec(const char* name = "i8-token-bf16+hadamard") {
  kvmix_codec codec = KVMIX_INIT(kvmix_codec);
  EXPECT_EQ(kvmix_codec_parse(name, &codec, nullptr), KVMIX_OK);
  return codec;
}

std::vector<float> Numbers(std::size_t n, float step) {
  std::vector<float> x(n);
  for (std::size_t i = 0; i < n; ++i) x[i] = std::sin(step * static_cast<float>(i + 1));
  return x;
}

// A plan, pool and cache of one layer with kTokens tokens in it.
class Door : public ::testing::Test {
 protected:
  void SetUp() override {
    const kvmix_layer layer = Layer();
    ASSERT_EQ(kvmix_plan_create(&layer, 1, &plan_, &error_), KVMIX_OK) << error_.text;
    const kvmix_codec codec = Codec();
    for (const kvmix_tensor t : {KVMIX_K, KVMIX_V}) {
      ASSERT_EQ(kvmix_plan_set_codec(plan_, 0, KVMIX_ALL, t, &codec, &error_), KVMIX_OK)
          << error_.text;
    }
    ASSERT_EQ(kvmix_pool_create(plan_, nullptr, &pool_, &error_), KVMIX_OK) << error_.text;
    ASSERT_EQ(kvmix_cache_create(pool_, 2 * kTokens, &cache_, &error_), KVMIX_OK) << error_.text;
    ASSERT_EQ(Append(cache_), KVMIX_OK) << error_.text;
  }
  void TearDown() override {
    kvmix_cache_destroy(cache_);
    kvmix_pool_destroy(pool_);
    kvmix_plan_destroy(plan_);
  }

  kvmix_rows K() const { return RowsView::F32(k_.data(), kTokens, kHeads, kDim); }
  kvmix_rows V() const { return RowsView::F32(v_.data(), kTokens, kHeads, kDim); }
  kvmix_rows Q(std::size_t n = 3) const { return RowsView::F32(q_.data(), n, kQueryHeads, kDim); }
  kvmix_code Append(kvmix_cache* cache) {
    const kvmix_rows k = K(), v = V();
    return kvmix_cache_append(cache, 0, &k, &v, nullptr, &error_);
  }
  kvmix_code Attend(const kvmix_rows& q, const kvmix_out& out, const kvmix_sight* sight = nullptr) {
    return kvmix_cache_attend(cache_, 0, &q, &out, sight, nullptr, &error_);
  }
  std::vector<float> Attended() {
    std::vector<float> out(3 * kQueryHeads * kDim);
    EXPECT_EQ(Attend(Q(), {out.data(), KVMIX_F32, 0, 0}), KVMIX_OK) << error_.text;
    return out;
  }
  // The last call was refused with this code and a line that holds `part`, and changed nothing.
  void ExpectRefused(kvmix_code found, kvmix_code code, const std::string& part) {
    EXPECT_EQ(found, code) << part;
    EXPECT_EQ(error_.code, code) << part;
    const std::string text = error_.text;
    EXPECT_NE(text.find(part), std::string::npos) << "\"" << text << "\" does not name " << part;
    EXPECT_EQ(text.find('\n'), std::string::npos) << text;
    EXPECT_EQ(kvmix_cache_tokens(cache_, 0), kTokens);
    error_ = {};
  }

  kvmix_error error_{};
  kvmix_plan* plan_ = nullptr;
  kvmix_pool* pool_ = nullptr;
  kvmix_cache* cache_ = nullptr;
  std::vector<float> k_ = Numbers(kTokens * kHeads * kDim, 0.37f);
  std::vector<float> v_ = Numbers(kTokens * kHeads * kDim, 0.59f);
  std::vector<float> q_ = Numbers(3 * kQueryHeads * kDim, 0.83f);
};

TEST_F(Door, RefusesNull) {
  kvmix_plan* plan = nullptr;
  kvmix_cache* cache = nullptr;
  const kvmix_rows k = K();
  const kvmix_out out{q_.data(), KVMIX_F32, 0, 0};
  const kvmix_codec codec = Codec();
  std::int64_t cell = 0;
  kvmix_rows no_data = K();
  no_data.data = nullptr;
  const kvmix_layer layer = Layer();
  kvmix_layer no_sinks = layer;
  no_sinks.sinks_size = kQueryHeads;
  kvmix_codec no_mean = Codec("i8-token+centre");
  no_mean.mean_size = kDim;
  kvmix_rope no_frequencies = KVMIX_INIT(kvmix_rope);
  no_frequencies.frequencies_size = kDim / 2;
  ExpectRefused(kvmix_plan_save(nullptr, "/tmp/x", &error_), kBad, "null");
  kvmix_pool* pool = nullptr;
  ExpectRefused(kvmix_pool_create(nullptr, nullptr, &pool, &error_), kBad, "null");
  ExpectRefused(kvmix_plan_create(&layer, 1, nullptr, &error_), kBad, "out");
  ExpectRefused(kvmix_plan_create(nullptr, 1, &plan, &error_), kBad, "layers");
  ExpectRefused(kvmix_plan_create(&no_sinks, 1, &plan, &error_), kBad, "sinks");
  ExpectRefused(kvmix_plan_parse(nullptr, 7, nullptr, &plan, &error_), kBad, "text");
  ExpectRefused(kvmix_plan_set_codec(plan_, 0, 0, KVMIX_K, nullptr, &error_), kBad, "codec");
  ExpectRefused(kvmix_plan_set_codec(plan_, 0, 0, KVMIX_K, &no_mean, &error_), kBad, "mean");
  ExpectRefused(kvmix_plan_layer(plan_, 0, nullptr, &error_), kBad, "layer");
  ExpectRefused(kvmix_cache_create(nullptr, 8, &cache, &error_), kBad, "null");
  ExpectRefused(kvmix_cache_fork(nullptr, &cache, &error_), kBad, "null");
  ExpectRefused(kvmix_cache_append(nullptr, 0, &k, &k, nullptr, &error_), kBad, "null");
  ExpectRefused(kvmix_cache_append(cache_, 0, nullptr, &k, nullptr, &error_), kBad, "k");
  ExpectRefused(kvmix_cache_append(cache_, 0, &k, &no_data, nullptr, &error_), kBad, "V");
  ExpectRefused(kvmix_cache_store(cache_, 0, nullptr, 1, &k, &k, &error_), kBad, "cells");
  ExpectRefused(kvmix_cache_store(nullptr, 0, &cell, 1, &k, &k, &error_), kBad, "null");
  ExpectRefused(kvmix_cache_shift(cache_, 0, 1, nullptr, 1, &error_), kBad, "ropes");
  ExpectRefused(kvmix_cache_shift(cache_, 0, 1, &no_frequencies, 1, &error_), kBad, "frequencies");
  ExpectRefused(kvmix_cache_decode(cache_, 0, KVMIX_K, 0, 1, nullptr, &error_), kBad, "out");
  ExpectRefused(kvmix_cache_export(cache_, 0, 0, KVMIX_K, 0, 1, nullptr, nullptr, &error_), kBad,
                "null");
  ExpectRefused(kvmix_cache_import(cache_, 0, 1, nullptr, nullptr, nullptr, nullptr, &error_), kBad,
                "null");
  ExpectRefused(kvmix_cache_write(cache_, nullptr, nullptr, &error_), kBad, "write");
  ExpectRefused(kvmix_cache_read(cache_, nullptr, nullptr, &error_), kBad, "read");
  ExpectRefused(kvmix_cache_attend(cache_, 0, nullptr, &out, nullptr, nullptr, &error_), kBad, "q");
  ExpectRefused(Attend(Q(), {nullptr, KVMIX_F32, 0, 0}), kBad, "out");
  ExpectRefused(kvmix_attend(nullptr, 2, 0, nullptr, nullptr, &error_), kBad, "requests");
  ExpectRefused(kvmix_append(nullptr, 2, 0, nullptr, &error_), kBad, "requests");
  ExpectRefused(kvmix_quantize(nullptr, &k, q_.data(), nullptr, nullptr, &error_), kBad, "null");
  ExpectRefused(kvmix_head_scale(&codec, nullptr, q_.data(), &error_), kBad, "rows");
  ExpectRefused(kvmix_merge_outputs(nullptr, nullptr, nullptr, nullptr, 1, 1, &error_), kBad,
                "log_sum_exp");
  EXPECT_EQ(kvmix_cache_truncate(nullptr, 0, nullptr), kBad);  // no room for a line
  EXPECT_EQ(kvmix_cache_tokens(nullptr, 0), 0u);
  EXPECT_EQ(kvmix_pool_target(nullptr), nullptr);
  EXPECT_EQ(kvmix_plan_fingerprint(nullptr), 0u);
  kvmix_plan_destroy(nullptr);
  kvmix_threads_recall(nullptr);
}

// f(struct) for a struct_size of 0, too small, beyond belief, and of a later version with a field
// that is not 0: all are refused. With a later version's zeros it is good.
template <class T, class F>
void ForSizes(const T& good, const F& call, const std::function<void(kvmix_code)>& refused) {
  struct Later {
    T now;
    std::uint64_t more[2];
  } later{good, {0, 0}};
  for (const std::size_t size : {std::size_t{0}, sizeof(T) - 1, SIZE_MAX}) {
    later.now.struct_size = size;
    refused(call(&later.now));
  }
  later.now.struct_size = sizeof(later);
  EXPECT_EQ(call(&later.now), KVMIX_OK);
  later.more[1] = 1;
  refused(call(&later.now));
}

TEST_F(Door, ReadsStructsOfOtherVersions) {
  const auto refused = [&](kvmix_code code) { ExpectRefused(code, kBad, "struct_size"); };
  ForSizes(
      Layer(),
      [&](const kvmix_layer* layer) {
        kvmix_plan* plan = nullptr;
        const kvmix_code code = kvmix_plan_create(layer, 1, &plan, &error_);
        kvmix_plan_destroy(plan);
        return code;
      },
      refused);
  ForSizes(
      Codec(),
      [&](const kvmix_codec* codec) {
        return kvmix_plan_set_codec(plan_, 0, 0, KVMIX_K, codec, &error_);
      },
      refused);
  kvmix_pool_options options = KVMIX_INIT(kvmix_pool_options);
  ForSizes(
      options,
      [&](const kvmix_pool_options* o) {
        kvmix_cache* cache = nullptr;
        const kvmix_code code = kvmix_cache_create_alone(plan_, 10, o, &cache, &error_);
        kvmix_cache_destroy(cache);
        return code;
      },
      refused);
  std::vector<float> out(3 * kQueryHeads * kDim);
  kvmix_sight sight = KVMIX_INIT(kvmix_sight);
  ASSERT_EQ(kvmix_cache_sight(cache_, 0, &sight, &error_), KVMIX_OK);
  ForSizes(
      sight,
      [&](const kvmix_sight* s) {
        return Attend(Q(), {out.data(), KVMIX_F32, 0, 0}, s);
      },
      refused);
  kvmix_attend_request request = KVMIX_INIT(kvmix_attend_request);
  request.cache = cache_;
  request.q = Q();
  request.out = {out.data(), KVMIX_F32, 0, 0};
  ForSizes(
      request,
      [&](const kvmix_attend_request* r) {
        return kvmix_attend(r, 1, 0, nullptr, nullptr, &error_);
      },
      refused);
  // A struct to fill in: what is beyond ours becomes 0.
  struct Later {
    kvmix_sight now;
    std::uint64_t more = 7;
  } later;
  later.now.struct_size = sizeof(later);
  ASSERT_EQ(kvmix_cache_sight(cache_, 0, &later.now, &error_), KVMIX_OK);
  EXPECT_EQ(later.more, 0u);
  EXPECT_EQ(later.now.struct_size, sizeof(later));
  later.now.struct_size = 8;
  refused(kvmix_cache_sight(cache_, 0, &later.now, &error_));
}

TEST_F(Door, RefusesUnknownNumbers) {
  std::vector<float> out(3 * kQueryHeads * kDim);
  const auto dtype = static_cast<kvmix_dtype>(7);
  kvmix_rows q = Q(), k = K();
  const kvmix_rows v = V();
  q.dtype = k.dtype = dtype;
  ExpectRefused(Attend(q, {out.data(), KVMIX_F32, 0, 0}), kBad, "dtype 7");
  ExpectRefused(Attend(Q(), {out.data(), dtype, 0, 0}), kBad, "dtype 7");
  ExpectRefused(kvmix_cache_append(cache_, 0, &k, &v, nullptr, &error_), kBad, "dtype 7");
  kvmix_attend_request request = KVMIX_INIT(kvmix_attend_request);
  request.cache = cache_;
  request.q = Q();
  request.out = {out.data(), KVMIX_F32, 0, 0};
  request.mask = {out.data(), dtype, 3, 4, 4, nullptr};
  ExpectRefused(kvmix_attend(&request, 1, 0, nullptr, nullptr, &error_), kBad, "dtype 7");
  const auto tensor = static_cast<kvmix_tensor>(-1);
  const kvmix_codec good = Codec();
  kvmix_codec codec = good;
  ExpectRefused(kvmix_plan_set_codec(plan_, 0, 0, tensor, &good, &error_), kBad, "tensor");
  const kvmix_out to{out.data(), KVMIX_F32, 0, 0};
  ExpectRefused(kvmix_cache_decode(cache_, 0, tensor, 0, 1, &to, &error_), kBad, "tensor");
  EXPECT_EQ(kvmix_cache_row_bytes(cache_, 0, 0, tensor), 0u);
  codec.storage = static_cast<kvmix_storage>(99);
  ExpectRefused(kvmix_plan_set_codec(plan_, 0, 0, KVMIX_K, &codec, &error_), kBad, "layer 0");
  codec = good;
  codec.scale = static_cast<kvmix_scale>(-3);
  ExpectRefused(kvmix_codec_check(&codec, kDim, &error_), kBad, "codec");
  codec = good;
  codec.steps = 1u << 31;
  ExpectRefused(kvmix_codec_check(&codec, kDim, &error_), kBad, "steps");
  kvmix_sight sight = KVMIX_INIT(kvmix_sight);
  ASSERT_EQ(kvmix_cache_sight(cache_, 0, &sight, &error_), KVMIX_OK);
  sight.residence = static_cast<kvmix_residence>(5);
  ExpectRefused(Attend(Q(), {out.data(), KVMIX_F32, 0, 0}, &sight), kBad, "residence");
  EXPECT_STREQ(kvmix_code_name(static_cast<kvmix_code>(1000)), "unknown code");
}

TEST_F(Door, RefusesPlacesThatOverlap) {
  std::vector<float> out(4096);
  const auto refused = [&](std::ptrdiff_t token, std::ptrdiff_t head) {
    ExpectRefused(Attend(Q(), {out.data() + 2048, KVMIX_F32, token, head}), kBad, "strides");
  };
  const std::ptrdiff_t dim = kDim, row = kQueryHeads * kDim;
  refused(0, kDim);       // all queries in one place
  refused(row, 0);        // all heads
  refused(row, dim - 1);  // heads run into each other
  refused(row - 1, dim);  // and queries
  refused(-row + 1, -dim);
  const std::vector<float> dense = Attended();
  for (const auto& [token, head] : {std::pair{row, dim},
                                    {dim, 3 * dim},
                                    {-row, -dim},
                                    {row + 5, dim + 1},
                                    {-dim - 2, 3 * dim + 20}}) {
    ASSERT_EQ(Attend(Q(), {out.data() + 2048, KVMIX_F32, token, head}), KVMIX_OK) << error_.text;
    for (std::ptrdiff_t i = 0; i < 3 * row; ++i) {
      ASSERT_EQ(
          out[static_cast<std::size_t>(2048 + i / row * token + i % row / dim * head + i % dim)],
          dense[static_cast<std::size_t>(i)])
          << token << " " << head << " " << i;
    }
  }
  // q and out in one tensor: side by side, and in each other's way.
  std::vector<float> both(3 * 2 * static_cast<std::size_t>(row));
  kvmix_rows q = Q();
  for (std::size_t i = 0; i < q_.size(); ++i) {
    both[i / static_cast<std::size_t>(row) * 2 * static_cast<std::size_t>(row) +
         i % static_cast<std::size_t>(row)] = q_[i];
  }
  q.data = both.data();
  q.token_stride = 2 * row;
  ExpectRefused(Attend(q, {both.data() + row - 1, KVMIX_F32, 2 * row, dim}), kBad, "overlap");
  ExpectRefused(Attend(q, {both.data(), KVMIX_F32, 2 * row, dim}), kBad, "overlap");
  EXPECT_EQ(Attend(q, {both.data() + row, KVMIX_F32, 2 * row, dim}), KVMIX_OK) << error_.text;
  EXPECT_EQ(both[static_cast<std::size_t>(row)], dense[0]);
}

TEST_F(Door, RefusesSizesThatOverflow) {
  std::vector<float> out(3 * kQueryHeads * kDim);
  const kvmix_out to{out.data(), KVMIX_F32, 0, 0};
  kvmix_rows q = Q();
  for (const std::size_t tokens : {SIZE_MAX, SIZE_MAX / 2, SIZE_MAX / 512, std::size_t{1} << 61}) {
    q.tokens = tokens;
    ExpectRefused(Attend(q, to), kBad, "memory");
    q.token_stride = 0;
    ExpectRefused(Attend(q, to), kBad, "memory");
    q = Q();
  }
  for (const std::ptrdiff_t stride : {PTRDIFF_MAX, PTRDIFF_MIN, PTRDIFF_MAX / 3}) {
    q.token_stride = stride;
    ExpectRefused(Attend(q, to), kBad, "memory");
    q = Q();
    ExpectRefused(Attend(Q(), {out.data(), KVMIX_F32, stride, kDim}), kBad, "out");
  }
  q.data = reinterpret_cast<const char*>(q_.data()) + 2;
  ExpectRefused(Attend(q, to), kBad, "multiple of 4");
  kvmix_rows k = K(), v = V();
  k.tokens = v.tokens = SIZE_MAX;
  ExpectRefused(kvmix_cache_append(cache_, 0, &k, &v, nullptr, &error_), kBad, "K");
  std::int64_t cell = INT64_MAX;
  k.tokens = v.tokens = 1;
  ExpectRefused(kvmix_cache_store(cache_, 0, &cell, 1, &k, &v, &error_), kBad, "capacity");
  ExpectRefused(kvmix_cache_decode(cache_, 0, KVMIX_K, 1, SIZE_MAX, &to, &error_), kBad, "tokens");
  ExpectRefused(kvmix_cache_shift(cache_, SIZE_MAX, SIZE_MAX, nullptr, SIZE_MAX, &error_), kBad,
                "ropes");
  kvmix_plan* plan = nullptr;
  kvmix_layer layer = Layer();
  layer.kv_heads = layer.query_heads = SIZE_MAX;
  ExpectRefused(kvmix_plan_create(&layer, 1, &plan, &error_), kBad, "kv_heads");
  layer = Layer();
  ExpectRefused(kvmix_plan_create(&layer, SIZE_MAX, &plan, &error_), kBad, "layers");
  kvmix_codec codec = Codec("i8-token+centre");
  codec.mean = q_.data();
  codec.mean_size = SIZE_MAX;
  ExpectRefused(kvmix_codec_check(&codec, kDim, &error_), kBad, "mean");
}

TEST_F(Door, ReadsTextWithoutAnEnd) {
  const std::vector<char> name(5000, 'x');  // and no 0 byte
  kvmix_codec codec = KVMIX_INIT(kvmix_codec);
  ExpectRefused(kvmix_codec_parse(name.data(), &codec, &error_), kBad, "no end");
  kvmix_plan* plan = nullptr;
  ExpectRefused(kvmix_plan_load(name.data(), &plan, &error_), kBad, "no end");
  ExpectRefused(kvmix_plan_parse(name.data(), name.size(), nullptr, &plan, &error_), KVMIX_CORRUPT,
                "plan");
  kvmix_pool_options options = KVMIX_INIT(kvmix_pool_options);
  options.target = name.data();
  kvmix_pool* pool = nullptr;
  ExpectRefused(kvmix_pool_create(plan_, &options, &pool, &error_), kBad, "no end");
  // A plan's text, as a file has it, with no 0 byte after it.
  const std::string path = ::testing::TempDir() + "door_test_plan.json";
  ASSERT_EQ(kvmix_plan_save(plan_, path.c_str(), &error_), KVMIX_OK) << error_.text;
  std::FILE* const file = std::fopen(path.c_str(), "rb");
  std::vector<char> text(1 << 16);
  text.resize(std::fread(text.data(), 1, text.size(), file));
  std::fclose(file);
  text.shrink_to_fit();
  ASSERT_EQ(kvmix_plan_parse(text.data(), text.size(), nullptr, &plan, &error_), KVMIX_OK)
      << error_.text;
  EXPECT_EQ(kvmix_plan_fingerprint(plan), kvmix_plan_fingerprint(plan_));
  kvmix_plan_destroy(plan);
  // A long line is cut, between characters, and ends.
  std::string utf8 = "/";
  for (int i = 0; i < 700; ++i) utf8 += "\xC3\xA4";
  EXPECT_NE(kvmix_plan_load(utf8.c_str(), &plan, &error_), KVMIX_OK);
  const std::string line = error_.text;
  EXPECT_LT(line.size(), sizeof(error_.text));
  EXPECT_NE(static_cast<unsigned char>(line.back()) & 0xC0, 0xC0) << "a half character";
}

TEST_F(Door, TellsAFullPoolFromAFullCache) {
  ExpectRefused(
      [&] {
        (void)Append(cache_);
        const kvmix_code code = Append(cache_);
        (void)kvmix_cache_truncate(cache_, kTokens, nullptr);
        return code;
      }(),
      KVMIX_PAST_CAPACITY, "600 of 600");
  kvmix_pool_options options = KVMIX_INIT(kvmix_pool_options);
  options.bytes = kvmix_cache_bytes(cache_) / 2;
  kvmix_pool* pool = nullptr;
  kvmix_cache* cache = nullptr;
  ASSERT_EQ(kvmix_pool_create(plan_, &options, &pool, &error_), KVMIX_OK) << error_.text;
  ASSERT_EQ(kvmix_cache_create(pool, 5000, &cache, &error_), KVMIX_OK) << error_.text;
  ExpectRefused(Append(cache), KVMIX_POOL_FULL, "pool");
  EXPECT_EQ(kvmix_cache_tokens(cache, 0), 0u);
  EXPECT_EQ(kvmix_pool_bytes(pool), 0u);
  kvmix_cache_destroy(cache);
  kvmix_pool_destroy(pool);
  ExpectRefused(kvmix_cache_create_alone(plan_, SIZE_MAX, nullptr, &cache, &error_),
                KVMIX_OUT_OF_MEMORY, "GiB");
}

#ifdef KVMIX_KEEP_HANDLES
TEST_F(Door, RefusesHandlesThatWereDestroyed) {
  const kvmix_rows k = K();
  kvmix_cache* fork = nullptr;
  ASSERT_EQ(kvmix_cache_fork(cache_, &fork, &error_), KVMIX_OK);
  kvmix_cache_destroy(fork);
  kvmix_cache_destroy(fork);
  ExpectRefused(kvmix_cache_append(fork, 0, &k, &k, nullptr, &error_), kBad, "destroyed");
  EXPECT_EQ(kvmix_cache_tokens(fork, 0), 0u);
  kvmix_attend_request request = KVMIX_INIT(kvmix_attend_request);
  request.cache = fork;
  ExpectRefused(kvmix_attend(&request, 1, 0, nullptr, nullptr, &error_), kBad, "destroyed");
  kvmix_pool_destroy(pool_);
  ExpectRefused(kvmix_cache_create(pool_, 1, &fork, &error_), kBad, "destroyed");
  kvmix_plan_destroy(plan_);
  ExpectRefused(kvmix_plan_set_exact_first(plan_, 1, &error_), kBad, "destroyed");
  // Another kind of handle.
  ExpectRefused(kvmix_cache_truncate(reinterpret_cast<kvmix_cache*>(plan_), 0, &error_), kBad,
                "handle");
}
#endif

TEST_F(Door, GivesTheBitsOfTheCppHeaders) {
  Geometry g{1, kHeads, kQueryHeads, kDim};
  const HeadCodec codec{ParseCodecKind("i8-token-bf16+hadamard").value()};
  const Plan plan = UniformPlan(g, codec, codec);
  EXPECT_EQ(Fingerprint(plan), kvmix_plan_fingerprint(plan_));
  Cache cache = Cache::Create(plan, 2 * kTokens).value();
  ASSERT_TRUE(cache.Append(0, K(), V()).ok());
  std::vector<float> out(3 * kQueryHeads * kDim);
  ASSERT_TRUE(kvmix::Attend(cache, 0, Q(), out.data()).ok());
  EXPECT_EQ(out, Attended());
  kvmix_sight sight = cache.sight(0);
  sight.causal = 0;
  sight.soft_cap = 20.0f;
  sight.window = 100;
  std::vector<float> by_c(out.size());
  ASSERT_TRUE(kvmix::Attend(cache, 0, Q(), out.data(), sight).ok());
  ASSERT_EQ(Attend(Q(), {by_c.data(), KVMIX_F32, 0, 0}, &sight), KVMIX_OK) << error_.text;
  EXPECT_EQ(out, by_c);
  std::vector<float> decoded(kTokens * kHeads * kDim), rows(decoded.size());
  ASSERT_TRUE(cache.Decode(0, KVMIX_V, 0, kTokens, decoded.data()).ok());
  const kvmix_out to{rows.data(), KVMIX_F32, 0, 0};
  ASSERT_EQ(kvmix_cache_decode(cache_, 0, KVMIX_V, 0, kTokens, &to, &error_), KVMIX_OK);
  EXPECT_EQ(decoded, rows);
}

TEST_F(Door, RoundsOutputsToTheNearest) {
  const std::vector<float> exact = Attended();
  std::vector<std::uint16_t> narrow(exact.size());
  const kvmix_out f16{narrow.data(), KVMIX_F16, 0, 0}, bf16{narrow.data(), KVMIX_BF16, 0, 0};
  ASSERT_EQ(Attend(Q(), f16), KVMIX_OK) << error_.text;
  for (std::size_t i = 0; i < exact.size(); ++i) ASSERT_EQ(narrow[i], FloatToHalf(exact[i])) << i;
  ASSERT_EQ(Attend(Q(), bf16), KVMIX_OK) << error_.text;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    const float below = BFloatToFloat(narrow[i]);
    // No neighbour is nearer, and of two that are as near the even one is taken.
    for (const int step : {-1, 1}) {
      const auto other = static_cast<std::uint16_t>(narrow[i] + step);
      const float far = std::fabs(BFloatToFloat(other) - exact[i]);
      ASSERT_TRUE(far > std::fabs(below - exact[i]) ||
                  (far == std::fabs(below - exact[i]) && narrow[i] % 2 == 0))
          << exact[i];
    }
  }
}

TEST(FloatToBFloat, KeepsWhatIsNoNumber) {
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(FloatToBFloat(inf), 0x7F80);
  EXPECT_EQ(FloatToBFloat(-inf), 0xFF80);
  EXPECT_EQ(FloatToBFloat(std::numeric_limits<float>::max()), 0x7F80);
  EXPECT_TRUE(std::isnan(BFloatToFloat(FloatToBFloat(std::numeric_limits<float>::quiet_NaN()))));
  EXPECT_TRUE(std::isnan(BFloatToFloat(FloatToBFloat(std::bit_cast<float>(0x7F800001u)))));
  EXPECT_EQ(FloatToBFloat(-0.0f), 0x8000);
}

TEST_F(Door, SaysThatAFunctionDoesNotTakeASession) {
  struct Left {
    std::size_t bytes;
  } left{100};
  const auto write = [](void* self, const void*, std::size_t bytes) {
    Left& to = *static_cast<Left*>(self);
    if (to.bytes < bytes) return 1;
    to.bytes -= bytes;
    return 0;
  };
  ExpectRefused(kvmix_cache_write(cache_, write, &left, &error_), KVMIX_IO, "session");
  const auto throws = [](void*, const void*, std::size_t) -> int { throw std::string("no"); };
  ExpectRefused(kvmix_cache_write(cache_, throws, nullptr, &error_), KVMIX_INTERNAL, "exception");
  const auto read = [](void*, void*, std::size_t) { return 1; };
  const std::vector<float> before = Attended();
  ExpectRefused(kvmix_cache_read(cache_, read, nullptr, &error_), KVMIX_CORRUPT, "session");
  EXPECT_EQ(Attended(), before);
}

// Every allocation of a call fails once: the call says so, and the next one finds all as it was.
TEST_F(Door, SaysThatThereIsNoMemory) {
  const std::vector<float> before = Attended();
  const auto check = [&](const char* what, const std::function<kvmix_code()>& call) {
    for (long n = 0;; ++n) {
      ASSERT_LT(n, 5000) << what;
      fail_after = n;
      const kvmix_code code = call();
      fail_after = -1;
      if (code == KVMIX_OK) break;
      ASSERT_EQ(code, KVMIX_OUT_OF_MEMORY) << what << " " << n << ": " << error_.text;
      ASSERT_EQ(Attended(), before) << what << " " << n;
    }
  };
  check("plan", [&] {
    const kvmix_layer layer = Layer();
    kvmix_plan* plan = nullptr;
    const kvmix_code code = kvmix_plan_create(&layer, 1, &plan, &error_);
    kvmix_plan_destroy(plan);
    return code;
  });
  check("cache", [&] {
    kvmix_cache* cache = nullptr;
    const kvmix_code code = kvmix_cache_create_alone(plan_, 4000, nullptr, &cache, &error_);
    kvmix_cache_destroy(cache);
    return code;
  });
  check("append", [&] {
    kvmix_cache* fork = nullptr;
    kvmix_code code = kvmix_cache_fork(cache_, &fork, &error_);
    if (code == KVMIX_OK) code = Append(fork);
    kvmix_cache_destroy(fork);
    return code;
  });
  check("decode", [&] {
    float out[kHeads * kDim];
    const kvmix_out to{out, KVMIX_F32, 0, 0};
    return kvmix_cache_decode(cache_, 0, KVMIX_K, 0, 1, &to, &error_);
  });
}

}  // namespace
}  // namespace kvmix::testing
