// Per target: what a storage is to tiles, one struct each, and where a number lies in a tile. A new
// storage is a struct here and a case in WithStorage.
#if defined(KVMIX_KERNELS_STORAGE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVMIX_KERNELS_STORAGE_INL_H_
#undef KVMIX_KERNELS_STORAGE_INL_H_
#else
#define KVMIX_KERNELS_STORAGE_INL_H_
#endif

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/formats.h"
#include "kernels/levels.h"
#include "kernels/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {
static_assert(kBlockTokens % kLanes == 0 && kLanes <= 16);

HWY_INLINE constexpr std::size_t RoundUp(std::size_t n, std::size_t to) {
  return (n + to - 1) / to * to;
}

// Where a term of the first lane lies in a tile: so many bytes from its start, in a word there, so
// many bits up. The other lanes follow word by word.
struct Place {
  std::size_t at;
  int shift;
};

// A product takes kWidth neighbouring terms of a lane at a step, the codes of a Word. A tile is a
// sequence of groups of kGroupBytes, each of kParts steps; Codes<kOfK, part>() reads one of them
// from a group of K's or V's. KWord() makes a word of K from canonical bytes, Canonical() undoes
// it. Store() is for tiles that others are unpacked to: the codes of a step of theirs.
struct F16 {
  static constexpr Storage kStorage = KVMIX_STORAGE_F16;
  static constexpr bool kPacked = false;
  static constexpr std::size_t kWidth = 1, kParts = 1, kTerms = 1;
  using Code = std::uint16_t;
  using Word = std::uint16_t;
  static constexpr std::size_t kGroupBytes = kLanes * sizeof(Word);
  template <bool kOfK, std::size_t kPart>
  static HWY_INLINE VF Codes(const std::uint8_t* p) {
    const hn::Rebind<hwy::float16_t, DF> d;
    return hn::PromoteTo(DF(), hn::LoadU(d, reinterpret_cast<const hwy::float16_t*>(p)));
  }
  static HWY_INLINE Word KWord(Word canonical) { return canonical; }
  static HWY_INLINE Word Canonical(Word word) { return word; }
  static HWY_INLINE Place PlaceOf(std::size_t term) { return {term * kLanes * sizeof(Word), 0}; }
};

struct I8 {
  static constexpr Storage kStorage = KVMIX_STORAGE_I8;
  static constexpr bool kPacked = false;
  static constexpr std::size_t kWidth = KVMIX_QUADS ? 4 : 2, kParts = 1, kTerms = kWidth;
  using Code = std::uint8_t;
  using Word = hwy::UnsignedFromSize<kWidth>;
  static constexpr std::size_t kGroupBytes = kLanes * sizeof(Word);
  template <bool kOfK, std::size_t kPart>
#if KVMIX_QUADS
  static HWY_INLINE VI32 Codes(const std::uint8_t* p) {
    return hn::LoadU(DI32(), reinterpret_cast<const std::int32_t*>(p));
  }
#else
  static HWY_INLINE VI16 Codes(const std::uint8_t* p) {
    const hn::Rebind<std::int8_t, DI16> d;
    return hn::PromoteTo(DI16(), hn::LoadU(d, reinterpret_cast<const std::int8_t*>(p)));
  }
#endif
  static HWY_INLINE void Store(VI32 four_terms, std::uint8_t* to) {
    hn::StoreU(four_terms, DI32(), reinterpret_cast<std::int32_t*>(to));
  }
  static HWY_INLINE Word KWord(Word canonical) {
    return static_cast<Word>(canonical ^
                             (KVMIX_UNSIGNED_QUADS ? Word(~Word{0}) / 0xFF * 0x80u : 0u));
  }
  static HWY_INLINE Word Canonical(Word word) { return KWord(word); }
  static HWY_INLINE Place PlaceOf(std::size_t term) {
    return {term / kWidth * kLanes * kWidth, static_cast<int>(8 * (term % kWidth))};
  }
};

// I8's tiles in pairs, widened; in scratch only.
struct I16 {
  static constexpr bool kPacked = false;
  static constexpr std::size_t kWidth = 2, kParts = 1, kTerms = kWidth;
  static constexpr std::size_t kGroupBytes = kLanes * kWidth * sizeof(std::int16_t);
  template <bool kOfK, std::size_t kPart>
  static HWY_INLINE VI16 Codes(const std::uint8_t* p) {
    return hn::LoadU(DI16(), reinterpret_cast<const std::int16_t*>(p));
  }
  static HWY_INLINE void Store(VI16 pair, std::uint8_t* to) {
    hn::StoreU(pair, DI16(), reinterpret_cast<std::int16_t*>(to));
  }
  static HWY_INLINE void Store(VI32 four_terms, std::uint8_t* to) {
    const VI8 bytes = hn::BitCast(DI8(), four_terms);
    Store(hn::PromoteLowerTo(DI16(), bytes), to);
    Store(hn::PromoteUpperTo(DI16(), bytes), to + kGroupBytes);
  }
};

// Bytes of I8's tiles that hold four terms of every lane: a whole register.
constexpr std::size_t kFourTerms = 4 * kLanes;

