// A plan: which codec every KV head's K and V is stored with. Made by the tuner (kvmix/tune.h) or
// by hand, portable between machines, saved as JSON.
#ifndef KVMIX_PLAN_H_
#define KVMIX_PLAN_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kvmix/export.h"
#include "kvmix/status.h"

namespace kvmix {

// The shape of a model's attention. query_heads is a multiple of kv_heads; their ratio is the GQA
// group.
struct Geometry {
  std::size_t layers = 0;
  std::size_t kv_heads = 0;
  std::size_t query_heads = 0;
  std::size_t head_dim = 0;

  std::size_t group() const { return query_heads / kv_heads; }
  bool operator==(const Geometry&) const = default;
};

// Upper bound of head_dim: i32 sums of 16-bit by 8-bit products stay exact up to here.
inline constexpr std::size_t kMaxHeadDim = 512;

// Upper bound of layers and of heads, far beyond any model: products of a geometry's numbers stay
// far below 2^64.
inline constexpr std::size_t kMaxCount = 65536;

// Every number > 0, query_heads a multiple of kv_heads, head_dim <= kMaxHeadDim, the others <=
// kMaxCount; else an error naming the number.
KVMIX_API Status CheckGeometry(const Geometry& geometry);
// "24 layers x 2 KV heads x 64, 14 query heads"
KVMIX_API std::string ToString(const Geometry& geometry);

enum class Tensor : std::uint8_t { kK, kV };

enum class Storage : std::uint8_t { kF16, kI8 };
enum class ScaleKind : std::uint8_t {
  kNone,   // f16 storage
  kHead,   // one per KV head, fixed by the plan ("global" in the study); values beyond it saturate
  kToken,  // one per token and KV head, stored beside the codes
};
enum class ScaleType : std::uint8_t { kF32, kBF16 };  // of a stored scale; bf16 is rounded up

// How one KV head's K or V is stored: y = x - mean; code = round-to-nearest-even(y / scale) in
// [-127, 127]; x' = mean + scale * code.
struct HeadCodec {
  Storage storage = Storage::kF16;
  ScaleKind scale = ScaleKind::kNone;
  ScaleType scale_type = ScaleType::kF32;
  float head_scale = 0.0f;  // kHead: the scale itself (absmax of the calibration / 127)
  // Centring (kI8 only): a mean per channel, [head_dim], or empty. At attention K's mean costs
  // nothing: q . mean is the same for all keys of a row, and softmax does not see it. V's mean is
  // added to the output.
  std::vector<float> mean = {};

  bool centred() const { return !mean.empty(); }
  bool operator==(const HeadCodec&) const = default;
};

// "f16", "i8-head", "i8-token", "i8-token-bf16"; with "+centre" behind an int8 one where a mean is
// subtracted.
KVMIX_API std::string CodecName(const HeadCodec& codec);
// The inverse, without the numbers: "+centre" gives an empty mean of no meaning yet, so `centred`
// says it.
struct CodecKind {
  Storage storage = Storage::kF16;
  ScaleKind scale = ScaleKind::kNone;
  ScaleType scale_type = ScaleType::kF32;
  bool centred = false;
  bool operator==(const CodecKind&) const = default;
};
KVMIX_API Result<CodecKind> ParseCodecName(std::string_view name);
KVMIX_API CodecKind KindOf(const HeadCodec& codec);

// Bytes that one token of one KV head's K or V takes in the canonical form (codes and stored
// scales).
KVMIX_API std::size_t BytesPerToken(const CodecKind& kind, std::size_t head_dim);

// Accuracy of a plan on one set of dumps: over all query heads, of attention outputs against exact
// K and V.
struct Fidelity {
  double worst_cosine = 1.0;  // of the worst query head
  double mean_cosine = 1.0;
  double worst_nmse = 0.0;
  double mean_nmse = 0.0;
  std::size_t worst_layer = 0;  // of the worst cosine
  std::size_t worst_query_head = 0;
};

// Where a plan's numbers come from. Empty strings and zeros where unknown.
struct Provenance {
  std::string model;
  std::string calibration;  // names of the dumps, comma-separated
  std::size_t calibration_tokens = 0;
  std::size_t longest_prompt = 0;  // the context that the calibration covers
  std::string holdout;
  std::size_t holdout_tokens = 0;
  Fidelity on_calibration;
  Fidelity on_holdout;
};

struct Plan {
  Geometry geometry;
  std::vector<HeadCodec> codecs;  // [layers][kv_heads][K, V]
  Provenance provenance;

  HeadCodec& codec(std::size_t layer, std::size_t kv_head, Tensor t) {
    return codecs[(layer * geometry.kv_heads + kv_head) * 2 + static_cast<std::size_t>(t)];
  }
  const HeadCodec& codec(std::size_t layer, std::size_t kv_head, Tensor t) const {
    return const_cast<Plan*>(this)->codec(layer, kv_head, t);
  }
};

// All heads alike. head_scale and mean, where the kinds need them, are the caller's to fill in.
KVMIX_API Plan UniformPlan(const Geometry& geometry, const HeadCodec& k, const HeadCodec& v);

// A valid geometry, codecs of the right number, every codec whole (head_scale > 0 and finite, means
// of head_dim finite numbers, none with fp16).
KVMIX_API Status CheckPlan(const Plan& plan);

// Bytes of one token over all layers and heads; of the same in fp16; and the fraction of the latter
// that the plan saves.
KVMIX_API std::size_t BytesPerToken(const Plan& plan);
KVMIX_API std::size_t Fp16BytesPerToken(const Geometry& geometry);
KVMIX_API double SavedFraction(const Plan& plan);

// JSON. Save writes a temporary file beside `path` and renames it, so that `path` is whole or
// untouched. Load refuses a newer major version, unknown codecs and anything that CheckPlan
// refuses, naming the file.
KVMIX_API Status SavePlan(const Plan& plan, const std::string& path);
KVMIX_API Result<Plan> LoadPlan(const std::string& path);
// The plan fits this model; else an error naming both geometries.
KVMIX_API Status CheckGeometryMatches(const Plan& plan, const Geometry& geometry);

}  // namespace kvmix

#endif  // KVMIX_PLAN_H_
