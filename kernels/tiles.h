// Tiles: how a cache lays out the rows of one KV head so that attention needs neither horizontal
// sums nor dequantized copies.
//
// A tile vector holds `lanes` sums side by side, each over `width` neighbouring terms:
//   K: lanes = tokens, terms = channels      tile [token / lanes][channel / width][lanes][width]
//   V: lanes = channels, terms = tokens      tile [channel / lanes][token / width][lanes][width]
// of one block of 256 tokens. So QK and PV are one and the same product, "rows times tile"
// (kernels/attend.h). `lanes` is a constant of a target, `width` one of a storage on a target:
// width 1 for f16, 2 where i16 pairs are multiplied (vpmaddwd), 4 where bytes are (vpdpbusd, sdot).
// Tiles of i6, i4 and i3 are such tiles of bytes with fewer bits, plane by plane (storage-inl.h,
// docs/formats.md).
// Channels are padded with zeros to whole vectors. For vpdpbusd K is stored as code ^ 0x80, an
// unsigned byte, which is what it wants (and AMX: [16 lanes][4] is its B operand as it stands).
#ifndef KVMIX_KERNELS_TILES_H_
#define KVMIX_KERNELS_TILES_H_

#include <cstddef>
#include <cstdint>

#include "kernels/formats.h"

namespace kvmix::kernels {

struct TileKernels {
  // Fills in the offsets and block_bytes of a format whose rows and stretch are set.
  void (*lay_out)(BlockFormat& format);
  // Writes canonical rows of tokens [token, token + count): those of token t go to
  // blocks[t / kBlockTokens]. Row r at rows + r * row_stride bytes. scales: [count], or null.
  using Store = void(const BlockFormat& format, std::uint8_t* const* blocks, std::size_t token,
                     std::size_t count, const std::uint8_t* rows, std::size_t row_stride,
                     const float* scales);
  Store *store_k, *store_v;
  // The inverse. scales, if not null, get the format's constant where none is stored.
  using Load = void(const BlockFormat& format, const std::uint8_t* const* blocks, std::size_t token,
                    std::size_t count, std::uint8_t* rows, std::size_t row_stride, float* scales);
  Load *load_k, *load_v;
  // Asks for the lines that the rows of one token, K's and V's, will be written to.
  void (*prefetch)(const BlockFormat& format, std::uint8_t* const* blocks, std::size_t token);
};

TileKernels TileKernelsFor(std::int64_t target);

}  // namespace kvmix::kernels

#endif  // KVMIX_KERNELS_TILES_H_
