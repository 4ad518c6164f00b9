// The SIMD kernels as tables of functions, one table for each instruction set ("target") that was
// compiled in. Whoever uses kernels picks a table once (dispatch costs nothing per call) and may
// hold several, e.g. to compare targets.
//
// Kernels work on raw pointers, keep no state, allocate nothing, do no I/O and cannot fail.
// Pointers need no alignment beyond their types' own, but where a header asks for more.
#ifndef KVMIX_KERNELS_KERNELS_H_
#define KVMIX_KERNELS_KERNELS_H_

#include <string_view>
#include <vector>

#include "kernels/attend.h"
#include "kernels/encode.h"
#include "kernels/exact.h"
#include "kernels/mask.h"
#include "kernels/tiles.h"
#include "kernels/transform.h"

namespace kvmix::kernels {

struct Kernels {
  const char* target;  // Highway's name, "AVX3_DL", "AVX2", "NEON"; or "AMX" (kernels/amx.h)
  EncodeKernels encode;
  TransformKernels transform;
  TileKernels tiles;
  MaskKernels mask;
  AttendKernels attend;
  ExactKernels exact;
};

// Every target that is compiled in and that this CPU runs, the best first. Never empty.
const std::vector<Kernels>& AllKernels();

// The table of a target by name, "" the best one; null if this CPU or this build lacks it.
const Kernels* FindKernels(std::string_view target);

}  // namespace kvmix::kernels

#endif  // KVMIX_KERNELS_KERNELS_H_
