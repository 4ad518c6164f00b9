// A plan in the words of other engines, as near as they come to it: per layer what its most
// demanding head needs. Names and rules come from
//   llama.cpp         common/arg.cpp: --cache-type-k, --cache-type-v; one type for all layers
//   ik_llama.cpp      common/common.cpp: -ctk-first TYPE,N and -ctk-last TYPE,N with -ctk, the
//                     same for V; -khad and -vhad rotate
//   openvino          openvinotoolkit/openvino, its CPU plug-in; one precision for all layers:
//                     src/inference/include/openvino/runtime/properties.hpp: KEY_CACHE_PRECISION,
//                     KEY_CACHE_GROUP_SIZE and the same of VALUE. In src/plugins/intel_cpu/src
//                     config.cpp: u4, u8, f16, the mode BY_CHANNEL of keys;
//                     transformations/transformation_pipeline.cpp: the bytes of a group
//   model-optimizer   NVIDIA Model-Optimizer: kv_cache_quantized_layers of hf_quant_config.json
#ifndef KVMIX_TOOLS_PLAN_EXPORT_H_
#define KVMIX_TOOLS_PLAN_EXPORT_H_

#include <string>
#include <vector>

#include "kvmix/plan.h"

namespace kvmix::tools {

inline const std::vector<std::string> kEngines = {"llama.cpp", "ik_llama.cpp", "openvino",
                                                  "model-optimizer"};

struct PlanExport {
  std::string text;                // flags, or a file's content
  double saved_fraction = 0.0;     // of the fp16 bytes of a token, as the engine stores it
  std::vector<std::string> notes;  // what the plan has and the engine does not; warnings first
};

// engine: one of kEngines.
PlanExport ExportPlan(const Plan& plan, const std::string& engine);
// The notes as lines for people; all of it as JSON.
std::string NotesText(const PlanExport& found, const std::string& engine);
std::string ToJson(const PlanExport& found, const Plan& plan, const std::string& engine);

}  // namespace kvmix::tools

#endif  // KVMIX_TOOLS_PLAN_EXPORT_H_
