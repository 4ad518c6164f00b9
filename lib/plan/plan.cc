// Plans: checks and sizes.
#include "kvmix/plan.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <span>

#include <fmt/format.h>

#include "lib/files/check.h"
#include "lib/files/file.h"

namespace kvmix {

using internal::Error;

std::size_t Plan::index(std::size_t layer, std::size_t kv_head, Tensor t) const {
  KVMIX_CHECK(layer, <, model.layers.size());
  KVMIX_CHECK(kv_head, <, model.layers[layer].kv_heads);
  return (model.kv_heads_before(model.kv_layer(layer)) + kv_head) * 2 + static_cast<std::size_t>(t);
}

Plan UniformPlan(const Model& model, const HeadCodec& k, const HeadCodec& v) {
  Plan plan{model, {}, {}};
  for (std::size_t i = model.kv_heads_before(model.layers.size()); i > 0; --i)
    plan.codecs.insert(plan.codecs.end(), {k, v});
  return plan;
}

Status CheckPlan(const Plan& plan) {
  if (plan.exact_first > kMostExactFirst) {
    return Error(ErrorCode::kInvalidArgument, "exact_first: expected 0 to {}, found {}",
                 kMostExactFirst, plan.exact_first);
  }
  const Model& model = plan.model;
  if (Status s = CheckModel(model); !s.ok()) return s;
  const std::size_t expected = 2 * model.kv_heads_before(model.layers.size());
  if (plan.codecs.size() != expected)
    return Error(ErrorCode::kInvalidArgument, "codecs: expected {} ({}), found {}", expected,
                 ToString(model), plan.codecs.size());
  std::size_t first = 0;
  for (std::size_t layer = 0; layer < model.layers.size(); ++layer) {
    const LayerShape& shape = model.layers[layer];
    if (!shape.owns_kv()) continue;
    for (std::size_t i = 0; i < 2 * shape.kv_heads; ++i) {
      const bool is_k = i % 2 == 0;
      if (Status s = CheckCodec(plan.codecs[first + i], is_k ? shape.k_dim : shape.v_dim); !s.ok())
        return Error(s.code(), "layer {}, KV head {}, {}: {}", layer, i / 2, is_k ? "K" : "V",
                     s.message());
      if (!is_k && plan.codecs[first + i].kind.shape)
        return Error(ErrorCode::kInvalidArgument,
                     "layer {}, KV head {}, V: expected a codec without +shape, which only K has, "
                     "found {}",
                     layer, i / 2, ToString(plan.codecs[first + i].kind));
    }
    first += 2 * shape.kv_heads;
  }
  return {};
}

namespace {

struct Room {
  std::size_t bytes = 0, numbers = 0;
};

// What K or V take of a context; context 0: of a token that is not among the exact first.
Room RoomOf(const Plan& plan, std::size_t context, Tensor t) {
  Room room;
  std::size_t codec = static_cast<std::size_t>(t);
  for (std::size_t layer = 0; layer < plan.model.layers.size(); ++layer) {
    const LayerShape& shape = plan.model.layers[layer];
    if (!shape.owns_kv()) continue;
    const std::size_t dim = shape.dim(t),
                      tokens = context == 0 ? 1 : plan.model.tokens_held(layer, context),
                      exact = context == 0 ? 0 : std::min(plan.exact_first, tokens);
    for (std::size_t head = 0; head < shape.kv_heads; ++head, codec += 2)
      room.bytes += tokens * BytesPerToken(plan.codecs[codec].kind, dim) + exact * dim * 2;  // f16
    room.numbers += tokens * shape.kv_heads * dim;
  }
  return room;
}

}  // namespace

std::size_t ContextBytes(const Plan& plan, std::size_t context) {
  return RoomOf(plan, context, KVMIX_K).bytes + RoomOf(plan, context, KVMIX_V).bytes;
}

std::size_t Fp16ContextBytes(const Model& model, std::size_t context) {
  return ContextBytes(UniformPlan(model, {}, {}), context);
}

double SavedFraction(const Plan& plan, std::size_t context) {
  return 1.0 - static_cast<double>(ContextBytes(plan, context)) /
                   static_cast<double>(Fp16ContextBytes(plan.model, context));
}

EffectiveBits BitsPerNumber(const Plan& plan, std::size_t context) {
  const Room k = RoomOf(plan, context, KVMIX_K), v = RoomOf(plan, context, KVMIX_V);
  const auto bits = [](std::size_t bytes, std::size_t numbers) {
    return 8.0 * static_cast<double>(bytes) / static_cast<double>(numbers);
  };
  return {bits(k.bytes, k.numbers), bits(v.bytes, v.numbers),
          bits(k.bytes + v.bytes, k.numbers + v.numbers)};
}

std::size_t BytesPerToken(const Plan& plan) { return ContextBytes(plan, 0); }
std::size_t Fp16BytesPerToken(const Model& model) { return Fp16ContextBytes(model, 0); }

std::uint64_t Fingerprint(const Plan& plan) {
  XXH3_state_t hash;
  XXH3_64bits_reset(&hash);
  const auto bytes = [&](const void* data, std::size_t n) { XXH3_64bits_update(&hash, data, n); };
  const auto number = [&](std::uint64_t x) { bytes(&x, sizeof(x)); };
  const auto floats = [&](std::span<const float> x) {
    number(x.size());
    bytes(x.data(), x.size_bytes());
  };
  for (const LayerShape& shape : plan.model.layers) {
    for (const std::size_t x :
         {shape.kv_heads, shape.k_dim, shape.v_dim, shape.kv_layer.value_or(SIZE_MAX)}) {
      number(x);
    }
  }
  number(plan.exact_first);
  for (const HeadCodec& codec : plan.codecs) {
    CodecKind decoded = codec.kind;
    decoded.shape = false;  // that only the encoder knows
    const std::string kind = ToString(decoded);
    bytes(kind.data(), kind.size() + 1);  // with the 0 at its end
    floats({&codec.head_scale, 1});
    floats(codec.mean());
    floats(codec.factor());
  }
  return XXH3_64bits_digest(&hash);
}

Status CheckModelMatches(const Plan& plan, const Model& model) {
  if (plan.model == model) return {};
  return Error(ErrorCode::kMismatch, "plan: expected {}, found {}", ToString(model),
               ToString(plan.model));
}

}  // namespace kvmix
