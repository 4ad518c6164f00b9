#include "engines/common/settings.h"

#include <algorithm>
#include <charconv>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <kvmix/version.h>

namespace kvmix::engine {
namespace {

Status Wrong(std::string message) { return {ErrorCode::kInvalidArgument, std::move(message)}; }

Status SetPlan(const std::string& value, Settings* settings) {
  Result<Plans> plans = Plans::Load(value);
  if (!plans.ok()) return plans.status();
  settings->plans = std::move(*plans);
  return {};
}

Status SetCodec(const std::string& value, Settings* settings) {
  const Result<CodecKind> kind = ParseCodecKind(value);
  if (!kind.ok()) return kind.status();
  if (kind->centre || kind->own_centre || kind->fold || kind->shape ||
      kind->scale == KVMIX_SCALE_HEAD) {
    return Wrong(
        fmt::format("expected a codec without numbers of its own, of K and V (no +centre, "
                    "+own-centre, +fold, +shape, i8-head), found {}",
                    value));
  }
  if (settings->plans.has_budget()) return Wrong("expected a codec or a budget, found both");
  if (settings->plans.empty()) settings->plans = Plans(HeadCodec{*kind});
  return {};
}

Status SetBudget(const std::string& value, Settings* settings) {
  double budget = 0.0;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), budget);
  if (error != std::errc() || end != value.data() + value.size() || !(budget > 0.0) ||
      !(budget < 1.0)) {
    return Wrong(fmt::format("expected a fraction between 0 and 1, as 0.6, found {}", value));
  }
  if (settings->plans.has_codec()) return Wrong("expected a codec or a budget, found both");
  if (settings->plans.empty()) settings->plans = Plans(budget);
  return {};
}

Status SetTarget(const std::string& value, Settings* settings) {
  const std::vector<std::string_view> targets = Targets();
  if (std::ranges::find(targets, value) == targets.end()) {
    return Wrong(fmt::format("expected one of {}, found {}", fmt::join(targets, ", "), value));
  }
  settings->target = value;
  return {};
}

Status SetDump(const std::string& value, Settings* settings) {
  settings->dump = value;
  return {};
}

template <bool Settings::*kSwitch>
Status SetSwitch(const std::string& value, Settings* settings) {
  if (value != "0" && value != "1") return Wrong("expected 0 or 1, found " + value);
  settings->*kSwitch = value == "1";
  return {};
}

struct Variable {
  const char* name;
  const char* help;
  Status (*set)(const std::string& value, Settings* settings);
};
constexpr Variable kVariables[] = {
    {"KVMIX_PLAN", "plans of kvmix-tune: a file, a folder, or several (a.json:b.json)", SetPlan},
    {"KVMIX_BUDGET", "without a plan: the fraction of f16's bytes to save (what int8 saves)",
     SetBudget},
    {"KVMIX_CODEC", "without a plan: one codec in all heads, of K and V", SetCodec},
    {"KVMIX_TARGET", "the instruction set (the best of this CPU)", SetTarget},
    {"KVMIX_DUMP", "a file to write K, V and Q to, for kvmix-tune", SetDump},
    {"KVMIX_MEMORY", "1: give the engine's own K and V back to the system",
     SetSwitch<&Settings::memory>},
    {"KVMIX_VERBOSE", "1: say at the end what was done", SetSwitch<&Settings::verbose>},
    {"KVMIX_HELP", "1: this list", SetSwitch<&Settings::help>},
};

// Variables that others read: the library, its tools, kvmix.sh and the jobs of Slurm.
constexpr std::string_view kOthers[] = {"KVMIX_AMX",      "KVMIX_BROWSER", "KVMIX_BUILD",
                                        "KVMIX_DATA_DIR", "KVMIX_LLAMA",   "KVMIX_MEASURE",
                                        "KVMIX_TUNE"};

}  // namespace

Result<Settings> ReadSettings(const char* const* environment) {
  Settings settings;
  for (; *environment != nullptr; ++environment) {
    const std::string_view text = *environment;
    const std::size_t equals = std::min(text.find('='), text.size());
    const std::string_view name = text.substr(0, equals);
    const std::string value(text.substr(std::min(equals + 1, text.size())));
    if (!name.starts_with("KVMIX_") || value.empty()) continue;
    if (std::ranges::find(kOthers, name) != std::end(kOthers)) continue;
    const auto variable = std::ranges::find(kVariables, name, &Variable::name);
    if (variable == std::end(kVariables)) {
      return Wrong(fmt::format(
          "{}: expected a setting that KVMIX_HELP=1 lists, found an unknown one", name));
    }
    if (Status s = variable->set(value, &settings); !s.ok()) {
      return Status(s.code(), fmt::format("{}: {}", name, s.message()));
    }
  }
  return settings;
}

std::string SettingsHelp() {
  std::string help;
  for (const Variable& v : kVariables) help += fmt::format("  {:<14} {}\n", v.name, v.help);
  return help;
}

std::string Summary(const Settings& settings) {
  return fmt::format("{}, {}", settings.plans.Summary(),
                     settings.target.empty() ? Targets().front() : settings.target);
}

}  // namespace kvmix::engine
