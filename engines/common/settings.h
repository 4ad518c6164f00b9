// The settings of the plug-in: environment variables.
#ifndef KVMIX_ENGINES_COMMON_SETTINGS_H_
#define KVMIX_ENGINES_COMMON_SETTINGS_H_

#include <optional>
#include <string>

#include <kvmix/codec.h>
#include <kvmix/plan.h>

namespace kvmix::engine {

struct Settings {
  std::optional<Plan> plan;  // KVMIX_PLAN
  std::string plan_path;
  HeadCodec codec;     // KVMIX_CODEC, where there is no plan
  std::string target;  // KVMIX_TARGET
  std::string dump;    // KVMIX_DUMP
  bool memory = false;
  bool verbose = false;
};

// Reads the KVMIX_* variables and says in one line what they come to; with KVMIX_HELP, lists them.
// False, with a line that says why: one of them is wrong, or unknown.
bool LoadSettings();
const Settings& TheSettings();
// The model of a plan, or what it was calibrated on.
std::string NameOf(const Plan& plan);

}  // namespace kvmix::engine

#endif  // KVMIX_ENGINES_COMMON_SETTINGS_H_
