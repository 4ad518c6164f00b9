// Codecs, models and plans: checks, names, sizes and files. kvmix/plan.h says what each function
// does; its functions of the same names come here through kvmix/kvmix.h, and those of this header
// are called as internal::X, for both would fit.
#ifndef KVMIX_LIB_PLAN_PLAN_H_
#define KVMIX_LIB_PLAN_PLAN_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kvmix/plan.h"

namespace kvmix::internal {

std::string ToString(const CodecKind& kind);
Result<CodecKind> ParseCodecKind(std::string_view name);
std::size_t BytesPerToken(const CodecKind& kind, std::size_t head_dim);
Status CheckCodec(const HeadCodec& codec, std::size_t head_dim);

Status CheckModel(const Model& model);
std::string ToString(const Model& model);

Status CheckExactFirst(std::size_t tokens);
// Of a plan with these codecs.
Status CheckExactNewest(std::size_t tokens, const std::vector<HeadCodec>& codecs);
// Bytes of an own centre, of a stretch of one KV head: a scale, and int8 codes.
constexpr std::size_t CentreBytes(std::size_t k_dim) { return sizeof(float) + k_dim; }
// A codec for one KV head's K or V of a layer. Errors name the place.
Status CheckCodecAt(const HeadCodec& codec, const Plan& plan, std::size_t layer,
                    std::size_t kv_head, Tensor tensor);
Status CheckPlan(const Plan& plan);
std::uint64_t Fingerprint(const Plan& plan);
kvmix_plan_size MeasurePlan(const Plan& plan, std::size_t context);

Status SavePlan(const Plan& plan, const std::string& path);
Result<Plan> LoadPlan(const std::string& path);
// folder: the place of the matrices; null: a plan with any is refused.
Result<Plan> ParsePlan(std::string_view text, const char* folder);

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_PLAN_PLAN_H_
