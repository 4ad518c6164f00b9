#include "kvmix/plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

namespace kvmix {

namespace {

struct NamedCodec {
  std::string_view name;
  Storage storage;
  ScaleKind scale;
  ScaleType scale_type;
};
// Every combination that can be stored.
constexpr std::array kNamedCodecs = {
    NamedCodec{"f16", Storage::kF16, ScaleKind::kNone, ScaleType::kF32},
    NamedCodec{"i8-head", Storage::kI8, ScaleKind::kHead, ScaleType::kF32},
    NamedCodec{"i8-token", Storage::kI8, ScaleKind::kToken, ScaleType::kF32},
    NamedCodec{"i8-token-bf16", Storage::kI8, ScaleKind::kToken, ScaleType::kBF16},
};
constexpr std::string_view kCentre = "+centre";

// Null: no such codec.
const NamedCodec* FindNamed(const HeadCodec& codec) {
  const auto it = std::find_if(kNamedCodecs.begin(), kNamedCodecs.end(), [&](const NamedCodec& n) {
    return n.storage == codec.storage && n.scale == codec.scale && n.scale_type == codec.scale_type;
  });
  return it == kNamedCodecs.end() ? nullptr : &*it;
}

Status CheckCodec(const HeadCodec& codec, std::size_t head_dim) {
  if (FindNamed(codec) == nullptr)
    return Status(ErrorCode::kInvalidArgument,
                  "expected a codec that exists, found a storage with a scale that it cannot have");
  if (codec.scale == ScaleKind::kHead &&
      !(codec.head_scale > 0.0f && std::isfinite(codec.head_scale))) {
    return Status(ErrorCode::kInvalidArgument,
                  fmt::format("expected a scale above 0, found {}", codec.head_scale));
  }
  if (codec.centred() && codec.storage == Storage::kF16) {
    return Status(
        ErrorCode::kInvalidArgument,
        fmt::format(
            "expected fp16 without a mean, found one of {} channels: only int8 rows are centred",
            codec.mean.size()));
  }
  if (codec.centred() && codec.mean.size() != head_dim) {
    return Status(
        ErrorCode::kInvalidArgument,
        fmt::format("expected a mean of {} channels, found {}", head_dim, codec.mean.size()));
  }
  for (std::size_t c = 0; c < codec.mean.size(); ++c) {
    if (!std::isfinite(codec.mean[c]))
      return Status(
          ErrorCode::kInvalidArgument,
          fmt::format("expected a finite mean, found {} in channel {}", codec.mean[c], c));
  }
  return {};
}

}  // namespace

Status CheckGeometry(const Geometry& g) {
  struct Bounded {
    const char* name;
    std::size_t value, most;
  };
  for (const auto& [name, value, most] :
       {Bounded{"layers", g.layers, kMaxCount}, Bounded{"kv_heads", g.kv_heads, kMaxCount},
        Bounded{"query_heads", g.query_heads, kMaxCount},
        Bounded{"head_dim", g.head_dim, kMaxHeadDim}}) {
    if (value == 0 || value > most)
      return Status(ErrorCode::kInvalidArgument,
                    fmt::format("{}: expected 1 to {}, found {}", name, most, value));
  }
  if (g.query_heads % g.kv_heads != 0) {
    return Status(ErrorCode::kInvalidArgument,
                  fmt::format("query_heads: expected a multiple of the {} KV heads, found {}",
                              g.kv_heads, g.query_heads));
  }
  return {};
}

std::string ToString(const Geometry& g) {
  return fmt::format("{} layers x {} KV heads x {}, {} query heads", g.layers, g.kv_heads,
                     g.head_dim, g.query_heads);
}

std::string CodecName(const HeadCodec& codec) {
  const NamedCodec* named = FindNamed(codec);
  return std::string(named != nullptr ? named->name : "invalid") +
         std::string(codec.centred() ? kCentre : "");
}

Result<CodecKind> ParseCodecName(std::string_view name) {
  const bool centred = name.ends_with(kCentre);
  const std::string_view base = name.substr(0, name.size() - (centred ? kCentre.size() : 0));
  for (const NamedCodec& n : kNamedCodecs) {
    if (n.name == base && !(centred && n.storage == Storage::kF16))
      return CodecKind{n.storage, n.scale, n.scale_type, centred};
  }
  return Status(ErrorCode::kInvalidArgument,
                fmt::format("codec: expected f16, or i8-head, i8-token or i8-token-bf16 with or "
                            "without +centre, found \"{}\"",
                            name));
}

CodecKind KindOf(const HeadCodec& codec) {
  return {codec.storage, codec.scale, codec.scale_type, codec.centred()};
}

std::size_t BytesPerToken(const CodecKind& kind, std::size_t head_dim) {
  if (kind.storage == Storage::kF16) return 2 * head_dim;
  const std::size_t scale_bytes = kind.scale != ScaleKind::kToken       ? 0
                                  : kind.scale_type == ScaleType::kBF16 ? 2
                                                                        : 4;
  return head_dim + scale_bytes;
}

Plan UniformPlan(const Geometry& geometry, const HeadCodec& k, const HeadCodec& v) {
  Plan plan;
  plan.geometry = geometry;
  plan.codecs.reserve(geometry.layers * geometry.kv_heads * 2);
  for (std::size_t i = 0; i < geometry.layers * geometry.kv_heads; ++i) {
    plan.codecs.push_back(k);
    plan.codecs.push_back(v);
  }
  return plan;
}

Status CheckPlan(const Plan& plan) {
  const Geometry& g = plan.geometry;
  if (Status s = CheckGeometry(g); !s.ok()) return s;
  const std::size_t expected = g.layers * g.kv_heads * 2;
  if (plan.codecs.size() != expected) {
    return Status(ErrorCode::kInvalidArgument,
                  fmt::format("codecs: expected {} ({}), found {}", expected, ToString(g),
                              plan.codecs.size()));
  }
  for (std::size_t i = 0; i < expected; ++i) {
    if (Status s = CheckCodec(plan.codecs[i], g.head_dim); !s.ok()) {
      return Status(s.code(), fmt::format("layer {}, KV head {}, {}: {}", i / 2 / g.kv_heads,
                                          i / 2 % g.kv_heads, i % 2 == 0 ? "K" : "V", s.message()));
    }
  }
  return {};
}

std::size_t BytesPerToken(const Plan& plan) {
  std::size_t bytes = 0;
  for (const HeadCodec& codec : plan.codecs)
    bytes += BytesPerToken(KindOf(codec), plan.geometry.head_dim);
  return bytes;
}

std::size_t Fp16BytesPerToken(const Geometry& g) {
  return g.layers * g.kv_heads * 2 * BytesPerToken(CodecKind{}, g.head_dim);
}

double SavedFraction(const Plan& plan) {
  return 1.0 - static_cast<double>(BytesPerToken(plan)) /
                   static_cast<double>(Fp16BytesPerToken(plan.geometry));
}

Status CheckGeometryMatches(const Plan& plan, const Geometry& geometry) {
  if (plan.geometry == geometry) return {};
  return Status(ErrorCode::kMismatch, fmt::format("plan: expected {}, found {}", ToString(geometry),
                                                  ToString(plan.geometry)));
}

}  // namespace kvmix
