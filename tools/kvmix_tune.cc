// kvmix-tune: from dumps to a plan. Measures what every codec costs every head, chooses, measures
// the plan as a whole, reports. In one go, or in four steps that leave files to each other.
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <iterator>
#include <map>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include "console.h"
#include "dumps.h"
#include "kvmix/tune/speed.h"
#include "kvmix/tune/steps.h"
#include "lib/files/file.h"
#include "lib/tune/parts.h"
#include "plan_export.h"
#include "tune_options.h"
#include "tune_report.h"

namespace kvmix::tools {
namespace {

constexpr double kSpeedSeconds = 0.5;
// A query head of the plan as a whole beyond so many times its predicted NMSE has the plan chosen
// again, at most so often.
constexpr std::size_t kRepairs = 3;

// Tells early that a file cannot be written, before minutes of work.
void CheckWritable(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code error;
  if (fs::is_directory(path, error))
    Refuse("{}: expected a file to write to, found a folder", path);
  if (fs::is_other(fs::status(path, error))) return;  // a device or a pipe is written to as it is
  const fs::path parent = fs::path(internal::RealPath(path)).parent_path(),
                 folder = parent.empty() ? "." : parent;
  if (!fs::is_directory(folder, error))
    Refuse("{}: expected the folder {}, found none", path, folder.string());
  if (access(folder.c_str(), W_OK | X_OK) != 0)
    Refuse("{}: may not write to the folder {}", path, folder.string());
}

// What a step writes may take the place of what a step wrote, and of nothing else.
void CheckPart(const std::string& path) {
  CheckWritable(path);
  std::error_code error;
  if (std::filesystem::is_regular_file(path, error) && !tune::KindOfPart(path).ok())
    Refuse("{}: expected no file, or one that a step of kvmix-tune wrote, found another", path);
}

std::vector<tune::Dump> OpenDumps(const std::vector<std::string>& paths,
                                  const tune::RawFormat& raw) {
  std::vector<tune::Dump> dumps;
  for (const std::string& path : paths) dumps.push_back(OpenDump(path, raw));
  return dumps;
}

std::vector<const tune::Dump*> Pointers(const std::vector<tune::Dump>& dumps) {
  std::vector<const tune::Dump*> pointers;
  for (const tune::Dump& dump : dumps) pointers.push_back(&dump);
  return pointers;
}

tune::Wisdom Speeds(const TuneOptions& o, const Model& model,
                    const tune::CandidateKinds& candidates) {
  tune::Wisdom wisdom = tune::ThisMachine();
  if (!o.wisdom.empty()) {
    Result<tune::Wisdom> known = tune::LoadWisdom(o.wisdom);
    if (known.status().code() != ErrorCode::kNotFound) wisdom = Require(std::move(known));
  }
  const std::size_t before = wisdom.speeds.size();
  ProgressBar bar("timing the kernels");
  for (const LayerShape& layer : model.layers) {
    if (layer.has_kv())
      Require(tune::MeasureHeadSpeeds(candidates.k, candidates.v, layer, o.context, kSpeedSeconds,
                                      &wisdom));
  }
  if (!o.wisdom.empty() && wisdom.speeds.size() > before)
    Require(tune::SaveWisdom(wisdom, o.wisdom));
  return wisdom;
}

tune::MeasureOptions WithBar(const TuneOptions& o, ProgressBar* bar) {
  return {o.threads, o.target, [bar](std::size_t done, std::size_t all) { bar->Update(done, all); },
          o.exact_first};
}

// The errors of the plan as a whole over several dumps.
std::vector<tune::AttentionError> MeasureWhole(const std::vector<const tune::Dump*>& dumps,
                                               const Plan& plan, const TuneOptions& o,
                                               const std::string& label) {
  ProgressBar bar(label);
  std::vector<tune::AttentionError> total(plan.model.query_heads_before(plan.model.layers.size()));
  for (const tune::Dump* dump : dumps) {
    const auto errors = Require(tune::MeasurePlan(*dump, plan, WithBar(o, &bar)));
    for (std::size_t i = 0; i < total.size(); ++i) total[i] += errors[i];
  }
  return total;
}

// ---- the steps

tune::Calibration RunCalibrate(const TuneOptions& o, const std::vector<tune::Dump>& dumps) {
  ProgressBar bar("calibrating");
  const auto [first, last] = o.LayerRange(dumps[0].model());
  return Require(tune::Calibrate(Pointers(dumps), first, last, WithBar(o, &bar)));
}

// Adds what `path` holds already, if there is such a file.
void Resume(const std::string& path, tune::Measurement* measurement) {
  Result<tune::Measurement> known = tune::LoadMeasurement(path);
  if (known.status().code() == ErrorCode::kNotFound) return;
  Result<tune::Measurement> both = tune::Merge(*measurement, Require(std::move(known)));
  if (!both.ok()) Refuse("{}: {}; name another file to begin anew", path, both.status().message());
  *measurement = std::move(*both);
}

// `path`, if it is not empty, is kept up to date, and read if it is there.
tune::Measurement RunMeasure(const TuneOptions& o, const std::vector<tune::Dump>& dumps,
                             const tune::Calibration& calibration, const std::string& path) {
  ProgressBar bar("measuring every head and codec");
  const tune::MeasureOptions how = WithBar(o, &bar);
  tune::Measurement m =
      Require(tune::StartMeasurement(calibration, Require(tune::Candidates(o.candidates)), how));
  m.candidate_set = o.candidates;
  if (!path.empty()) Resume(path, &m);
  const auto save = [&] { return path.empty() ? Status() : tune::SavePart(m, path); };
  const auto [first, last] = o.LayerRange(calibration.model);
  Require(tune::Measure(Pointers(dumps), calibration, first, last, how, &m, save));
  Require(save());
  return m;
}

// The dumps by their hash, as the measurement has them.
std::vector<const tune::Dump*> InOrder(const std::vector<tune::Dump>& dumps,
                                       const tune::Measurement& m) {
  std::map<std::string, const tune::Dump*> by_hash;
  for (const tune::Dump& dump : dumps) {
    const tune::DumpId id = Require(tune::Identify(dump));
    if (std::ranges::find(m.dumps, id.hash, &tune::DumpId::hash) == m.dumps.end())
      Refuse("{}: expected one of the dumps that were measured, {}, found another", dump.path(),
             tune::Names(m.dumps));
    if (!by_hash.emplace(id.hash, &dump).second) Refuse("{}: expected each dump once", dump.path());
  }
  if (!by_hash.empty() && by_hash.size() != m.dumps.size())
    Refuse("expected every dump that was measured, {}, or none, found {} of {}",
           tune::Names(m.dumps), by_hash.size(), m.dumps.size());
  std::vector<const tune::Dump*> ordered;
  for (const auto& [hash, dump] : by_hash) ordered.push_back(dump);
  return ordered;
}

struct HeldOut {
  tune::Dump dump;
  tune::DumpId id;
};

// Each fits `expected`, and none is there twice.
std::vector<HeldOut> OpenHoldouts(const TuneOptions& o, const Model& expected) {
  std::vector<HeldOut> holdouts;
  for (const std::string& path : o.holdouts) {
    tune::Dump dump = OpenDump(path, o.raw);
    if (!dump.has_q()) Refuse("{}: has no Q, which attention errors need", path);
    if (dump.tokens() == 0) Refuse("{}: has no tokens", path);
    if (dump.model() != expected)
      Refuse("{}: expected {}, found {}", path, ToString(expected), ToString(dump.model()));
    tune::DumpId id = Require(tune::Identify(dump));
    for (const HeldOut& other : holdouts)
      if (other.id.hash == id.hash) Require(tune::GivenTwice(other.dump, dump));
    holdouts.push_back({std::move(dump), std::move(id)});
  }
  return holdouts;
}

// `table`: what was measured; `dumps`: those that it was measured on, or none.
TuneReport RunChoose(TuneOptions o, const tune::Measurement& m, tune::ErrorTable table,
                     const std::vector<tune::Dump>& dumps, const std::vector<HeldOut>& holdouts) {
  const std::vector<const tune::Dump*> calibration = InOrder(dumps, m);
  o.target = m.target;
  TuneReport report;
  report.candidates = m.candidate_set;
  report.context = o.context;
  report.constraints = o.constraints;
  report.times_are_kept = !o.wisdom.empty();
  report.explain = o.explain;
  report.table = std::move(table);
  report.wisdom = Speeds(o, m.model, m.candidates);
  const auto choose = [&] {
    report.choice = Require(tune::Choose(report.table, report.wisdom, o.context, o.constraints));
  };
  choose();

  const Plan& plan = report.choice.plan;
  for (bool again = !calibration.empty(); again;) {
    const std::vector<tune::AttentionError> truth =
        MeasureWhole(calibration, plan, o, "measuring the plan on the calibration");
    report.calibration = tune::Summarize(truth, m.model);
    const std::size_t worse = tune::RaiseToTruth(plan, truth, kWorseThanPredicted, &report.table);
    report.worse_than_predicted.push_back(worse);
    again = worse > 0 && report.worse_than_predicted.size() <= kRepairs;
    if (again) choose();
  }
  Provenance& provenance = report.choice.plan.provenance;
  if (report.calibration) provenance.on_calibration = *report.calibration;
  for (const HeldOut& holdout : holdouts) {
    if (std::ranges::find(m.dumps, holdout.id.hash, &tune::DumpId::hash) != m.dumps.end())
      Warn(fmt::format("{}: this holdout is a dump of the calibration: take another text",
                       holdout.dump.path()));
    WarnOfLength(holdout.dump, plan);
    const std::vector<tune::AttentionError> errors =
        MeasureWhole({&holdout.dump}, plan, o, "measuring the plan on " + holdout.id.name);
    report.holdouts.push_back({holdout.id.name, holdout.id.tokens, holdout.id.longest_prompt,
                               tune::Summarize(errors, m.model)});
  }
  if (const Holdout* worst = WorstHoldout(report)) {
    provenance.holdout = worst->name;
    provenance.holdout_tokens = worst->tokens;
    provenance.on_holdout = worst->found;
  }
  return report;
}

// ---- the command line of each

// What can be said before the work begins.
void CheckChoosing(TuneOptions* o) {
  if (!o->constraints.budget && !o->constraints.min_cosine)
    Refuse("nothing to aim at: give --budget (0.45 saves 45 % of the bytes) or --min-cosine");
  if (o->max_ms) o->constraints.max_decode_ns = *o->max_ms * 1e6;
  // Times that are measured in every run anew must not make every run's plan another.
  if (o->wisdom.empty()) o->constraints.time_tolerance = 1.0;
  if (o->output.empty() && !o->json) {
    o->output = kDefaultPlan;
    std::error_code error;
    if (std::filesystem::exists(std::filesystem::symlink_status(kDefaultPlan, error)))
      Refuse("{} exists already: name the plan's file with -o", kDefaultPlan);
  }
  for (const std::string& path : {o->output, o->wisdom, o->work})
    if (!path.empty()) CheckWritable(path);
}

void Finish(const TuneReport& report, const TuneOptions& o) {
  if (!o.output.empty()) Require(SavePlan(report.choice.plan, o.output));
  Print(o.json ? ReportJson(report)
               : ReportText(report) + fmt::format("\nplan written to {}\n", o.output));
}

// What a part holds, and what it lacks of the model and of the dumps that it knows.
template <class Part>
void PrintContents(const Part& part, const std::string& path) {
  std::vector<tune::Place> there, missing;
  for (std::size_t layer = 0; layer < part.model.layers.size(); ++layer) {
    if (!part.model.layers[layer].owns_kv()) continue;
    const auto pieces = part.pieces.find(layer);
    for (const tune::DumpId& id : part.dumps) {
      const bool has = pieces != part.pieces.end() && pieces->second.contains(id.hash);
      (has ? there : missing).emplace_back(id.hash, layer);
    }
  }
  const auto line = [&](const char* what, const std::vector<tune::Place>& places) {
    return places.empty() ? ""
                          : fmt::format("  {} {}\n", what, tune::PlacesText(places, part.dumps));
  };
  Print(fmt::format("{}\n", path) + line("holds", there) + line("lacks", missing));
}

std::vector<std::string> DumpPaths(const TuneOptions& o) {
  return o.dumps.empty() ? std::vector{SamplePath("calibration")} : o.dumps;
}

template <class Part>
Part MergeFiles(const std::vector<std::string>& paths, Result<Part> load(const std::string&)) {
  Part all = Require(load(paths[0]));
  for (std::size_t i = 1; i < paths.size(); ++i) {
    Result<Part> more = tune::Merge(all, Require(load(paths[i])));
    if (!more.ok()) Refuse("{}: {}", paths[i], more.status().message());
    all = std::move(*more);
  }
  return all;
}

constexpr const char* kCalibrated = "dumps of one model; without any, the built-in sample";

// A step adds its options to `app` and returns what runs it.
using Step = std::function<void()> (*)(CLI::App* app, TuneOptions* o);

std::function<void()> CalibrateStep(CLI::App* app, TuneOptions* o) {
  app->description("The first step: adds up what is known of every head's K, V and queries.");
  AddDumps(app, o, kCalibrated);
  AddLayers(app, o);
  AddPartOutput(app, o, "the file to write");
  return [o] {
    CheckPart(o->output);
    const tune::Calibration calibration = RunCalibrate(*o, OpenDumps(DumpPaths(*o), o->raw));
    Require(tune::SavePart(calibration, o->output));
    PrintContents(calibration, o->output);
  };
}

std::function<void()> MeasureStep(CLI::App* app, TuneOptions* o) {
  app->description("The second step: the errors of every candidate codec on every head.");
  AddDumps(app, o, kCalibrated);
  app->add_option("--calibration", o->parts, "files of the first step that are whole together")
      ->required();
  AddLayers(app, o);
  AddMeasuring(app, o);
  AddPartOutput(app, o, "the file to write, after every layer; one that is there is gone on with");
  return [o] {
    CheckPart(o->output);
    const tune::Calibration calibration =
        MergeFiles<tune::Calibration>(o->parts, tune::LoadCalibration);
    const std::vector<tune::Dump> dumps = OpenDumps(DumpPaths(*o), o->raw);
    PrintContents(RunMeasure(*o, dumps, calibration, o->output), o->output);
  };
}

std::function<void()> MergeStep(CLI::App* app, TuneOptions* o) {
  app->description("Puts files of the first step together, or of the second.");
  app->add_option("PART", o->parts, "files of one kind")->required();
  AddPartOutput(app, o, "the file to write");
  return [o] {
    CheckPart(o->output);
    const auto merge = [&](const auto& part) {
      Require(tune::SavePart(part, o->output));
      PrintContents(part, o->output);
    };
    if (Require(tune::KindOfPart(o->parts[0])) == tune::PartKind::kCalibration)
      merge(MergeFiles<tune::Calibration>(o->parts, tune::LoadCalibration));
    else
      merge(MergeFiles<tune::Measurement>(o->parts, tune::LoadMeasurement));
  };
}

std::function<void()> ChooseStep(CLI::App* app, TuneOptions* o) {
  app->description("The last step: a plan within a budget, from what was measured.");
  app->add_option("FILE", o->measurement, "a file of the second step that is whole")->required();
  AddDumps(app, o, "all dumps that were measured, to measure the plan as a whole; or none");
  AddChoosing(app, o);
  return [o] {
    CheckChoosing(o);
    const tune::Measurement m = Require(tune::LoadMeasurement(o->measurement));
    Result<tune::ErrorTable> table = tune::Table(m);
    if (!table.ok()) Refuse("{}: {}", o->measurement, table.status().message());
    const std::vector<HeldOut> holdouts = OpenHoldouts(*o, m.model);
    Finish(RunChoose(*o, m, std::move(*table), OpenDumps(o->dumps, o->raw), holdouts), *o);
  };
}

std::function<void()> AllSteps(CLI::App* app, TuneOptions* o) {
  app->description(
      "Chooses how every KV head's K and V is stored: the least damage to attention within a "
      "budget of bytes.");
  AddDumps(app, o, kCalibrated);
  AddMeasuring(app, o);
  AddChoosing(app, o);
  app->add_option("--work", o->work,
                  "file to keep what was measured in, after every layer: another run goes on with "
                  "it, and choose takes it");
  app->footer(
      "Example:\n  kvmix-tune model.c4.safetensors --holdout model.wikitext.safetensors --budget "
      "0.45 -o plan.json\n"
      "The same in steps, which can run in parts and elsewhere (STEP --help says how):\n"
      "  kvmix-tune calibrate model.c4.safetensors -o calibration\n"
      "  kvmix-tune measure model.c4.safetensors --calibration calibration --layers 0:14 -o a\n"
      "  kvmix-tune measure model.c4.safetensors --calibration calibration --layers 14:28 -o b\n"
      "  kvmix-tune merge a b -o measurement\n"
      "  kvmix-tune choose measurement model.c4.safetensors --budget 0.45 -o plan.json\n"
      "For another engine:\n  kvmix-tune export plan.json --to llama.cpp");
  return [o] {
    CheckChoosing(o);
    std::error_code error;
    if (o->candidates == "all" && !internal::IsNullDevice(o->output) &&
        std::filesystem::is_other(std::filesystem::status(o->output, error))) {
      Refuse(
          "{}: expected a file, as a plan with +shape has a second file beside it, found a "
          "device or a pipe; name a file, or give --candidates int8",
          o->output);
    }
    if (o->dumps.empty() && o->holdouts.empty()) o->holdouts = {SamplePath("holdout")};
    const std::vector<tune::Dump> dumps = OpenDumps(DumpPaths(*o), o->raw);
    const std::vector<HeldOut> holdouts = OpenHoldouts(*o, dumps[0].model());
    const tune::Measurement m = RunMeasure(*o, dumps, RunCalibrate(*o, dumps), o->work);
    Finish(RunChoose(*o, m, Require(tune::Table(m)), dumps, holdouts), *o);
  };
}

std::function<void()> ExportStep(CLI::App* app, TuneOptions* o) {
  app->description(
      "A plan in the words of another engine, as near as it comes to it, and what is lost.");
  app->add_option("PLAN", o->plan, "a plan of kvmix-tune")->required();
  app->add_option("--to", o->engine, "whose words")->required()->check(CLI::IsMember(kEngines));
  app->add_option("-o,--output", o->output, "file for the flags or the configuration alone");
  app->add_flag("--json", o->json, "print it, and what is lost, as JSON");
  return [o] {
    const Plan plan = Require(LoadPlan(o->plan));
    const PlanExport found = ExportPlan(plan, o->engine);
    if (!o->output.empty()) Require(internal::WriteFileAtomically(o->output, found.text));
    Print(o->json ? ToJson(found, plan, o->engine)
                  : (o->output.empty() ? found.text + "\n" : "") + NotesText(found, o->engine));
  };
}

constexpr std::pair<std::string_view, Step> kSteps[] = {{"calibrate", CalibrateStep},
                                                        {"measure", MeasureStep},
                                                        {"merge", MergeStep},
                                                        {"choose", ChooseStep},
                                                        {"export", ExportStep}};

// A step is a first argument that is its name; a dump of that name is ./NAME.
int Main(int argc, char** argv) {
  const auto* step = argc < 2 ? std::end(kSteps)
                              : std::ranges::find(kSteps, std::string_view(argv[1]),
                                                  [](const auto& s) { return s.first; });
  const bool is_step = step != std::end(kSteps);
  TuneOptions o;
  CLI::App app("", is_step ? fmt::format("kvmix-tune {}", step->first) : "kvmix-tune");
  const std::function<void()> run = (is_step ? step->second : AllSteps)(&app, &o);
  return RunProgram(&app, argc - is_step, argv + is_step, run);
}

}  // namespace
}  // namespace kvmix::tools

// All but the options' definition runs in RunProgram(). NOLINTNEXTLINE(bugprone-exception-escape)
int main(int argc, char** argv) { return kvmix::tools::Main(argc, argv); }
