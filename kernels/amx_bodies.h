// Attention by tiles with either body of the seam, for tests: tasks with any number of rows go to
// tiles, but those with f16. A library of its own.
#ifndef KVMIX_KERNELS_AMX_BODIES_H_
#define KVMIX_KERNELS_AMX_BODIES_H_

#include "kernels/attend.h"

namespace kvmix::kernels {

// Tiles in memory: what the hardware computes, on every CPU with AVX3_DL, some hundred times
// slower. Null functions elsewhere.
AttendKernels PortableTileKernels();

// The hardware's instructions, whether Amx() says yes or not. Null functions where AVX3_DL is not.
AttendKernels HardwareTileKernels();

}  // namespace kvmix::kernels

#endif  // KVMIX_KERNELS_AMX_BODIES_H_
