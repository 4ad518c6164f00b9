// The settings of a plug-in: environment variables.
#ifndef KVMIX_ENGINES_COMMON_SETTINGS_H_
#define KVMIX_ENGINES_COMMON_SETTINGS_H_

#include <string>

#include <kvmix/status.h>

#include "engines/common/plans.h"

namespace kvmix::engine {

struct Settings {
  Plans plans;         // KVMIX_PLAN, or KVMIX_BUDGET, or KVMIX_CODEC
  std::string target;  // KVMIX_TARGET; empty: the best of this CPU
  std::string dump;    // KVMIX_DUMP; empty: none
  bool memory = false;
  bool verbose = false;
  bool help = false;
};

// environment: "NAME=value" pointers, then null, as `environ` has them. An empty variable is an
// unset one, and variables of the library, its tools and kvmix.sh are let through. An error names a
// KVMIX_ variable that is wrong, or unknown.
Result<Settings> ReadSettings(const char* const* environment);
// A line for each setting.
std::string SettingsHelp();
// "plan.json (Qwen2.5-1.5B), AVX2"
std::string Summary(const Settings& settings);

}  // namespace kvmix::engine

#endif  // KVMIX_ENGINES_COMMON_SETTINGS_H_
