#include "dumps.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <system_error>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "console.h"

namespace kvmix::tools {

namespace fs = std::filesystem;

void WarnOfLength(const tune::Dump& dump, const Plan& plan) {
  const std::size_t longest = std::ranges::max(dump.prompt_tokens());
  if (!IsFarBeyond(plan, longest)) return;
  Warn(fmt::format(
      "{}: a context of {} tokens, but the plan was calibrated on prompts of at most {}: it may be "
      "less accurate there. Calibrate on prompts as long as those that are served.",
      dump.path(), longest, plan.provenance.longest_prompt));
}

std::string SamplePath(const std::string& part) {
  std::error_code error;
  std::vector<fs::path> folders{
      fs::read_symlink("/proc/self/exe", error).parent_path() / "../share/kvmix",
      KVMIX_SOURCE_DATA};
  if (const char* data = std::getenv("KVMIX_DATA_DIR")) folders = {data};
  std::vector<std::string> searched;
  for (const fs::path& folder : folders) {
    const fs::path sample = (folder / "sample").lexically_normal(),
                   file = sample / fmt::format("qwen2.5-coder-1.5b.{}.safetensors", part);
    if (fs::exists(file, error)) return file.string();
    searched.push_back(sample.string());
  }
  Refuse("the built-in sample is not in {}: name a dump, or set KVMIX_DATA_DIR",
         fmt::join(searched, " or "));
}

}  // namespace kvmix::tools
