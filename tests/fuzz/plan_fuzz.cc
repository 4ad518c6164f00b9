// Any bytes as a plan: an error, or a valid plan that is the same once saved and loaded again.
#include <cstdint>
#include <string_view>

#include "kvmix/plan.h"
#include "tests/fuzz/fuzz.h"

namespace kvmix::fuzz {

std::vector<std::string> Seeds() {
  return {R"({"format": "kvmix-plan", "version": [1, 0],
"geometry": {"layers": 2, "kv_heads": 1, "query_heads": 2, "head_dim": 3},
"bytes_per_token": 19, "saved_fraction": 0.2,
"provenance": {"model": "a \"model\" \u00e9", "calibration": "one,two", "calibration_tokens": 512,
  "longest_prompt": 256, "holdout": "", "holdout_tokens": 0},
"accuracy": {"calibration": {"worst_cosine": 0.99, "mean_cosine": 1.0, "worst_nmse": 1e-5,
  "mean_nmse": 1e-300, "worst_layer": 1, "worst_query_head": 0}},
"codecs": [[{"k": "i8-head+centre", "k_scale": 0.1, "k_mean": [1, -2.5e1, 1e-40], "v": "f16"}],
           [{"k": "i8-token", "v": "i8-token-bf16+centre", "v_mean": [0, -0, 3.4e38]}]]})",
          R"({"format": "kvmix-plan", "version": [1, 1],
"geometry": {"layers": 1, "kv_heads": 1, "query_heads": 1, "head_dim": 2},
"codecs": [[{"k": "i8-token-bf16+centre+fold+hadamard", "k_mean": [1, 2], "k_factor": [0.5, 8],
  "v": "i8-token+hadamard"}]]})",
          R"({"format": "kvmix-plan", "version": [1, 3],
"geometry": {"layers": 1, "kv_heads": 1, "query_heads": 1, "head_dim": 2},
"codecs": [[{"k": "i4-token-bf16+centre+hadamard", "k_mean": [1, 2], "v": "i4-token"}]]})",
          R"({"format": "kvmix-plan", "version": [1, 7], "a later field": [null],
"geometry": {"layers": 1, "kv_heads": 1, "query_heads": 2, "head_dim": 2},
"codecs": [[{"k": "f16", "v": "i8-token"}]]})",
          R"({"format": "kvmix-plan", "version": [1, 2], "layers": [null,
  {"kv_heads": 1, "query_heads": 2, "k_dim": 3, "v_dim": 2, "window": 64, "soft_cap": 50},
  {"kv_heads": 1, "query_heads": 1, "k_dim": 3, "v_dim": 2, "attention_scale": 0.1, "sinks": [-1],
   "kv_layer": 1}], "codecs": [null, [{"k": "i8-token", "v": "f16"}], null]})",
          R"({"format": "kvmix-plan", "version": [2, 0]})"};
}

namespace {

void Run(std::string_view bytes) {
  static TemporaryFile file, again;
  file.Write(bytes);
  const Result<Plan> plan = LoadPlan(file.path());
  if (!plan.ok()) return RequireGoodError(plan.status(), file.path());
  Require(CheckPlan(*plan).ok(), "a plan that CheckPlan accepts", CheckPlan(*plan));
  const Status saved = SavePlan(*plan, again.path());
  Require(saved.ok(), "a plan that can be saved", saved);
  const Result<Plan> second = LoadPlan(again.path());
  Require(second.ok(), "a plan that can be loaded again", second.status());
  Require(second->model == plan->model && second->codecs == plan->codecs, "the same plan");
}

}  // namespace
}  // namespace kvmix::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  kvmix::fuzz::Run({reinterpret_cast<const char*>(data), size});
  return 0;
}
