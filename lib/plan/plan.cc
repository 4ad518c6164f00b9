// Plans: checks and sizes.
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <span>

#include <fmt/format.h>

#include "lib/files/file.h"
#include "lib/plan/plan.h"

namespace kvmix::internal {

Status CheckExactFirst(std::size_t tokens) {
  if (tokens <= kMostExactFirst) return {};
  return Error(ErrorCode::kInvalidArgument, "exact_first: expected 0 to {}, found {}",
               kMostExactFirst, tokens);
}

Status CheckExactNewest(std::size_t tokens, const std::vector<HeadCodec>& codecs) {
  const bool exists = tokens == 0 || (std::has_single_bit(tokens) && tokens >= 16 && tokens <= 256);
  if (!exists) {
    return Error(ErrorCode::kInvalidArgument,
                 "exact_newest: expected 0, 16, 32, 64, 128 or 256, found {}", tokens);
  }
  if (tokens != 0 ||
      std::ranges::none_of(codecs, [](const HeadCodec& c) { return c.kind.own_centre; })) {
    return {};
  }
  return Error(ErrorCode::kInvalidArgument,
               "exact_newest: expected 16 or more, as a codec has +own-centre, found 0");
}

Status CheckCodecAt(const HeadCodec& codec, const Plan& plan, std::size_t layer,
                    std::size_t kv_head, Tensor tensor) {
  const bool is_k = tensor == KVMIX_K;
  const auto wrong = [&](ErrorCode code, const std::string& message) {
    return Error(code, "layer {}, KV head {}, {}: {}", layer, kv_head, is_k ? "K" : "V", message);
  };
  const Status s = internal::CheckCodec(codec, plan.model.layers[layer].dim(tensor));
  if (!s.ok()) return wrong(s.code(), s.message());
  const std::string name = internal::ToString(codec.kind);
  if (!is_k && (codec.kind.shape || codec.kind.own_centre)) {
    return wrong(ErrorCode::kInvalidArgument,
                 fmt::format("expected a codec without {}, which only K has, found {}",
                             codec.kind.shape ? "+shape" : "+own-centre", name));
  }
  if (!codec.kind.own_centre || plan.exact_newest != 0) return {};
  return wrong(ErrorCode::kInvalidArgument,
               "expected exact_newest of 16 or more with +own-centre, found 0 with " + name);
}

Status CheckPlan(const Plan& plan) {
  if (Status s = CheckExactFirst(plan.exact_first); !s.ok()) return s;
  if (Status s = CheckExactNewest(plan.exact_newest, {}); !s.ok()) return s;
  const Model& model = plan.model;
  if (Status s = internal::CheckModel(model); !s.ok()) return s;
  const std::size_t expected = 2 * model.kv_heads_before(model.layers.size());
  if (plan.codecs.size() != expected) {
    return Error(ErrorCode::kInvalidArgument, "codecs: expected {} ({}), found {}", expected,
                 internal::ToString(model), plan.codecs.size());
  }
  auto codec = plan.codecs.begin();
  for (std::size_t layer = 0; layer < model.layers.size(); ++layer) {
    const LayerShape& shape = model.layers[layer];
    for (std::size_t i = 0; shape.owns_kv() && i < 2 * shape.kv_heads; ++i, ++codec) {
      const Tensor tensor = i % 2 == 0 ? KVMIX_K : KVMIX_V;
      if (Status s = CheckCodecAt(*codec, plan, layer, i / 2, tensor); !s.ok()) return s;
    }
  }
  return {};
}

namespace {

struct Room {
  std::size_t bytes = 0, numbers = 0;
};

// The room of one KV head's K or V for some tokens of a context; context 0: of a token far from its
// ends.
std::size_t BytesOf(const Plan& plan, const HeadCodec& codec, std::size_t dim, std::size_t tokens,
                    std::size_t context) {
  const std::size_t stretch = std::max<std::size_t>(1, plan.exact_newest);
  std::size_t bytes = tokens * internal::BytesPerToken(codec.kind, dim);
  if (codec.kind.own_centre) {
    const std::size_t centre = CentreBytes(dim);
    bytes += context == 0 ? (centre + stretch / 2) / stretch : tokens / stretch * centre;
  }
  if (context == 0) return bytes;
  // Of f16. The stretch that fills is half full in the mean.
  const std::size_t exact =
      std::min(plan.exact_first, tokens) + std::min(plan.exact_newest / 2, tokens);
  return bytes + exact * dim * 2;
}

// The room that K or V take of a context; context 0: of a token far from its ends.
Room RoomOf(const Plan& plan, std::size_t context, Tensor t) {
  Room room;
  std::size_t codec = static_cast<std::size_t>(t);
  for (std::size_t layer = 0; layer < plan.model.layers.size(); ++layer) {
    const LayerShape& shape = plan.model.layers[layer];
    if (!shape.owns_kv()) continue;
    const std::size_t dim = shape.dim(t),
                      tokens = context == 0 ? 1 : plan.model.tokens_held(layer, context);
    for (std::size_t head = 0; head < shape.kv_heads; ++head, codec += 2)
      room.bytes += BytesOf(plan, plan.codecs[codec], dim, tokens, context);
    room.numbers += tokens * shape.kv_heads * dim;
  }
  return room;
}

}  // namespace

kvmix_plan_size MeasurePlan(const Plan& plan, std::size_t context) {
  const Room k = RoomOf(plan, context, KVMIX_K), v = RoomOf(plan, context, KVMIX_V);
  return {sizeof(kvmix_plan_size), k.bytes, v.bytes, k.numbers, v.numbers};
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
  for (const LayerShape& shape : plan.model.layers) {
    for (const std::size_t x :
         {shape.kv_heads, shape.k_dim, shape.v_dim, shape.kv_layer.value_or(SIZE_MAX)}) {
      number(x);
    }
  }
  number(plan.exact_first);
  if (plan.exact_newest != 0) number(plan.exact_newest);
  for (const HeadCodec& codec : plan.codecs) {
    CodecKind decoded = codec.kind;
    decoded.shape = false;  // that only the encoder knows
    const std::string kind = internal::ToString(decoded);
    bytes(kind.data(), kind.size() + 1);  // with the 0 at its end
    floats({&codec.head_scale, 1});
    floats(codec.mean());
    floats(codec.factor());
  }
  return XXH3_64bits_digest(&hash);
}

}  // namespace kvmix::internal
