// Per target: what a storage is to tiles and to products, one struct each, and where a number lies
// in a tile. A new storage is a struct here and a case in WithStorage.
#if defined(KVMIX_KERNELS_STORAGE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVMIX_KERNELS_STORAGE_INL_H_
#undef KVMIX_KERNELS_STORAGE_INL_H_
#else
#define KVMIX_KERNELS_STORAGE_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/formats.h"
#include "kernels/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {
static_assert(kBlockTokens % kLanes == 0 && kLanes <= 16);

HWY_INLINE constexpr std::size_t RoundUp(std::size_t n, std::size_t to) {
  return (n + to - 1) / to * to;
}

// kWidth neighbouring terms of a lane make a Word of as many Codes. Codes() loads a tile vector in
// the form that the storage's product multiplies.
struct F16 {
  static constexpr Storage kStorage = Storage::kF16;
  static constexpr std::size_t kWidth = 1;
  static constexpr std::uint8_t kFlipK = 0;  // xor of stored K codes
  using Code = std::uint16_t;
  using Word = std::uint16_t;
  static HWY_INLINE VF Codes(const std::uint8_t* p) {
    const hn::Rebind<hwy::float16_t, DF> d;
    return hn::PromoteTo(DF(), hn::LoadU(d, reinterpret_cast<const hwy::float16_t*>(p)));
  }
};

struct I8 {
  static constexpr Storage kStorage = Storage::kI8;
  static constexpr std::size_t kWidth = KVMIX_QUADS ? 4 : 2;
  static constexpr std::uint8_t kFlipK = KVMIX_UNSIGNED_QUADS ? 0x80 : 0;
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
};

// f(S()) with the struct of a storage.
template <class F>
HWY_INLINE decltype(auto) WithStorage(Storage storage, const F& f) {
  return storage == Storage::kF16 ? f(F16()) : f(I8());
}

// Bytes of one tile vector.
template <class S>
constexpr std::size_t kVectorBytes = kLanes * sizeof(typename S::Word);
// Steps (vectors) from the first to the last term: K's channels, V's tokens.
template <class S>
HWY_INLINE constexpr std::size_t KSteps(std::size_t dim) {
  return RoundUp(dim, S::kWidth) / S::kWidth;
}
template <class S>
constexpr std::size_t kVSteps = kBlockTokens / S::kWidth;
// Bytes of all terms of kLanes tokens (K) or kLanes channels (V).
template <class S>
HWY_INLINE constexpr std::size_t KTileBytes(std::size_t dim) {
  return KSteps<S>(dim) * kVectorBytes<S>;
}
template <class S>
constexpr std::size_t kVTileBytes = kVSteps<S>* kVectorBytes<S>;

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
