// The study's strategies as plans, so that one code path serves them and any other plan.
#ifndef KVMIX_TOOLS_STUDY_H_
#define KVMIX_TOOLS_STUDY_H_

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "kvmix/dump.h"
#include "kvmix/plan.h"
#include "kvmix/status.h"

namespace kvmix::tools {

struct KvHead {
  std::size_t layer = 0;
  std::size_t head = 0;
};

// "0:0,0:1,8:0", layer:head; "none"
Result<std::vector<KvHead>> ParseKvHeads(const std::string& text);

// 1: int8, one scale per head over all tokens.   2: int8, one per token and head.   3: K int8 with
// one scale per head, but fp16 for `fp16_heads`; V int8 with one scale per token. Without
// `fp16_heads`, the six of the study on its model (24 layers x 2 KV heads x 64), on other models an
// error. Per-head scales are left at 1: SetHeadScales() knows them.
Result<Plan> StrategyPlan(const Geometry& geometry, int strategy,
                          const std::optional<std::vector<KvHead>>& fp16_heads);

// Every per-head scale becomes the one that just covers this dump.
void SetHeadScales(const Dump& dump, Plan* plan);

}  // namespace kvmix::tools

#endif  // KVMIX_TOOLS_STUDY_H_
