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

// Tiles that products multiply. A product takes kWidth neighbouring terms of a lane at a step, the
// Codes of a Word; a tile vector is a word of each lane. KWord() makes a word of K from canonical
// bytes, Canonical() undoes it.
struct F16 {
  static constexpr Storage kStorage = Storage::kF16;
  static constexpr bool kPacked = false;
  static constexpr std::size_t kWidth = 1, kTerms = 1;
  using Code = std::uint16_t;
  using Word = std::uint16_t;
  static HWY_INLINE VF Codes(const std::uint8_t* p) {
    const hn::Rebind<hwy::float16_t, DF> d;
    return hn::PromoteTo(DF(), hn::LoadU(d, reinterpret_cast<const hwy::float16_t*>(p)));
  }
  static HWY_INLINE Word KWord(Word canonical) { return canonical; }
  static HWY_INLINE Word Canonical(Word word) { return word; }
  static HWY_INLINE Place PlaceOf(std::size_t term) { return {term * kLanes * sizeof(Word), 0}; }
};

struct I8 {
  static constexpr Storage kStorage = Storage::kI8;
  static constexpr bool kPacked = false;
  static constexpr std::size_t kWidth = KVMIX_QUADS ? 4 : 2, kTerms = kWidth;
  using Code = std::uint8_t;
  using Word = hwy::UnsignedFromSize<kWidth>;
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
  static HWY_INLINE Word KWord(Word canonical) {
    return static_cast<Word>(canonical ^
                             (KVMIX_UNSIGNED_QUADS ? Word(~Word{0}) / 0xFF * 0x80u : 0u));
  }
  static HWY_INLINE Word Canonical(Word word) { return KWord(word); }
  static HWY_INLINE Place PlaceOf(std::size_t term) {
    return {term / kWidth * kLanes * kWidth, static_cast<int>(8 * (term % kWidth))};
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

// A tile below int8 is one of I8 (without the flip of K's sign) in groups of kRegisters registers.
// A group is one plane after the other; a plane has the bits of register r at bits
// kBits * (r % kPerByte) of its register r / kPerByte, byte by byte. So a shift and a mask unpack
// a register (unpack-inl.h), and a group is kTerms terms of every lane.
template <class... P>
struct Packed {
  static constexpr bool kPacked = true;
  static constexpr int kBits = (P::kBits + ...);
  static constexpr std::size_t kRegisters = std::max({P::kPerByte...});
  static constexpr std::size_t kTerms = 4 * kRegisters;
  static constexpr std::size_t kGroupBytes = kRegisters * kBits / 8 * kFourTerms;

  // f(Plane()) for each in order.
  template <class F>
  static HWY_INLINE void ForPlanes(const F& f) {
    (f(P()), ...);
  }
  // Bytes from the start of a group.
  template <class Q>
  static constexpr std::size_t kPlaneOffset = kRegisters* Q::kFrom / 8 * kFourTerms;

  template <class Q>
  static HWY_INLINE Place PlaceOf(Q, std::size_t term) {
    const std::size_t r = term % kTerms / 4;
    const Place of_byte = I8::PlaceOf(term % 4);
    return {
        term / kTerms * kGroupBytes + kPlaneOffset<Q> + r / Q::kPerByte * kFourTerms + of_byte.at,
        of_byte.shift + static_cast<int>(r % Q::kPerByte) * Q::kBits};
  }
};

struct I6 : Packed<Plane<0, 4>, Plane<4, 2>> {
  static constexpr Storage kStorage = Storage::kI6;
  static constexpr int Level(int code) { return (code ^ 32) - 32; }
};
struct I4 : Packed<Plane<0, 4>> {
  static constexpr Storage kStorage = Storage::kI4;
  static constexpr int Level(int code) { return kLevels[static_cast<std::size_t>(code)]; }
};
struct I3 : Packed<Plane<0, 2>, Plane<2, 1>> {
  static constexpr Storage kStorage = Storage::kI3;
  static constexpr int Level(int code) { return kLevels3[static_cast<std::size_t>(code)]; }
};

// f(S()) with the struct of a storage.
template <class F>
HWY_INLINE decltype(auto) WithStorage(Storage storage, const F& f) {
  switch (storage) {
    case Storage::kF16:
      return f(F16());
    case Storage::kI6:
      return f(I6());
    case Storage::kI4:
      return f(I4());
    case Storage::kI3:
      return f(I3());
    case Storage::kI8:
      break;
  }
  return f(I8());
}
// F16 or I8: the tiles that a storage's products multiply.
template <class S>
using Multiplied = std::conditional_t<std::is_same_v<S, F16>, F16, I8>;
template <class F>
HWY_INLINE decltype(auto) WithMultiplied(Storage storage, const F& f) {
  if (storage == Storage::kF16) return f(F16());
  return f(I8());
}

// Bytes of one tile vector, of a storage that products multiply.
template <class S>
constexpr std::size_t kVectorBytes = kLanes * sizeof(typename S::Word);
// Bytes of all terms of kLanes tokens (K) or kLanes channels (V).
template <class S>
HWY_INLINE constexpr std::size_t TileBytes(std::size_t terms) {
  return kLanes * RoundUp(terms, S::kTerms) * BitsOf(S::kStorage) / 8;
}
template <class S>
constexpr std::size_t kVTileBytes = TileBytes<S>(kBlockTokens);

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
