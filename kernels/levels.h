// Storages below int8: a code is the number of a level, and a row has one scale.
//
//   value = scale * level of the code
//
//   i6   the level is the code itself, an integer from -31 to 31
//   i4   one of 16 levels, i3 one of 8: code c of the lower half is the magnitude c below, the code
//        with all bits of c flipped its negative. No level is 0.
// So a code read as a number in two's complement grows with its level.
//
// The levels of i4 and i3 are those of the Lloyd-Max quantizer of a normal distribution (J. Max,
// "Quantizing for minimum distortion", IRE Transactions on Information Theory 6, 1960, table I,
// N = 16: +-0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733; N = 8: +-0.2451, 0.7560,
// 1.344, 2.152), times 127 over the largest, rounded to integers: rows are near normal after a
// rotation, and the products of int8 take such levels as they are.
//
// A canonical row is one plane of bits after the other: i6 the lower 4 bits of all codes, then the
// upper 2; i4 its 4; i3 the lower 2, then the upper 1. A plane of w bits has dim * w / 8 bytes,
// channel c at the bits from w * (c mod (8 / w)) up of byte c / (8 / w).
//
// How a row y becomes codes (levels-inl.h), in integers, so that the bytes are the same everywhere:
//   z = round-to-nearest-even(y * (32767 / m)), m the row's largest |y|, each step rounded to f32
//   for every reach: the codes of the levels nearest to z; a = sum of z * level, b = sum of level^2
//     i4, i3  of a grid whose outermost level is n / 16 of 32767, that is m, n the reach (kBorders)
//     i6      |level| = min(31, (|z| * n + 2^14) >> 15), n the reach
//   the codes are those of the largest a^2 / b, by f64, the first of equals: for given levels the
//     best scale is a / b, and leaves the error sum z^2 - a^2 / b
//   scale = f32(f64(m / 32767) * (a / b)), m / 32767 by f32, not beyond 2^121 (i6: 2^123; times the
//     largest level that is finite); stored as bf16 it is rounded to nearest even
// A row with m < 2^-100 has scale 0 and codes 0. With the step +shape other codes follow, of the
// same scale: shape-inl.h.
#ifndef KVMIX_KERNELS_LEVELS_H_
#define KVMIX_KERNELS_LEVELS_H_

#include <array>
#include <cstddef>
#include <cstdint>

namespace kvmix::kernels {

inline constexpr std::array<std::int8_t, 8> kMagnitudes = {6, 18, 31, 44, 58, 75, 96, 127};
inline constexpr std::array<std::int8_t, 4> kMagnitudes3 = {14, 45, 79, 127};

// By code.
template <std::size_t kCount>
constexpr std::array<std::int8_t, 2 * kCount> LevelsOf(
    const std::array<std::int8_t, kCount>& magnitudes) {
  std::array<std::int8_t, 2 * kCount> levels{};
  for (std::size_t c = 0; c < kCount; ++c) {
    levels[c] = magnitudes[c];
    levels[2 * kCount - 1 - c] = static_cast<std::int8_t>(-magnitudes[c]);
  }
  return levels;
}
inline constexpr std::array<std::int8_t, 16> kLevels = LevelsOf(kMagnitudes);
inline constexpr std::array<std::int8_t, 8> kLevels3 = LevelsOf(kMagnitudes3);
// i6's largest level.
inline constexpr std::int32_t kLargest6 = 31;

// The largest |z|.
inline constexpr std::int32_t kLargestZ = 32767;
// Where the outermost level may lie, in sixteenths of the largest |z|. (Below 16: values beyond it
// are clipped. The fewer the levels, the more that pays.) i6's: see above.
inline constexpr std::array<std::int16_t, 5> kReaches = {16, 15, 14, 13, 12};
inline constexpr std::array<std::int16_t, 5> kReaches3 = {15, 13, 12, 11, 10};
inline constexpr std::array<std::int16_t, 4> kReaches6 = {31, 34, 38, 43};

// [reach][c]: code c + 1 stands for |z| above it: the mean of two levels, rounded down.
template <std::size_t kCount, std::size_t kReachCount>
constexpr std::array<std::array<std::int16_t, kCount - 1>, kReachCount> BordersOf(
    const std::array<std::int8_t, kCount>& magnitudes,
    const std::array<std::int16_t, kReachCount>& reaches) {
  std::array<std::array<std::int16_t, kCount - 1>, kReachCount> borders{};
  for (std::size_t r = 0; r < kReachCount; ++r) {
    for (std::size_t c = 0; c + 1 < kCount; ++c) {
      borders[r][c] = static_cast<std::int16_t>((magnitudes[c] + magnitudes[c + 1]) * reaches[r] *
                                                kLargestZ / (2 * 127 * 16));
    }
  }
  return borders;
}

}  // namespace kvmix::kernels

#endif  // KVMIX_KERNELS_LEVELS_H_
