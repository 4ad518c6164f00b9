// kvmix-eval: the original study on any dump, as CSV. `quant`: errors of K and V themselves.
// `attention`: errors of attention outputs. `size`: bytes. Columns and digits are the study's, so
// that its files and these can be compared line by line.
#include <algorithm>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <CLI/CLI.hpp>

#include "console.h"
#include "dumps.h"
#include "kvmix/tune/steps.h"
#include "study.h"

namespace kvmix::tools {
namespace {

constexpr std::size_t kAttentionTokens = 4096;  // the study's

struct Options {
  std::string dump;
  tune::RawFormat raw;
  int strategy = 0;  // 0: not given
  std::string fp16_heads;
  std::string plan;
  std::string rounding = "nearest";
  bool reference = false;
  bool bits = false;
  int threads = 0;
  Geometry geometry{0, 0, 0, 0};  // size
  std::vector<std::size_t> tokens{kAttentionTokens};
};

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
  return o.dump.empty() ? Require(tune::Dump::Open(SamplePath("holdout")))
                        : OpenDump(o.dump, o.raw);
}

// ---- quant

// The study's six decimals; where they would not hold the sum to four digits (its own data have no
// such sum), more.
std::string SumText(double sum) {
  return sum == 0.0 || sum >= 0.005 ? fmt::format("{:.6f}", sum) : fmt::format("{:.6e}", sum);
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
      const HeadCodec& codec = plan.codec(layer, head, t);
      const RowsView rows = loaded.head(head, t);
      ErrorSums errors;  // of a head in fp16, all zeros: the study says nothing else of it either
      if (codec.kind.storage != KVMIX_STORAGE_F16) {
        // A plan that was loaded is valid.
        errors = o.rounding == "truncate" ? TruncationError(rows, codec)
                                          : tune::EncodingError(rows, codec).value();
      }
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

// The rows of one layer: all query heads together, then each. kernels: what a fifth column says;
// empty where there is none.
std::string AttentionLines(std::size_t layer, std::span<const tune::AttentionError> heads,
                           std::span<const tune::AttentionError> kernels = {}) {
  const auto sum = [](std::span<const tune::AttentionError> errors) {
    tune::AttentionError total;
    for (const tune::AttentionError& e : errors) total += e;
    return total;
  };
  std::string csv;
  const auto add = [&](const auto& head, const tune::AttentionError& e,
                       const tune::AttentionError& kernel) {
    csv += fmt::format("{},{},{:.6e},{:.6f}", layer, head, e.nmse(), e.cosine());
    csv += kernels.empty() ? "\n" : fmt::format(",{:.6e}\n", kernel.nmse());
  };
  add("all", sum(heads), sum(kernels));
  for (std::size_t h = 0; h < heads.size(); ++h)
    add(h, heads[h], kernels.empty() ? tune::AttentionError() : kernels[h]);
  return csv;
}

std::vector<tune::AttentionError> CompareHeads(const std::vector<float>& exact,
                                               const std::vector<float>& approximate,
                                               const LayerShape& shape) {
  const std::size_t stride = shape.query_heads * shape.v_dim;
  std::vector<tune::AttentionError> errors;
  for (std::size_t at = 0; at < stride; at += shape.v_dim)
    errors.push_back(tune::CompareOutputs(&exact[at], &approximate[at], exact.size() / stride,
                                          stride, shape.v_dim));
  return errors;
}

// In double precision over exact rows and over the codes; and the library's kernels over the codes,
// against the latter.
std::string ReferenceAttention(const tune::Dump& dump, const Plan& plan, int threads) {
  const std::vector<LayerShape>& layers = dump.model().layers;
  ProgressBar bar("attention in double precision");
  std::string csv = "layer,head,nmse,cos_sim,kernel_nmse\n";
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    const LayerShape& shape = layers[layer];
    if (!shape.has_kv()) continue;
    const tune::DumpLayer held = Require(dump.Load(layer));
    const std::vector<HeadCodec> exact_codecs(shape.kv_heads * 2);
    const HeadCodec* first = &plan.codec(layer, 0, KVMIX_K);
    const auto exact = AttendExactly(dump, layer, exact_codecs.data(), threads),
               decoded = AttendExactly(dump, layer, first, threads);
    std::vector<float> kernel;
    Require(
        AttendDump(dump, layer, {first, first + shape.kv_heads * 2}, {.runner = threads}, &kernel));
    csv += AttentionLines(layer, CompareHeads(exact, decoded, shape),
                          CompareHeads(decoded, kernel, shape));
    bar.Update(layer + 1, layers.size());
  }
  return csv;
}

std::string Attention(const Options& o) {
  const tune::Dump dump = OpenInput(o);
  if (!dump.has_q())
    Refuse("{}: has no Q, which attention needs{}", dump.path(),
           o.raw.kv_heads && !o.raw.query_heads ? " (give --query-heads)" : "");
  if (dump.tokens() == 0) Refuse("{}: has no tokens", dump.path());
  const Plan plan = ChoosePlan(o, dump);
  WarnOfLength(dump, plan);
  if (o.reference) return ReferenceAttention(dump, plan, o.threads);
  ProgressBar bar("attention");
  const std::vector<tune::AttentionError> errors = Require(tune::MeasurePlan(
      dump, plan, {.runner = o.threads, .progress = [&](std::size_t done, std::size_t total) {
                     bar.Update(done, total);
                   }}));
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
  app->add_option(
      "DUMP", o->dump,
      "a safetensors dump or a raw folder; without it, the built-in sample's held-out text");
  app->add_option("--strategy", o->strategy,
                  "1: int8, one scale per head over all tokens; 2: int8, one per token and head; "
                  "3: --fp16-heads in fp16, other K as 1, V as 2")
      ->check(CLI::Range(1, 3));
  AddPlanOptions(app, o, "a plan of kvmix-tune in the place of strategy 3");
  app->add_option("--threads", o->threads, "0: all")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  AddRawOptions(app, &o->raw);
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
  quant->add_option("--rounding", o.rounding, "nearest, or truncate to see what a bare cast costs")
      ->check(CLI::IsMember({"nearest", "truncate"}))
      ->capture_default_str();
  CLI::App* attention =
      app.add_subcommand("attention",
                         "errors of attention outputs against exact K and V, causal within each "
                         "prompt; columns: layer, head (query head, or all), NMSE, mean cosine");
  AddDumpOptions(attention, &o);
  attention->add_flag("--reference", o.reference,
                      "in double precision over the same codes; a fifth column is the NMSE of the "
                      "library's kernels against that");
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
      "Examples:\n  kvmix-eval quant dump.safetensors --strategy 2\n  kvmix-eval attention dump/ "
      "--plan plan.json --kv-heads 2 --query-heads 14 --head-dim 64 --prompt-tokens 512,512\n"
      "  kvmix-eval size --layers 24 --kv-heads 2 --head-dim 64 --tokens 4096,32768");
  return RunProgram(&app, argc, argv, [&] {
    Print(*quant ? Quant(o) : *attention ? Attention(o) : Size(o));
  });
}

}  // namespace
}  // namespace kvmix::tools

// All but the options' definition runs in RunProgram(). NOLINTNEXTLINE(bugprone-exception-escape)
int main(int argc, char** argv) { return kvmix::tools::Main(argc, argv); }
