#include "tune_report.h"

#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <tuple>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "console.h"

namespace kvmix::tools {
namespace {

// A holdout's mean NMSE over the calibration's from which on the report speaks of it.
constexpr double kFarFrom = 2.0;

// A head is an outlier if int8 with a scale per token costs it this many times what it costs the
// median head of the same tensor.
constexpr double kOutlierFactor = 10.0;
// Larger grids are not drawn.
constexpr std::size_t kMaxGridLayers = 80;
constexpr std::size_t kMaxGridHeads = 16;
constexpr std::size_t kFrontLines = 12;

const CodecKind kPlain{KVMIX_STORAGE_I8, KVMIX_SCALE_TOKEN};

char Letter(Tensor t) { return t == KVMIX_K ? 'K' : 'V'; }

const tune::CandidateError* Find(const tune::HeadErrors& head, const CodecKind& kind) {
  for (const tune::CandidateError& c : head.candidates)
    if (c.codec.kind == kind) return &c;
  return nullptr;
}

}  // namespace

Fidelity OfHead(const tune::CandidateError& candidate) {
  return tune::Summarize(candidate.queries, Geometry{1, 1, candidate.queries.size(), 1});
}

std::vector<const tune::HeadErrors*> Outliers(const tune::ErrorTable& table) {
  const auto cost = [](const tune::HeadErrors& h) {
    const tune::CandidateError* plain = Find(h, kPlain);
    return plain ? OfHead(*plain).worst_nmse : 0.0;
  };
  std::vector<const tune::HeadErrors*> outliers;
  for (const Tensor tensor : {KVMIX_K, KVMIX_V}) {
    std::vector<double> costs;
    for (const tune::HeadErrors& h : table.heads)
      if (h.tensor == tensor) costs.push_back(cost(h));
    std::ranges::sort(costs);
    const double limit = kOutlierFactor * costs[costs.size() / 2];
    for (const tune::HeadErrors& h : table.heads)
      if (h.tensor == tensor && cost(h) > limit) outliers.push_back(&h);
  }
  std::ranges::stable_sort(outliers, std::greater(),
                           [&](const tune::HeadErrors* h) { return cost(*h); });
  return outliers;
}

bool ContextMatters(const TuneReport& r) {
  return r.table.exact_first != 0 || r.table.exact_newest != 0 ||
         Fp16ContextBytes(r.table.model, r.context) < r.context * Fp16BytesPerToken(r.table.model);
}

const char* LimitName(tune::Limit limit) {
  switch (limit) {
    case tune::Limit::kNone:
      return "none";
    case tune::Limit::kWorst:
      return "worst";
    case tune::Limit::kCosine:
      return "cosine";
    case tune::Limit::kTime:
      return "time";
    case tune::Limit::kBudget:
      return "budget";
    case tune::Limit::kSum:
      return "sum";
  }
  return "";
}

std::size_t TensorBytes(const TuneReport& r, const tune::HeadErrors& head, const CodecKind& kind) {
  return BytesPerToken(kind, r.table.model.layers[head.layer].dim(head.tensor));
}

// ---- text

namespace {

std::string OutlierText(const TuneReport& r) {
  const std::vector<const tune::HeadErrors*> outliers = Outliers(r.table);
  if (outliers.empty())
    return fmt::format(
        "No outlier heads: int8 per token costs no query head over {:.0f} x the median head's "
        "NMSE\n",
        kOutlierFactor);
  Table table("layer\tKV head\t\tmax|x|\tNMSE as int8\tNMSE as stored\tstored as", 0);
  for (const tune::HeadErrors* h : outliers) {
    const CodecKind& kind = r.choice.plan.codec(h->layer, h->kv_head, h->tensor).kind;
    table.Add("{}\t{}\t{}\t{:.1f}\t{:.1e}\t{:.1e}\t{}", h->layer, h->kv_head, Letter(h->tensor),
              h->max_abs, OfHead(*Find(*h, kPlain)).worst_nmse, OfHead(*Find(*h, kind)).worst_nmse,
              ToString(kind));
  }
  return fmt::format(
      "Outlier heads: int8 per token costs their worst query head over {:.0f} x the median head's "
      "NMSE\n{}",
      kOutlierFactor, table.Text());
}

// The codecs in use, each with a letter (F for fp16), and which head has which.
std::string PlanText(const Plan& plan) {
  const std::vector<LayerShape>& layers = plan.model.layers;
  std::map<std::string, std::array<std::size_t, 2>> counts;  // of K and of V
  for (std::size_t i = 0; i < plan.codecs.size(); ++i)
    ++counts[ToString(plan.codecs[i].kind)][i % 2];
  std::map<std::string, char> letters;
  char next = 'a';
  Table codecs("\tcodec\tK heads\tV heads", 2);
  for (const auto& [name, count] : counts) {
    letters[name] = name == "f16" ? 'F' : next++;
    codecs.Add("{}\t{}\t{}\t{}", letters[name], name, count[0], count[1]);
  }
  std::string text = codecs.Text();
  const std::size_t heads = std::ranges::max(layers, {}, &LayerShape::kv_heads).kv_heads;
  if (layers.size() > kMaxGridLayers || heads > kMaxGridHeads) return text;
  std::string tens;
  for (std::size_t l = 0; l < layers.size(); l += 10) tens += fmt::format("{:<10}", l);
  text += fmt::format("  {:<13} {}\n", "layer",
                      tens.substr(0, std::max(layers.size(), tens.find_last_not_of(' ') + 1)));
  for (const Tensor t : {KVMIX_K, KVMIX_V}) {
    for (std::size_t h = 0; h < heads; ++h) {
      std::string row;
      for (std::size_t l = 0; l < layers.size(); ++l) {
        const bool has_one = layers[l].owns_kv() && h < layers[l].kv_heads;
        row += has_one ? letters[ToString(plan.codec(l, h, t).kind)] : ' ';
      }
      text += fmt::format("  {} of head {:<4} {}\n", Letter(t), h,
                          row.substr(0, row.find_last_not_of(' ') + 1));
    }
  }
  return text;
}

// Says by how much the truth is worse than the prediction.
std::string TruthNote(const TuneReport& r) {
  std::string text;
  const std::vector<std::size_t>& worse = r.worse_than_predicted;
  if (!worse.empty() && worse.front() > 0) {
    text += fmt::format(
        "  Query heads over {} x their predicted NMSE, plan by plan: {}. Each time they were held "
        "for\n  as bad as they were, and the plan was chosen again.\n",
        tune::kWorseThanPredicted, fmt::join(worse, ", "));
  }
  double most = 0.0;
  for (const tune::Holdout& holdout : r.holdouts) most = std::max(most, holdout.found.mean_nmse);
  if (r.calibration && most > kFarFrom * r.calibration->mean_nmse) {
    text += fmt::format(
        "  {} holdout's mean NMSE is {:.1f} x the calibration's: calibrate on more text, and on "
        "prompts\n  as long as those that are served.\n",
        r.holdouts.size() == 1 ? "The" : "A", most / r.calibration->mean_nmse);
  }
  return text;
}

// "64 tokens", of several prompts "96 tokens, prompts of up to 64".
std::string LengthText(const tune::Holdout& h) {
  return fmt::format(
      "{} tokens{}", h.tokens,
      h.longest_prompt == h.tokens ? "" : fmt::format(", prompts of up to {}", h.longest_prompt));
}

std::string AccuracyText(const TuneReport& r) {
  Table table("\tworst cosine\tlayer, query head\tmean cosine\tworst NMSE\tmean NMSE", 1);
  const auto add = [&](const std::string& name, const Fidelity& f) {
    table.Add("{}\t{:.6f}\t{}, {}\t{:.6f}\t{:.2e}\t{:.2e}", name, f.worst_cosine, f.worst_layer,
              f.worst_query_head, f.mean_cosine, f.worst_nmse, f.mean_nmse);
  };
  const Provenance& p = r.choice.plan.provenance;
  add("predicted, head by head", r.choice.predicted);
  if (r.calibration)
    add(fmt::format("calibration, {} tokens", p.calibration_tokens), *r.calibration);
  for (std::size_t i = 0; i < r.holdouts.size(); ++i) {
    const std::string number = r.holdouts.size() == 1 ? "" : fmt::format(" {}", i + 1);
    add(fmt::format("holdout{}, {} tokens", number, r.holdouts[i].tokens), r.holdouts[i].found);
  }
  return fmt::format(
      "Attention output against exact K and V, predicted and measured as a whole\n{}{}{}",
      table.Text(),
      r.holdouts.empty()
          ? "  no holdout: --holdout DUMP measures the plan on text that it was not made from\n"
          : "",
      TruthNote(r));
}

// Says what the times had to do with the choice.
std::string TimeNote(const TuneReport& r) {
  if (r.constraints.time_tolerance == 1.0 && !r.constraints.max_decode_ns)
    return fmt::format(
        "Decode times did not enter the choice: give --wisdom FILE, and they decide within {:.0f} "
        "%.\n",
        100.0 * (tune::Constraints().time_tolerance - 1.0));
  const tune::ParetoPoint& without = r.choice.without_times;
  std::string text = fmt::format(
      "Decode times decided {} of {} tensors{}.\n", r.choice.decided_by_time,
      r.choice.plan.codecs.size(),
      r.times_are_kept
          ? ""
          : ", and another run, timed anew, may choose otherwise: --wisdom FILE keeps them");
  if (r.choice.decided_by_time > 0)
    text += fmt::format(
        "Without them: {:.3f} ms a token, worst NMSE {:.2e}, mean NMSE {:.2e} as predicted.\n",
        without.decode_ns / 1e6, without.predicted.worst_nmse, without.predicted.mean_nmse);
  return text;
}

// A layer of every shape that decode times tell apart.
std::vector<LayerShape> SpeedShapes(const TuneReport& r) {
  const auto what = [&](const LayerShape& x) {
    return std::tuple(x.group(), x.k_dim, x.v_dim, x.seen(r.context));
  };
  std::vector<LayerShape> shapes;
  for (const LayerShape& layer : r.table.model.layers) {
    const auto is_alike = [&](const LayerShape& x) { return what(x) == what(layer); };
    if (layer.has_kv() && std::ranges::none_of(shapes, is_alike)) shapes.push_back(layer);
  }
  return shapes;
}

// "i8-bf16" for "i8-token-bf16": seven names side by side must fit a line.
std::string WithoutToken(std::string name) {
  const std::size_t at = name.find("-token");
  return at == name.npos ? name : name.erase(at, 6);
}

std::string SpeedText(const TuneReport& r) {
  std::vector<std::string> names[2];
  for (std::size_t t = 0; t < 2; ++t) {
    for (const tune::CandidateError& c : r.table.heads[t].candidates) {
      const std::string name = tune::SpeedName(c.codec.kind);
      if (std::ranges::find(names[t], name) == names[t].end()) names[t].push_back(name);
    }
  }
  std::string text = fmt::format(
      "Decode of one token at context {}, attention alone, 1 thread: {:.3f} ms, in fp16 {:.3f} ms "
      "({:.2f} x)\n({} on {})\n",
      r.context, r.choice.decode_ns / 1e6, r.choice.fp16_decode_ns / 1e6,
      r.choice.fp16_decode_ns / r.choice.decode_ns, r.wisdom.target, r.wisdom.cpu);
  for (const LayerShape& layer : SpeedShapes(r)) {
    std::string what = "ms per KV head";
    if (!r.table.model.geometry())
      what += fmt::format(" x {}/{}, {} queries, {} tokens", layer.k_dim, layer.v_dim,
                          layer.group(), layer.seen(r.context));
    std::string across;
    for (const std::string& v : names[1]) across += "\t" + WithoutToken(v);
    Table table(across, 1);
    for (const std::string& k : names[0]) {
      std::vector<double> row;
      for (const std::string& v : names[1])
        row.push_back(r.wisdom.Find(k, v, layer, r.context)->decode_ns / 1e6);
      table.Add("{}\t{:.4f}", k, fmt::join(row, "\t"));
    }
    text += fmt::format("  {}, K down, V across (without -token)\n{}", what, table.Text());
  }
  return text + TimeNote(r);
}

std::string FrontText(const std::vector<tune::ParetoPoint>& front) {
  Table table("saved\tworst cosine\tworst NMSE\tmean NMSE\tK and V in fp16\tdecode ms", 0);
  const std::size_t lines = std::min(front.size(), kFrontLines);
  for (std::size_t i = 0; i < lines; ++i) {
    const tune::ParetoPoint& p = front[lines > 1 ? i * (front.size() - 1) / (lines - 1) : 0];
    table.Add("{:.2f} %\t{:.6f}\t{:.2e}\t{:.2e}\t{}\t{:.3f}", 100.0 * p.saved_fraction,
              p.predicted.worst_cosine, p.predicted.worst_nmse, p.predicted.mean_nmse,
              p.fp16_tensors, p.decode_ns / 1e6);
  }
  return fmt::format(
      "Other budgets: {} of the Pareto front's points (all {} with --json), predicted\n{}", lines,
      front.size(), table.Text());
}

// "i8-token-bf16+cfh": the steps by their first letters.
std::string ShortName(const CodecKind& kind) {
  const std::string name = ToString(kind);
  std::string text = name.substr(0, name.find('+'));
  for (std::size_t i = text.size(); i < name.size(); ++i) {
    if (name[i] != '+') continue;
    if (i == text.size()) text += '+';
    text += name[i + 1];
  }
  return text;
}

std::string ExplainText(const TuneReport& r) {
  Table table("layer\tKV head\t\tstored as\tbytes\tNMSE\tnext smaller\tbytes\tNMSE\tlimit", 0);
  for (std::size_t i = 0; i < r.table.heads.size(); ++i) {
    const tune::HeadErrors& h = r.table.heads[i];
    const CodecKind& kind = r.choice.plan.codecs[i].kind;
    const tune::Reason& reason = r.choice.reasons[i];
    std::string smaller = "\t\t";
    if (reason.smaller) {
      const CodecKind& next = h.candidates[*reason.smaller].codec.kind;
      smaller = fmt::format("{}\t{}\t{:.1e}", ShortName(next), TensorBytes(r, h, next),
                            reason.smaller_worst_nmse);
    }
    table.Add("{}\t{}\t{}\t{}\t{}\t{:.1e}\t{}\t{}", h.layer, h.kv_head, Letter(h.tensor),
              ShortName(kind), TensorBytes(r, h, kind), reason.worst_nmse, smaller,
              LimitName(reason.limit));
  }
  std::string text = fmt::format(
      "Why not smaller: bytes per token, and the NMSE of the worst query head that reads the KV "
      "head\n(steps: c centre, f fold, h hadamard, s shape)\n{}"
      "limit, which the next smaller codec would break:\n"
      "  worst   a query head's NMSE would be above w = {:.2e}, {} x the least possible\n",
      table.Text(), r.choice.worst_limit, r.constraints.worst_tolerance);
  if (r.constraints.min_cosine)
    text += fmt::format("  cosine  a query head's cosine would be below {}\n",
                        *r.constraints.min_cosine);
  return text +
         "  sum     the sum of NMSE would be larger, and other heads save the budget's bytes at "
         "less\n"
         "  budget  the sum would be larger, and the budget is held without it\n"
         "  time    decode times decided\n"
         "  none    no candidate is smaller\n";
}

}  // namespace

std::string ReportText(const TuneReport& r) {
  const Plan& plan = r.choice.plan;
  const Provenance& p = plan.provenance;
  std::string text = fmt::format("{}\n{}\ncalibrated on {} ({} tokens)\n",
                                 p.model.empty() ? "unknown model" : p.model, ToString(plan.model),
                                 p.calibration, p.calibration_tokens);
  for (const tune::Holdout& h : r.holdouts)
    text += fmt::format("held out {} ({})\n", h.name, LengthText(h));
  const std::size_t tokens = ContextMatters(r) ? r.context : 1;
  const EffectiveBits bits = BitsPerNumber(plan, tokens == 1 ? 0 : tokens);
  text += fmt::format(
      "\n{}\nPlan: {} of {} bytes {}, {:.2f} % saved\n"
      "Bits a number takes with its share of the scales: {:.2f} (K {:.2f}, V {:.2f})\n"
      "{}\n{}\n{}\n{}",
      OutlierText(r), ContextBytes(plan, tokens), Fp16ContextBytes(plan.model, tokens),
      tokens == 1 ? "per token" : fmt::format("at a context of {} tokens", tokens),
      100.0 * SavedFraction(plan, tokens), bits.all, bits.k, bits.v, PlanText(plan),
      AccuracyText(r), SpeedText(r), FrontText(r.choice.front));
  if (r.explain) text += "\n" + ExplainText(r);
  if (IsFarBeyond(plan, r.context))
    text += fmt::format(
        "\nCalibrated on prompts of up to {} tokens: before serving {}, tune and hold out on dumps "
        "as long.\n",
        p.longest_prompt, r.context);
  return text;
}

}  // namespace kvmix::tools
