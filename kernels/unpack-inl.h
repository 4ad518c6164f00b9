// Per target: tiles of storages below int8 as tiles of I8, in scratch, once for all that read them.
#if defined(KVMIX_KERNELS_UNPACK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVMIX_KERNELS_UNPACK_INL_H_
#undef KVMIX_KERNELS_UNPACK_INL_H_
#else
#define KVMIX_KERNELS_UNPACK_INL_H_
#endif

#include <array>
#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/storage-inl.h"
#include "kernels/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {

// v's bytes, each by so many bits up (below 0: down); bits of neighbours come in from the side.
template <int kBy>
HWY_INLINE VU8 Shifted(VU8 v) {
  const hn::Repartition<std::uint16_t, DU8> d16;
  const auto two = hn::BitCast(d16, v);
  if constexpr (kBy > 0) return hn::BitCast(DU8(), hn::ShiftLeft<kBy>(two));
  if constexpr (kBy < 0) return hn::BitCast(DU8(), hn::ShiftRight<-kBy>(two));
  return v;
}

// A code's bits within one plane, at their place; what is elsewhere in `shifted` is no matter.
// Where vpermb looks codes up, the bits above a code may be any.
template <class P>
HWY_INLINE VU8 WithPlane(P, VU8 codes, VU8 shifted) {
#if KVMIX_UNSIGNED_QUADS
  if constexpr (P::kFrom == 0) return shifted;
  const VU8 below = hn::Set(DU8(), static_cast<std::uint8_t>((1 << P::kFrom) - 1));
  return hn::IfVecThenElse(below, codes, shifted);
#else
  const VU8 own = hn::Set(DU8(), static_cast<std::uint8_t>(P::kMask << P::kFrom));
  if constexpr (P::kFrom == 0) return hn::And(shifted, own);
  return hn::OrAnd(codes, shifted, own);
#endif
}

// The levels of codes, one a byte, in the form of I8's tiles.
template <class S, bool kOfK>
HWY_INLINE VU8 LevelsOfCodes(VU8 codes) {
  constexpr int kCodes = 1 << S::kBits;
#if KVMIX_UNSIGNED_QUADS
  // vpermb looks at the lowest six bits of a byte: the table as often as it fits.
  static constexpr auto kTable = [] {
    std::array<std::uint8_t, 64> table{};
    for (int c = 0; c < 64; ++c)
      table[c] = static_cast<std::uint8_t>(S::Level(c % kCodes) ^ (kOfK ? 0x80 : 0));
    return table;
  }();
  return hn::TableLookupLanes(hn::LoadU(DU8(), kTable.data()),
                              hn::Indices512<std::uint8_t>{codes.raw});
#else
  const DI8 d;
  const VI8 c = hn::BitCast(d, codes);
  if constexpr (kCodes > 16) {  // i6: two's complement
    const VI8 sign = hn::Set(d, std::int8_t{kCodes / 2});
    return hn::BitCast(DU8(), hn::Sub(hn::Xor(c, sign), sign));
  } else {
#if HWY_TARGET == HWY_SSE2
    // No pshufb, and a table read byte by byte is ten times as slow.
    const auto at_least = [&](VI8 v, int than) KVMIX_LAMBDA {
      return hn::Gt(v, hn::Set(d, static_cast<std::int8_t>(than - 1)));
    };
    const VI8 negative = hn::VecFromMask(d, at_least(c, kCodes / 2));
    const VI8 rank = hn::Xor(c, hn::And(negative, hn::Set(d, std::int8_t{kCodes - 1})));
    VI8 magnitude = hn::Set(d, static_cast<std::int8_t>(S::Level(0)));
    Unroll<kCodes / 2 - 1>([&](auto i) KVMIX_LAMBDA {
      const VI8 rise = hn::Set(d, static_cast<std::int8_t>(S::Level(i + 1) - S::Level(i)));
      magnitude = hn::Add(magnitude, hn::IfThenElseZero(at_least(rank, i + 1), rise));
    });
    return hn::BitCast(DU8(), hn::Sub(hn::Xor(magnitude, negative), negative));
#else
    static constexpr auto kTable = [] {
      std::array<std::int8_t, 16> table{};
      for (int i = 0; i < kCodes; ++i) table[i] = static_cast<std::int8_t>(S::Level(i));
      return table;
    }();
    return hn::BitCast(DU8(), hn::TableLookupBytes(hn::LoadDup128(d, kTable.data()), c));
#endif
  }
#endif
}

// Terms [first, last) of a tile, and those that share a group with them.
template <class S, bool kOfK>
HWY_NOINLINE void Unpack(const std::uint8_t* HWY_RESTRICT packed, std::size_t first,
                         std::size_t last, std::uint8_t* HWY_RESTRICT to) {
  const std::size_t begin = first / S::kTerms, end = (last + S::kTerms - 1) / S::kTerms;
  for (std::size_t group = begin; group < end; ++group) {
    const std::uint8_t* from = packed + group * S::kGroupBytes;
    std::uint8_t* registers = to + group * S::kRegisters * kFourTerms;
    VU8 codes[S::kRegisters];
    S::ForPlanes([&]<class P>(P plane) KVMIX_LAMBDA {
      Unroll<S::kRegisters / P::kPerByte>([&](auto i) KVMIX_LAMBDA {
        const VU8 v = hn::LoadU(DU8(), from + S::template kPlaneOffset<P> + i * kFourTerms);
        Unroll<P::kPerByte>([&](auto part) KVMIX_LAMBDA {
          VU8& code = codes[i * P::kPerByte + part];
          code = WithPlane(plane, code, Shifted<P::kFrom - static_cast<int>(part) * P::kBits>(v));
        });
      });
    });
    Unroll<S::kRegisters>([&](auto r) KVMIX_LAMBDA {
      hn::StoreU(LevelsOfCodes<S, kOfK>(codes[r]), DU8(), registers + r * kFourTerms);
    });
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

// Those of K or V, without the codes of a block.
template <bool kOfK>
Tiles TilesOf(const TileFormat& f, std::uint8_t* scratch) {
  const std::size_t terms = kOfK ? f.row.dim : kBlockTokens;
  return WithStorage(f.row.storage, [&]<class S>(S) KVMIX_LAMBDA -> Tiles {
    const std::size_t bytes = TileBytes<S>(terms);
    if constexpr (S::kPacked) {
      return {nullptr, bytes * 8 / S::kBits, &Unpack<S, kOfK>, bytes, scratch};
    } else {
      return {nullptr, bytes, nullptr, bytes, nullptr};
    }
  });
}

// Scratch for all tiles of a block.
template <bool kOfK>
std::size_t UnpackedBytes(const TileFormat& f) {
  const Tiles tiles = TilesOf<kOfK>(f, nullptr);
  if (tiles.unpack == nullptr) return 0;
  return (kOfK ? kBlockTokens : RoundUp(f.row.dim, kLanes)) / kLanes * tiles.stride;
}

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
