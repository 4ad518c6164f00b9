// Rows <-> tiles, one token at a time: K's row is scattered in groups of `width` channels; V's row
// is merged, `width` tokens to a word, with one read-modify-write of a tile vector per `lanes`
// channels.
#include "kernels/tiles.h"

#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/tiles.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/highway.h"
#include "kernels/per_target.h"
#include "kernels/tiles-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {
namespace {

std::size_t ScaleBytes(TileScale s) {
  return s == TileScale::kConstant ? 0 : kBlockTokens * (s == TileScale::kF32 ? 4 : 2);
}

void LayOut(BlockFormat& f) {
  std::size_t at = 0;
  const auto place = [&at](TileFormat& t, std::size_t code_bytes) {
    t.codes_offset = at;
    at = t.scales_offset = RoundUp(at + code_bytes, 64);
    at = RoundUp(at + ScaleBytes(t.scale), 64);
  };
  place(f.k, kBlockTokens / kLanes * KTileBytes(f.k.storage, f.head_dim));
  place(f.v, RoundUp(f.head_dim, kLanes) / kLanes * VTileBytes(f.v.storage));
  f.block_bytes = at;
}

void StoreScale(const TileFormat& f, std::uint8_t* block, std::size_t token, float scale) {
  if (f.scale == TileScale::kF32) {
    std::memcpy(block + f.scales_offset + 4 * token, &scale, 4);
  } else if (f.scale == TileScale::kBF16) {
    std::uint32_t bits;
    std::memcpy(&bits, &scale, 4);
    const std::uint16_t upper =
        static_cast<std::uint16_t>(bits >> 16);  // the encoder rounded it to bf16 already
    std::memcpy(block + f.scales_offset + 2 * token, &upper, 2);
  }
}

float LoadScale(const TileFormat& f, const std::uint8_t* block, std::size_t token) {
  float scale = f.constant;
  if (f.scale == TileScale::kF32) {
    std::memcpy(&scale, block + f.scales_offset + 4 * token, 4);
  } else if (f.scale == TileScale::kBF16) {
    std::uint16_t upper;
    std::memcpy(&upper, block + f.scales_offset + 2 * token, 2);
    const std::uint32_t bits = std::uint32_t{upper} << 16;
    std::memcpy(&scale, &bits, 4);
  }
  return scale;
}

using Word = hwy::UnsignedFromSize<kI8Width>;  // the codes of one group

// The first group of K's row `token`; the following ones are kLanes * kWidth elements apart.
template <typename Byte>
Byte* KRow(const BlockFormat& f, Byte* block, std::size_t token) {
  return block + f.k.codes_offset + token / kLanes * KTileBytes(f.k.storage, f.head_dim) +
         token % kLanes * Width(f.k.storage) * CodeBytes(f.k.storage);
}

// Group: as large as `width` codes, so that each is one move.
template <typename Group>
HWY_INLINE void ScatterGroups(const std::uint8_t* row, std::size_t row_bytes, std::uint8_t flip,
                              std::uint8_t* to) {
  const Group flips = static_cast<Group>(static_cast<Group>(~Group{0}) / 0xFF * flip);
  std::size_t i = 0;
  for (; i + sizeof(Group) <= row_bytes; i += sizeof(Group)) {
    Group group;
    std::memcpy(&group, row + i, sizeof(Group));
    group ^= flips;
    std::memcpy(to + i * kLanes, &group, sizeof(Group));
  }
  if (i < row_bytes) {
    Group group = 0;
    std::memcpy(&group, row + i, row_bytes - i);
    group ^= flips;
    std::memcpy(to + i * kLanes, &group, sizeof(Group));
  }
}

void StoreK(const BlockFormat& f, std::uint8_t* block, std::size_t token, const void* codes,
            float scale) {
  const std::uint8_t* row = static_cast<const std::uint8_t*>(codes);
  if (f.k.storage == TileStorage::kF16) {
    ScatterGroups<std::uint16_t>(row, 2 * f.head_dim, 0, KRow(f, block, token));
  } else {
    ScatterGroups<Word>(row, f.head_dim, kFlipK, KRow(f, block, token));
  }
  StoreScale(f.k, block, token, scale);
}

void LoadK(const BlockFormat& f, const std::uint8_t* block, std::size_t token, void* codes,
           float* scale) {
  std::uint8_t* row = static_cast<std::uint8_t*>(codes);
  const std::uint8_t* from = KRow(f, block, token);
  const std::size_t bytes = f.head_dim * CodeBytes(f.k.storage);
  const std::size_t group = Width(f.k.storage) * CodeBytes(f.k.storage);
  const std::uint8_t flip = f.k.storage == TileStorage::kF16 ? 0 : kFlipK;
  for (std::size_t i = 0; i < bytes; ++i)
    row[i] = static_cast<std::uint8_t>(from[i / group * group * kLanes + i % group] ^ flip);
  *scale = LoadScale(f.k, block, token);
}

// Merges the codes of one token into the words of a V tile: `kWidth` codes of type T, neighbouring
// tokens, share a word.
template <typename T, typename W>
HWY_INLINE void MergeRow(const T* row, std::size_t head_dim, std::size_t sub,
                         std::size_t tile_bytes, std::uint8_t* to) {
  const hn::CappedTag<W, kLanes> dw;
  const hn::Rebind<T, decltype(dw)> dt;
  const int shift = static_cast<int>(8 * sizeof(T) * sub);
  const auto keep = hn::Set(dw, static_cast<W>(~(static_cast<W>(static_cast<T>(~T{0})) << shift)));
  const auto merge = [&](auto codes, std::uint8_t* at) HWY_ATTR {
    W* words = reinterpret_cast<W*>(at);
    if constexpr (sizeof(W) == sizeof(T)) {
      hn::StoreU(codes, dw, words);
    } else {
      hn::StoreU(hn::Or(hn::And(hn::LoadU(dw, words), keep),
                        hn::ShiftLeftSame(hn::PromoteTo(dw, codes), shift)),
                 dw, words);
    }
  };
  std::size_t c = 0;
  for (; c + kLanes <= head_dim; c += kLanes, to += tile_bytes) merge(hn::LoadU(dt, row + c), to);
  if (c < head_dim) merge(hn::LoadN(dt, row + c, head_dim - c), to);
}

void StoreV(const BlockFormat& f, std::uint8_t* block, std::size_t token, const void* codes,
            float scale) {
  const std::size_t width = Width(f.v.storage), tile_bytes = VTileBytes(f.v.storage);
  std::uint8_t* to = block + f.v.codes_offset + token / width * VectorBytes(f.v.storage);
  if (f.v.storage == TileStorage::kF16) {
    MergeRow<std::uint16_t, std::uint16_t>(static_cast<const std::uint16_t*>(codes), f.head_dim, 0,
                                           tile_bytes, to);
  } else {
    MergeRow<std::uint8_t, Word>(static_cast<const std::uint8_t*>(codes), f.head_dim, token % width,
                                 tile_bytes, to);
  }
  StoreScale(f.v, block, token, scale);
}

void LoadV(const BlockFormat& f, const std::uint8_t* block, std::size_t token, void* codes,
           float* scale) {
  std::uint8_t* row = static_cast<std::uint8_t*>(codes);
  const std::size_t size = CodeBytes(f.v.storage), width = Width(f.v.storage);
  const std::uint8_t* from =
      block + f.v.codes_offset + token / width * VectorBytes(f.v.storage) + token % width * size;
  for (std::size_t c = 0; c < f.head_dim; ++c) {
    std::memcpy(row + c * size,
                from + c / kLanes * VTileBytes(f.v.storage) + c % kLanes * width * size, size);
  }
  *scale = LoadScale(f.v, block, token);
}

}  // namespace

TileKernels TileTable() { return {&LayOut, &StoreK, &StoreV, &LoadK, &LoadV}; }

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvmix::kernels {
HWY_EXPORT(TileTable);
TileKernels TileKernelsFor(std::int64_t target) { return KVMIX_CALL_FOR(target, TileTable)(); }
}  // namespace kvmix::kernels
#endif  // HWY_ONCE
