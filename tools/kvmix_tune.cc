// kvmix-tune: from dumps to a plan (kvmix/tune/tune.h), in one go, or in four steps that leave
// files to each other. The command line, and what people are told.
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <iterator>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include "console.h"
#include "dumps.h"
#include "kvmix/tune/tune.h"
#include "plan_export.h"
#include "tune_options.h"
#include "tune_report.h"

namespace kvmix::tools {
namespace {

// The path that symbolic links lead to; the last one may lead to nothing yet.
std::filesystem::path RealPath(std::filesystem::path path) {
  namespace fs = std::filesystem;
  constexpr int kMostLinks = 40;  // as many as Linux follows
  std::error_code error;
  for (int i = 0; i < kMostLinks && fs::is_symlink(fs::symlink_status(path, error)); ++i) {
    path = path.parent_path() / fs::read_symlink(path, error);  // an absolute one stands alone
  }
  return path;
}

// Tells early that a file cannot be written, before minutes of work.
void CheckWritable(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code error;
  if (fs::is_directory(path, error))
    Refuse("{}: expected a file to write to, found a folder", path);
  if (fs::is_other(fs::status(path, error))) return;  // a device or a pipe is written to as it is
  const fs::path parent = RealPath(path).parent_path(), folder = parent.empty() ? "." : parent;
  if (!fs::is_directory(folder, error))
    Refuse("{}: expected the folder {}, found none", path, folder.string());
  if (access(folder.c_str(), W_OK | X_OK) != 0)
    Refuse("{}: may not write to the folder {}", path, folder.string());
}

// A step may overwrite the file of a step, and nothing else.
void CheckPart(const std::string& path) {
  CheckWritable(path);
  std::error_code error;
  if (std::filesystem::is_regular_file(path, error) && !tune::KindOfPart(path).ok())
    Refuse("{}: expected no file, or one that a step of kvmix-tune wrote, found another", path);
}

std::vector<tune::Dump> OpenDumps(const std::vector<std::string>& paths) {
  std::vector<tune::Dump> dumps;
  for (const std::string& path : paths) dumps.push_back(Require(tune::Dump::Open(path)));
  return dumps;
}

std::vector<const tune::Dump*> Pointers(const std::vector<tune::Dump>& dumps) {
  std::vector<const tune::Dump*> pointers;
  for (const tune::Dump& dump : dumps) pointers.push_back(&dump);
  return pointers;
}

// Shows a bar while run(options) works, and returns its result.
template <class Run>
auto WithBar(const tune::TuneOptions& o, const std::string& step, const Run& run) {
  ProgressBar bar(step);
  return Require(run(tune::MeasureOptions{o.runner, o.target, bar.Callback(),
                                          o.exact_first.value_or(0), o.exact_newest.value_or(0)}));
}

// Warns of holdouts whose figures say less than they seem to.
void WarnOfHoldouts(const std::vector<tune::Dump>& dumps, const tune::Tuned& tuned) {
  for (std::size_t i = 0; i < dumps.size(); ++i) {
    if (tuned.holdouts[i].is_calibration) {
      Warn(fmt::format("{}: this holdout is a dump of the calibration: take another text",
                       dumps[i].path()));
    }
    WarnOfLength(dumps[i], tuned.choice.plan);
  }
}

// Tunes, with `how`(holdouts, options) as the way to do it, and hands the plan and the report out.
template <class How>
void RunTune(const CommandLine& o, const How& how) {
  const std::vector<tune::Dump> holdouts = OpenDumps(o.holdouts);
  TuneReport report;
  {
    StepBar bar;
    tune::TuneOptions options = o.how;
    options.progress = [&](const std::string& step, std::size_t done, std::size_t total) {
      bar.Update(step, done, total);
      return true;
    };
    static_cast<tune::Tuned&>(report) = Require(how(Pointers(holdouts), options));
  }
  report.times_are_kept = !o.how.wisdom.empty();
  report.explain = o.explain;
  WarnOfHoldouts(holdouts, report);
  if (!o.output.empty()) Require(SavePlan(report.choice.plan, o.output));
  Print(o.json ? ReportJson(report)
               : ReportText(report) + fmt::format("\nplan written to {}\n", o.output));
}

// ---- the command line of each

// Refuses what can be refused before the work begins.
void CheckChoosing(CommandLine* o) {
  tune::Constraints& constraints = o->how.constraints;
  if (!constraints.budget && !constraints.min_cosine)
    Refuse("nothing to aim at: give --budget (0.45 saves 45 % of the bytes) or --min-cosine");
  if (o->max_ms) constraints.max_decode_ns = *o->max_ms * 1e6;
  if (o->output.empty() && !o->json) {
    o->output = kDefaultPlan;
    std::error_code error;
    if (std::filesystem::exists(std::filesystem::symlink_status(kDefaultPlan, error)))
      Refuse("{} exists already: name the plan's file with -o", kDefaultPlan);
  }
  for (const std::string& path : {o->output, o->how.wisdom, o->how.work})
    if (!path.empty()) CheckWritable(path);
}

// Prints what a part holds, and what it lacks of the model and of the dumps that it knows.
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

std::vector<std::string> DumpPaths(const CommandLine& o) {
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
using Step = std::function<void()> (*)(CLI::App* app, CommandLine* o);

std::function<void()> CalibrateStep(CLI::App* app, CommandLine* o) {
  app->description("The first step: adds up what is known of every head's K, V and queries.");
  AddDumps(app, o, kCalibrated);
  AddLayers(app, o);
  AddPartOutput(app, o, "the file to write");
  return [o] {
    CheckPart(o->output);
    const std::vector<tune::Dump> dumps = OpenDumps(DumpPaths(*o));
    const auto range = o->LayerRange(dumps[0].model());
    const auto calibration = WithBar(o->how, "calibrating", [&](const auto& options) {
      return tune::Calibrate(Pointers(dumps), range.first, range.second, options);
    });
    Require(tune::SavePart(calibration, o->output));
    PrintContents(calibration, o->output);
  };
}

std::function<void()> MeasureStep(CLI::App* app, CommandLine* o) {
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
    const std::vector<tune::Dump> dumps = OpenDumps(DumpPaths(*o));
    const auto range = o->LayerRange(calibration.model);
    o->how = tune::Settled(o->how, Pointers(dumps));
    const auto m = WithBar(o->how, "measuring every head and codec", [&](const auto& options) {
      return tune::MeasureInto(o->output, Pointers(dumps), calibration, o->how.candidates,
                               range.first, range.second, options);
    });
    PrintContents(m, o->output);
  };
}

std::function<void()> MergeStep(CLI::App* app, CommandLine* o) {
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

std::function<void()> ChooseStep(CLI::App* app, CommandLine* o) {
  app->description("The last step: a plan within a budget, from what was measured.");
  app->add_option("FILE", o->measurement, "a file of the second step that is whole")->required();
  AddDumps(app, o, "all dumps that were measured, to measure the plan as a whole; or none");
  AddChoosing(app, o);
  return [o] {
    CheckChoosing(o);
    const tune::Measurement m = Require(tune::LoadMeasurement(o->measurement));
    const Status whole = tune::CheckWhole(m);
    if (!whole.ok()) Refuse("{}: {}", o->measurement, whole.message());
    const std::vector<tune::Dump> dumps = OpenDumps(o->dumps);
    RunTune(*o, [&](const auto& holdouts, const tune::TuneOptions& options) {
      return tune::Tune(m, Pointers(dumps), holdouts, options);
    });
  };
}

std::function<void()> AllSteps(CLI::App* app, CommandLine* o) {
  app->description(
      "Chooses how every KV head's K and V is stored: the least damage to attention within a "
      "budget of bytes.");
  AddDumps(app, o, kCalibrated);
  AddMeasuring(app, o);
  AddChoosing(app, o);
  app->add_option("--work", o->how.work,
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
    if (o->how.candidates == "all" && std::filesystem::canonical(o->output, error) != "/dev/null" &&
        std::filesystem::is_other(std::filesystem::status(o->output, error))) {
      Refuse(
          "{}: expected a file, as a plan with +shape has a second file beside it, found a "
          "device or a pipe; name a file, or give --candidates int8",
          o->output);
    }
    if (o->dumps.empty() && o->holdouts.empty()) o->holdouts = {SamplePath("holdout")};
    const std::vector<tune::Dump> dumps = OpenDumps(DumpPaths(*o));
    RunTune(*o, [&](const auto& holdouts, const tune::TuneOptions& options) {
      return tune::Tune(Pointers(dumps), holdouts, options);
    });
  };
}

std::function<void()> ExportStep(CLI::App* app, CommandLine* o) {
  app->description(
      "A plan in the words of another engine, as near as it comes to it, and what is lost.");
  app->add_option("PLAN", o->plan, "a plan of kvmix-tune")->required();
  app->add_option("--to", o->engine, "whose words")->required()->check(CLI::IsMember(kEngines));
  app->add_option("-o,--output", o->output, "file for the flags or the configuration alone");
  app->add_flag("--json", o->json, "print it, and what is lost, as JSON");
  return [o] {
    const Plan plan = Require(LoadPlan(o->plan));
    const PlanExport found = ExportPlan(plan, o->engine);
    if (!o->output.empty()) WriteFile(o->output, found.text);
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
  CommandLine o;
  CLI::App app("", is_step ? fmt::format("kvmix-tune {}", step->first) : "kvmix-tune");
  const std::function<void()> run = (is_step ? step->second : AllSteps)(&app, &o);
  return RunProgram(&app, argc - is_step, argv + is_step, [&] {
    o.how.runner = o.threads;
    run();
  });
}

}  // namespace
}  // namespace kvmix::tools

// All but the options' definition runs in RunProgram(). NOLINTNEXTLINE(bugprone-exception-escape)
int main(int argc, char** argv) { return kvmix::tools::Main(argc, argv); }
