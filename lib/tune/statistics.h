// Calibration adds these up over a dump.
#ifndef KVMIX_LIB_TUNE_STATISTICS_H_
#define KVMIX_LIB_TUNE_STATISTICS_H_

#include <cstddef>
#include <vector>

#include "kvmix/tune/dump.h"
#include "kvmix/tune/steps.h"

namespace kvmix::tune {

// The sums over one KV head's K or V in one dump. `readers`: the layer that owns K and V, then
// those that read them. K's query moment stays empty where the dump has no Q. The sums run in an
// order that depends on the shapes alone.
HeadStatistics Statistics(const std::vector<DumpLayer>& readers, std::size_t kv_head,
                          Tensor tensor);

}  // namespace kvmix::tune

#endif  // KVMIX_LIB_TUNE_STATISTICS_H_
