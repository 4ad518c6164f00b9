// A plan: which codec every KV head's K and V is stored with. Made by the tuner
// (kvmix/tune/tune.h) or by hand, portable between machines, saved as JSON.
#ifndef KVMIX_PLAN_H_
#define KVMIX_PLAN_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "kvmix/codec.h"
#include "kvmix/kvmix.h"
#include "kvmix/model.h"
#include "kvmix/status.h"

namespace kvmix {

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

namespace internal {

inline kvmix_fidelity ViewOf(const Fidelity& f) {
  return {f.worst_cosine, f.mean_cosine, f.worst_nmse,
          f.mean_nmse,    f.worst_layer, f.worst_query_head};
}

inline Fidelity ValueOf(const kvmix_fidelity& f) {
  return {f.worst_cosine, f.mean_cosine, f.worst_nmse,
          f.mean_nmse,    f.worst_layer, f.worst_query_head};
}

inline kvmix_provenance ViewOf(const Provenance& p) {
  return {sizeof(kvmix_provenance), p.model.c_str(),          p.calibration.c_str(),
          p.holdout.c_str(),        p.calibration_tokens,     p.longest_prompt,
          p.holdout_tokens,         ViewOf(p.on_calibration), ViewOf(p.on_holdout)};
}

inline Provenance ValueOf(const kvmix_provenance& p) {
  const auto text = [](const char* t) { return std::string(t != nullptr ? t : ""); };
  return {text(p.model),   text(p.calibration), p.calibration_tokens,      p.longest_prompt,
          text(p.holdout), p.holdout_tokens,    ValueOf(p.on_calibration), ValueOf(p.on_holdout)};
}

}  // namespace internal

inline constexpr std::size_t kMostExactFirst = KVMIX_MOST_EXACT_FIRST;

struct Plan {
  Model model;
  std::vector<HeadCodec> codecs;  // [layers that own K and V][kv_heads][K, V]
  Provenance provenance;
  // The first tokens of every layer, which take much of the attention (sinks), are kept in f16
  // beside their codes, and attended to exactly. At most kMostExactFirst.
  std::size_t exact_first = 0;
  // Tokens of a stretch: 16, 32, 64, 128, 256, or 0 for none. The tokens of every layer stand in
  // stretches [0, n), [n, 2n), ... A stretch is kept in f16, and encoded when its last token has
  // come. A query sees the stretch that it stands in exactly, and so a stretch that is not encoded;
  // all others as encoded. So its place alone decides what it sees, whatever the chunks.
  std::size_t exact_newest = 0;

