// kvmix-eval: the original study on any dump, as CSV. `quant`: errors of K and V themselves.
// `attention`: errors of attention outputs. `size`: bytes. Columns and digits are the study's, so
// that its files and these can be compared line by line.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <CLI/CLI.hpp>

#include "console.h"
#include "dumps.h"
#include "kvmix/quantize.h"
#include "kvmix/tune/steps.h"

namespace kvmix::tools {
namespace {

constexpr std::size_t kAttentionTokens = 4096;  // the study's

struct Options {
  std::string dump;
  int strategy = 0;  // 0: not given
  std::string fp16_heads;
  std::string plan;
  bool bits = false;
  int threads = 0;
  Geometry geometry{0, 0, 0, 0};  // size
  std::vector<std::size_t> tokens{kAttentionTokens};
};

// ---- plans

constexpr const char* kStudyHeads = "0:0,0:1,1:1,2:0,2:1,8:0";

// 24 layers x 2 KV heads x 64: the one model whose six K heads for strategy 3 the study names.
bool IsStudyModel(const Model& model) {
  const std::optional<Geometry> g = model.geometry();
  return g && g->layers == 24 && g->kv_heads == 2 && g->head_dim == 64;
}

// 1: int8, one scale per head over all tokens.   2: int8, one per token and head.   3: K int8 with
// one scale per head, but fp16 for `fp16_heads`; V int8 with one scale per token. fp16_heads:
// "0:0,0:1,8:0" (layer:head), "none", or "": the study's six on its model, on others an error.
// Per-head scales are left at 1: SetHeadScales() knows them.
Plan StrategyPlan(const Model& model, int strategy, const std::string& fp16_heads) {
  const HeadCodec per_head{{KVMIX_STORAGE_I8, KVMIX_SCALE_HEAD}, 1.0f},
      per_token{{KVMIX_STORAGE_I8, KVMIX_SCALE_TOKEN}};
  Plan plan = UniformPlan(model, strategy == 2 ? per_token : per_head,
                          strategy == 1 ? per_head : per_token);
  if (strategy == 3 && fp16_heads.empty() && !IsStudyModel(model))
    Refuse(
        "strategy 3 on {} needs --fp16-heads (its K heads to keep in fp16) or --plan: the study's "
        "six heads are those of 24 layers x 2 KV heads x 64",
        ToString(model));
  std::istringstream items(fp16_heads.empty() ? kStudyHeads : fp16_heads);
  for (std::string item; fp16_heads != "none" && std::getline(items, item, ',');) {
    const auto place = ParsePair(item);
    if (!place) Refuse("--fp16-heads: expected layer:head, as in 0:1, found '{}'", item);
    const auto [layer, head] = *place;
    if (strategy != 3) continue;
    if (layer >= model.layers.size() || head >= model.layers[layer].kv_heads)
      Refuse("--fp16-heads: no head {}:{} in {}", layer, head, ToString(model));
    plan.codec(layer, head, KVMIX_K) = {};
  }
  return plan;
}

// Every per-head scale becomes the one that just covers this dump.
void SetHeadScales(const tune::Dump& dump, Plan* plan) {
  const std::vector<LayerShape>& layers = plan->model.layers;
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    if (!layers[layer].owns_kv()) continue;
    const tune::DumpLayer loaded = Require(dump.Load(layer));
    for (std::size_t head = 0; head < layers[layer].kv_heads; ++head) {
      for (const Tensor t : {KVMIX_K, KVMIX_V}) {
        HeadCodec& codec = plan->codec(layer, head, t);
        if (codec.kind.scale != KVMIX_SCALE_HEAD) continue;
        const float scale = HeadScale(loaded.head(head, t), codec);
        codec.head_scale = scale > 0.0f ? scale : 1.0f;  // nothing but zeros: any scale stores them
      }
    }
  }
}

// A plan for layers of this shape. queries_matter: for as many query heads as well.
Plan PlanFor(const std::string& path, Model model, bool queries_matter) {
  Plan plan = Require(LoadPlan(path));
  Model found = Stored(plan.model);
  model = Stored(std::move(model));
  for (std::size_t i = 0; i < model.layers.size() && !queries_matter; ++i)
    model.layers[i].query_heads = found.layers[std::min(i, found.layers.size() - 1)].query_heads;
  if (found != model)
    Refuse("{}: plan: expected {}, found {}", path, ToString(model), ToString(found));
  return plan;
}

// The plan of --plan or --strategy. A plan goes as strategy 3 in the CSV.
Plan ChoosePlan(const Options& o, const tune::Dump& dump) {
  if (!o.plan.empty()) {
    if (o.strategy != 0 && o.strategy != 3)
      Refuse("--plan goes with strategy 3, not with {}", o.strategy);
    return PlanFor(o.plan, dump.model(), dump.has_q());
  }
  if (o.strategy == 0) Refuse("nothing to evaluate: give --strategy 1, 2 or 3, or --plan");
  Plan plan = StrategyPlan(dump.model(), o.strategy, o.fp16_heads);
  SetHeadScales(dump, &plan);
  return plan;
}

tune::Dump OpenInput(const Options& o) {
  return Require(tune::Dump::Open(o.dump.empty() ? SamplePath("holdout") : o.dump));
}

// ---- quant

// The study's six decimals; where they would not hold the sum to four digits (its own data have no
// such sum), more.
std::string SumText(double sum) {
  return sum == 0.0 || sum >= 0.005 ? fmt::format("{:.6f}", sum) : fmt::format("{:.6e}", sum);
}

// The errors of one head's rows. Of a head in fp16, zeros: the study says nothing else of it
// either.
ErrorSums EncodingError(const RowsView& rows, const HeadCodec& codec) {
  if (codec.kind.storage == KVMIX_STORAGE_F16) return {};
  const RowCodec row_codec = Require(RowCodec::Create(codec, rows.head_dim));
  std::vector<std::uint8_t> codes(rows.tokens * row_codec.row_bytes());
  std::vector<float> scales(rows.tokens);
  row_codec.Encode(rows, codes.data(), scales.data());
  return row_codec.Errors(rows, codes.data(), scales.data());
}

std::string Quant(const Options& o) {
  const tune::Dump dump = OpenInput(o);
  const Plan plan = ChoosePlan(o, dump);
  const int strategy = o.plan.empty() ? o.strategy : 3;
  const std::vector<LayerShape>& layers = dump.model().layers;
  ProgressBar bar("encoding");
  std::string csv;
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    if (!layers[layer].owns_kv()) continue;
    const tune::DumpLayer loaded = Require(dump.Load(layer));
    const std::size_t kv_heads = layers[layer].kv_heads;
    std::vector<std::string> lines(2 * kv_heads);  // [K, V][kv_heads]
    Runner(o.threads).Run(lines.size(), [&](std::size_t i) {
      const bool is_k = i < kv_heads;
      const Tensor t = is_k ? KVMIX_K : KVMIX_V;
      const std::size_t head = i % kv_heads;
      const RowsView rows = loaded.head(head, t);
      const ErrorSums errors = EncodingError(rows, plan.codec(layer, head, t));
      lines[i] = fmt::format("{},{},{},{},{},{},{},{:.6f},{},{:.6f}\n",
                             is_k ? dump.k_name(layer) : dump.v_name(layer), layer,
                             is_k ? 'k' : 'v', rows.tokens, head, rows.head_dim, strategy,
                             errors.max_abs, SumText(errors.sum_squared_error), errors.mse());
    });
    csv += fmt::format("{}", fmt::join(lines, ""));
    bar.Update(layer + 1, layers.size());
  }
  return csv;
}

