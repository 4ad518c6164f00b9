// What bytes mean: the canonical rows of one KV head's K or V, and the blocks of tiles that a cache
// keeps them in. Plain types: no SIMD, no state.
#ifndef KVMIX_KERNELS_FORMATS_H_
#define KVMIX_KERNELS_FORMATS_H_

#include <cstddef>
#include <cstdint>

#include "kvmix/types.h"

namespace kvmix::kernels {

// Where the scale of a row is: one number for the head, or stored beside each row. i6, i4 and
// i3 have the latter only.
enum class ScaleStore : std::uint8_t { kConstant, kF32, kBF16 };

// Most channels of a row.
inline constexpr std::size_t kMaxDim = KVMIX_MAX_HEAD_DIM;

// The canonical form of rows: codes [count][dim], those below i8 in planes (kernels/levels.h), and
// where the scale is stored, scales [count] as f32 (those of kBF16 are bf16 numbers). The same
// bytes on every target.
struct RowFormat {
  Storage storage = KVMIX_STORAGE_F16;
  ScaleStore scale = ScaleStore::kConstant;
  float constant = 1.0f;  // kConstant: the scale of all rows (1 for f16)
  std::size_t dim = 0;    // channels; of i6 a multiple of 4, of i4 of 2, of i3 of 8
  // Of what codes are multiplied with, q (K) or the softmax weights (V): 16 or 8; f16: any.
  std::size_t operand_bits = 16;
};

inline std::size_t RowBytes(const RowFormat& f) {
  return kvmix_storage_bits(f.storage) * f.dim / 8;
}

// Tokens of a block.
inline constexpr std::size_t kBlockTokens = 256;
static_assert(KVMIX_LONGEST_STRETCH == kBlockTokens);
// Fewest tokens of a stretch: a vector of tokens has one centre.
inline constexpr std::size_t kSmallestStretch = KVMIX_SHORTEST_STRETCH;

// One tensor's part of a block.
struct TileFormat {
  RowFormat row;
  std::size_t codes_offset = 0;   // bytes from the block's start
  std::size_t scales_offset = 0;  // kF32, kBF16
};

// A block of one KV head: K codes | K scales | V codes | V scales | centres of K, each padded to 64
// bytes.
struct BlockFormat {
  TileFormat k, v;
  std::size_t block_bytes = 0;
  // Tokens of a stretch, a power of two from kSmallestStretch to kBlockTokens, whose K codes are
  // around a centre of their own; 0: none.
  std::size_t stretch = 0;
  // [kBlockTokens / stretch] centres, after everything else: a scale (f32) and K's dim of int8.
  std::size_t centres_offset = 0;
};

inline std::size_t CentreBytes(const BlockFormat& f) { return KVMIX_CENTRE_BYTES(f.k.row.dim); }

}  // namespace kvmix::kernels

#endif  // KVMIX_KERNELS_FORMATS_H_
