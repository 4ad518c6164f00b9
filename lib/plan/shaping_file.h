// The shaping matrices of a plan (step +shape), in a safetensors file beside its JSON.
#ifndef KVMIX_LIB_PLAN_SHAPING_FILE_H_
#define KVMIX_LIB_PLAN_SHAPING_FILE_H_

#include <string>

#include "kvmix/plan.h"
#include "kvmix/status.h"

namespace kvmix::internal {

bool HasShaping(const Plan& plan);

// XXH3 (64 bits) of the matrices' numbers, head after head, as 16 hexadecimal digits.
std::string ShapingHash(const Plan& plan);

// Named after what it holds: plans of other matrices do not share a file, so that a plan is
// replaced as a whole or not at all, and the same plan is the same text under any name.
std::string ShapingFileName(const std::string& hash);

// The matrix of layer N's KV head H is the tensor "layers.N.heads.H.k", F32, [k_dim, k_dim].
Status SaveShaping(const Plan& plan, const std::string& path);
// Fills the codecs that have the step, which may have other vectors already. kCorrupt: a matrix is
// missing or of another shape or type, or the hash is another one.
Status LoadShaping(const std::string& path, const std::string& hash, Plan* plan);

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_PLAN_SHAPING_FILE_H_
