#include "dumps.h"

#include <cstdlib>
#include <filesystem>
#include <system_error>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace kvmix::tools {

void AddRawOptions(CLI::App* app, RawFormat* raw) {
  const std::string group =
      "Raw folders (layer_NN.k.bin, .v.bin, .q.bin: fp16, [tokens, heads, head_dim])";
  app->add_option("--kv-heads", raw->kv_heads, "KV heads")
      ->group(group)
      ->check(CLI::Range(1u, 65536u));
  app->add_option("--query-heads", raw->query_heads, "query heads")
      ->group(group)
      ->check(CLI::Range(1u, 65536u));
  app->add_option("--head-dim", raw->head_dim, "channels of a head")
      ->group(group)
      ->check(CLI::Range(1u, static_cast<unsigned>(kMaxHeadDim)));
  app->add_option("--prompt-tokens", raw->prompt_tokens,
                  "lengths of the concatenated prompts, comma-separated; without it: one prompt")
      ->group(group)
      ->delimiter(',');
}

Result<Dump> OpenDump(const std::string& path, const RawFormat& raw) {
  std::error_code error;
  if (!std::filesystem::is_directory(path, error)) return Dump::Open(path);
  if (raw.kv_heads == 0 || raw.head_dim == 0)
    return Status(
        ErrorCode::kInvalidArgument,
        fmt::format("{}: a raw folder needs --kv-heads, --query-heads and --head-dim", path));
  return Dump::Open(path, &raw);
}

Result<std::string> SamplePath(const std::string& part) {
  namespace fs = std::filesystem;
  std::error_code error;
  std::vector<fs::path> folders;
  if (const char* data = std::getenv("KVMIX_DATA_DIR")) {
    folders = {data};
  } else {
    folders = {fs::read_symlink("/proc/self/exe", error).parent_path() / "../share/kvmix",
               KVMIX_SOURCE_DATA};
  }
  for (const fs::path& folder : folders) {
    const fs::path file =
        folder / "sample" / fmt::format("qwen2.5-coder-1.5b.{}.safetensors", part);
    if (fs::exists(file, error)) return file.lexically_normal().string();
  }
  std::string where;
  for (const fs::path& folder : folders)
    where += (where.empty() ? "" : " or ") + (folder / "sample").lexically_normal().string();
  return Status(
      ErrorCode::kNotFound,
      fmt::format("the built-in sample is not in {}: name a dump, or set KVMIX_DATA_DIR", where));
}

}  // namespace kvmix::tools
