// The SIMD kernels as tables of functions, one table for each instruction set ("target") that was
// compiled in. Whoever uses kernels picks a table once (dispatch costs nothing per call) and may
// hold several, e.g. to compare targets.
//
// Kernels work on raw pointers that need no alignment beyond their types' own, keep no state,
// allocate nothing, do no I/O and cannot fail.
#ifndef KVMIX_KERNELS_KERNELS_H_
#define KVMIX_KERNELS_KERNELS_H_

#include <string_view>
#include <vector>

#include "kernels/attend.h"
#include "kernels/probe.h"
#include "kernels/quantize.h"
#include "kernels/tiles.h"

namespace kvmix::kernels {

struct Kernels {
  const char* target;  // Highway's name: "AVX3_DL", "AVX2", "NEON"
  QuantizeKernels quantize;
  TileKernels tiles;
  AttendKernels attend;
  ProbeKernels probe;
};

// Every target that is compiled in and that this CPU runs, the best first. Never empty.
const std::vector<Kernels>& AllKernels();

// The table that new caches and the functions of kvmix/quantize.h use: the best, unless UseTarget
// chose another.
const Kernels& ActiveKernels();

// For tests and benchmarks: makes the named target active; "" the best. False if this CPU or this
// build lacks it. Not thread-safe against a concurrent ActiveKernels().
bool UseTarget(std::string_view target);

}  // namespace kvmix::kernels

#endif  // KVMIX_KERNELS_KERNELS_H_