  // Of a layer that reads another's K and V: the other's. A layer without any is a bug.
  HeadCodec& codec(std::size_t layer, std::size_t kv_head, Tensor t) {
    return codecs[index(layer, kv_head, t)];
  }
  const HeadCodec& codec(std::size_t layer, std::size_t kv_head, Tensor t) const {
    return codecs[index(layer, kv_head, t)];
  }
  std::size_t index(std::size_t layer, std::size_t kv_head, Tensor t) const {
    if (layer >= model.layers.size() || kv_head >= model.layers[layer].kv_heads) {
      internal::Stop("a layer and KV head of the plan",
                     "layer " + std::to_string(layer) + ", KV head " + std::to_string(kv_head));
    }
    return (model.kv_heads_before(model.kv_layer(layer)) + kv_head) * 2 +
           static_cast<std::size_t>(t);
  }
};

// All heads alike. K without centring or rotation (a plain "i8-token") ruins models whose keys have
// a bias, as those of Qwen2 and Qwen2.5: give such models a DefaultPlan, or one of kvmix-tune.
inline Plan UniformPlan(const Model& model, const HeadCodec& k, const HeadCodec& v) {
  Plan plan{model, {}, {}};
  for (std::size_t i = model.kv_heads_before(model.layers.size()); i > 0; --i) {
    plan.codecs.insert(plan.codecs.end(), {k, v});
  }
  return plan;
}

// The plan for a model that nobody has calibrated: codes of this storage with an own centre of K,
// rotated, in stretches of 64 tokens, and 4 exact first tokens.
inline Plan DefaultPlan(const Model& model, Storage storage = KVMIX_STORAGE_I8) {
  const CodecKind k{
      .storage = storage, .scale = KVMIX_SCALE_TOKEN_BF16, .hadamard = true, .own_centre = true};
  CodecKind v = k;
  v.own_centre = false;
  Plan plan = UniformPlan(model, {k}, {v});
  plan.exact_first = 4;
  plan.exact_newest = 64;
  return plan;
}

namespace internal {

struct DestroyPlan {
  void operator()(kvmix_plan* plan) const { kvmix_plan_destroy(plan); }
};
using PlanHandle = std::unique_ptr<kvmix_plan, DestroyPlan>;

// Errors: all that makes a plan invalid.
inline Result<PlanHandle> HandleOf(const Plan& plan) {
  const std::vector<kvmix_layer> layers = ViewOf(plan.model);
  kvmix_plan* made = nullptr;
  CallError error;
  Status s = error.Of(kvmix_plan_create(layers.data(), layers.size(), &made, error));
  if (!s.ok()) return s;
  PlanHandle handle(made);
  s = error.Of(kvmix_plan_set_exact_first(made, plan.exact_first, error));
  if (s.ok()) s = error.Of(kvmix_plan_set_exact_newest(made, plan.exact_newest, error));
  if (!s.ok()) return s;
  const std::size_t expected = 2 * plan.model.kv_heads_before(layers.size());
  if (plan.codecs.size() != expected) {
    return Status(ErrorCode::kInvalidArgument, "codecs: expected " + std::to_string(expected) +
                                                   " (" + ToString(plan.model) + "), found " +
                                                   std::to_string(plan.codecs.size()));
  }
  auto codec = plan.codecs.begin();
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    const std::size_t heads = plan.model.layers[layer].owns_kv() ? layers[layer].kv_heads : 0;
    for (std::size_t i = 0; i < 2 * heads; ++i, ++codec) {
      const kvmix_codec view = ViewOf(*codec);
      const Tensor tensor = i % 2 == 0 ? KVMIX_K : KVMIX_V;
      s = error.Of(kvmix_plan_set_codec(made, layer, i / 2, tensor, &view, error));
      if (!s.ok()) return s;
    }
  }
  const kvmix_provenance provenance = ViewOf(plan.provenance);
  s = error.Of(kvmix_plan_set_provenance(made, &provenance, error));
  if (!s.ok()) return s;
  return handle;
}

// A live handle's plan.
inline Plan ValueOf(const kvmix_plan* handle) {
  Plan plan;
  for (std::size_t i = 0; i < kvmix_plan_layers(handle); ++i) {
    kvmix_layer layer = KVMIX_INIT(kvmix_layer);
    (void)kvmix_plan_layer(handle, i, &layer, nullptr);
    plan.model.layers.push_back(ValueOf(layer));
    for (std::size_t c = 0; layer.reads == 0 && c < 2 * layer.kv_heads; ++c) {
      kvmix_codec codec = KVMIX_INIT(kvmix_codec);
      (void)kvmix_plan_codec(handle, i, c / 2, c % 2 == 0 ? KVMIX_K : KVMIX_V, &codec, nullptr);
      plan.codecs.push_back(ValueOf(codec));
    }
  }
  kvmix_provenance provenance = KVMIX_INIT(kvmix_provenance);
  (void)kvmix_plan_provenance(handle, &provenance, nullptr);
  plan.provenance = ValueOf(provenance);
  plan.exact_first = kvmix_plan_exact_first(handle);
  plan.exact_newest = kvmix_plan_exact_newest(handle);
  return plan;
}

inline kvmix_plan_size SizeOf(const Plan& plan, std::size_t context) {
  kvmix_plan_size size = KVMIX_INIT(kvmix_plan_size);
  (void)kvmix_plan_measure(HandleOf(plan).value().get(), context, &size, nullptr);
  return size;
}

}  // namespace internal

// A valid model, codecs of the right number, every codec whole (CheckCodec). The functions below
// that return no Status take such a plan; another one is a bug, and stops the program.
inline Status CheckPlan(const Plan& plan) { return internal::HandleOf(plan).status(); }

// A hash of all that decides the meaning of stored bytes: the model's shape and the codecs with
// their numbers, not the provenance. The same on every machine.
inline std::uint64_t Fingerprint(const Plan& plan) {
  return kvmix_plan_fingerprint(internal::HandleOf(plan).value().get());
}

