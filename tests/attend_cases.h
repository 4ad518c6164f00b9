// What the tests of attention and of the cache share: made-up K, V and q, plans that mix codecs,
// the double-precision reference over the codes that a cache really holds, and the run over every
// target.
#ifndef KVMIX_TESTS_ATTEND_CASES_H_
#define KVMIX_TESTS_ATTEND_CASES_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "kvmix/attention.h"
#include "kvmix/cache.h"
#include "kvmix/half.h"
#include "kvmix/plan.h"
#include "kvmix/quantize.h"
#include "kvmix/version.h"
#include "tests/attend_options.h"
#include "tests/reference/attention.h"

namespace kvmix::testing {

using Names = std::vector<std::string>;  // of codecs, as in kvmix/codec.h

// Every storage, every scale, every step.
inline const Names kCodecs = {"f16",
                              "i8-token",
                              "i8-token-bf16",
                              "i8-head",
                              "i8-token+centre",
                              "i8-token+hadamard",
                              "i8-token-bf16+centre+fold+hadamard",
                              "i8-head+centre+hadamard",
                              "i4x16-token",
                              "i4x16-token-bf16+centre+fold+hadamard"};

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
// The shape of a model whose layers have the same heads, whatever their windows.
inline Geometry GeometryOf(const Model& model) {
  const LayerShape& first = model.layers.front();
  return {model.layers.size(), first.kv_heads, first.query_heads, first.k_dim};
}

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

// [rows, heads, head_dim], without gaps.
template <class T>
RowsView View(const std::vector<T>& x, std::size_t heads, std::size_t head_dim) {
  constexpr Dtype kDtype = std::is_same_v<T, Half> ? KVMIX_F16 : KVMIX_F32;
  return RowsView::Dense(x.data(), kDtype, x.size() / (heads * head_dim), heads, head_dim);
}
template <class T>
RowsView KvView(const Geometry& g, const std::vector<T>& x) {
  return View(x, g.kv_heads, g.head_dim);
}
template <class T>
RowsView QView(const Geometry& g, const std::vector<T>& x) {
  return View(x, g.query_heads, g.head_dim);
}

// Rows somewhere in memory.
struct Placed {
  std::vector<char> bytes;
  RowsView view;  // into them
};

// `from` as another type and with other strides, its rows `gap` numbers apart. Between them lie
// NaN. What bf16 has no bits for is cut off.
inline Placed Place(const RowsView& from, Dtype dtype, bool heads_first, bool backwards,
                    std::size_t gap) {
  Placed to;
  to.view = from;
  to.view.dtype = dtype;
  const std::size_t row = from.head_dim + gap, bytes = to.view.element_bytes();
  to.view.token_stride = static_cast<std::ptrdiff_t>(heads_first ? row : from.heads * row);
  to.view.head_stride = static_cast<std::ptrdiff_t>(heads_first ? from.tokens * row : row);
  to.bytes.assign(from.tokens * from.heads * row * bytes, static_cast<char>(0xFF));
  std::size_t first = 0;
  if (backwards) {  // the last token's last head comes first
    first = (from.tokens * from.heads - 1) * row;
    to.view.token_stride = -to.view.token_stride;
    to.view.head_stride = -to.view.head_stride;
  }
  to.view.data = to.bytes.data() + first * bytes;
  for (std::size_t i = 0; i < from.tokens * from.heads * from.head_dim; ++i) {
    const std::size_t t = i / from.head_dim / from.heads, h = i / from.head_dim % from.heads,
                      c = i % from.head_dim;
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(from.At(t, h, c));
    const Half half =
        dtype == KVMIX_F16 ? FloatToHalf(from.At(t, h, c)) : static_cast<Half>(bits >> 16);
    const auto at = static_cast<const char*>(to.view.row(t, h)) - to.bytes.data();
    std::memcpy(to.bytes.data() + at + c * bytes,
                dtype == KVMIX_F32 ? static_cast<const void*>(&bits) : &half, bytes);
  }
  return to;
}

// A codec with its numbers taken from the rows of one head that it will hold: a mean is that of
// each channel, a factor the square root of its range, and a head's scale covers all but the top
// tenth (so that some values saturate).
inline HeadCodec MakeCodec(const std::string& name, const RowsView& rows) {
  HeadCodec codec{ParseCodecKind(name).value(), 0.0f, nullptr};
  CodecVectors vectors;
  if (codec.kind.centre) {
    vectors.mean.resize(rows.head_dim);
    for (std::size_t i = 0; i < rows.tokens * rows.head_dim; ++i) {
      const std::size_t t = i / rows.head_dim, c = i % rows.head_dim;
      vectors.mean[c] += rows.At(t, 0, c) / static_cast<float>(rows.tokens);
    }
  }
  if (codec.kind.fold) {
    std::vector<float> range(rows.head_dim);
    for (std::size_t i = 0; i < rows.tokens * rows.head_dim; ++i) {
      const std::size_t t = i / rows.head_dim, c = i % rows.head_dim;
      const float mean = codec.kind.centre ? vectors.mean[c] : 0.0f;
      range[c] = std::max(range[c], std::fabs(rows.At(t, 0, c) - mean));
    }
    for (const float x : range) vectors.factor.push_back(x > 0.0f ? std::sqrt(x) : 1.0f);
  }
  if (vectors != CodecVectors()) {
    codec.vectors = std::make_shared<const CodecVectors>(std::move(vectors));
  }
  if (codec.kind.scale == KVMIX_SCALE_HEAD) {
    const float scale = HeadScale(rows, codec);
    codec.head_scale = scale > 0.0f ? 0.9f * scale : 1.0f;
  }
  return codec;
}

inline HeadCodec MakeCodec(const std::string& name, const Geometry& g, const std::vector<Half>& x,
                           std::size_t kv_head) {
  const RowsView rows = KvView(g, x);
  return MakeCodec(name, rows.tokens != 0 ? rows.Head(kv_head) : rows);
}

// A codec's name for head_dim channels: i8 in the place of i4 or i4x16, where they are odd.
inline std::string Fitting(const std::string& name, std::size_t head_dim) {
  return head_dim % 2 != 0 && name.starts_with("i4") ? "i8" + name.substr(name.find('-')) : name;
}

// KV head h gets k_codecs[h % n] and v_codecs[h % m], as far as they fit head_dim, in every layer.
inline Plan MakePlan(const Geometry& g, const Rows& rows, const Names& k_codecs,
                     const Names& v_codecs) {
  Plan plan;
  plan.model = g;
  for (std::size_t i = 0; i < g.layers * g.kv_heads; ++i) {
    const std::size_t h = i % g.kv_heads;
    const std::string k = Fitting(k_codecs[h % k_codecs.size()], g.head_dim),
                      v = Fitting(v_codecs[h % v_codecs.size()], g.head_dim);
    plan.codecs.push_back(MakeCodec(k, g, rows.k, h));
    plan.codecs.push_back(MakeCodec(v, g, rows.v, h));
  }
  return plan;
}

// A cache with `rows` in every layer, for a target, "" for the best.
inline Cache Filled(const Plan& plan, const Rows& rows, std::size_t capacity,
                    std::string_view target = {}) {
  Result<Cache> cache = Cache::Create(plan, capacity, {.target = std::string(target)});
  if (!cache.ok()) ADD_FAILURE() << cache.status().message();
  for (std::size_t layer = 0; layer < GeometryOf(plan.model).layers; ++layer) {
    const Status s = cache->Append(layer, KvView(GeometryOf(plan.model), rows.k),
                                   KvView(GeometryOf(plan.model), rows.v));
    EXPECT_TRUE(s.ok()) << s.message();
  }
  return std::move(*cache);
}

// The rows that a layer's codes and scales stand for: [tokens, kv_heads, head_dim].
inline std::vector<double> Decoded(const Cache& cache, std::size_t layer, Tensor tensor) {
  const Geometry g = GeometryOf(cache.model());
  if (cache.tokens(layer) == 0) return {};
  const std::size_t tokens = cache.tokens(layer), stride = g.kv_heads * g.head_dim;
  std::vector<float> x(tokens * stride), scales(tokens);
  for (std::size_t h = 0; h < g.kv_heads; ++h) {
    const RowCodec codec =
        RowCodec::Create(cache.plan().codec(layer, h, tensor), g.head_dim).value();
    std::vector<std::uint8_t> codes(tokens * codec.row_bytes());
    EXPECT_TRUE(cache.ExportRows(layer, h, tensor, 0, tokens, codes.data(), scales.data()).ok());
    codec.Decode(codes.data(), scales.data(), tokens, x.data() + h * g.head_dim, stride);
  }
  return {x.begin(), x.end()};
}

inline std::vector<double> Expected(const Cache& cache, std::size_t layer,
                                    const std::vector<float>& q,
                                    const AttendOptions& options = {}) {
  return reference::Attention(cache.model().layers[layer], q, Decoded(cache, layer, KVMIX_K),
                              Decoded(cache, layer, KVMIX_V), options);
}

template <typename T>
std::vector<float> Attended(const Cache& cache, std::size_t layer, const std::vector<T>& q,
                            const AttendOptions& options = {}, const Runner& runner = 1) {
  std::vector<float> out(q.size(), std::numeric_limits<float>::quiet_NaN());
  const Status s =
      Attend(cache, layer, QView(GeometryOf(cache.model()), q), out.data(), options, runner);
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

// f(target) with each target in turn.
template <class F>
void ForAllTargets(const F& f) {
  for (const std::string_view target : Targets()) {
    SCOPED_TRACE(target);
    f(target);
  }
}

}  // namespace kvmix::testing

#endif  // KVMIX_TESTS_ATTEND_CASES_H_
