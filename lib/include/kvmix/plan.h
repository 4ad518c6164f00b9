// A plan: which codec every KV head's K and V is stored with. Made by the tuner
// (kvmix/tune/tune.h) or by hand, portable between machines, saved as JSON.
#ifndef KVMIX_PLAN_H_
#define KVMIX_PLAN_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kvmix/codec.h"
#include "kvmix/export.h"
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

inline constexpr std::size_t kMostExactFirst = KVMIX_MOST_EXACT_FIRST;

struct Plan {
  Model model;
  std::vector<HeadCodec> codecs;  // [layers that own K and V][kv_heads][K, V]
  Provenance provenance;
  // The first tokens of every layer, which take much of the attention (sinks), are kept in f16
  // beside their codes, and attended to exactly. At most kMostExactFirst.
  std::size_t exact_first = 0;

  // Of a layer that reads another's K and V: the other's. A layer without any is a bug.
  HeadCodec& codec(std::size_t layer, std::size_t kv_head, Tensor t) {
    return codecs[index(layer, kv_head, t)];
  }
  const HeadCodec& codec(std::size_t layer, std::size_t kv_head, Tensor t) const {
    return codecs[index(layer, kv_head, t)];
  }
  KVMIX_API std::size_t index(std::size_t layer, std::size_t kv_head, Tensor t) const;
};

// All heads alike. K without centring or rotation (a plain "i8-token") ruins models whose keys have
// a bias, as those of Qwen2 and Qwen2.5: give such models a plan of kvmix-tune.
KVMIX_API Plan UniformPlan(const Model& model, const HeadCodec& k, const HeadCodec& v);

// A valid model, codecs of the right number, every codec whole (CheckCodec).
KVMIX_API Status CheckPlan(const Plan& plan);

// A hash of all that decides what stored bytes mean: the model's shape and the codecs with their
// numbers, not the provenance. The same on every machine.
KVMIX_API std::uint64_t Fingerprint(const Plan& plan);

// Bytes that a context of so many tokens takes over all layers and heads; of the same in fp16; and
// the fraction of the latter that the plan saves. Layers that share K and V count once, one with a
// window holds at most the window, exact first tokens count beside their codes. Context 0: of a
// token alone.
KVMIX_API std::size_t ContextBytes(const Plan& plan, std::size_t context);
KVMIX_API std::size_t Fp16ContextBytes(const Model& model, std::size_t context);
KVMIX_API double SavedFraction(const Plan& plan, std::size_t context = 0);
// Bits that a stored number takes with its share of the scales: 8 * bytes / numbers, of the same
// context. fp16 is 16, an i8 with an f32 scale per token 8 + 32 / head_dim.
struct EffectiveBits {
  double k = 0.0, v = 0.0, all = 0.0;
};
KVMIX_API EffectiveBits BitsPerNumber(const Plan& plan, std::size_t context = 0);
// Of one token, which every window lets through.
KVMIX_API std::size_t BytesPerToken(const Plan& plan);
KVMIX_API std::size_t Fp16BytesPerToken(const Model& model);

// Means, folds and queries of short prompts are not those of long ones: RoPE slowly turns channels.
// A context of more than kFarBeyondCalibration times the calibration's longest prompt deserves a
// warning. False if the plan does not say what it was calibrated on.
inline constexpr std::size_t kFarBeyondCalibration = 4;
inline bool IsFarBeyond(const Plan& plan, std::size_t context) {
  const std::size_t longest = plan.provenance.longest_prompt;
  return longest != 0 && context > kFarBeyondCalibration * longest;
}

// JSON, and where K has the step +shape a safetensors file of matrices in the same folder, which
// the JSON names with its hash: move and copy both. If `path` is a symbolic link, Save writes both
// where it leads to, and Load looks for the matrices beside the link and then there. Save writes a
// temporary file and renames it, so that the plan is whole or untouched; the matrices of a plan
// that was there before stay. kInvalidArgument: a plan with +shape for a device or a pipe, which
// has no file beside it; /dev/null takes it. Load refuses a newer major version, unknown codecs, a
// matrix file that is missing or another one, and anything that CheckPlan refuses, naming the file.
KVMIX_API Status SavePlan(const Plan& plan, const std::string& path);
KVMIX_API Result<Plan> LoadPlan(const std::string& path);
// The plan fits this model; else an error naming both.
KVMIX_API Status CheckModelMatches(const Plan& plan, const Model& model);

}  // namespace kvmix

#endif  // KVMIX_PLAN_H_