// Bytes of a context over all layers and heads; of the same in fp16; and the fraction of the latter
// that the plan saves. Layers that share K and V count once, one with a window holds at most the
// window, exact first tokens count beside their codes. Context 0: one token that every window lets
// through.
inline std::size_t ContextBytes(const Plan& plan, std::size_t context) {
  const kvmix_plan_size size = internal::SizeOf(plan, context);
  return size.k_bytes + size.v_bytes;
}
inline std::size_t Fp16ContextBytes(const Model& model, std::size_t context) {
  const kvmix_plan_size size = internal::SizeOf(UniformPlan(model, {}, {}), context);
  return 2 * (size.k_numbers + size.v_numbers);
}
inline double SavedFraction(const Plan& plan, std::size_t context = 0) {
  return 1.0 - static_cast<double>(ContextBytes(plan, context)) /
                   static_cast<double>(Fp16ContextBytes(plan.model, context));
}
inline std::size_t BytesPerToken(const Plan& plan) { return ContextBytes(plan, 0); }
inline std::size_t Fp16BytesPerToken(const Model& model) { return Fp16ContextBytes(model, 0); }

// Bits that a stored number takes with its share of the scales: 8 * bytes / numbers, of the same
// context. fp16 is 16, an i8 with an f32 scale per token 8 + 32 / head_dim.
struct EffectiveBits {
  double k = 0.0, v = 0.0, all = 0.0;
};
inline EffectiveBits BitsPerNumber(const Plan& plan, std::size_t context = 0) {
  const kvmix_plan_size size = internal::SizeOf(plan, context);
  const auto bits = [](std::uint64_t bytes, std::uint64_t numbers) {
    return 8.0 * static_cast<double>(bytes) / static_cast<double>(numbers);
  };
  return {bits(size.k_bytes, size.k_numbers), bits(size.v_bytes, size.v_numbers),
          bits(size.k_bytes + size.v_bytes, size.k_numbers + size.v_numbers)};
}

// Means of short prompts are not those of long ones: RoPE slowly turns channels.
// A context of more than kFarBeyondCalibration times the calibration's longest prompt deserves a
// warning. False if the plan does not say what it was calibrated on, or has no calibrated mean.
inline constexpr std::size_t kFarBeyondCalibration = 4;
inline bool IsFarBeyond(const Plan& plan, std::size_t context) {
  const std::size_t longest = plan.provenance.longest_prompt;
  return longest != 0 && context > kFarBeyondCalibration * longest &&
         std::any_of(plan.codecs.begin(), plan.codecs.end(),
                     [](const HeadCodec& codec) { return codec.kind.centre; });
}

// JSON, and where K has the step +shape a safetensors file of matrices in the same folder, which
// the JSON names with its hash: move and copy both. If `path` is a symbolic link, Save writes both
// where it leads to, and Load looks for the matrices beside the link and then there. Save writes a
// temporary file and renames it, so that the plan is whole or untouched; the matrices of a plan
// that was there before stay. kInvalidArgument: a plan with +shape for a device or a pipe, which
// has no file beside it; /dev/null takes it. Load and Parse refuse a newer major version, unknown
// codecs, a matrix file that is missing or another one, and anything that CheckPlan refuses, naming
// the file.
inline Status SavePlan(const Plan& plan, const std::string& path) {
  const Result<internal::PlanHandle> handle = internal::HandleOf(plan);
  if (!handle.ok()) {
    return Status(handle.status().code(), path + ": " + handle.status().message());
  }
  internal::CallError error;
  return error.Of(kvmix_plan_save(handle->get(), path.c_str(), error));
}
inline Result<Plan> LoadPlan(const std::string& path) {
  kvmix_plan* plan = nullptr;
  internal::CallError error;
  const Status s = error.Of(kvmix_plan_load(path.c_str(), &plan, error));
  const internal::PlanHandle handle(plan);
  if (!s.ok()) return s;
  return internal::ValueOf(plan);
}
// The text of such a file. folder: the place of the matrices; "": a plan with any is refused.
inline Result<Plan> ParsePlan(std::string_view text, const std::string& folder = {}) {
  kvmix_plan* plan = nullptr;
  internal::CallError error;
  const char* const place = folder.empty() ? nullptr : folder.c_str();
  const Status s = error.Of(kvmix_plan_parse(text.data(), text.size(), place, &plan, error));
  const internal::PlanHandle handle(plan);
  if (!s.ok()) return s;
  return internal::ValueOf(plan);
}

}  // namespace kvmix

#endif  // KVMIX_PLAN_H_
