// Plans as JSON, written and read: docs/formats.md shows one and says what its fields mean. A newer
// minor version may add fields, which are ignored here; 1.1 added the steps fold and hadamard, 1.2
// layers that differ and exact_first, 1.3 i4, 1.4 i6, i3 and shape, 1.5 operands of 8 bits, 1.6
// exact_newest and own-centre.
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "lib/files/file.h"
#include "lib/files/json_view.h"
#include "lib/plan/model_json.h"
#include "lib/plan/plan.h"
#include "lib/plan/shaping_file.h"

namespace kvmix::internal {
namespace {

constexpr std::string_view kFormat = "kvmix-plan";
constexpr std::size_t kMajor = 1;
constexpr std::size_t kMinor = 1, kMinorOfLayers = 2,  // and of exact_first
    kMinorOfShaping = 4, kMinorOfOperands = 5,         // and of all below i8, as they are now
    kMinorOfNewest = 6;

constexpr std::pair<const char*, double Fidelity::*> kErrors[] = {
    {"worst_cosine", &Fidelity::worst_cosine},
    {"mean_cosine", &Fidelity::mean_cosine},
    {"worst_nmse", &Fidelity::worst_nmse},
    {"mean_nmse", &Fidelity::mean_nmse}};

// ---- writing
// By hand: a head is one line, and a float has the nine digits that give it back exactly.

std::string VectorText(std::span<const float> vector, std::string_view key, std::string_view name) {
  if (vector.empty()) return "";
  return fmt::format(", \"{}_{}\": [{:.9g}]", key, name, fmt::join(vector, ", "));
}

std::string CodecText(const HeadCodec& codec, std::string_view key) {
  std::string text = fmt::format("\"{}\": \"{}\"", key, internal::ToString(codec.kind));
  if (codec.kind.scale == KVMIX_SCALE_HEAD)
    text += fmt::format(", \"{}_scale\": {:.9g}", key, codec.head_scale);
  return text + VectorText(codec.mean(), key, "mean") + VectorText(codec.factor(), key, "factor");
}

std::string CodecsText(const Plan& plan) {
  std::vector<std::string> layers;
  auto codec = plan.codecs.begin();
  for (const LayerShape& shape : plan.model.layers) {
    std::vector<std::string> heads;
    for (std::size_t head = 0; shape.owns_kv() && head < shape.kv_heads; ++head, codec += 2) {
      heads.push_back(
          fmt::format("{{{}, {}}}", CodecText(codec[0], "k"), CodecText(codec[1], "v")));
    }
    layers.push_back(shape.owns_kv() ? fmt::format("    [{}]", fmt::join(heads, ",\n     "))
                                     : "    null");
  }
  return fmt::format("{}", fmt::join(layers, ",\n"));
}

std::string ModelText(const Model& model) {
  const std::optional<Geometry> g = model.geometry();
  if (!g) return "\"layers\": " + internal::LayersText(model);
  return fmt::format(
      R"("geometry": {{"layers": {}, "kv_heads": {}, "query_heads": {}, "head_dim": {}}})",
      g->layers, g->kv_heads, g->query_heads, g->head_dim);
}

std::string FidelityText(const Fidelity& f, std::string_view name) {
  std::string text = fmt::format("\n    \"{}\": {{", name);
  for (const auto& [key, error] : kErrors) text += fmt::format("\"{}\": {}, ", key, f.*error);
  return text + fmt::format("\"worst_layer\": {}, \"worst_query_head\": {}}}", f.worst_layer,
                            f.worst_query_head);
}

// Only what was measured.
std::string AccuracyText(const Provenance& p) {
  std::vector<std::string> measured;
  if (p.calibration_tokens > 0) measured.push_back(FidelityText(p.on_calibration, "calibration"));
  if (p.holdout_tokens > 0) measured.push_back(FidelityText(p.on_holdout, "holdout"));
  return fmt::format("{{{}{}}}", fmt::join(measured, ","), measured.empty() ? "" : "\n  ");
}

// The oldest minor version that has a codec.
std::size_t MinorOf(const CodecKind& kind) {
  switch (kind.storage) {
    case KVMIX_STORAGE_F16:
      return kMinor;
    case KVMIX_STORAGE_I8:
      if (kind.operands != KVMIX_OPERANDS_USUAL) break;
      return kind.shape ? kMinorOfShaping : kMinor;
    case KVMIX_STORAGE_I6:  // the names of these three meant operands of 16 bits before
    case KVMIX_STORAGE_I4:
    case KVMIX_STORAGE_I3:
      break;
  }
  return kMinorOfOperands;
}

// The oldest minor version that has all that the plan says.
std::size_t MinorOf(const Plan& plan) {
  if (plan.exact_newest != 0) return kMinorOfNewest;
  std::size_t minor = plan.model.geometry() && plan.exact_first == 0 ? kMinor : kMinorOfLayers;
  for (const HeadCodec& codec : plan.codecs) minor = std::max(minor, MinorOf(codec.kind));
  return minor;
}

std::string ShapingText(const std::string& file, const std::string& hash) {
  return fmt::format("\n  \"shaping\": {{\"file\": {}, \"xxh3\": \"{}\"}},", JsonText(file), hash);
}

// shaping: a line, or nothing.
std::string PlanText(const Plan& plan, const std::string& shaping) {
  const Provenance& p = plan.provenance;
  const kvmix_plan_size size = MeasurePlan(plan, 0);
  const double saved = 1.0 - static_cast<double>(size.k_bytes + size.v_bytes) /
                                 static_cast<double>(2 * (size.k_numbers + size.v_numbers));
  return fmt::format(
      R"({{
  "format": "{}",
  "version": [{}, {}],
  {},{}{}{}
  "bytes_per_token": {},
  "saved_fraction": {},
  "provenance": {{"model": {}, "calibration": {}, "calibration_tokens": {}, "longest_prompt": {}, )"
      R"("holdout": {}, "holdout_tokens": {}}},
  "accuracy": {},
  "codecs": [
{}
  ]
}}
)",
      kFormat, kMajor, MinorOf(plan), ModelText(plan.model),
      plan.exact_first == 0 ? "" : fmt::format("\n  \"exact_first\": {},", plan.exact_first),
      plan.exact_newest == 0 ? "" : fmt::format("\n  \"exact_newest\": {},", plan.exact_newest),
      shaping, size.k_bytes + size.v_bytes, saved, JsonText(p.model), JsonText(p.calibration),
      p.calibration_tokens, p.longest_prompt, JsonText(p.holdout), p.holdout_tokens,
      AccuracyText(p), CodecsText(plan));
}

