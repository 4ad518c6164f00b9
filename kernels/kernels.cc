#include "kernels/kernels.h"

#include "hwy/highway.h"

namespace kvmix::kernels {
namespace {

std::vector<Kernels> MakeAll() {
  std::vector<Kernels> all;
  // A better target has a lower bit. SupportedTargets() also names fall-backs that are not compiled
  // in: mask them away.
  for (std::int64_t left = hwy::SupportedTargets() & HWY_TARGETS; left != 0; left &= left - 1) {
    const std::int64_t target = left & -left;
    all.push_back({hwy::TargetName(target), QuantizeKernelsFor(target), TileKernelsFor(target),
                   AttendKernelsFor(target), ProbeKernelsFor(target)});
  }
  return all;
}

const Kernels*& Active() {
  static const Kernels* active = &AllKernels().front();
  return active;
}

}  // namespace

const std::vector<Kernels>& AllKernels() {
  static const std::vector<Kernels> all = MakeAll();
  return all;
}

const Kernels& ActiveKernels() { return *Active(); }

bool UseTarget(std::string_view target) {
  for (const Kernels& k : AllKernels()) {
    if (target.empty() || target == k.target) {
      Active() = &k;
      return true;
    }
  }
  return false;
}

}  // namespace kvmix::kernels
