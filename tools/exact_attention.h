// Attention in double precision over the very codes that a cache stores, in plain C++: shows how
// much of an error is the codec's and how much the kernels add. Slow: some 2 Gmac/s a thread.
#ifndef KVMIX_TOOLS_EXACT_ATTENTION_H_
#define KVMIX_TOOLS_EXACT_ATTENTION_H_

#include <cstddef>
#include <vector>

#include "kvmix/dump.h"
#include "kvmix/plan.h"
#include "kvmix/status.h"

namespace kvmix::tools {

// AttendDump() of kvmix/tune.h in double precision: one layer, causal within each prompt. codecs:
// [kv_heads][K, V]. out: [tokens, query_heads, head_dim], rounded to f32 at the very end. Memory: K
// and V as doubles.
Status AttendExactly(const Dump& dump, std::size_t layer, const std::vector<HeadCodec>& codecs,
                     int num_threads, std::vector<float>* out);

}  // namespace kvmix::tools

#endif  // KVMIX_TOOLS_EXACT_ATTENTION_H_
