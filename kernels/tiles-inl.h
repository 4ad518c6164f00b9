// Per target: the two constants of its tiles, and where a number lies in them. Included by tiles.cc
// and attend.cc, which therefore agree. (No include guard: Highway includes it once for each
// target.)
#if defined(KVMIX_KERNELS_TILES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVMIX_KERNELS_TILES_INL_H_
#undef KVMIX_KERNELS_TILES_INL_H_
#else
#define KVMIX_KERNELS_TILES_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/tiles.h"

// Byte dot products of four terms in one instruction: vpdpbusd, which wants one operand unsigned,
// or sdot (which Highway has in this NEON target only).
#undef KVMIX_QUADS
#undef KVMIX_UNSIGNED_QUADS
#if HWY_ARCH_X86
#define KVMIX_QUADS (HWY_TARGET <= HWY_AVX3_DL)
#define KVMIX_UNSIGNED_QUADS KVMIX_QUADS
#else
#define KVMIX_QUADS (HWY_TARGET == HWY_NEON_BF16)
#define KVMIX_UNSIGNED_QUADS 0
#endif

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DI32 = hn::ScalableTag<std::int32_t>;
using DF = hn::ScalableTag<float>;

constexpr std::size_t kLanes = hn::MaxLanes(DF());
static_assert(kBlockTokens % kLanes == 0 && kLanes <= 16);
constexpr std::size_t kI8Width = KVMIX_QUADS ? 4 : 2;
constexpr std::uint8_t kFlipK = KVMIX_UNSIGNED_QUADS ? 0x80 : 0;  // xor of stored K codes

HWY_INLINE constexpr std::size_t Width(TileStorage s) {
  return s == TileStorage::kF16 ? 1 : kI8Width;
}
HWY_INLINE constexpr std::size_t CodeBytes(TileStorage s) { return s == TileStorage::kF16 ? 2 : 1; }
HWY_INLINE constexpr std::size_t RoundUp(std::size_t n, std::size_t to) {
  return (n + to - 1) / to * to;
}

// Bytes of one tile vector.
HWY_INLINE constexpr std::size_t VectorBytes(TileStorage s) {
  return kLanes * Width(s) * CodeBytes(s);
}
// Steps (vectors) from the first to the last term: K's channels, V's tokens.
HWY_INLINE constexpr std::size_t KSteps(TileStorage s, std::size_t head_dim) {
  return RoundUp(head_dim, Width(s)) / Width(s);
}
HWY_INLINE constexpr std::size_t VSteps(TileStorage s) { return kBlockTokens / Width(s); }
// Bytes of all terms of kLanes tokens (K) or kLanes channels (V).
HWY_INLINE constexpr std::size_t KTileBytes(TileStorage s, std::size_t head_dim) {
  return KSteps(s, head_dim) * VectorBytes(s);
}
HWY_INLINE constexpr std::size_t VTileBytes(TileStorage s) { return VSteps(s) * VectorBytes(s); }

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
