// What bytes mean: the canonical rows of one KV head's K or V, and the blocks of tiles that a cache
// keeps them in. Plain types: no SIMD, no state.
#ifndef KVMIX_KERNELS_FORMATS_H_
#define KVMIX_KERNELS_FORMATS_H_

#include <cstddef>
#include <cstdint>

namespace kvmix::kernels {

enum class Storage : std::uint8_t { kF16, kI8, kI6, kI4, kI3 };

// Where the scale of a row is: one number for the head, or stored beside each row. i6, i4 and
// i3 have the latter only.
enum class ScaleStore : std::uint8_t { kConstant, kF32, kBF16 };

// Most channels of a row: i32 sums of 16-bit by 8-bit products stay exact up to here.
inline constexpr std::size_t kMaxDim = 512;

// The canonical form of rows: codes [count][dim], those below i8 in planes (kernels/levels.h), and
// where the scale is stored, scales [count] as f32 (those of kBF16 are bf16 numbers). The same
// bytes on every target.
struct RowFormat {
  Storage storage = Storage::kF16;
  ScaleStore scale = ScaleStore::kConstant;
  float constant = 1.0f;  // kConstant: the scale of all rows (1 for f16)
  std::size_t dim = 0;    // channels; of i6 a multiple of 4, of i4 of 2, of i3 of 8
};

constexpr std::size_t BitsOf(Storage storage) {
  switch (storage) {
    case Storage::kF16:
      return 16;
    case Storage::kI8:
      return 8;
    case Storage::kI6:
      return 6;
    case Storage::kI4:
      return 4;
    case Storage::kI3:
      break;
  }
  return 3;
}

constexpr std::size_t RowBytes(const RowFormat& f) { return BitsOf(f.storage) * f.dim / 8; }

// Tokens of a block.
inline constexpr std::size_t kBlockTokens = 256;

// One tensor's part of a block.
struct TileFormat {
  RowFormat row;
  std::size_t codes_offset = 0;   // bytes from the block's start
  std::size_t scales_offset = 0;  // kF32, kBF16
};

// A block of one KV head: K codes | K scales | V codes | V scales, each padded to 64 bytes.
struct BlockFormat {
  TileFormat k, v;
  std::size_t block_bytes = 0;
};

}  // namespace kvmix::kernels

#endif  // KVMIX_KERNELS_FORMATS_H_
