// Per target: where products find their tiles. Those of storages that they do not multiply are
// unpacked to tiles of I8 or I16 in scratch, once for all turns of rows.
#if defined(KVMIX_KERNELS_UNPACK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVMIX_KERNELS_UNPACK_INL_H_
#undef KVMIX_KERNELS_UNPACK_INL_H_
#else
#define KVMIX_KERNELS_UNPACK_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/storage-inl.h"
#include "kernels/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {

// Terms [first, last) of a tile of S as M has them, and those that share a group with them.
template <class S, class M, bool kOfK>
HWY_NOINLINE void Unpack(const std::uint8_t* HWY_RESTRICT packed, std::size_t first,
                         std::size_t last, std::uint8_t* HWY_RESTRICT to) {
  const std::size_t begin = first / S::kTerms, end = (last + S::kTerms - 1) / S::kTerms;
  constexpr std::size_t kPartBytes = S::kWidth / M::kWidth * M::kGroupBytes;
  packed += begin * S::kGroupBytes;
  to += begin * S::kParts * kPartBytes;
  for (std::size_t group = begin; group < end; ++group) {
    Unroll<S::kParts>([&](auto part) KVMIX_LAMBDA {
      M::Store(S::template Codes<kOfK, part>(packed), to + part * kPartBytes);
    });
    packed += S::kGroupBytes;
    to += S::kParts * kPartBytes;
  }
}

// Tiles of one tensor of a block, as products take them.
struct Tiles {
  const std::uint8_t* codes;  // the block's, or all of them unpacked
  std::size_t stride;         // bytes from tile to tile, unpacked
  // Null: the codes are such tiles as they lie.
  void (*unpack)(const std::uint8_t* packed, std::size_t first, std::size_t last, std::uint8_t* to);
  std::size_t packed_stride;
  std::uint8_t* scratch;

  Tiles Of(const std::uint8_t* block_codes) const {
    Tiles tiles = *this;
    tiles.codes = block_codes;
    return tiles;
  }
  // Terms [first, last) of `count` tiles from `tile` on. Valid until the next call.
  HWY_INLINE const std::uint8_t* Get(std::size_t tile, std::size_t count, std::size_t first,
                                     std::size_t last) const {
    if (unpack == nullptr) return codes + tile * stride;
    for (std::size_t i = 0; i < count; ++i)
      unpack(codes + (tile + i) * packed_stride, first, last, scratch + i * stride);
    return scratch;
  }
  // From now on `tiles` are there for any number of calls.
  void Keep(std::size_t tile, std::size_t end, std::size_t first, std::size_t last) {
    if (unpack == nullptr) return;
    for (; tile < end; ++tile)
      unpack(codes + tile * packed_stride, first, last, scratch + tile * stride);
    codes = scratch;
    unpack = nullptr;
  }
};

// Those of K or V, without the codes of a block. M: the tiles that a storage's products multiply.
template <bool kOfK, template <class> class M>
Tiles TilesOf(const TileFormat& f, std::uint8_t* scratch) {
  const std::size_t terms = kOfK ? f.row.dim : kBlockTokens;
  return WithStorage(f.row.storage, [&]<class S>(S) KVMIX_LAMBDA -> Tiles {
    const std::size_t bytes = TileBytes<S>(terms);
    if constexpr (!std::is_same_v<S, M<S>>) {
      const std::size_t unpacked = TileBytes<M<S>>(RoundUp(terms, S::kTerms));
      return {nullptr, unpacked, &Unpack<S, M<S>, kOfK>, bytes, scratch};
    } else {
      return {nullptr, bytes, nullptr, bytes, nullptr};
    }
  });
}

// Scratch for all tiles of a block.
template <bool kOfK, template <class> class M>
std::size_t UnpackedBytes(const TileFormat& f) {
  const Tiles tiles = TilesOf<kOfK, M>(f, nullptr);
  if (tiles.unpack == nullptr) return 0;
  return (kOfK ? kBlockTokens : RoundUp(f.row.dim, kLanes)) / kLanes * tiles.stride;
}

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