// The bits of codes below int8 that lie together, in a canonical row and in a tile: kBits of each,
// from bit kFrom up.
template <int kFrom_, int kBits_>
struct Plane {
  static constexpr int kFrom = kFrom_, kBits = kBits_;
  static constexpr std::uint8_t kMask = (1 << kBits) - 1;
  static constexpr std::size_t kPerByte = 8 / kBits;
};

// v's bytes, each by so many bits up (below 0: down); bits of neighbours come in from the side.
template <int kBy>
HWY_INLINE VU8 Shifted(VU8 v) {
  const hn::Repartition<std::uint16_t, DU8> d16;
  const auto two = hn::BitCast(d16, v);
  if constexpr (kBy > 0) return hn::BitCast(DU8(), hn::ShiftLeft<kBy>(two));
  if constexpr (kBy < 0) return hn::BitCast(DU8(), hn::ShiftRight<-kBy>(two));
  return v;
}

// A tile below int8 is one of I8 (without the flip of K's sign) in groups of kParts registers. A
// group is one plane after the other; a plane has the bits of register r at bits
// kBits * (r % kPerByte) of its register r / kPerByte, byte by byte. So a shift and a mask give a
// register's codes, and a table their levels. A group is kTerms terms of every lane.
template <class S, class... P>
struct Packed {
  static constexpr bool kPacked = true;
  static constexpr int kBits = (P::kBits + ...), kCodes = 1 << kBits;
  static constexpr std::size_t kWidth = 4, kParts = std::max({P::kPerByte...});
  static constexpr std::size_t kTerms = kWidth * kParts;
  static constexpr std::size_t kGroupBytes = kParts * kBits / 8 * kFourTerms;

  // f(Plane()) for each in order.
  template <class F>
  static HWY_INLINE void ForPlanes(const F& f) {
    (f(P()), ...);
  }
  template <class Q>
  static HWY_INLINE Place PlaceOf(Q, std::size_t term) {
    const std::size_t r = term % kTerms / 4;
    const Place of_byte = I8::PlaceOf(term % 4);
    return {
        term / kTerms * kGroupBytes + kPlaneOffset<Q> + r / Q::kPerByte * kFourTerms + of_byte.at,
        of_byte.shift + static_cast<int>(r % Q::kPerByte) * Q::kBits};
  }

  // The levels of register kPart of a group, one a byte, as I8's tiles have them.
  template <bool kOfK, std::size_t kPart>
  static HWY_INLINE VI32 Codes(const std::uint8_t* group) {
    if constexpr (kLevelsByPlane) return hn::BitCast(DI32(), LevelsByPlane<kPart>(group));
    VU8 codes = hn::Zero(DU8());
    ForPlanes([&]<class Q>(Q plane) KVMIX_LAMBDA {
      const VU8 v = hn::LoadU(DU8(), group + kPlaneOffset<Q> + kPart / Q::kPerByte * kFourTerms);
      constexpr int kUp = Q::kFrom - static_cast<int>(kPart % Q::kPerByte) * Q::kBits;
      codes = WithPlane(plane, codes, Shifted<kUp>(v));
    });
    return hn::BitCast(DI32(), Levels<kOfK>(codes));
  }

