// Layers of dumps, one after the other or side by side.
#ifndef KVMIX_LIB_TUNE_LAYERS_H_
#define KVMIX_LIB_TUNE_LAYERS_H_

#include <cstddef>
#include <functional>
#include <vector>

#include "kvmix/status.h"
#include "kvmix/tune/dump.h"
#include "kvmix/tune/steps.h"

namespace kvmix::tune {

// At least one, each with Q, all of one model.
Status CheckDumps(const std::vector<const Dump*>& dumps);

// The layers of [first, last) that own K and V. `dump` must have all of [first, last).
Result<std::vector<std::size_t>> OwnLayers(const Dump& dump, std::size_t first, std::size_t last);

// The error of work that the caller's progress callback stopped.
Status Cancelled();

// Calls work(layer, threads for it) for every layer, which is loaded meanwhile, and returns the
// first layer's error. Layers run side by side, which costs the least waiting, as long as the
// outputs that they hold stay small; else one after the other with all threads.
Status ForLayers(const std::vector<std::size_t>& layers, const std::vector<const Dump*>& dumps,
                 const MeasureOptions& options,
                 const std::function<Status(std::size_t, const MeasureOptions&)>& work);

}  // namespace kvmix::tune

#endif  // KVMIX_LIB_TUNE_LAYERS_H_
