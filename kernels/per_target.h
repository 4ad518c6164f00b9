// For kernel files, after HWY_EXPORT(function): calls the copy of `function` that was compiled for
// one given target.
#ifndef KVMIX_KERNELS_PER_TARGET_H_
#define KVMIX_KERNELS_PER_TARGET_H_

#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"

namespace kvmix::kernels {

inline std::size_t TargetIndex(std::int64_t target) {
  hwy::ChosenTarget chosen;
  chosen.Update(target);
  return chosen.GetIndex();
}

}  // namespace kvmix::kernels

// Highway makes no table where only one target is compiled in (e.g. -march=native).
#if HWY_IDE || ((HWY_TARGETS & (HWY_TARGETS - 1)) == 0)
#define KVMIX_CALL_FOR(target, function) (static_cast<void>(target), &HWY_STATIC_DISPATCH(function))
#else
#define KVMIX_CALL_FOR(target, function) \
  HWY_DISPATCH_TABLE(function)[::kvmix::kernels::TargetIndex(target)]
#endif

// Stands between the parameters and the body of every lambda in per-target code: lambdas do not
// inherit the target's attributes, and gcc does not inline those used more than once.
#define KVMIX_LAMBDA HWY_ATTR __attribute__((always_inline))

#endif  // KVMIX_KERNELS_PER_TARGET_H_