// ---- attention

// The rows of one layer: all query heads together, then each.
std::string AttentionLines(std::size_t layer, std::span<const tune::AttentionError> heads) {
  std::string csv;
  const auto add = [&](const auto& head, const tune::AttentionError& e) {
    csv += fmt::format("{},{},{:.6e},{:.6f}\n", layer, head, e.nmse(), e.cosine());
  };
  tune::AttentionError all;
  for (const tune::AttentionError& e : heads) all += e;
  add("all", all);
  for (std::size_t h = 0; h < heads.size(); ++h) add(h, heads[h]);
  return csv;
}

std::string Attention(const Options& o) {
  const tune::Dump dump = OpenInput(o);
  if (!dump.has_q()) Refuse("{}: has no Q, which attention needs", dump.path());
  const Plan plan = ChoosePlan(o, dump);
  WarnOfLength(dump, plan);
  ProgressBar bar("attention");
  const std::vector<tune::AttentionError> errors =
      Require(tune::MeasurePlan(dump, plan, {.runner = o.threads, .progress = bar.Callback()}));
  std::string csv = "layer,head,nmse,cos_sim\n";
  const Model& model = dump.model();
  for (std::size_t layer = 0; layer < model.layers.size(); ++layer) {
    if (model.layers[layer].has_kv())
      csv += AttentionLines(
          layer, {&errors[model.query_heads_before(layer)], model.layers[layer].query_heads});
  }
  return csv;
}

// ---- size

// Two decimals, the second only where it is not 0: 48.0, 26.25.
std::string MibText(std::size_t bytes) {
  std::string text = fmt::format("{:.2f}", static_cast<double>(bytes) / (1 << 20));
  if (text.back() == '0') text.pop_back();
  return text;
}

