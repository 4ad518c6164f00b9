// The report as JSON, for programs.
#include <cstddef>
#include <optional>
#include <string>

#include <nlohmann/json.hpp>

#include "tune_report.h"

namespace kvmix::tools {
namespace {

using Json = nlohmann::ordered_json;

const char* JsonName(Tensor t) { return t == KVMIX_K ? "k" : "v"; }

Json ToJson(const Fidelity& f) {
  return {{"worst_cosine", f.worst_cosine},
          {"mean_cosine", f.mean_cosine},
          {"worst_nmse", f.worst_nmse},
          {"mean_nmse", f.mean_nmse},
          {"worst_head", {{"layer", f.worst_layer}, {"query_head", f.worst_query_head}}}};
}

Json HeadJson(const tune::HeadErrors& h) {
  return {{"layer", h.layer},
          {"kv_head", h.kv_head},
          {"tensor", JsonName(h.tensor)},
          {"max_abs", h.max_abs}};
}

Json ExplainJson(const tune::HeadErrors& head, const tune::Reason& reason) {
  Json json = {{"limit", LimitName(reason.limit)}, {"worst_nmse", reason.worst_nmse}};
  if (reason.smaller)
    json["smaller"] = {{"codec", ToString(head.candidates[*reason.smaller].codec.kind)},
                       {"worst_nmse", reason.smaller_worst_nmse},
                       {"sum_nmse_added", reason.sum_nmse_added}};
  return json;
}

Json ToJson(const tune::Holdout& h) {
  Json json = {{"dump", h.name}, {"tokens", h.tokens}, {"longest_prompt", h.longest_prompt}};
  json.update(ToJson(h.found));
  return json;
}

// The model, the dumps and the figures of the plan as a whole.
Json Overview(const TuneReport& r) {
  const Plan& plan = r.choice.plan;
  const Provenance& p = plan.provenance;
  const EffectiveBits bits = BitsPerNumber(plan, r.context);
  const tune::Holdout* holdout = WorstHoldout(r);
  Json json = {{"format", "kvmix-tune-1"}, {"model", p.model}};
  if (const std::optional<Geometry> g = plan.model.geometry()) {
    json["geometry"] = {{"layers", g->layers},
                        {"kv_heads", g->kv_heads},
                        {"query_heads", g->query_heads},
                        {"head_dim", g->head_dim}};
  } else {
    json["layers"] = Json::parse(tune::LayerShapesText(plan.model));
  }
  json.update({{"candidates", r.candidates},
               {"calibration_dumps", p.calibration},
               {"calibration_tokens", p.calibration_tokens},
               {"longest_prompt", p.longest_prompt},
               {"holdout_dump", p.holdout},
               {"holdout_tokens", p.holdout_tokens},
               {"bytes_per_token", BytesPerToken(plan)},
               {"fp16_bytes_per_token", Fp16BytesPerToken(plan.model)},
               {"saved_fraction", SavedFraction(plan, r.context)},
               {"effective_bits", {{"all", bits.all}, {"k", bits.k}, {"v", bits.v}}},
               {"worst_limit", r.choice.worst_limit},
               {"predicted", ToJson(r.choice.predicted)},
               {"calibration", r.calibration ? ToJson(*r.calibration) : Json()},
               {"holdout", holdout ? ToJson(holdout->found) : Json()},
               {"worse_than_predicted", r.worse_than_predicted},
               {"decode_ns_per_token",
                {{"plan", r.choice.decode_ns},
                 {"without_times", r.choice.without_times.decode_ns},
                 {"fp16", r.choice.fp16_decode_ns},
                 {"tensors_decided", r.choice.decided_by_time},
                 {"context", r.context},
                 {"cpu", r.wisdom.cpu},
                 {"target", r.wisdom.target}}}});
  return json;
}

Json CandidateJson(const TuneReport& r, const tune::HeadErrors& h, const tune::CandidateError& c) {
  const Fidelity f = OfHead(c);
  Json candidate = {{"codec", ToString(c.codec.kind)},
                    {"worst_nmse", f.worst_nmse},
                    {"worst_cosine", f.worst_cosine},
                    {"mse", c.values.mse()},
                    {"max_error", c.values.max_error}};
  if (r.explain) {
    candidate["bytes_per_token"] = TensorBytes(r, h, c.codec.kind);
    for (const tune::AttentionError& e : c.queries) candidate["nmse"].push_back(e.nmse());
  }
  return candidate;
}

// K or V number i of the plan, with all of its candidates.
Json HeadJson(const TuneReport& r, std::size_t i) {
  const tune::HeadErrors& h = r.table.heads[i];
  Json head = HeadJson(h);
  head["codec"] = ToString(r.choice.plan.codecs[i].kind);
  if (r.explain) head["explain"] = ExplainJson(h, r.choice.reasons[i]);
  for (const tune::CandidateError& c : h.candidates)
    head["candidates"].push_back(CandidateJson(r, h, c));
  return head;
}

}  // namespace

std::string ReportJson(const TuneReport& r) {
  const Plan& plan = r.choice.plan;
  Json json = Overview(r);
  if (ContextMatters(r)) {
    json["context_bytes"] = ContextBytes(plan, r.context);
    json["fp16_context_bytes"] = Fp16ContextBytes(plan.model, r.context);
  }
  for (const char* list : {"holdouts", "fp16_heads", "outliers", "heads", "front"})
    json[list] = Json::array();
  for (const tune::Holdout& h : r.holdouts) json["holdouts"].push_back(ToJson(h));
  for (const tune::HeadErrors* h : Outliers(r.table)) json["outliers"].push_back(HeadJson(*h));
  for (std::size_t i = 0; i < r.table.heads.size(); ++i) {
    const tune::HeadErrors& h = r.table.heads[i];
    if (plan.codecs[i].kind.storage == KVMIX_STORAGE_F16)
      json["fp16_heads"].push_back(
          {{"layer", h.layer}, {"kv_head", h.kv_head}, {"tensor", JsonName(h.tensor)}});
    json["heads"].push_back(HeadJson(r, i));
  }
  for (const tune::ParetoPoint& point : r.choice.front)
    json["front"].push_back({{"saved_fraction", point.saved_fraction},
                             {"predicted", ToJson(point.predicted)},
                             {"decode_ns", point.decode_ns},
                             {"fp16_tensors", point.fp16_tensors}});
  return json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace kvmix::tools
