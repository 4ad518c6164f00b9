// Tiles: how the cache lays out the rows of one KV head so that attention needs neither horizontal
// sums nor dequantized copies.
//
// A tile vector holds `lanes` sums side by side, each over `width` neighbouring terms:
//   K: lanes = tokens, terms = channels      tile [token / lanes][channel / width][lanes][width]
//   V: lanes = channels, terms = tokens      tile [channel / lanes][token / width][lanes][width]
// of one block of 256 tokens. So QK and PV are one and the same product, "rows times tile"
// (kernels/attend.h). `lanes` and `width` are two constants of a target and a storage: width 1 for
// f16, 2 where i16 pairs are multiplied (vpmaddwd), 4 where bytes are (vpdpbusd, sdot). Channels
// are padded with zeros to whole vectors. For vpdpbusd K is stored as code ^ 0x80, an unsigned
// byte, which is what it wants (and AMX: [16 lanes][4] is its B operand as it stands).
//
// A KV head is a stream of blocks: K codes | K scales | V codes | V scales, each padded to 64
// bytes, so that attention reads memory from front to end.
#ifndef KVMIX_KERNELS_TILES_H_
#define KVMIX_KERNELS_TILES_H_

#include <cstddef>
#include <cstdint>

namespace kvmix::kernels {

inline constexpr std::size_t kBlockTokens = 256;

enum class TileStorage : std::uint8_t { kF16, kI8 };
enum class TileScale : std::uint8_t {
  kConstant,
  kF32,
  kBF16
};  // one number for the head, or stored one per token

// One tensor's part of a block.
struct TileFormat {
  TileStorage storage = TileStorage::kF16;
  TileScale scale = TileScale::kConstant;
  float constant = 1.0f;          // kConstant: the scale of all tokens (1 for f16)
  std::size_t codes_offset = 0;   // from the block's start, in bytes
  std::size_t scales_offset = 0;  // kF32, kBF16
};

// One KV head.
struct BlockFormat {
  TileFormat k, v;
  std::size_t head_dim = 0;
  std::size_t block_bytes = 0;
};

struct TileKernels {
  // Fills in the offsets and block_bytes of a format whose storage, scale and head_dim are set.
  void (*lay_out)(BlockFormat& format);
  // Writes one token's row into a block (token < 256). codes: [head_dim] int8 or halves, as the
  // storage says.
  void (*store_k)(const BlockFormat& format, std::uint8_t* block, std::size_t token,
                  const void* codes, float scale);
  void (*store_v)(const BlockFormat& format, std::uint8_t* block, std::size_t token,
                  const void* codes, float scale);
  // The inverse.
  void (*load_k)(const BlockFormat& format, const std::uint8_t* block, std::size_t token,
                 void* codes, float* scale);
  void (*load_v)(const BlockFormat& format, const std::uint8_t* block, std::size_t token,
                 void* codes, float* scale);
};

TileKernels TileKernelsFor(std::int64_t target);

}  // namespace kvmix::kernels

#endif  // KVMIX_KERNELS_TILES_H_