bool IsFinite(const Fidelity& f) {
  return std::ranges::all_of(kErrors, [&](auto& error) { return std::isfinite(f.*error.second); });
}

// ---- reading

HeadCodec ReadCodec(const JsonView& head, const std::string& key, std::size_t minor) {
  const std::string name = head[key].Text();
  const Result<CodecKind> kind = internal::ParseCodecKind(name);
  if (!kind.ok()) {
    head[key].Fail(ErrorCode::kCorrupt, "a codec that this version knows", internal::Quoted(name));
    return {};
  }
  HeadCodec codec{*kind};
  // Before there was a choice, all operands had 16 bits.
  if (minor < kMinorOfOperands && OperandBits(*kind) == 8) codec.kind.operands = KVMIX_OPERANDS_16;
  if (kind->scale == KVMIX_SCALE_HEAD) codec.head_scale = head[key + "_scale"].Float();
  CodecVectors vectors;
  if (kind->centre) vectors.mean = head[key + "_mean"].Floats();
  if (kind->fold) vectors.factor = head[key + "_factor"].Floats();
  if (kind->centre || kind->fold)
    codec.vectors = std::make_shared<const CodecVectors>(std::move(vectors));
  return codec;
}

Model ReadModel(const JsonView& root) {
  if (root.has("layers")) return internal::ReadLayers(root["layers"]);
  const JsonView geometry = root["geometry"];
  const Geometry g{geometry["layers"].Count(), geometry["kv_heads"].Count(),
                   geometry["query_heads"].Count(), geometry["head_dim"].Count()};
  // Memory grows with what the file holds, never with what it claims.
  return root["codecs"].HasSize(g.layers, "layers") ? Model(g) : Model();
}

std::vector<HeadCodec> ReadCodecs(const JsonView& layers, const Model& model, std::size_t minor) {
  std::vector<HeadCodec> codecs;
  if (!layers.HasSize(model.layers.size(), "layers")) return codecs;
  for (std::size_t layer = 0; layer < model.layers.size(); ++layer) {
    const LayerShape& shape = model.layers[layer];
    const JsonView heads = layers[layer];
    if (!shape.owns_kv()) {
      if (!heads.is_null())
        heads.Fail(ErrorCode::kCorrupt, "null, as the layer has no K and V of its own", "codecs");
      continue;
    }
    if (!heads.HasSize(shape.kv_heads, "KV heads")) return codecs;
    for (std::size_t head = 0; head < shape.kv_heads; ++head) {
      for (const char* key : {"k", "v"}) codecs.push_back(ReadCodec(heads[head], key, minor));
    }
  }
  return codecs;
}

std::string Beside(const std::string& path, const std::string& file) {
  return (std::filesystem::path(path).parent_path() / file).string();
}

// Where the matrices of a plan are: in the folder of `plan_path`, or, if that is a link, in the
// folder of the real file.
std::string FindMatrices(const std::string& plan_path, const std::string& file) {
  const std::string beside = Beside(plan_path, file);
  std::error_code ignored;
  if (std::filesystem::exists(beside, ignored)) return beside;
  return Beside(RealPath(plan_path), file);
}

