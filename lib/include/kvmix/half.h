// Halves (IEEE 754 binary16) as 16 raw bits, and bf16 numbers likewise: to float and back.
#ifndef KVMIX_HALF_H_
#define KVMIX_HALF_H_

#include <bit>
#include <cstdint>

#include "kvmix/export.h"

namespace kvmix {

using Half = std::uint16_t;

// Exact. Meant for single numbers; the kernels convert whole rows.
inline float HalfToFloat(Half h) {
  const std::uint32_t sign = std::uint32_t{h & 0x8000u} << 16;
  const std::uint32_t magnitude = h & 0x7FFFu;
  if (magnitude >= 0x7C00u)
    return std::bit_cast<float>(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13));
  // The bits, read as a float, are the number times 2^-112; that holds for subnormal halves as
  // well.
  return std::bit_cast<float>(
      std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude << 13) * 0x1p112f) | sign);
}

// A bf16 number's 16 bits are the upper half of a float's.
inline float BFloatToFloat(std::uint16_t b) { return std::bit_cast<float>(std::uint32_t{b} << 16); }

// Rounds to nearest, ties to even; overflow becomes infinity, a NaN stays a (quiet) NaN.
inline Half FloatToHalf(float f) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(f);
  const Half sign = static_cast<Half>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return sign | 0x7E00u;
  if (magnitude >= 0x477FF000u) return sign | 0x7C00u;  // 65520 and above
  if (magnitude < 0x38800000u) {                        // below 2^-14: a multiple of 2^-24
    const float ulps = std::bit_cast<float>(magnitude) * 0x1p24f + 0x1p23f;  // rounds to an integer
    return sign | static_cast<Half>(std::bit_cast<std::uint32_t>(ulps) & 0x7FFu);
  }
  return sign |
         static_cast<Half>((magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13);
}

// Rounds to nearest, ties to even; a NaN stays a (quiet) NaN.
inline std::uint16_t FloatToBFloat(float f) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(f);
  const std::uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  return static_cast<std::uint16_t>(((f != f) ? bits | 0x400000u : rounded) >> 16);
}

}  // namespace kvmix

#endif  // KVMIX_HALF_H_
