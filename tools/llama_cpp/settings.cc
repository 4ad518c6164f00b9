#include "settings.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string_view>

#include <kvmix/version.h>

namespace kvmix::llama {
namespace {

Settings settings;

constexpr const char* kDefaultCodec = "i8-token-bf16+hadamard";

// Each returns what is wrong with the value, or nothing.
std::string SetPlan(const std::string& value) {
  Result<Plan> plan = LoadPlan(value);
  if (!plan.ok()) return plan.status().message();
  settings.plan = std::move(*plan);
  settings.plan_path = value;
  return {};
}
std::string SetCodec(const std::string& value) {
  const Result<CodecKind> kind = ParseCodecKind(value);
  if (!kind.ok()) return kind.status().message();
  if (kind->centre || kind->fold || kind->scale == KVMIX_SCALE_HEAD) {
    return "expected a codec without numbers of its own (no +centre, +fold, i8-head), found " +
           value;
  }
  settings.codec = {*kind};
  return {};
}
std::string SetTarget(const std::string& value) {
  const std::vector<std::string_view> targets = Targets();
  if (std::ranges::find(targets, value) == targets.end()) {
    std::string names;
    for (const std::string_view t : targets) names.append(names.empty() ? "" : ", ").append(t);
    return "expected one of " + names + ", found " + value;
  }
  settings.target = value;
  return {};
}
std::string SetDump(const std::string& value) {
  if (value.empty()) return "expected a path, found an empty one";
  settings.dump = value;
  return {};
}
std::string SetSwitch(const std::string& value, bool* on) {
  if (value != "0" && value != "1") return "expected 0 or 1, found " + value;
  *on = value == "1";
  return {};
}
std::string SetMemory(const std::string& value) { return SetSwitch(value, &settings.memory); }
std::string SetVerbose(const std::string& value) { return SetSwitch(value, &settings.verbose); }
std::string Help(const std::string&);

struct Variable {
  const char* name;
  const char* help;
  std::string (*set)(const std::string& value);
};
constexpr Variable kVariables[] = {
    {"KVMIX_PLAN", "a plan of kvmix-tune for this model: which codec each head has", SetPlan},
    {"KVMIX_CODEC", "without a plan: the codec of all heads (i8-token-bf16+hadamard)", SetCodec},
    {"KVMIX_TARGET", "the instruction set (the best of this CPU)", SetTarget},
    {"KVMIX_DUMP", "a file to write K, V and Q to, for kvmix-tune", SetDump},
    {"KVMIX_MEMORY", "1: give the engine's own K and V back to the system", SetMemory},
    {"KVMIX_VERBOSE", "1: say at the end what was done", SetVerbose},
    {"KVMIX_HELP", "1: this list", Help},
};

std::string Help(const std::string&) {
  std::fprintf(stderr, "kvmix %s for llama.cpp, flash attention on (-fa on). Settings:\n",
               std::string(Version()).c_str());
  for (const Variable& v : kVariables) std::fprintf(stderr, "  %-14s %s\n", v.name, v.help);
  return {};
}

}  // namespace

const Settings& TheSettings() { return settings; }

std::string NameOf(const Plan& plan) {
  const Provenance& p = plan.provenance;
  return p.model.empty() ? "calibrated on " + p.calibration : p.model;
}

bool LoadSettings() {
  SetCodec(kDefaultCodec);
  const auto refuse = [](std::string_view name, const std::string& why) {
    std::fprintf(stderr, "kvmix: error: %s: %s. kvmix is not used.\n", std::string(name).c_str(),
                 why.c_str());
    return false;
  };
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    if (!text.starts_with("KVMIX_")) continue;
    const std::string_view name = text.substr(0, text.find('='));
    const auto variable = std::ranges::find(kVariables, name, &Variable::name);
    if (variable == std::end(kVariables)) {
      return refuse(name, "expected a setting that KVMIX_HELP=1 lists, found an unknown one");
    }
    if (const std::string why = variable->set(std::getenv(variable->name)); !why.empty()) {
      return refuse(name, why);
    }
  }
  const std::string plan = settings.plan ? settings.plan_path + " (" + NameOf(*settings.plan) + ")"
                                         : ToString(settings.codec.kind) + " in all heads";
  const std::string target =
      settings.target.empty() ? std::string(Targets().front()) : settings.target;
  std::fprintf(stderr,
               "kvmix %s: %s, %s%s; takes flash attention (-fa on) over caches of f16, bf16, f32 "
               "and q8_0\n",
               std::string(Version()).c_str(), plan.c_str(), target.c_str(),
               settings.memory ? ", in place of the engine's cache" : "");
  return true;
}

}  // namespace kvmix::llama
