// The seam between attention by tiles (amx-inl.h) and the matrix unit: the few instructions that
// move and multiply tiles of 16 rows of 64 bytes, and the same in plain C++.
//
//   Configure()              before all others, in every thread
//   Release()                after all others
//   Zero<tile>()
//   Load<tile>(from)         1024 bytes, row by row
//   Store<tile>(to)
//   SignedTimesUnsigned<c, a, b>()    c[i][j] += sum over k of a[i][k] * b[k / 4][4 * j + k % 4],
//   UnsignedTimesSigned<c, a, b>()    i32 modulo 2^32; a is 16 x 64, b 64 x 16 by four
//
// Tiles 0 to 7. Per target, but only for AVX3_DL.
#if defined(KVMIX_KERNELS_AMX_TILES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVMIX_KERNELS_AMX_TILES_INL_H_
#undef KVMIX_KERNELS_AMX_TILES_INL_H_
#else
#define KVMIX_KERNELS_AMX_TILES_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "hwy/highway.h"

#if HWY_TARGET == HWY_AVX3_DL
// Highway has no target for the instructions of tiles. clang wants to be told even where they are
// written in assembly; gcc would not inline what such functions call.
#undef KVMIX_TILE_TARGET
#if HWY_COMPILER_CLANG
#define KVMIX_TILE_TARGET HWY_TARGET_STR ",amx-tile,amx-int8"
#else
#define KVMIX_TILE_TARGET HWY_TARGET_STR
#endif
// KVMIX_LAMBDA for lambdas that use tiles.
#undef KVMIX_TILE_LAMBDA
#define KVMIX_TILE_LAMBDA __attribute__((target(KVMIX_TILE_TARGET), always_inline))
HWY_PUSH_ATTRIBUTES(KVMIX_TILE_TARGET)
namespace kvmix::kernels::HWY_NAMESPACE {

constexpr std::size_t kTileRows = 16, kTileTerms = 64, kTileBytes = kTileRows * kTileTerms;

// The instructions as they are: compilers' own intrinsics let stores into a tile's memory sink
// below its load (gcc 12), or choose, spill and configure tiles by themselves (clang).
struct AmxTiles {
  static HWY_INLINE void Configure() {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof(config) == 64);
    asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
  }
  static HWY_INLINE void Release() { asm volatile("tilerelease" : : : "memory"); }
  template <int kTile>
  static HWY_INLINE void Zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  template <int kTile>
  static HWY_INLINE void Load(const void* from) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0"
                 :
                 : "i"(kTile), "r"(from), "r"(std::size_t{64})
                 : "memory");
  }
  template <int kTile>
  static HWY_INLINE void Store(void* to) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)"
                 :
                 : "i"(kTile), "r"(to), "r"(std::size_t{64})
                 : "memory");
  }
  template <int kC, int kA, int kB>
  static HWY_INLINE void SignedTimesUnsigned() {
    static_assert(kC != kA && kC != kB && kA != kB);
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
  template <int kC, int kA, int kB>
  static HWY_INLINE void UnsignedTimesSigned() {
    static_assert(kC != kA && kC != kB && kA != kB);
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
};

// For tests. Aborts where tiles are not configured.
class PortableTiles {
 public:
  void Configure() {
    std::memset(tiles_, 0, sizeof(tiles_));
    configured_ = true;
  }
  void Release() { configured_ = false; }
  template <int kTile>
  void Zero() {
    std::memset(Tile(kTile), 0, kTileBytes);
  }
  template <int kTile>
  void Load(const void* from) {
    std::memcpy(Tile(kTile), from, kTileBytes);
  }
  template <int kTile>
  void Store(void* to) {
    std::memcpy(to, Tile(kTile), kTileBytes);
  }
  template <int kC, int kA, int kB>
  void SignedTimesUnsigned() {
    Multiply<std::int8_t, std::uint8_t>(Tile(kC), Tile(kA), Tile(kB));
  }
  template <int kC, int kA, int kB>
  void UnsignedTimesSigned() {
    Multiply<std::uint8_t, std::int8_t>(Tile(kC), Tile(kA), Tile(kB));
  }

 private:
  std::uint8_t* Tile(int tile) {
    if (!configured_) std::abort();
    return tiles_[tile];
  }
  // Sanitizers would make most of the tests' time of it.
  template <class A, class B>
  __attribute__((no_sanitize("address", "undefined"))) static void Multiply(std::uint8_t* c,
                                                                            const std::uint8_t* a,
                                                                            const std::uint8_t* b) {
    for (std::size_t i = 0; i < kTileRows; ++i) {
      for (std::size_t j = 0; j < kTileTerms / 4; ++j) {
        std::uint32_t sum;
        std::memcpy(&sum, c + 64 * i + 4 * j, 4);
        for (std::size_t k = 0; k < kTileTerms; ++k) {
          const int x = static_cast<A>(a[64 * i + k]),
                    y = static_cast<B>(b[k / 4 * 64 + 4 * j + k % 4]);
          sum += static_cast<std::uint32_t>(x * y);
        }
        std::memcpy(c + 64 * i + 4 * j, &sum, 4);
      }
    }
  }

  std::uint8_t tiles_[8][kTileBytes];
  bool configured_ = false;
};

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_POP_ATTRIBUTES

#endif  // HWY_AVX3_DL
#endif  // per-target include guard
