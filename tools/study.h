// What the original study did and the library does not do: its strategies, as plans, so that one
// code path serves them and any other plan; its cast; attention in double precision.
#ifndef KVMIX_TOOLS_STUDY_H_
#define KVMIX_TOOLS_STUDY_H_

#include <cstddef>
#include <string>
#include <vector>

#include "kvmix/plan.h"
#include "kvmix/quantize.h"
#include "kvmix/runner.h"
#include "kvmix/tune/dump.h"

namespace kvmix::tools {

// 24 layers x 2 KV heads x 64: the one model whose six K heads for strategy 3 the study names.
bool IsStudyModel(const Model& model);

// 1: int8, one scale per head over all tokens.   2: int8, one per token and head.   3: K int8 with
// one scale per head, but fp16 for `fp16_heads`; V int8 with one scale per token. fp16_heads:
// "0:0,0:1,8:0" (layer:head), "none", or "": the study's six on its model, on others an error.
// Per-head scales are left at 1: SetHeadScales() knows them.
Plan StrategyPlan(const Model& model, int strategy, const std::string& fp16_heads);

// Every per-head scale becomes the one that just covers this dump.
void SetHeadScales(const tune::Dump& dump, Plan* plan);

// Rows of one head encoded and decoded again. The codec must be whole.
ErrorSums EncodingError(const RowsView& rows, const HeadCodec& codec);

// The same with `(int8_t)(x * inv_scale)` where it should round: the cast bug of the study, and of
// many a program. In the study's own arithmetic, and not the kernels', since the largest value of a
// row lies on an integer and a last bit decides on which side of it. codec: of one of its
// strategies.
ErrorSums TruncationError(const RowsView& rows, const HeadCodec& codec);

// AttendDump() of kvmix/tune.h in double precision, over the very codes that a cache stores: shows
// how much of an error is the codec's and how much the kernels add. One layer, causal within each
// prompt. codecs: [kv_heads][K, V]. Returns [tokens, query_heads, v_dim], rounded to f32 at the
// very end. Slow: some 2 Gmac/s a thread. Memory: K and V as doubles.
std::vector<float> AttendExactly(const tune::Dump& dump, std::size_t layer, const HeadCodec* codecs,
                                 const Runner& runner);

}  // namespace kvmix::tools

#endif  // KVMIX_TOOLS_STUDY_H_
