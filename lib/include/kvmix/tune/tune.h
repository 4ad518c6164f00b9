// From dumps to a plan in one call: everything that kvmix-tune does. A program that calls Tune()
// gets the plan that kvmix-tune writes with the same options, byte for byte.
//
//   1. Calibrate, Measure, Choose (kvmix/tune/steps.h).
//   2. The plan is measured as a whole on the calibration. Query heads with more than
//      kWorseThanPredicted times their predicted NMSE are held for as bad as they were measured
//      (RaiseToTruth), and the plan is chosen again, up to three times.
//   3. The plan is measured as a whole on every holdout.
#ifndef KVMIX_TUNE_TUNE_H_
#define KVMIX_TUNE_TUNE_H_

#include <cstddef>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "kvmix/export.h"
#include "kvmix/plan.h"
#include "kvmix/runner.h"
#include "kvmix/status.h"
#include "kvmix/tune/dump.h"
#include "kvmix/tune/speed.h"
#include "kvmix/tune/steps.h"

namespace kvmix::tune {

// Called when a step begins (0 of 1) and after each of its layers, by one thread at a time. `step`
// names the step for people: "calibrating", "measuring the plan on wiki.safetensors". Returns false
// to stop the work, which then ends with kCancelled.
using StepProgress =
    std::function<bool(const std::string& step, std::size_t done, std::size_t total)>;

struct TuneOptions {
  std::string candidates = "all";  // a name that Candidates() knows
  Constraints constraints = {};    // budget, min_cosine or both must be given
  std::size_t context = 4096;      // tokens in the cache, for bytes and decode times
  // A file of this CPU's kernel speeds: read if it exists, completed, written. "": the speeds are
  // measured and thrown away; time_tolerance then counts as 1, so that times that differ from run
  // to run cannot make every run's plan another one.
  std::string wisdom = {};
  // A file that keeps the measurement after every layer; another run goes on with it. "": none.
  std::string work = {};
  // As in Plan. Without: 4 and 64 where they take at most a fiftieth of f16's bytes at `context`,
  // and none for the study's candidates.
  std::optional<std::size_t> exact_first = {}, exact_newest = {};
  std::string target = {};  // the instruction set, a name of Targets(); "": the best
  Runner runner = 0;        // the plan does not depend on it
  StepProgress progress = {};
};

// The plan measured as a whole on a dump that it was not made from.
struct Holdout {
  std::string name = {};  // of the dump's file
  std::size_t tokens = 0;
  std::size_t longest_prompt = 0;
  Fidelity found = {};
  bool is_calibration = false;  // the dump belongs to the calibration, so `found` proves nothing
  bool is_far_beyond = false;   // its prompts are far longer than the calibration's (IsFarBeyond)
};

inline constexpr double kWorseThanPredicted = 1.5;

struct Tuned {
  Choice choice = {};     // choice.plan has its whole provenance
  ErrorTable table = {};  // what the plan was chosen from, raised to the truth
  Wisdom wisdom = {};     // holds the speed of every pair of candidates
  std::string candidates = {};
  std::size_t context = 0;
  Constraints constraints = {};  // with the time_tolerance that was used
  // The plan measured as a whole on the calibration, where its dumps were given.
  std::optional<Fidelity> calibration = {};
  std::vector<Holdout> holdouts = {};  // in the order given
  // For each plan that was measured on the calibration, the last being choice.plan: the number of
  // query heads whose NMSE was more than kWorseThanPredicted times the predicted one.
  std::vector<std::size_t> worse_than_predicted = {};
};

// The options with exact_first and exact_newest as they are for this model.
KVMIX_API TuneOptions Settled(TuneOptions options, const Model& model);

// The holdout with the least worst cosine, the first of equal ones: the plan's provenance names it.
// Null if there are no holdouts.
KVMIX_API const Holdout* WorstHoldout(const Tuned& tuned);

// dumps: the calibration, at least one dump. holdouts: other texts, or none; each has Q and the
// model of `dumps`, and none is given twice.
KVMIX_API Result<Tuned> Tune(const std::vector<const Dump*>& dumps,
                             const std::vector<const Dump*>& holdouts, const TuneOptions& options);

// The same from a measurement that is whole (CheckWhole), whose candidates, exact_first and target
// take the place of the options'. dumps: every dump that was measured; or none, and the plan is not
// measured on the calibration.
KVMIX_API Result<Tuned> Tune(const Measurement& measurement, const std::vector<const Dump*>& dumps,
                             const std::vector<const Dump*>& holdouts, const TuneOptions& options);

}  // namespace kvmix::tune

#endif  // KVMIX_TUNE_TUNE_H_
