#include "engines/llama_cpp/plugin.h"

#include <cstdio>

namespace kvmix::llama {

void Say(const std::string& line) { std::fprintf(stderr, "kvmix: %s\n", line.c_str()); }

void Plugin::SayOnce(const std::string& reason, const std::string& line) {
  const std::lock_guard lock(mutex_);
  if (said_.insert(reason).second) Say(line);
}

std::optional<Attention> Plugin::Take(ggml_tensor* op) {
  if (op->op != GGML_OP_FLASH_ATTN_EXT) return {};
  std::optional<Attention> a = ReadAttention(op);
  std::string why = a ? Refusal(*a, settings.memory) : "attention without a KV cache", reason = why;
  if (why.empty()) {
    why = settings.plans.Check(a->layer, a->shape).message();
    reason = "plan";
  }
  if (why.empty()) return a;
  SayOnce(reason, "not taken, and left to the CPU: " + why);
  return {};
}

}  // namespace kvmix::llama
