#include "engines/common/plans.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include <fmt/format.h>

namespace kvmix::engine {
namespace {

bool IsLayer(const Model& model, std::size_t layer, const LayerShape& s) {
  if (layer >= model.layers.size()) return false;
  const LayerShape& of = model.layers[layer];
  return of.owns_kv() && of.kv_heads == s.kv_heads && of.query_heads == s.query_heads &&
         of.k_dim == s.k_dim && of.v_dim == s.v_dim;
}

Model ModelOf(const LayerShape& shape) { return Model{std::vector<LayerShape>{shape}}; }

// The default plan of the most bits that saves this much; nothing where none does.
std::optional<Plan> PlanFor(const Model& model, double budget) {
  for (const Storage storage :
       {KVMIX_STORAGE_I8, KVMIX_STORAGE_I6, KVMIX_STORAGE_I4, KVMIX_STORAGE_I3}) {
    const Plan plan = DefaultPlan(model, storage);
    if (CheckPlan(plan).ok() && SavedFraction(plan, Plans::kBudgetContext) >= budget) return plan;
  }
  return std::nullopt;
}

// The model of a plan, or what it was calibrated on.
std::string NameOf(const Plan& plan) {
  const Provenance& p = plan.provenance;
  return p.model.empty() ? "calibrated on " + p.calibration : p.model;
}

// The plans of a folder, or the file itself.
Result<std::vector<std::string>> FilesOf(const std::string& path) {
  std::error_code error;
  if (!std::filesystem::is_directory(path, error)) return std::vector<std::string>{path};
  std::vector<std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator(path, error)) {
    if (entry.path().extension() == ".json") files.push_back(entry.path().string());
  }
  if (error) return Status(ErrorCode::kIo, fmt::format("{}: {}", path, error.message()));
  if (files.empty()) {
    return Status(ErrorCode::kNotFound,
                  fmt::format("{}: expected a folder of plans, found no .json in it", path));
  }
  std::ranges::sort(files);
  return files;
}

// The parts of a list with colons; a path that exists is one, whatever its name.
std::vector<std::string> Split(const std::string& paths) {
  std::error_code error;
  if (std::filesystem::exists(paths, error)) return {paths};
  std::vector<std::string> parts;
  for (std::size_t begin = 0, end; begin <= paths.size(); begin = end + 1) {
    end = std::min(paths.find(':', begin), paths.size());
    if (end > begin) parts.push_back(paths.substr(begin, end - begin));
  }
  return parts;
}

}  // namespace

Status Plans::Add(const std::string& path) {
  Result<Plan> plan = LoadPlan(path);
  if (!plan.ok()) return plan.status();
  const std::vector<LayerShape>& layers = plan->model.layers;
  for (const Named& other : plans_) {
    for (std::size_t l = 0; l < layers.size(); ++l) {
      if (!layers[l].owns_kv() || !IsLayer(other.plan.model, l, layers[l])) continue;
      return {ErrorCode::kMismatch,
              fmt::format("{} and {}: expected plans of unlike layers, found layer {} alike: {}",
                          other.path, path, l, ToString(ModelOf(layers[l])))};
    }
  }
  plans_.push_back({path, std::move(*plan)});
  return {};
}

Result<Plans> Plans::Load(const std::string& paths) {
  Plans all;
  for (const std::string& part : Split(paths)) {
    const Result<std::vector<std::string>> files = FilesOf(part);
    if (!files.ok()) return files.status();
    for (const std::string& file : *files) {
      if (Status s = all.Add(file); !s.ok()) return s;
    }
  }
  if (!all.empty()) return all;
  return Status(ErrorCode::kInvalidArgument, fmt::format("expected a plan, found '{}'", paths));
}

const Plans::Named* Plans::Find(std::size_t layer, const LayerShape& shape) const {
  const auto it = std::ranges::find_if(
      plans_, [&](const Named& n) { return IsLayer(n.plan.model, layer, shape); });
  return it != plans_.end() ? &*it : nullptr;
}

Status Plans::Check(std::size_t layer, const LayerShape& shape) const {
  if (empty() && !codec_ && !PlanFor(ModelOf(shape), budget_)) {
    return {ErrorCode::kInfeasible,
            fmt::format("a budget of {}: expected at most what i3 saves of layer {}, {}", budget_,
                        layer, ToString(ModelOf(shape)))};
  }
  if (empty() || Find(layer, shape) != nullptr) return {};
  std::string found;
  for (const Named& n : plans_) {
    found += fmt::format("{}{}: a plan of {} ({})", found.empty() ? "" : "; ", n.path,
                         ToString(n.plan.model), NameOf(n.plan));
  }
  return {ErrorCode::kMismatch,
          fmt::format("{}; layer {} here is {}", found, layer, ToString(ModelOf(shape)))};
}

Plan Plans::OfLayer(std::size_t layer, const LayerShape& shape) const {
  const Model model = ModelOf(shape);
  const Named* const of = Find(layer, shape);
  if (of == nullptr)
    return codec_ ? UniformPlan(model, *codec_, *codec_) : *PlanFor(model, budget_);
  Plan one = UniformPlan(model, {}, {});
  one.exact_first = of->plan.exact_first;
  one.exact_newest = of->plan.exact_newest;
  for (std::size_t h = 0; h < shape.kv_heads; ++h) {
    for (const Tensor t : {KVMIX_K, KVMIX_V}) {
      one.codec(0, h, t) = of->plan.codec(layer, h, t);
    }
  }
  return one;
}

std::string Plans::LengthWarning(std::size_t layer, const LayerShape& shape,
                                 std::size_t context) const {
  const Named* const of = Find(layer, shape);
  if (of == nullptr || !IsFarBeyond(of->plan, context)) return "";
  return fmt::format(
      "a context of {} tokens, but the plan was calibrated on prompts of at most {}: it may be "
      "less "
      "accurate there. Calibrate on prompts as long as the ones that are served.",
      context, of->plan.provenance.longest_prompt);
}

std::string Plans::Summary() const {
  if (empty() && codec_) return ToString(codec_->kind) + " in all heads";
  if (empty()) {
    return budget_ == 0.0 ? "the default plan"
                          : fmt::format("{} % saved, without a plan", 100.0 * budget_);
  }
  std::string all;
  for (const Named& n : plans_) {
    all += fmt::format("{}{} ({})", all.empty() ? "" : ", ", n.path, NameOf(n.plan));
  }
  return all;
}

}  // namespace kvmix::engine