Status ReadShaping(const JsonView& root, const std::string& plan_path,
                   const std::optional<std::string>& place, Plan* plan) {
  if (!internal::HasShaping(*plan)) return {};
  const JsonView shaping = root["shaping"];
  const std::string file = shaping["file"].Text(), hash = shaping["xxh3"].Text();
  if (file.empty() || hash.empty()) return {};  // said already
  if (std::filesystem::path(file).filename().string() != file)
    return FileError(ErrorCode::kCorrupt, plan_path, "shaping.file", "the name of a file beside it",
                     internal::Quoted(file));
  if (place.has_value()) return LoadShaping(FindMatrices(*place, file), hash, plan);
  return FileError(ErrorCode::kInvalidArgument, plan_path, "shaping",
                   "a folder that holds the matrices", "none");
}

Fidelity ReadFidelity(const JsonView& accuracy, const std::string& key) {
  Fidelity fidelity;
  if (!accuracy.has(key)) return fidelity;
  const JsonView f = accuracy[key];
  for (const auto& [name, error] : kErrors) fidelity.*error = f[name].Number();
  fidelity.worst_layer = f["worst_layer"].Count();
  fidelity.worst_query_head = f["worst_query_head"].Count();
  return fidelity;
}

Provenance ReadProvenance(const JsonView& root) {
  Provenance p;
  if (root.has("provenance")) {
    const JsonView from = root["provenance"];
    p.model = from["model"].Text();
    p.calibration = from["calibration"].Text();
    p.calibration_tokens = from["calibration_tokens"].Count();
    p.longest_prompt = from["longest_prompt"].Count();
    p.holdout = from["holdout"].Text();
    p.holdout_tokens = from["holdout_tokens"].Count();
  }
  if (root.has("accuracy")) {
    p.on_calibration = ReadFidelity(root["accuracy"], "calibration");
    p.on_holdout = ReadFidelity(root["accuracy"], "holdout");
  }
  return p;
}

// place: a path in the folder of the matrices, if that is known.
Result<Plan> ReadPlan(const nlohmann::json& document, const std::string& path,
                      const std::optional<std::string>& place) {
  Status status;
  const JsonView root(document, path, &status);
  CheckVersion(root, kFormat, kMajor);
  if (!status.ok()) return status;

  Plan plan;
  plan.model = ReadModel(root);
  plan.codecs = ReadCodecs(root["codecs"], plan.model, root["version"][1].Count());
  if (root.has("exact_first")) plan.exact_first = root["exact_first"].Count();
  if (root.has("exact_newest")) plan.exact_newest = root["exact_newest"].Count();
  plan.provenance = ReadProvenance(root);
  if (!status.ok()) return status;
  if (Status s = ReadShaping(root, path, place, &plan); !s.ok()) return s;
  if (!status.ok()) return status;
  if (Status s = internal::CheckPlan(plan); !s.ok()) {
    return Error(ErrorCode::kCorrupt, "{}: {}", path, s.message());
  }
  return plan;
}

}  // namespace

Status SavePlan(const Plan& plan, const std::string& path) {
  if (Status s = internal::CheckPlan(plan); !s.ok())
    return Error(s.code(), "{}: {}", path, s.message());
  if (!IsFinite(plan.provenance.on_calibration) || !IsFinite(plan.provenance.on_holdout)) {
    return FileError(ErrorCode::kInvalidArgument, path, "accuracy", "finite numbers", "NaN or Inf");
  }
  if (!internal::HasShaping(plan)) return internal::WriteFileAtomically(path, PlanText(plan, ""));
  const std::string hash = internal::ShapingHash(plan), file = internal::ShapingFileName(hash),
                    text = PlanText(plan, ShapingText(file, hash)),
                    matrices = Beside(RealPath(path), file);
  if (IsNullDevice(path)) return WriteFileAtomically(path, text);
  std::error_code ignored;
  if (std::filesystem::is_other(std::filesystem::status(path, ignored))) {
    return FileError(ErrorCode::kInvalidArgument, path, "",
                     "a file, as a plan with +shape has a second file beside it",
                     "a device or a pipe");
  }
  const bool had = std::filesystem::exists(matrices, ignored);
  if (Status s = internal::SaveShaping(plan, matrices); !s.ok()) return s;
  Status s = internal::WriteFileAtomically(path, text);
  if (!s.ok() && !had) std::filesystem::remove(matrices, ignored);
  return s;
}

Result<Plan> LoadPlan(const std::string& path) {
  const Result<nlohmann::json> document = LoadJson(path);
  if (!document.ok()) return document.status();
  return ReadPlan(*document, path, path);
}

Result<Plan> ParsePlan(std::string_view text, const char* folder) {
  const std::string name = "plan";
  const Result<nlohmann::json> document = ParseJson(text, name, "");
  if (!document.ok()) return document.status();
  if (folder == nullptr) return ReadPlan(*document, name, std::nullopt);
  return ReadPlan(*document, name, (std::filesystem::path(folder) / name).string());
}

}  // namespace kvmix::internal
