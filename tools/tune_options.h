// The command line of kvmix-tune, for its short form and for each of its four steps.
#ifndef KVMIX_TOOLS_TUNE_OPTIONS_H_
#define KVMIX_TOOLS_TUNE_OPTIONS_H_

#include <cstddef>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>

#include "kvmix/tune/tune.h"

namespace kvmix::tools {

struct CommandLine {
  std::vector<std::string> dumps;
  std::vector<std::string> parts;  // of `merge`; of `measure` the calibration
  std::string measurement;         // of `choose`
  std::string plan, engine;        // of `export`
  std::string layers;              // "FIRST:LAST"
  tune::TuneOptions how;           // how to measure and to choose
  int threads = 0;                 // of how.runner
  std::optional<double> max_ms;
  std::vector<std::string> holdouts;
  std::string output;
  bool json = false;
  bool explain = false;

  // The half-open range that `layers` names; without it, all of the model's.
  std::pair<std::size_t, std::size_t> LayerRange(const Model& model) const;
};

inline constexpr const char* kDefaultPlan = "plan.json";

// DUMP and --threads
void AddDumps(CLI::App* app, CommandLine* o, const std::string& what);
void AddLayers(CLI::App* app, CommandLine* o);
// --candidates, --exact-first, --target
void AddMeasuring(CLI::App* app, CommandLine* o);
// --budget and all else that the choice depends on, and where the plan goes
void AddChoosing(CLI::App* app, CommandLine* o);
// -o, which must be there
void AddPartOutput(CLI::App* app, CommandLine* o, const std::string& what);

}  // namespace kvmix::tools

#endif  // KVMIX_TOOLS_TUNE_OPTIONS_H_
