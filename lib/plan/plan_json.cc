// Plans as JSON:
//   {"format": "kvmix-plan", "version": [1, 0],
//    "geometry": {"layers": 24, "kv_heads": 2, "query_heads": 14, "head_dim": 64},
//    "bytes_per_token": 6720, "saved_fraction": 0.45,
//    "provenance": {"model": "...", ...},
//    "accuracy": {"calibration": {...}, "holdout": {...}},
//    "codecs": [[{"k": "i8-head+centre+fold", "k_scale": 0.1, "k_mean": [...], "k_factor": [...],
//                 "v": "i8-token+hadamard"}, ...KV heads], ...layers]}
// Sizes are for people, and computed again on loading. Provenance and accuracy may be missing. A
// newer minor version may add fields, which are ignored here; 1.1 added the steps fold and
// hadamard.
#include <fmt/format.h>

#include <cmath>
#include <iterator>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "kvmix/plan.h"
#include "lib/files/file.h"
#include "lib/files/json_view.h"

namespace kvmix {

using internal::FileError;
using internal::JsonText;
using internal::JsonView;

namespace {

constexpr std::string_view kFormat = "kvmix-plan";
constexpr std::size_t kMajor = 1;
constexpr std::size_t kMinor = 1;
constexpr std::string_view kTensorKeys[] = {"k", "v"};

// ---- writing
// By hand: a head is one line, and a float has the nine digits that give it back exactly.

void AppendVector(std::span<const float> vector, std::string_view key, std::string_view name,
                  std::string* out) {
  if (vector.empty()) return;
  const auto to = std::back_inserter(*out);
  fmt::format_to(to, ", \"{}_{}\": [", key, name);
  for (std::size_t c = 0; c < vector.size(); ++c) {
    fmt::format_to(to, "{}{:.9g}", c == 0 ? "" : ", ", vector[c]);
  }
  *out += ']';
}

void AppendCodec(const HeadCodec& codec, std::string_view key, std::string* out) {
  const auto to = std::back_inserter(*out);
  fmt::format_to(to, "\"{}\": \"{}\"", key, ToString(codec.kind));
  if (codec.kind.scale == Scale::kHead) {
    fmt::format_to(to, ", \"{}_scale\": {:.9g}", key, codec.head_scale);
  }
  AppendVector(codec.mean(), key, "mean", out);
  AppendVector(codec.factor(), key, "factor", out);
}

std::string CodecsText(const Plan& plan) {
  std::string out = "  \"codecs\": [\n";
  const Geometry& g = plan.geometry;
  for (std::size_t layer = 0; layer < g.layers; ++layer) {
    for (std::size_t head = 0; head < g.kv_heads; ++head) {
      out += head == 0 ? "    [{" : "     {";
      AppendCodec(plan.codec(layer, head, Tensor::kK), kTensorKeys[0], &out);
      out += ", ";
      AppendCodec(plan.codec(layer, head, Tensor::kV), kTensorKeys[1], &out);
      out += head + 1 < g.kv_heads ? "},\n" : "}]";
    }
    out += layer + 1 < g.layers ? ",\n" : "\n";
  }
  return out + "  ]\n";
}

std::string FidelityText(const Fidelity& f) {
  return fmt::format(R"({{"worst_cosine": {}, "mean_cosine": {}, "worst_nmse": {}, )"
                     R"("mean_nmse": {}, "worst_layer": {}, "worst_query_head": {}}})",
                     f.worst_cosine, f.mean_cosine, f.worst_nmse, f.mean_nmse, f.worst_layer,
                     f.worst_query_head);
}

// Only what was measured.
std::string AccuracyText(const Provenance& p) {
  std::string out;
  if (p.calibration_tokens > 0) out += "\n    \"calibration\": " + FidelityText(p.on_calibration);
  if (p.holdout_tokens > 0)
    out += std::string(out.empty() ? "" : ",") + "\n    \"holdout\": " + FidelityText(p.on_holdout);
  return "  \"accuracy\": {" + out + (out.empty() ? "},\n" : "\n  },\n");
}

std::string PlanText(const Plan& plan) {
  const Geometry& g = plan.geometry;
  const Provenance& p = plan.provenance;
  std::string out =
      fmt::format("{{\n  \"format\": \"{}\",\n  \"version\": [{}, {}],\n", kFormat, kMajor, kMinor);
  const auto to = std::back_inserter(out);
  fmt::format_to(to,
                 "  \"geometry\": {{\"layers\": {}, \"kv_heads\": {}, \"query_heads\": {}, "
                 "\"head_dim\": {}}},\n",
                 g.layers, g.kv_heads, g.query_heads, g.head_dim);
  fmt::format_to(to, "  \"bytes_per_token\": {},\n  \"saved_fraction\": {},\n", BytesPerToken(plan),
                 SavedFraction(plan));
  fmt::format_to(to,
                 "  \"provenance\": {{\"model\": {}, \"calibration\": {}, \"calibration_tokens\": "
                 "{}, \"longest_prompt\": {}, ",
                 JsonText(p.model), JsonText(p.calibration), p.calibration_tokens,
                 p.longest_prompt);
  fmt::format_to(to, "\"holdout\": {}, \"holdout_tokens\": {}}},\n", JsonText(p.holdout),
                 p.holdout_tokens);
  return out + AccuracyText(p) + CodecsText(plan) + "}\n";
}

bool IsFinite(const Fidelity& f) {
  return std::isfinite(f.worst_cosine) && std::isfinite(f.mean_cosine) &&
         std::isfinite(f.worst_nmse) && std::isfinite(f.mean_nmse);
}

// ---- reading

std::vector<float> ReadVector(const JsonView& vector) {
  std::vector<float> numbers;
  const std::size_t channels = vector.size();
  for (std::size_t c = 0; c < channels; ++c) numbers.push_back(vector[c].Float());
  return numbers;
}

HeadCodec ReadCodec(const JsonView& head, const std::string& key) {
  const std::string name = head[key].Text();
  const Result<CodecKind> kind = ParseCodecKind(name);
  if (!kind.ok()) {
    head[key].Fail(ErrorCode::kCorrupt, "a codec that this version knows", internal::Quoted(name));
    return {};
  }
  HeadCodec codec{*kind, 0.0f, nullptr};
  if (kind->scale == Scale::kHead) codec.head_scale = head[key + "_scale"].Float();
  CodecVectors vectors;
  if (kind->centre) vectors.mean = ReadVector(head[key + "_mean"]);
  if (kind->fold) vectors.factor = ReadVector(head[key + "_factor"]);
  if (vectors != CodecVectors()) {
    codec.vectors = std::make_shared<const CodecVectors>(std::move(vectors));
  }
  return codec;
}

// Memory grows with what the file holds, never with what its geometry claims.
std::vector<HeadCodec> ReadCodecs(const JsonView& layers, const Geometry& geometry) {
  std::vector<HeadCodec> codecs;
  const auto check_size = [](const JsonView& array, std::size_t expected, const char* of) {
    const std::size_t found = array.size();
    if (found != expected)
      array.Fail(ErrorCode::kCorrupt, fmt::format("{} {}", expected, of), fmt::format("{}", found));
    return found == expected;
  };
  if (!check_size(layers, geometry.layers, "layers")) return codecs;
  for (std::size_t layer = 0; layer < geometry.layers; ++layer) {
    const JsonView heads = layers[layer];
    if (!check_size(heads, geometry.kv_heads, "KV heads")) return codecs;
    for (std::size_t head = 0; head < geometry.kv_heads; ++head) {
      for (const std::string_view key : kTensorKeys)
        codecs.push_back(ReadCodec(heads[head], std::string(key)));
    }
  }
  return codecs;
}

Fidelity ReadFidelity(const JsonView& accuracy, const std::string& key) {
  if (!accuracy.has(key)) return {};
  const JsonView f = accuracy[key];
  return {f["worst_cosine"].Number(), f["mean_cosine"].Number(), f["worst_nmse"].Number(),
          f["mean_nmse"].Number(),    f["worst_layer"].Count(),  f["worst_query_head"].Count()};
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

}  // namespace

Status SavePlan(const Plan& plan, const std::string& path) {
  if (Status s = CheckPlan(plan); !s.ok()) return Status(s.code(), path + ": " + s.message());
  if (!IsFinite(plan.provenance.on_calibration) || !IsFinite(plan.provenance.on_holdout)) {
    return FileError(ErrorCode::kInvalidArgument, path, "accuracy", "finite numbers", "NaN or Inf");
  }
  return internal::WriteFileAtomically(path, PlanText(plan));
}

Result<Plan> LoadPlan(const std::string& path) {
  const Result<nlohmann::json> document = internal::LoadJson(path);
  if (!document.ok()) return document.status();
  Status status;
  const JsonView root(*document, path, &status);
  internal::CheckVersion(root, kFormat, kMajor);
  if (!status.ok()) return status;

  Plan plan;
  const JsonView geometry = root["geometry"];
  plan.geometry = {geometry["layers"].Count(), geometry["kv_heads"].Count(),
                   geometry["query_heads"].Count(), geometry["head_dim"].Count()};
  plan.codecs = ReadCodecs(root["codecs"], plan.geometry);
  plan.provenance = ReadProvenance(root);
  if (!status.ok()) return status;
  if (Status s = CheckPlan(plan); !s.ok())
    return Status(ErrorCode::kCorrupt, path + ": " + s.message());
  return plan;
}

}  // namespace kvmix
