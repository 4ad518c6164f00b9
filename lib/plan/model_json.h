// A model's layers as a JSON list, as plans, dumps and reports have it (docs/formats.md).
#ifndef KVMIX_LIB_PLAN_MODEL_JSON_H_
#define KVMIX_LIB_PLAN_MODEL_JSON_H_

#include <string>

#include "kvmix/model.h"
#include "lib/files/json_view.h"

namespace kvmix::internal {

// A layer a line.
std::string LayersText(const Model& model);
// What it says, which CheckModel may still refuse; errors go to the view's status.
Model ReadLayers(const JsonView& layers);

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_PLAN_MODEL_JSON_H_
