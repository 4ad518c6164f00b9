// The list of targets: what is compiled in and what this CPU runs.
#include "kernels/kernels.h"

#include <algorithm>

#include "hwy/highway.h"
#include "kernels/amx.h"

namespace kvmix::kernels {
namespace {

std::vector<Kernels> MakeAll() {
  std::vector<Kernels> all;
  // A better target has a lower bit. SupportedTargets() also names fall-backs that are not compiled
  // in: mask them away.
  for (std::int64_t left = hwy::SupportedTargets() & HWY_TARGETS; left != 0; left &= left - 1) {
    const std::int64_t target = left & -left;
    all.push_back({hwy::TargetName(target), EncodeKernelsFor(target), TransformKernelsFor(target),
                   TileKernelsFor(target), MaskKernelsFor(target), AttendKernelsFor(target),
                   ExactKernelsFor(target)});
  }
  if (Amx().yes) {
    Kernels amx = *std::ranges::find(all, std::string_view("AVX3_DL"), &Kernels::target);
    amx.target = "AMX";
    amx.attend = AmxAttendKernels();
    all.insert(all.begin(), amx);
  }
  return all;
}

}  // namespace

const std::vector<Kernels>& AllKernels() {
  static const std::vector<Kernels> all = MakeAll();
  return all;
}

const Kernels* FindKernels(std::string_view target) {
  for (const Kernels& k : AllKernels()) {
    if (target.empty() || target == k.target) return &k;
  }
  return nullptr;
}

}  // namespace kvmix::kernels
