// Per target: what a storage is to tiles and to products, one struct each, and where a number lies
// in a tile. A new storage is a struct here and a case in WithStorage.
#if defined(KVMIX_KERNELS_STORAGE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVMIX_KERNELS_STORAGE_INL_H_
#undef KVMIX_KERNELS_STORAGE_INL_H_
#else
#define KVMIX_KERNELS_STORAGE_INL_H_
#endif

#include <array>
#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/formats.h"
#include "kernels/levels.h"
#include "kernels/nibbles-inl.h"
#include "kernels/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {
static_assert(kBlockTokens % kLanes == 0 && kLanes <= 16);

HWY_INLINE constexpr std::size_t RoundUp(std::size_t n, std::size_t to) {
  return (n + to - 1) / to * to;
}

// A product takes kWidth neighbouring terms of a lane at a step, and a tile vector holds kParts
// steps: kWidth * kParts Codes of a lane make a Word. Codes<kOfK, part>() loads a tile vector of K
// or V and returns one of its steps in the form that the storage's product multiplies. KWord()
// makes a word of K from canonical bytes, Canonical() undoes it; code `term` of a word of V lies
// Shift(term) bits up, and has the bits of kMask.
struct F16 {
  static constexpr Storage kStorage = Storage::kF16;
  static constexpr std::size_t kWidth = 1, kParts = 1;
  using Code = std::uint16_t;
  using Word = std::uint16_t;
  static constexpr Word kMask = 0xFFFF;
  template <bool kOfK, std::size_t kPart>
  static HWY_INLINE VF Codes(const std::uint8_t* p) {
    const hn::Rebind<hwy::float16_t, DF> d;
    return hn::PromoteTo(DF(), hn::LoadU(d, reinterpret_cast<const hwy::float16_t*>(p)));
  }
  static HWY_INLINE Word KWord(Word canonical) { return canonical; }
  static HWY_INLINE Word Canonical(Word word) { return word; }
  static HWY_INLINE int Shift(std::size_t) { return 0; }
};

struct I8 {
  static constexpr Storage kStorage = Storage::kI8;
  static constexpr std::size_t kWidth = KVMIX_QUADS ? 4 : 2, kParts = 1;
  using Code = std::uint8_t;
  using Word = hwy::UnsignedFromSize<kWidth>;
  static constexpr Word kMask = 0xFF;
#if KVMIX_QUADS
  template <bool kOfK, std::size_t kPart>
  static HWY_INLINE VI32 Codes(const std::uint8_t* p) {
    return hn::LoadU(DI32(), reinterpret_cast<const std::int32_t*>(p));
  }
#else
  template <bool kOfK, std::size_t kPart>
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
  static HWY_INLINE int Shift(std::size_t term) { return static_cast<int>(8 * term); }
};

// A vector has 8 terms of a lane. The lower nibbles of a word's bytes are terms 0 to 3, the upper
// ones 4 to 7; where pairs are multiplied, the two middle bytes change places, so that every second
// byte belongs to a pair, and a shift widens it.
struct I4 {
  static constexpr Storage kStorage = Storage::kI4;
  static constexpr std::size_t kWidth = I8::kWidth, kParts = 8 / kWidth;
  using Code = std::uint8_t;
  using Word = std::uint32_t;
  static constexpr Word kMask = 0x0F;
  template <bool kOfK, std::size_t kPart>
  static HWY_INLINE auto Codes(const std::uint8_t* p) {
    constexpr bool kUpper = kPart >= kParts / 2;
    const VU8 bytes = hn::LoadU(DU8(), p);
#if KVMIX_UNSIGNED_QUADS
    // vpermb looks at the lowest six bits of a byte: with the table four times over, no mask.
    const hn::Repartition<std::uint16_t, DU8> d16;
    const VU8 lowest =
        kUpper ? hn::BitCast(DU8(), hn::ShiftRight<4>(hn::BitCast(d16, bytes))) : bytes;
    const VI8 table = hn::LoadDup128(DI8(), (kOfK ? kFlippedLevels : kLevels).data());
    const VI8 levels = hn::TableLookupLanes(table, hn::Indices512<std::int8_t>{lowest.raw});
#else
    const VU8 nibbles =
        kUpper ? hn::ShiftRight<4>(bytes) : hn::And(bytes, hn::Set(DU8(), std::uint8_t{0x0F}));
    const VI8 levels = LookUpLevels(nibbles);
#endif
#if KVMIX_QUADS
    return hn::BitCast(DI32(), levels);
#else
    const VI16 pairs = hn::BitCast(DI16(), levels);
    return hn::ShiftRight<8>(kPart % 2 == 0 ? hn::ShiftLeft<8>(pairs) : pairs);
#endif
  }
  static HWY_INLINE Word KWord(Word canonical) {
    const Word pairs = Exchange<12>(canonical, 0xF0F0);
    return KVMIX_QUADS ? Exchange<8>(pairs, 0xFF00) : pairs;
  }
  static HWY_INLINE Word Canonical(Word word) {
    return Exchange<12>(KVMIX_QUADS ? Exchange<8>(word, 0xFF00) : word, 0xF0F0);
  }
  static HWY_INLINE int Shift(std::size_t term) {
    const std::size_t byte = KVMIX_QUADS ? term % 4 : term % 2 * 2 + term / 2 % 2;
    return static_cast<int>(8 * byte + term / 4 * 4);
  }

 private:
  // The levels as bytes with the sign flipped, which vpdpbusd takes as K's.
  static constexpr std::array<std::int8_t, 16> kFlippedLevels = [] {
    std::array<std::int8_t, 16> flipped{};
    for (std::size_t c = 0; c < flipped.size(); ++c)
      flipped[c] = static_cast<std::int8_t>(static_cast<std::uint8_t>(kLevels[c]) ^ 0x80u);
    return flipped;
  }();
  // The bits of `which` and those kDistance above them change places.
  template <int kDistance>
  static HWY_INLINE Word Exchange(Word word, Word which) {
    const Word differ = (word ^ word >> kDistance) & which;
    return word ^ differ ^ differ << kDistance;
  }
};

// f(S()) with the struct of a storage.
template <class F>
HWY_INLINE decltype(auto) WithStorage(Storage storage, const F& f) {
  if (storage == Storage::kF16) return f(F16());
  if (storage == Storage::kI4) return f(I4());
  return f(I8());
}

// Bytes of one tile vector.
template <class S>
constexpr std::size_t kVectorBytes = kLanes * sizeof(typename S::Word);
// Terms of a lane in one tile vector.
template <class S>
constexpr std::size_t kTerms = S::kWidth* S::kParts;
// Vectors from the first to the last term: K's channels, V's tokens.
template <class S>
HWY_INLINE constexpr std::size_t KVectors(std::size_t dim) {
  return RoundUp(dim, kTerms<S>) / kTerms<S>;
}
template <class S>
constexpr std::size_t kVVectors = kBlockTokens / kTerms<S>;
// Bytes of all terms of kLanes tokens (K) or kLanes channels (V).
template <class S>
HWY_INLINE constexpr std::size_t KTileBytes(std::size_t dim) {
  return KVectors<S>(dim) * kVectorBytes<S>;
}
template <class S>
constexpr std::size_t kVTileBytes = kVVectors<S>* kVectorBytes<S>;

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
