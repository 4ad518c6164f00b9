// kvmix-tune: from dumps to a plan. Measures what every codec costs every head, chooses, measures
// the plan as a whole, reports.
#include <unistd.h>

#include <filesystem>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include "console.h"
#include "dumps.h"
#include "kvmix/speed.h"
#include "kvmix/tune.h"
#include "lib/files/file.h"
#include "tune_report.h"

namespace kvmix::tools {
namespace {

constexpr const char* kDefaultPlan = "plan.json";
constexpr double kSpeedSeconds = 0.5;

struct Options {
  std::vector<std::string> dumps;
  std::string holdout;
  RawFormat raw;
  Constraints constraints;
  std::optional<double> max_ms;
  std::string candidates = "all";
  std::size_t context = 4096;
  std::size_t exact_first = 0;
  int threads = 0;
  std::string wisdom;
  std::string output;
  bool json = false;
  bool explain = false;
};

// A number in (low, high), or in (low, high] if `closed`.
CLI::Validator Between(double low, double high, bool closed) {
  return CLI::Validator(
      [=](std::string& text) -> std::string {
        double x = 0.0;
        if (CLI::detail::lexical_cast(text, x) && x > low && (x < high || (closed && x == high)))
          return "";
        return fmt::format("expected a number above {} and {} {}, found '{}'", low,
                           closed ? "up to" : "below", high, text);
      },
      "NUMBER");
}

void AddOptions(CLI::App* app, Options* o) {
  app->add_option("DUMP", o->dumps,
                  "dumps of one model to calibrate on: safetensors files or raw folders; without "
                  "any, the built-in sample");
  app->add_option("--budget", o->constraints.budget,
                  "save at least this fraction of the fp16 bytes of a context of --context tokens")
      ->check(Between(0.0, 1.0, false));
  app->add_option(
         "--min-cosine", o->constraints.min_cosine,
         "of the predicted worst query head; without --budget: save the most that holds it")
      ->check(Between(0.0, 1.0, true));
  app->add_option("--max-time", o->max_ms,
                  "at most this predicted decode time of a token over all layers, in ms")
      ->check(Between(0.0, 1e9, false));
  app->add_option("--holdout", o->holdout, "dump to measure the finished plan on");
  app->add_option("--candidates", o->candidates, "codecs to choose from")
      ->check(CLI::IsMember({"seed", "int8", "all", "int4"}))
      ->capture_default_str();
  app->add_option("--context", o->context,
                  "tokens in the cache, for decode times, and for bytes where layers have a window")
      ->check(CLI::Range(1u, 1u << 20))
      ->capture_default_str();
  app->add_option("--exact-first", o->exact_first,
                  "keep so many first tokens of every layer in f16 beside their codes")
      ->check(CLI::Range(std::size_t{0}, kMostExactFirst))
      ->capture_default_str();
  app->add_option("--threads", o->threads, "0: all")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  app->add_option(
      "--wisdom", o->wisdom,
      "file of kernel speeds of this CPU: read if it exists, completed, written; they then "
      "decide where codecs are about equally accurate");
  app->add_option(
      "-o,--output", o->output,
      fmt::format("the plan (default: {} if there is none yet; none with --json)", kDefaultPlan));
  app->add_flag("--json", o->json, "print the report as JSON");
  app->add_flag("--explain", o->explain,
                "say of every KV head's K and V why it is not stored smaller; as JSON also what "
                "every candidate costs each query head");
  AddRawOptions(app, &o->raw);
  app->footer(
      "Example:\n  kvmix-tune model.c4.safetensors --holdout model.wikitext.safetensors --budget "
      "0.45 -o plan.json");
}

// Tells early that a file cannot be written, before minutes of work.
void CheckWritable(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code error;
  if (fs::is_directory(path, error))
    Refuse("{}: expected a file to write to, found a folder", path);
  const fs::path parent = fs::path(path).parent_path(), folder = parent.empty() ? "." : parent;
  if (!fs::is_directory(folder, error))
    Refuse("{}: expected the folder {}, found none", path, folder.string());
  if (access(folder.c_str(), W_OK | X_OK) != 0)
    Refuse("{}: may not write to the folder {}", path, folder.string());
}

struct Dumps {
  std::vector<Dump> calibration;
  std::optional<Dump> holdout;
};

Dumps OpenDumps(const Options& o) {
  std::vector<std::string> paths = o.dumps;
  std::string holdout_path = o.holdout;
  if (paths.empty()) {
    paths = {SamplePath("calibration")};
    if (holdout_path.empty()) holdout_path = SamplePath("holdout");
  }
  Dumps dumps;
  for (const std::string& path : paths) dumps.calibration.push_back(OpenDump(path, o.raw));
  if (holdout_path.empty()) return dumps;
  dumps.holdout = OpenDump(holdout_path, o.raw);
  if (!dumps.holdout->has_q()) Refuse("{}: has no Q, which attention errors need", holdout_path);
  const Model &expected = dumps.calibration[0].model(), &found = dumps.holdout->model();
  if (found != expected)
    Refuse("{}: expected {}, found {}", holdout_path, ToString(expected), ToString(found));
  return dumps;
}

Wisdom Speeds(const Options& o, const Model& model, const CandidateKinds& candidates) {
  Wisdom wisdom = ThisMachine();
  if (!o.wisdom.empty()) {
    Result<Wisdom> known = LoadWisdom(o.wisdom);
    if (known.status().code() != ErrorCode::kNotFound) wisdom = Require(std::move(known));
  }
  const std::size_t before = wisdom.speeds.size();
  ProgressBar bar("timing the kernels");
  for (const LayerShape& layer : model.layers) {
    if (layer.has_kv())
      Require(
          MeasureHeadSpeeds(candidates.k, candidates.v, layer, o.context, kSpeedSeconds, &wisdom));
  }
  if (!o.wisdom.empty() && wisdom.speeds.size() > before) Require(SaveWisdom(wisdom, o.wisdom));
  return wisdom;
}

MeasureOptions WithBar(int threads, ProgressBar* bar) {
  return {threads, "", [bar](std::size_t done, std::size_t all) { bar->Update(done, all); }, 0};
}

// The plan as a whole over several dumps.
Fidelity MeasureWhole(const std::vector<const Dump*>& dumps, const Plan& plan, int threads,
                      const std::string& label) {
  ProgressBar bar(label);
  std::vector<AttentionError> total(plan.model.query_heads_before(plan.model.layers.size()));
  for (const Dump* dump : dumps) {
    const auto errors = Require(MeasurePlan(*dump, plan, WithBar(threads, &bar)));
    for (std::size_t i = 0; i < total.size(); ++i) total[i] += errors[i];
  }
  return Summarize(total, plan.model);
}

TuneReport Tune(const Options& o) {
  const CandidateKinds candidates = Require(Candidates(o.candidates));
  const Dumps dumps = OpenDumps(o);
  std::vector<const Dump*> calibration;
  for (const Dump& dump : dumps.calibration) calibration.push_back(&dump);

  TuneReport report;
  report.candidates = o.candidates;
  report.context = o.context;
  report.constraints = o.constraints;
  report.times_are_kept = !o.wisdom.empty();
  report.explain = o.explain;
  const Model& model = calibration[0]->model();
  report.wisdom = Speeds(o, model, candidates);
  {
    ProgressBar bar("measuring every head and codec");
    MeasureOptions how = WithBar(o.threads, &bar);
    how.exact_first = o.exact_first;
    report.table = Require(Measure(calibration, candidates, 0, model.layers.size(), how));
  }
  report.choice = Require(Choose(report.table, report.wisdom, o.context, o.constraints));

  const Plan& plan = report.choice.plan;
  Provenance& provenance = report.choice.plan.provenance;
  report.calibration = provenance.on_calibration =
      MeasureWhole(calibration, plan, o.threads, "measuring the plan on the calibration");
  if (dumps.holdout) {
    report.holdout = provenance.on_holdout =
        MeasureWhole({&*dumps.holdout}, plan, o.threads, "measuring the plan on the holdout");
    provenance.holdout = internal::FileName(dumps.holdout->path());
    provenance.holdout_tokens = dumps.holdout->tokens();
  }
  return report;
}

void Run(Options o) {
  if (!o.constraints.budget && !o.constraints.min_cosine)
    Refuse("nothing to aim at: give --budget (0.45 saves 45 % of the bytes) or --min-cosine");
  if (o.max_ms) o.constraints.max_decode_ns = *o.max_ms * 1e6;
  // Times that are measured in every run anew must not make every run's plan another.
  if (o.wisdom.empty()) o.constraints.time_tolerance = 1.0;
  if (o.output.empty() && !o.json) {
    o.output = kDefaultPlan;
    std::error_code error;
    if (std::filesystem::exists(std::filesystem::symlink_status(kDefaultPlan, error)))
      Refuse("{} exists already: name the plan's file with -o", kDefaultPlan);
  }
  for (const std::string& path : {o.output, o.wisdom})
    if (!path.empty()) CheckWritable(path);
  const TuneReport report = Tune(o);
  if (!o.output.empty()) Require(SavePlan(report.choice.plan, o.output));
  Print(o.json ? ReportJson(report)
               : ReportText(report) + fmt::format("\nplan written to {}\n", o.output));
}

int Main(int argc, char** argv) {
  Options o;
  CLI::App app(
      "Chooses how every KV head's K and V is stored: the least damage to attention within a "
      "budget of bytes.",
      "kvmix-tune");
  AddOptions(&app, &o);
  return RunProgram(&app, argc, argv, [&] { Run(o); });
}

}  // namespace
}  // namespace kvmix::tools

// All but the options' definition runs in RunProgram(). NOLINTNEXTLINE(bugprone-exception-escape)
int main(int argc, char** argv) { return kvmix::tools::Main(argc, argv); }
