// Geometries and plans: checks and sizes.
#include "kvmix/plan.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <span>
#include <tuple>

#include "lib/files/file.h"

namespace kvmix {

using internal::Error;

Status CheckGeometry(const Geometry& g) {
  const std::tuple<const char*, std::size_t, std::size_t> numbers[] = {
      {"layers", g.layers, kMaxCount},
      {"kv_heads", g.kv_heads, kMaxCount},
      {"query_heads", g.query_heads, kMaxCount},
      {"head_dim", g.head_dim, kMaxHeadDim}};
  for (const auto& [name, value, most] : numbers) {
    if (value == 0 || value > most)
      return Error(ErrorCode::kInvalidArgument, "{}: expected 1 to {}, found {}", name, most,
                   value);
  }
  if (g.query_heads % g.kv_heads == 0) return {};
  return Error(ErrorCode::kInvalidArgument,
               "query_heads: expected a multiple of the {} KV heads, found {}", g.kv_heads,
               g.query_heads);
}

Plan UniformPlan(const Geometry& geometry, const HeadCodec& k, const HeadCodec& v) {
  Plan plan{geometry, {}, {}};
  for (std::size_t i = 0; i < geometry.layers * geometry.kv_heads; ++i)
    plan.codecs.insert(plan.codecs.end(), {k, v});
  return plan;
}

Status CheckPlan(const Plan& plan) {
  if (plan.exact_first > kMostExactFirst) {
    return Error(ErrorCode::kInvalidArgument, "exact_first: expected 0 to {}, found {}",
                 kMostExactFirst, plan.exact_first);
  }
  const Geometry& g = plan.geometry;
  if (Status s = CheckGeometry(g); !s.ok()) return s;
  const std::size_t expected = g.layers * g.kv_heads * 2;
  if (plan.codecs.size() != expected)
    return Error(ErrorCode::kInvalidArgument, "codecs: expected {} ({}), found {}", expected,
                 ToString(g), plan.codecs.size());
  for (std::size_t i = 0; i < expected; ++i) {
    if (Status s = CheckCodec(plan.codecs[i], g.head_dim); !s.ok())
      return Error(s.code(), "layer {}, KV head {}, {}: {}", i / 2 / g.kv_heads, i / 2 % g.kv_heads,
                   i % 2 == 0 ? "K" : "V", s.message());
  }
  return {};
}

std::size_t BytesPerToken(const Plan& plan) {
  std::size_t bytes = 0;
  for (const HeadCodec& codec : plan.codecs)
    bytes += BytesPerToken(codec.kind, plan.geometry.head_dim);
  return bytes;
}

std::size_t Fp16BytesPerToken(const Geometry& g) {
  return g.layers * g.kv_heads * 2 * BytesPerToken(CodecKind{}, g.head_dim);
}

double SavedFraction(const Plan& plan) {
  return 1.0 - static_cast<double>(BytesPerToken(plan)) /
                   static_cast<double>(Fp16BytesPerToken(plan.geometry));
}

std::uint64_t Fingerprint(const Plan& plan) {
  XXH3_state_t hash;
  XXH3_64bits_reset(&hash);
  const auto bytes = [&](const void* data, std::size_t n) { XXH3_64bits_update(&hash, data, n); };
  const auto number = [&](std::uint64_t x) { bytes(&x, sizeof(x)); };
  const auto floats = [&](std::span<const float> x) {
    number(x.size());
    bytes(x.data(), x.size_bytes());
  };
  const Model model = plan.geometry;
  for (const LayerShape& shape : model.layers) {
    for (const std::size_t x :
         {shape.kv_heads, shape.k_dim, shape.v_dim, shape.kv_layer.value_or(SIZE_MAX)}) {
      number(x);
    }
  }
  number(plan.exact_first);
  for (const HeadCodec& codec : plan.codecs) {
    const std::string kind = ToString(codec.kind);
    bytes(kind.data(), kind.size() + 1);  // with the 0 at its end
    floats({&codec.head_scale, 1});
    floats(codec.mean());
    floats(codec.factor());
  }
  return XXH3_64bits_digest(&hash);
}

Status CheckModelMatches(const Plan& plan, const Model& model) {
  if (Model(plan.geometry) == model) return {};
  return Error(ErrorCode::kMismatch, "plan: expected {}, found {}", ToString(model),
               ToString(plan.geometry));
}

}  // namespace kvmix
