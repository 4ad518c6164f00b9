// What the tests of attention and of the cache share: made-up K, V and q, plans that mix codecs,
// the double-precision reference over the codes that a cache really holds, and the run over every
// target.
#ifndef KVMIX_TESTS_ATTEND_CASES_H_
#define KVMIX_TESTS_ATTEND_CASES_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "kvmix/attention.h"
#include "kvmix/cache.h"
#include "kvmix/half.h"
#include "kvmix/plan.h"
#include "tests/reference/attention.h"

namespace kvmix::testing {

using Names = std::vector<std::string>;  // of codecs, as in kvmix/plan.h

inline const Names kCodecs = {"f16", "i8-token", "i8-token-bf16", "i8-head", "i8-token+centre"};

// Normal numbers as halves.
inline std::vector<Half> RandomHalves(std::mt19937& rng, std::size_t n, float size = 1.0f) {
  std::normal_distribution<float> normal(0.0f, size);
  std::vector<Half> x(n);
  for (Half& h : x) h = FloatToHalf(normal(rng));
  return x;
}

inline std::vector<float> ToFloats(const std::vector<Half>& x) {
  std::vector<float> f(x.size());
  std::transform(x.begin(), x.end(), f.begin(), HalfToFloat);
  return f;
}

// K and V of one layer: [tokens, kv_heads, head_dim].
struct Rows {
  std::vector<Half> k, v;
};

// K has a constant offset in one channel of 16 (`offset`), as models with a bias have; V's tokens
// differ in size.
inline Rows RandomRows(const Geometry& g, std::size_t tokens, unsigned seed, float offset = 4.0f) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  const std::size_t row = g.kv_heads * g.head_dim;
  std::vector<float> k_offset(row);
  for (std::size_t c = 0; c < row; c += 16) k_offset[c] = offset * normal(rng);
  Rows rows{std::vector<Half>(tokens * row), std::vector<Half>(tokens * row)};
  for (std::size_t t = 0; t < tokens; ++t) {
    const float size = std::exp2(normal(rng));
    for (std::size_t c = 0; c < row; ++c) {
      rows.k[t * row + c] = FloatToHalf(normal(rng) + k_offset[c]);
      rows.v[t * row + c] = FloatToHalf(size * normal(rng));
    }
  }
  return rows;
}

// A codec with its numbers taken from the rows that it will hold: a head's scale covers them but
// for the top tenth (so that some saturate), a mean is that of each channel.
inline HeadCodec MakeCodec(const std::string& name, const Geometry& g, const std::vector<Half>& x,
                           std::size_t kv_head) {
  const CodecKind kind = ParseCodecName(name).value();
  HeadCodec codec{kind.storage, kind.scale, kind.scale_type, 0.0f, {}};
  const std::size_t stride = g.kv_heads * g.head_dim;
  if (kind.centred) codec.mean.assign(g.head_dim, 0.0f);
  float largest = 0.0f;
  for (std::size_t t = 0; t * stride < x.size(); ++t) {
    for (std::size_t c = 0; c < g.head_dim; ++c) {
      const float value = HalfToFloat(x[t * stride + kv_head * g.head_dim + c]);
      largest = std::max(largest, std::fabs(value));
      if (kind.centred) codec.mean[c] += value / static_cast<float>(x.size() / stride);
    }
  }
  if (kind.scale == ScaleKind::kHead)
    codec.head_scale = largest > 0.0f ? 0.9f * largest / 127.0f : 1.0f;
  return codec;
}

// KV head h gets k_codecs[h % n] and v_codecs[h % m], in every layer.
inline Plan MakePlan(const Geometry& g, const Rows& rows, const Names& k_codecs,
                     const Names& v_codecs) {
  Plan plan;
  plan.geometry = g;
  for (std::size_t i = 0; i < g.layers * g.kv_heads; ++i) {
    const std::size_t h = i % g.kv_heads;
    plan.codecs.push_back(MakeCodec(k_codecs[h % k_codecs.size()], g, rows.k, h));
    plan.codecs.push_back(MakeCodec(v_codecs[h % v_codecs.size()], g, rows.v, h));
  }
  return plan;
}

