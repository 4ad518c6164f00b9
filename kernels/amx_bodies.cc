#include "kernels/amx_bodies.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/amx_bodies.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/highway.h"
#include "kernels/amx-inl.h"
#include "kernels/amx_tiles-inl.h"

#if HWY_ARCH_X86_64 && HWY_TARGET == HWY_AVX3_DL

HWY_PUSH_ATTRIBUTES(KVMIX_TILE_TARGET)
namespace kvmix::kernels::HWY_NAMESPACE {

static bool Always(std::size_t) { return true; }
AttendKernels Portable() { return TileKernels<PortableTiles, &Always>(); }
AttendKernels Hardware() { return TileKernels<AmxTiles, &Always>(); }

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_POP_ATTRIBUTES
#endif  // HWY_AVX3_DL

#if HWY_ONCE
namespace kvmix::kernels {
#if HWY_ARCH_X86_64 && (HWY_TARGETS & HWY_AVX3_DL)
static bool HasAvx3Dl() { return (hwy::SupportedTargets() & HWY_AVX3_DL) != 0; }
AttendKernels PortableTileKernels() {
  return HasAvx3Dl() ? N_AVX3_DL::Portable() : AttendKernels{};
}
AttendKernels HardwareTileKernels() {
  return HasAvx3Dl() ? N_AVX3_DL::Hardware() : AttendKernels{};
}
#else
AttendKernels PortableTileKernels() { return {}; }
AttendKernels HardwareTileKernels() { return {}; }
#endif
}  // namespace kvmix::kernels
#endif  // HWY_ONCE
