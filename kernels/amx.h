// Attention by the tiles of Intel's AMX: whether this process may use them, and the kernels.
//
// Tiles are state that an operating system must keep for every thread, so Linux wants to be asked:
// a CPU that has them is not enough. The question is put once for the process, when AllKernels() is
// first called; threads and children of fork share the answer. It is no where the kernel is older
// than 5.16, and where a thread has an alternate signal stack too small for the larger state; a yes
// makes later sigaltstack calls refuse small stacks. So it is put only where it is wanted, until
// somebody has measured what tiles gain: KVMIX_AMX=N in the environment asks, and sends tasks of N
// rows of a KV head or more to tiles. Without it, and with KVMIX_AMX=0, nothing is asked.
#ifndef KVMIX_KERNELS_AMX_H_
#define KVMIX_KERNELS_AMX_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/attend.h"

namespace kvmix::kernels {

// What the answer depends on.
struct AmxQuestion {
  bool avx3_dl = false;            // the target that does everything else
  std::uint32_t leaf7_edx = 0;     // CPUID 7.0; bits 24 (AMX-TILE) and 25 (AMX-INT8)
  std::uint64_t xcr0 = 0;          // what the operating system saves; bits 17 and 18
  const char* variable = nullptr;  // KVMIX_AMX
  long (*request)() = nullptr;     // arch_prctl(ARCH_REQ_XCOMP_PERM, 18): 0, or -1 with errno
};
struct AmxAnswer {
  bool yes = false;
  std::string why_not;                 // empty where the CPU has no tiles: nothing to tell anybody
  std::size_t fewest_rows = SIZE_MAX;  // of a task that goes to tiles
};
AmxAnswer Ask(const AmxQuestion& question);

// Of this process; asked once.
const AmxAnswer& Amx();

// For blocks that AVX3_DL's tile kernels made. Tasks with f16, or with few rows, go to AVX3_DL's
// kernel, which gives the same bits. Only where Amx().yes.
AttendKernels AmxAttendKernels();

// Eight products of tiles at a time, `rounds` times; returns the multiply-adds (kernels/probe.h).
double AmxDotU8I8(std::size_t rounds);

}  // namespace kvmix::kernels

#endif  // KVMIX_KERNELS_AMX_H_
