// The plans that an engine was given, and the codecs of a layer by them.
#ifndef KVMIX_ENGINES_COMMON_PLANS_H_
#define KVMIX_ENGINES_COMMON_PLANS_H_

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include <kvmix/codec.h>
#include <kvmix/model.h>
#include <kvmix/plan.h>
#include <kvmix/status.h>

namespace kvmix::engine {

// An engine may run several models, a draft beside its target: each layer takes the plan of its
// shape. Without plans a layer takes the DefaultPlan that saves as much as was asked for, or has
// one codec in all heads.
class Plans {
 public:
  // paths: a plan, a folder of plans (*.json), or several of both with colons between them. Errors:
  // what LoadPlan refuses; no plan; two plans that have a layer alike, so that nothing tells which
  // of them a model is of.
  static Result<Plans> Load(const std::string& paths);
  Plans() = default;
  explicit Plans(const HeadCodec& codec) : codec_(codec) {}
  // The fraction of f16's bytes to save, at kBudgetContext tokens.
  explicit Plans(double budget) : budget_(budget) {}
  static constexpr std::size_t kBudgetContext = 4096;

  bool empty() const { return plans_.empty(); }
  bool has_codec() const { return codec_.has_value(); }
  bool has_budget() const { return budget_ != 0.0; }
  // There is a plan for this layer, or there are no plans, and its heads can be as small as was
  // asked for; an error names layer and plans.
  Status Check(std::size_t layer, const LayerShape& shape) const;
  // A plan of this layer alone, which Check accepts.
  Plan OfLayer(std::size_t layer, const LayerShape& shape) const;
  // One line where the context is far beyond the calibration of the layer's plan; else empty.
  std::string LengthWarning(std::size_t layer, const LayerShape& shape, std::size_t context) const;
  // "plan.json (Qwen2.5-1.5B)", or "f16 in all heads".
  std::string Summary() const;

 private:
  struct Named {
    std::string path;
    Plan plan;
  };
  const Named* Find(std::size_t layer, const LayerShape& shape) const;
  Status Add(const std::string& path);

  std::vector<Named> plans_;
  std::optional<HeadCodec> codec_;
  double budget_ = 0.0;
};

}  // namespace kvmix::engine

#endif  // KVMIX_ENGINES_COMMON_PLANS_H_
