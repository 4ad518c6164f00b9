// Queries into the space of a codec's codes, and outputs back out of it.
#include "kernels/transform.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/transform.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/highway.h"
#include "kernels/transform-inl.h"
#include "kernels/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {
namespace {

template <bool kFactorFirst>
void TransformRows(float* x, std::size_t stride, std::size_t count, std::size_t dim,
                   const float* factor, bool hadamard) {
  for (std::size_t r = 0; r < count; ++r)
    TransformRow(x + r * stride, dim, kFactorFirst ? factor : nullptr,
                 kFactorFirst ? nullptr : factor, hadamard);
}

}  // namespace

TransformKernels TransformTable() { return {&TransformRows<true>, &TransformRows<false>}; }

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvmix::kernels {
HWY_EXPORT(TransformTable);
TransformKernels TransformKernelsFor(std::int64_t target) {
  return KVMIX_CALL_FOR(target, TransformTable)();
}
}  // namespace kvmix::kernels
#endif  // HWY_ONCE