// A cache for the active target with `rows` in every layer.
inline Cache Filled(const Plan& plan, const Rows& rows, std::size_t capacity) {
  Result<Cache> cache = Cache::Create(plan.geometry, plan, capacity);
  if (!cache.ok()) ADD_FAILURE() << cache.status().message();
  const std::size_t tokens = rows.k.size() / (plan.geometry.kv_heads * plan.geometry.head_dim);
  for (std::size_t layer = 0; layer < plan.geometry.layers; ++layer) {
    const Status s = cache->Append(layer, rows.k.data(), rows.v.data(), tokens);
    EXPECT_TRUE(s.ok()) << s.message();
  }
  return std::move(*cache);
}

// The rows that a layer's codes and scales stand for: [tokens, kv_heads, head_dim].
inline std::vector<double> Decoded(const Cache& cache, std::size_t layer, Tensor tensor) {
  const Geometry& g = cache.geometry();
  const std::size_t tokens = cache.tokens(layer);
  std::vector<double> x(tokens * g.kv_heads * g.head_dim);
  std::vector<Half> halves(tokens * g.head_dim);
  std::vector<float> scales(tokens);
  for (std::size_t h = 0; h < g.kv_heads; ++h) {
    const HeadCodec& codec = cache.plan().codec(layer, h, tensor);
    std::fill(scales.begin(), scales.end(),
              codec.scale == ScaleKind::kHead ? codec.head_scale : 1.0f);
    EXPECT_TRUE(cache.ExportRows(layer, h, tensor, 0, tokens, halves.data(), scales.data()).ok());
    const std::int8_t* codes = reinterpret_cast<const std::int8_t*>(halves.data());
    for (std::size_t i = 0; i < tokens * g.head_dim; ++i) {
      const std::size_t t = i / g.head_dim, c = i % g.head_dim;
      const double code =
          codec.storage == Storage::kF16 ? static_cast<double>(HalfToFloat(halves[i])) : codes[i];
      x[(t * g.kv_heads + h) * g.head_dim + c] =
          (codec.centred() ? codec.mean[c] : 0.0) + scales[t] * code;
    }
  }
  return x;
}

inline std::vector<double> Expected(const Cache& cache, std::size_t layer,
                                    const std::vector<float>& q,
                                    const AttendOptions& options = {}) {
  return reference::Attention(cache.geometry(), q, Decoded(cache, layer, Tensor::kK),
                              Decoded(cache, layer, Tensor::kV), options);
}

template <typename T>
std::vector<float> Attended(const Cache& cache, std::size_t layer, const std::vector<T>& q,
                            const AttendOptions& options = {}) {
  const Geometry& g = cache.geometry();
  std::vector<float> out(q.size(), std::numeric_limits<float>::quiet_NaN());
  const Status s =
      Attend(cache, layer, q.data(), q.size() / (g.query_heads * g.head_dim), out.data(), options);
  EXPECT_TRUE(s.ok()) << s.message();
  return out;
}

// mean(d^2) / mean(out^2) of each query head; 0 where both are zero, infinite where a NaN is.
inline std::vector<double> Nmse(const Geometry& g, const std::vector<float>& out,
                                const std::vector<double>& expected) {
  std::vector<double> error(g.query_heads), size(g.query_heads), nmse(g.query_heads);
  for (std::size_t i = 0; i < out.size(); ++i) {
    const std::size_t h = i / g.head_dim % g.query_heads;
    const double d = out[i] - expected[i];
    error[h] += d * d;
    size[h] += expected[i] * expected[i];
  }
  for (std::size_t h = 0; h < g.query_heads; ++h) {
    nmse[h] = error[h] == 0.0 ? 0.0 : error[h] / size[h];
    if (!(nmse[h] <= std::numeric_limits<double>::max()))
      nmse[h] = std::numeric_limits<double>::infinity();
  }
  return nmse;
}

inline double WorstNmse(const Geometry& g, const std::vector<float>& out,
                        const std::vector<double>& expected) {
  const std::vector<double> nmse = Nmse(g, out, expected);
  return *std::max_element(nmse.begin(), nmse.end());
}

// f() with each target active in turn.
template <class F>
void ForAllTargets(const F& f) {
  for (const kernels::Kernels& k : kernels::AllKernels()) {
    SCOPED_TRACE(k.target);
    ASSERT_TRUE(kernels::UseTarget(k.target));
    f();
  }
  kernels::UseTarget("");
}

}  // namespace kvmix::testing

#endif  // KVMIX_TESTS_ATTEND_CASES_H_
