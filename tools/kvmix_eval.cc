// kvmix-eval: the original study on any dump, as CSV. `quant`: errors of K and V themselves.
// `attention`: errors of attention outputs. `size`: bytes. Columns and digits are the study's, so
// that its files and these can be compared line by line.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include "console.h"
#include "dumps.h"
#include "exact_attention.h"
#include "kvmix/tune.h"
#include "lib/files/machine.h"
#include "study.h"

namespace kvmix::tools {
namespace {

constexpr const char* kProgram = "kvmix-eval";
constexpr std::size_t kAttentionTokens = 4096;  // the study's

struct Options {
  std::string dump;
  RawFormat raw;
  int strategy = 0;  // 0: not given
  std::string fp16_heads;
  std::string plan;
  std::string rounding = "nearest";
  bool reference = false;
  int threads = 0;
  Geometry geometry{0, 0, 0, 0};  // size
  std::vector<std::size_t> tokens{kAttentionTokens};
};

// The plan of --plan or --strategy, and the number that stands for it in the CSV.
struct Codecs {
  Plan plan;
  int strategy = 0;
};

Result<std::optional<std::vector<KvHead>>> Fp16Heads(const Options& o) {
  if (o.fp16_heads.empty()) return std::optional<std::vector<KvHead>>();
  Result<std::vector<KvHead>> heads = ParseKvHeads(o.fp16_heads);
  if (!heads.ok()) return heads.status();
  return std::optional(std::move(*heads));
}

// A plan for a model of this shape; query_heads 0: any number of them.
Result<Plan> PlanFor(const std::string& path, Geometry geometry) {
  Result<Plan> plan = LoadPlan(path);
  if (!plan.ok()) return plan.status();
  if (geometry.query_heads == 0) geometry.query_heads = plan->geometry.query_heads;
  if (Status s = CheckGeometryMatches(*plan, geometry); !s.ok())
    return Status(s.code(), fmt::format("{}: {}", path, s.message()));
  return plan;
}

Result<Codecs> ChooseCodecs(const Options& o, const Dump& dump) {
  if (!o.plan.empty()) {
    if (o.strategy != 0 && o.strategy != 3)
      return Status(ErrorCode::kInvalidArgument,
                    fmt::format("--plan goes with strategy 3, not with {}", o.strategy));
    Geometry geometry = dump.geometry();
    if (!dump.has_q()) geometry.query_heads = 0;
    Result<Plan> plan = PlanFor(o.plan, geometry);
    if (!plan.ok()) return plan.status();
    return Codecs{std::move(*plan), 3};
  }
  if (o.strategy == 0)
    return Status(ErrorCode::kInvalidArgument,
                  "nothing to evaluate: give --strategy 1, 2 or 3, or --plan");
  const auto heads = Fp16Heads(o);
  if (!heads.ok()) return heads.status();
  Result<Plan> plan = StrategyPlan(dump.geometry(), o.strategy, *heads);
  if (!plan.ok()) return plan.status();
  SetHeadScales(dump, &*plan);
  return Codecs{std::move(*plan), o.strategy};
}

Result<Dump> OpenInput(const Options& o) {
  if (!o.dump.empty()) return OpenDump(o.dump, o.raw);
  const Result<std::string> sample = SamplePath("holdout");
  return sample.ok() ? Dump::Open(*sample) : Result<Dump>(sample.status());
}

// ---- quant

// `(int8_t)(x * inv_scale)` where it should round: the cast bug of the study, and of many a
// program. In the study's own arithmetic, and not the kernels', since the largest value of a row
// lies on an integer and a last bit decides on which side of it. codec: of one of its strategies.
ErrorSums TruncationError(const RowsView& rows, const HeadCodec& codec) {
  ErrorSums sums;
  for (std::size_t t = 0; t < rows.tokens; ++t) {
    float max = 0.0f;
    for (std::size_t c = 0; c < rows.head_dim; ++c)
      max = std::max(max, std::fabs(rows.At(t, 0, c)));
    const float inv_scale = codec.kind.scale == Scale::kHead ? 1.0f / codec.head_scale
                            : max > 0.0f                     ? 127.0f / max
                                                             : 1.0f;
    for (std::size_t c = 0; c < rows.head_dim; ++c) {
      const float x = rows.At(t, 0, c);
      const float code = std::clamp(std::trunc(x * inv_scale), -127.0f, 127.0f);
      const double error = double{code / inv_scale} - x;
      sums.sum_squared_error += error * error;
      sums.max_error = std::max(sums.max_error, std::fabs(error));
    }
    sums.max_abs = std::max(sums.max_abs, double{max});
  }
  sums.count = rows.tokens * rows.head_dim;
  return sums;
}

// The study's six decimals; where they would not hold the sum to four digits (its own data have no
// such sum), more.
std::string SumText(double sum) {
  return sum == 0.0 || sum >= 0.005 ? fmt::format("{:.6f}", sum) : fmt::format("{:.6e}", sum);
}

std::string QuantLine(const std::string& file, std::size_t layer, Tensor t, const RowsView& rows,
                      std::size_t head, int strategy, const ErrorSums& e) {
  return fmt::format("{},{},{},{},{},{},{},{:.6f},{},{:.6f}\n", file, layer,
                     t == Tensor::kK ? 'k' : 'v', rows.tokens, head, rows.head_dim, strategy,
                     e.max_abs, SumText(e.sum_squared_error), e.mse());
}

Result<std::string> Quant(const Options& o) {
  const Result<Dump> dump = OpenInput(o);
  if (!dump.ok()) return dump.status();
  const Result<Codecs> codecs = ChooseCodecs(o, *dump);
  if (!codecs.ok()) return codecs.status();
  const Geometry& g = dump->geometry();
  const bool truncate = o.rounding == "truncate";
  const int threads = internal::Threads(o.threads);
  ProgressBar bar("encoding");
  std::string csv;
  for (std::size_t layer = 0; layer < g.layers; ++layer) {
    if (Status s = dump->CheckFinite(layer); !s.ok()) return s;
    std::vector<std::string> lines(2 * g.kv_heads);  // [K, V][kv_heads]
#pragma omp parallel for num_threads(threads)
    for (std::size_t i = 0; i < lines.size(); ++i) {
      const Tensor t = i < g.kv_heads ? Tensor::kK : Tensor::kV;
      const std::size_t head = i % g.kv_heads;
      const HeadCodec& codec = codecs->plan.codec(layer, head, t);
      const RowsView rows = dump->head(layer, head, t);
      ErrorSums errors;  // of a head in fp16, all zeros: the study says nothing else of it either
      if (codec.kind.storage != Storage::kF16) {
        // A plan that was loaded is valid.
        errors = truncate ? TruncationError(rows, codec) : EncodingError(rows, codec).value();
      }
      lines[i] = QuantLine(t == Tensor::kK ? dump->k_name(layer) : dump->v_name(layer), layer, t,
                           rows, head, codecs->strategy, errors);
    }
    for (const std::string& line : lines) csv += line;
    dump->Release(layer);
    bar.Update(layer + 1, g.layers);
  }
  return csv;
}

// ---- attention

// The rows of one layer: all query heads together, then each. kernels: null, or what a fifth column
// says.
std::string AttentionLines(std::size_t layer, const AttentionError* heads,
                           const AttentionError* kernels, std::size_t count) {
  const auto sum = [&](const AttentionError* errors) {
    AttentionError total;
    for (std::size_t h = 0; h < count; ++h) total += errors[h];
    return total;
  };
  std::string csv;
  const auto add = [&](const std::string& head, const AttentionError& e,
                       const AttentionError& kernel) {
    csv += fmt::format("{},{},{:.6e},{:.6f}", layer, head, e.nmse(), e.cosine());
    csv += kernels ? fmt::format(",{:.6e}\n", kernel.nmse()) : "\n";
  };
  add("all", sum(heads), kernels ? sum(kernels) : AttentionError());
  for (std::size_t h = 0; h < count; ++h)
    add(fmt::format("{}", h), heads[h], kernels ? kernels[h] : AttentionError());
  return csv;
}

std::vector<AttentionError> CompareHeads(const std::vector<float>& exact,
                                         const std::vector<float>& approximate, const Geometry& g) {
  const std::size_t stride = g.query_heads * g.head_dim;
  std::vector<AttentionError> errors;
  for (std::size_t h = 0; h < g.query_heads; ++h)
    errors.push_back(CompareOutputs(exact.data() + h * g.head_dim,
                                    approximate.data() + h * g.head_dim, exact.size() / stride,
                                    stride, g.head_dim));
  return errors;
}

// In double precision over exact rows and over the codes; and the library's kernels over the codes,
// against the latter.
Result<std::string> ReferenceAttention(const Dump& dump, const Plan& plan, int threads) {
  const Geometry& g = plan.geometry;
  const std::vector<HeadCodec> exact_codecs(g.kv_heads * 2);
  ProgressBar bar("attention in double precision");
  std::string csv = "layer,head,nmse,cos_sim,kernel_nmse\n";
  std::vector<float> exact, decoded, kernel;
  for (std::size_t layer = 0; layer < g.layers; ++layer) {
    if (Status s = dump.CheckFinite(layer); !s.ok()) return s;
    const HeadCodec* first = &plan.codec(layer, 0, Tensor::kK);
    const std::vector<HeadCodec> codecs(first, first + g.kv_heads * 2);
    if (Status s = AttendExactly(dump, layer, exact_codecs, threads, &exact); !s.ok()) return s;
    if (Status s = AttendExactly(dump, layer, codecs, threads, &decoded); !s.ok()) return s;
    if (Status s = AttendDump(dump, layer, codecs, {.num_threads = threads}, &kernel); !s.ok())
      return s;
    csv += AttentionLines(layer, CompareHeads(exact, decoded, g).data(),
                          CompareHeads(decoded, kernel, g).data(), g.query_heads);
    dump.Release(layer);
    bar.Update(layer + 1, g.layers);
  }
  return csv;
}

Result<std::string> Attention(const Options& o) {
  const Result<Dump> dump = OpenInput(o);
  if (!dump.ok()) return dump.status();
  if (!dump->has_q())
    return Status(ErrorCode::kInvalidArgument,
                  fmt::format("{}: has no Q, which attention needs{}", dump->path(),
                              o.raw.kv_heads && !o.raw.query_heads ? " (give --query-heads)" : ""));
  if (dump->tokens() == 0)
    return Status(ErrorCode::kInvalidArgument, fmt::format("{}: has no tokens", dump->path()));
  const Result<Codecs> codecs = ChooseCodecs(o, *dump);
  if (!codecs.ok()) return codecs.status();
  if (o.reference) return ReferenceAttention(*dump, codecs->plan, o.threads);
  const Geometry& g = dump->geometry();
  ProgressBar bar("attention");
  const auto errors = MeasurePlan(
      *dump, codecs->plan,
      {.num_threads = o.threads,
       .progress = [&](std::size_t done, std::size_t total) { bar.Update(done, total); }});
  if (!errors.ok()) return errors.status();
  std::string csv = "layer,head,nmse,cos_sim\n";
  for (std::size_t layer = 0; layer < g.layers; ++layer)
    csv += AttentionLines(layer, &(*errors)[layer * g.query_heads], nullptr, g.query_heads);
  return csv;
}

// ---- size

// Two decimals, the second only where it is not 0: 48.0, 26.25.
std::string MibText(std::size_t bytes_per_token, std::size_t tokens) {
  std::string text = fmt::format(
      "{:.2f}", static_cast<double>(bytes_per_token) * static_cast<double>(tokens) / (1 << 20));
  if (text.back() == '0') text.pop_back();
  return text;
}

Result<std::string> Size(const Options& o) {
  Geometry g = o.geometry;
  std::optional<Plan> given;
  if (!o.plan.empty()) {
    Result<Plan> plan = g.layers == 0 ? LoadPlan(o.plan) : PlanFor(o.plan, g);
    if (!plan.ok()) return plan.status();
    given = std::move(*plan);
    g = given->geometry;
  }
  g.query_heads = g.kv_heads;  // no matter for bytes
  if (Status s = CheckGeometry(g); !s.ok()) return s;
  const auto heads = Fp16Heads(o);
  if (!heads.ok()) return heads.status();
  std::vector<std::pair<std::string, Plan>> rows{{"fp16", UniformPlan(g, {}, {})}};
  for (int strategy = 1; strategy <= 3; ++strategy) {
    Result<Plan> plan = StrategyPlan(g, strategy, *heads);
    if (plan.ok()) {
      rows.emplace_back(fmt::format("strat{}", strategy), std::move(*plan));
    } else if (*heads) {
      return plan.status();
    }  // else strategy 3 of a model whose heads nobody has named
  }
  if (given) rows.emplace_back("plan", std::move(*given));
  std::string csv = "strategy,bytes_per_token,saved";
  for (const std::size_t tokens : o.tokens) csv += fmt::format(",mib_{}", tokens);
  for (const auto& [name, plan] : rows) {
    csv += fmt::format("\n{},{},{:.4f}", name, BytesPerToken(plan), SavedFraction(plan));
    for (const std::size_t tokens : o.tokens) csv += "," + MibText(BytesPerToken(plan), tokens);
  }
  return csv + "\n";
}

// ---- command line

void AddDumpOptions(CLI::App* app, Options* o) {
  app->add_option(
      "DUMP", o->dump,
      "a safetensors dump or a raw folder; without it, the built-in sample's held-out text");
  app->add_option("--strategy", o->strategy,
                  "1: int8, one scale per head over all tokens; 2: int8, one per token and head; "
                  "3: --fp16-heads in fp16, other K as 1, V as 2")
      ->check(CLI::Range(1, 3));
  app->add_option("--plan", o->plan, "a plan of kvmix-tune in the place of strategy 3");
  app->add_option("--fp16-heads", o->fp16_heads,
                  "K heads that strategy 3 keeps in fp16, as layer:head,..., or none (default: the "
                  "study's six, on its model only)");
  app->add_option("--threads", o->threads, "0: all")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  AddRawOptions(app, &o->raw);
}

int Main(int argc, char** argv) {
  Options o;
  CLI::App app("The KV quantization study on any dump: CSV on the standard output.", kProgram);
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
  CLI::App* size = app.add_subcommand("size", "bytes per token and MiB of a cache");
  size->add_option("--layers", o.geometry.layers,
                   "layers (these three: of --plan, where it is given and they are not)");
  size->add_option("--kv-heads", o.geometry.kv_heads, "KV heads");
  size->add_option("--head-dim", o.geometry.head_dim, "channels of a head");
  size->add_option("--tokens", o.tokens, "lengths of the cache, comma-separated")
      ->delimiter(',')
      ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 40))
      ->capture_default_str();
  size->add_option("--plan", o.plan, "a plan to list as well");
  size->add_option("--fp16-heads", o.fp16_heads,
                   "K heads that strategy 3 keeps in fp16, as layer:head,..., or none (default: "
                   "the study's six, on its model only)");
  app.footer(
      "Examples:\n  kvmix-eval quant dump.safetensors --strategy 2\n  kvmix-eval attention dump/ "
      "--plan plan.json --kv-heads 2 --query-heads 14 --head-dim 64 --prompt-tokens 512,512\n"
      "  kvmix-eval size --layers 24 --kv-heads 2 --head-dim 64 --tokens 4096,32768");
  if (const auto code = Parse(&app, argc, argv)) return *code;
  const Result<std::string> csv = *quant ? Quant(o) : *attention ? Attention(o) : Size(o);
  if (!csv.ok()) return Fail(kProgram, csv.status().message());
  return Print(kProgram, *csv);
}

}  // namespace
}  // namespace kvmix::tools

int main(int argc, char** argv) {
  return kvmix::tools::RunProgram(kvmix::tools::kProgram, kvmix::tools::Main, argc, argv);
}