std::string Size(const Options& o) {
  std::optional<Plan> plan;
  if (!o.plan.empty())
    plan = o.geometry.layers == 0 ? Require(LoadPlan(o.plan)) : PlanFor(o.plan, o.geometry, false);
  Geometry g = o.geometry;
  g.query_heads = g.kv_heads;  // no matter for bytes
  const Model model = plan ? plan->model : g;
  Require(CheckModel(model));
  std::string csv = fmt::format("strategy,bytes_per_token,saved,mib_{}{}\n",
                                fmt::join(o.tokens, ",mib_"), o.bits ? ",bits,k_bits,v_bits" : "");
  const auto add = [&](const std::string& name, const Plan& of) {
    csv += fmt::format("{},{},{:.4f}", name, BytesPerToken(of), SavedFraction(of));
    for (const std::size_t tokens : o.tokens) csv += "," + MibText(ContextBytes(of, tokens));
    const EffectiveBits bits = BitsPerNumber(of);
    if (o.bits) csv += fmt::format(",{:.4f},{:.4f},{:.4f}", bits.all, bits.k, bits.v);
    csv += "\n";
  };
  add("fp16", UniformPlan(model, {}, {}));
  for (int strategy = 1; strategy <= 3; ++strategy) {
    // Nobody has named strategy 3's heads of other models.
    if (strategy < 3 || !o.fp16_heads.empty() || IsStudyModel(model))
      add(fmt::format("strat{}", strategy), StrategyPlan(model, strategy, o.fp16_heads));
  }
  if (plan) add("plan", *plan);
  return csv;
}

// ---- command line

void AddPlanOptions(CLI::App* app, Options* o, const std::string& plan) {
  app->add_option("--plan", o->plan, plan);
  app->add_option("--fp16-heads", o->fp16_heads,
                  "K heads that strategy 3 keeps in fp16, as layer:head,..., or none (default: the "
                  "study's six, on its model only)");
}

void AddDumpOptions(CLI::App* app, Options* o) {
  app->add_option("DUMP", o->dump,
                  "a safetensors dump; without it, the built-in sample's held-out text");
  app->add_option("--strategy", o->strategy,
                  "1: int8, one scale per head over all tokens; 2: int8, one per token and head; "
                  "3: --fp16-heads in fp16, other K as 1, V as 2")
      ->check(CLI::Range(1, 3));
  AddPlanOptions(app, o, "a plan of kvmix-tune in the place of strategy 3");
  app->add_option("--threads", o->threads, "0: all")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
}

int Main(int argc, char** argv) {
  Options o;
  CLI::App app("The KV quantization study on any dump: CSV on the standard output.", "kvmix-eval");
  app.require_subcommand(1);
  CLI::App* quant = app.add_subcommand(
      "quant",
      "errors of K and V; columns: file, layer, k|v, tokens, head, head_dim, strategy, max|x|, sum "
      "of squared error, MSE (no header; zeros for a head in fp16)");
  AddDumpOptions(quant, &o);
  CLI::App* attention =
      app.add_subcommand("attention",
                         "errors of attention outputs against exact K and V, causal within each "
                         "prompt; columns: layer, head (query head, or all), NMSE, mean cosine");
  AddDumpOptions(attention, &o);
  CLI::App* size = app.add_subcommand(
      "size", "bytes per token and MiB of a cache; a layer with a window holds at most the window");
  size->add_option("--layers", o.geometry.layers,
                   "layers (these three: of --plan, where it is given and they are not)");
  size->add_option("--kv-heads", o.geometry.kv_heads, "KV heads");
  size->add_option("--head-dim", o.geometry.head_dim, "channels of a head");
  size->add_option("--tokens", o.tokens, "lengths of the cache, comma-separated")
      ->delimiter(',')
      ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 40))
      ->capture_default_str();
  size->add_flag("--bits", o.bits,
                 "three more columns: bits that a number takes with its share of the scales, over "
                 "K and V together, of K, of V");
  AddPlanOptions(size, &o, "a plan to list as well");
  app.footer(
      "Examples:\n  kvmix-eval quant dump.safetensors --strategy 2\n  kvmix-eval attention "
      "dump.safetensors "
      "--plan plan.json\n"
      "  kvmix-eval size --layers 24 --kv-heads 2 --head-dim 64 --tokens 4096,32768");
  return RunProgram(&app, argc, argv, [&] {
    Print(*quant ? Quant(o) : *attention ? Attention(o) : Size(o));
  });
}

}  // namespace
}  // namespace kvmix::tools

// All but the options' definition runs in RunProgram(). NOLINTNEXTLINE(bugprone-exception-escape)
int main(int argc, char** argv) { return kvmix::tools::Main(argc, argv); }
