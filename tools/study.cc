#include "study.h"

#include <algorithm>
#include <string_view>

#include <fmt/format.h>

#include "kvmix/quantize.h"
#include "lib/files/parse_number.h"

namespace kvmix::tools {
namespace {

const std::vector<KvHead> kStudyHeads = {{0, 0}, {0, 1}, {1, 1}, {2, 0}, {2, 1}, {8, 0}};

bool IsStudyModel(const Geometry& g) {
  return g.layers == 24 && g.kv_heads == 2 && g.head_dim == 64;
}

}  // namespace

Result<std::vector<KvHead>> ParseKvHeads(const std::string& text) {
  std::vector<KvHead> heads;
  std::string_view rest = text;
  if (text == "none") rest = {};
  while (!rest.empty()) {
    const std::string_view item = rest.substr(0, rest.find(','));
    rest.remove_prefix(std::min(rest.size(), item.size() + 1));
    const std::size_t colon = item.find(':');
    const auto number = [](std::string_view t) { return internal::ParseNumber<std::size_t>(t); };
    const auto layer = number(item.substr(0, colon));
    const auto head = colon == item.npos ? std::nullopt : number(item.substr(colon + 1));
    if (!layer || !head)
      return Status(ErrorCode::kInvalidArgument,
                    fmt::format("--fp16-heads: expected layer:head, as in 0:1, found '{}'", item));
    heads.push_back({*layer, *head});
  }
  return heads;
}

Result<Plan> StrategyPlan(const Geometry& g, int strategy,
                          const std::optional<std::vector<KvHead>>& fp16_heads) {
  const HeadCodec per_head{{Storage::kI8, Scale::kHead}, 1.0f},
      per_token{{Storage::kI8, Scale::kToken}};
  if (strategy == 1) return UniformPlan(g, per_head, per_head);
  if (strategy == 2) return UniformPlan(g, per_token, per_token);
  if (!fp16_heads && !IsStudyModel(g))
    return Status(
        ErrorCode::kInvalidArgument,
        fmt::format("strategy 3 on {} needs --fp16-heads (its K heads to keep in fp16) or --plan: "
                    "the study's six heads are those of 24 layers x 2 KV heads x 64",
                    ToString(g)));
  Plan plan = UniformPlan(g, per_head, per_token);
  for (const KvHead& h : fp16_heads ? *fp16_heads : kStudyHeads) {
    if (h.layer >= g.layers || h.head >= g.kv_heads)
      return Status(ErrorCode::kInvalidArgument,
                    fmt::format("--fp16-heads: no head {}:{} in {}", h.layer, h.head, ToString(g)));
    plan.codec(h.layer, h.head, Tensor::kK) = {};
  }
  return plan;
}

void SetHeadScales(const Dump& dump, Plan* plan) {
  const Geometry& g = plan->geometry;
  for (std::size_t layer = 0; layer < g.layers; ++layer) {
    for (std::size_t head = 0; head < g.kv_heads; ++head) {
      for (const Tensor t : {Tensor::kK, Tensor::kV}) {
        HeadCodec& codec = plan->codec(layer, head, t);
        if (codec.kind.scale != Scale::kHead) continue;
        const float scale = HeadScale(dump.head(layer, head, t), codec);
        codec.head_scale = scale > 0.0f ? scale : 1.0f;  // nothing but zeros: any scale stores them
      }
    }
    dump.Release(layer);
  }
}

}  // namespace kvmix::tools