  // The levels of codes, one a byte, K's in the form of I8's tiles.
  template <bool kOfK>
  static HWY_INLINE VU8 Levels(VU8 codes) {
#if KVMIX_UNSIGNED_QUADS
    // vpermb looks at the lowest six bits of a byte.
    static constexpr auto kTable = Table<kOfK, 64>();
    return hn::TableLookupLanes(hn::LoadU(DU8(), kTable.data()),
                                hn::Indices512<std::uint8_t>{codes.raw});
#else
    if constexpr (kCodes > 16) {  // i6: a number in two's complement
      const VU8 sign = hn::Set(DU8(), std::uint8_t{kCodes / 2});
      return hn::Sub(hn::Xor(codes, sign), sign);
    } else {
#if HWY_TARGET == HWY_SSE2
      // No pshufb, and a table read byte by byte is ten times as slow.
      const DI8 d;
      const VI8 c = hn::BitCast(d, codes);
      const auto at_least = [&](VI8 v, int least) KVMIX_LAMBDA {
        return hn::Gt(v, hn::Set(d, static_cast<std::int8_t>(least - 1)));
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
      static constexpr auto kTable = Table<kOfK, 16>();
      return hn::TableLookupBytes(hn::LoadDup128(DU8(), kTable.data()), codes);
#endif
    }
#endif
  }

 private:
  // i6, where tables have 16 bytes.
  static constexpr bool kLevelsByPlane =
      kCodes > 16 && !KVMIX_UNSIGNED_QUADS && HWY_TARGET != HWY_SSE2;
  // Levels that are sums of what each plane stands for. A table takes four bits of a plane, those
  // of several registers, of which it knows the one: a shift and a mask serve them all.
  template <std::size_t kPart>
  static HWY_INLINE VU8 LevelsByPlane(const std::uint8_t* group) {
    const DU8 d;
    VU8 levels = hn::Zero(d);
    ForPlanes([&]<class Q>(Q) KVMIX_LAMBDA {
      constexpr std::size_t kAt = kPart % Q::kPerByte, kSharing = 4 / Q::kBits;
      const VU8 v = hn::LoadU(d, group + kPlaneOffset<Q> + kPart / Q::kPerByte * kFourTerms);
      const VU8 four = hn::And(Shifted<-4 * static_cast<int>(kAt / kSharing)>(v), hn::Set(d, 15));
      if constexpr (Q::kFrom == 0) {
        levels = four;
      } else {
        static constexpr auto kTable = TableOfPlane<Q>(kAt % kSharing);
        levels = hn::Or(levels, hn::TableLookupBytes(hn::LoadDup128(d, kTable.data()), four));
      }
    });
    return levels;
  }
  template <class Q>
  static constexpr std::array<std::uint8_t, 16> TableOfPlane(std::size_t at) {
    std::array<std::uint8_t, 16> table{};
    for (std::size_t four = 0; four < 16; ++four) {
      const std::size_t bits = four >> (at * Q::kBits) & Q::kMask;
      table[four] = static_cast<std::uint8_t>(S::Level(static_cast<int>(bits << Q::kFrom)));
    }
    return table;
  }

  // Bytes from the start of a group.
  template <class Q>
  static constexpr std::size_t kPlaneOffset = (kParts * Q::kFrom) / 8 * kFourTerms;

  // With the bits of one plane, whatever is beside them in `shifted`. Where vpermb looks codes up,
  // the bits above a code may be any.
  template <class Q>
  static HWY_INLINE VU8 WithPlane(Q, VU8 codes, VU8 shifted) {
#if KVMIX_UNSIGNED_QUADS
    if constexpr (Q::kFrom == 0) return shifted;
    const VU8 below = hn::Set(DU8(), static_cast<std::uint8_t>((1 << Q::kFrom) - 1));
    return hn::IfVecThenElse(below, codes, shifted);
#else
    const VU8 own = hn::Set(DU8(), static_cast<std::uint8_t>(Q::kMask << Q::kFrom));
    if constexpr (Q::kFrom == 0) return hn::And(shifted, own);
    return hn::OrAnd(codes, shifted, own);
#endif
  }

  // The levels by code, as often as the table has room; vpdpbusd takes K's with the sign flipped.
  template <bool kOfK, std::size_t kSize>
  static constexpr std::array<std::uint8_t, kSize> Table() {
    std::array<std::uint8_t, kSize> table{};
    for (std::size_t c = 0; c < kSize; ++c)
      table[c] = static_cast<std::uint8_t>(S::Level(static_cast<int>(c % kCodes)) ^
                                           (kOfK && KVMIX_UNSIGNED_QUADS ? 0x80 : 0));
    return table;
  }
};

struct I6 : Packed<I6, Plane<0, 4>, Plane<4, 2>> {
  static constexpr Storage kStorage = KVMIX_STORAGE_I6;
  static constexpr int Level(int code) { return (code ^ 32) - 32; }
};
struct I4 : Packed<I4, Plane<0, 4>> {
  static constexpr Storage kStorage = KVMIX_STORAGE_I4;
  static constexpr int Level(int code) { return kLevels[static_cast<std::size_t>(code)]; }
};
struct I3 : Packed<I3, Plane<0, 2>, Plane<2, 1>> {
  static constexpr Storage kStorage = KVMIX_STORAGE_I3;
  static constexpr int Level(int code) { return kLevels3[static_cast<std::size_t>(code)]; }
};

// f(S()) with the struct of a storage.
template <class F>
HWY_INLINE decltype(auto) WithStorage(Storage storage, const F& f) {
  switch (storage) {
    case KVMIX_STORAGE_F16:
      return f(F16());
    case KVMIX_STORAGE_I6:
      return f(I6());
    case KVMIX_STORAGE_I4:
      return f(I4());
    case KVMIX_STORAGE_I3:
      return f(I3());
    case KVMIX_STORAGE_I8:
      break;
  }
  return f(I8());
}
// The tiles that a storage's products multiply. Quads are unpacked in registers, for every turn of
// rows anew; pairs, which have to be widened as well, once for all turns (unpack-inl.h).
template <class S>
using Multiplied = std::conditional_t<KVMIX_QUADS || !S::kPacked, S, I8>;
// The same where many turns read them: with vpdpbusd one limb of eight rows would hide no more than
// half of the unpacking. AVX3, where eight rows share a load, would gain nothing, SSE4 little
// (README.md).
template <class S>
using MultipliedOften =
    std::conditional_t<HWY_TARGET == HWY_AVX2 && !std::is_same_v<S, F16>, I16,
                       std::conditional_t<KVMIX_UNSIGNED_QUADS && S::kPacked, I8, Multiplied<S>>>;

// Bytes of all terms of kLanes tokens (K) or kLanes channels (V).
template <class S>
HWY_INLINE constexpr std::size_t TileBytes(std::size_t terms) {
  return RoundUp(terms, S::kTerms) / S::kTerms * S::kGroupBytes;
}
template <class S>
constexpr std::size_t kVTileBytes = TileBytes<S>(kBlockTokens);

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
