// What kvmix-tune found, as text for people and as JSON for programs.
#ifndef KVMIX_TOOLS_TUNE_REPORT_H_
#define KVMIX_TOOLS_TUNE_REPORT_H_

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "kvmix/tune/speed.h"
#include "kvmix/tune/steps.h"

namespace kvmix::tools {

// The plan measured as a whole on a dump that it was not made from.
struct Holdout {
  std::string name;  // of the dump's file
  std::size_t tokens = 0;
  std::size_t longest_prompt = 0;
  Fidelity found;
};

struct TuneReport {
  std::string candidates;  // "seed", "int8"
  std::size_t context = 0;
  tune::Constraints constraints;
  bool times_are_kept = false;  // in a wisdom file
  bool explain = false;         // say of every K and V why it is not stored smaller
  tune::ErrorTable table;
  tune::Wisdom wisdom;
  tune::Choice choice;
  // The plan measured as a whole, where there were dumps for it.
  std::optional<Fidelity> calibration;
  std::vector<Holdout> holdouts;  // in the order they were given
  // Of each plan that was measured on the calibration, the last of them the one above: the query
  // heads whose NMSE was more than kWorseThanPredicted times the predicted one.
  std::vector<std::size_t> worse_than_predicted;
};

inline constexpr double kWorseThanPredicted = 1.5;

// The holdout of the least worst cosine, of equals the first: the one that the plan's file keeps.
// Null where there is none.
const Holdout* WorstHoldout(const TuneReport& report);

std::string ReportText(const TuneReport& report);
std::string ReportJson(const TuneReport& report);

}  // namespace kvmix::tools

#endif  // KVMIX_TOOLS_TUNE_REPORT_H_
