// Storage i4: a code is a nibble, the number of one of 16 levels.
//
//   value = scale * kLevels[code]
//
// The levels are those of the Lloyd-Max quantizer of a normal distribution (J. Max, "Quantizing for
// minimum distortion", IRE Transactions on Information Theory 6, 1960, table I, N = 16: +-0.1284,
// 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733), times 127 / 2.733, rounded to integers: rows
// are near normal after a rotation, and the products of int8 take such levels as they are. Code c
// from 0 to 7 is the level kMagnitudes[c], code 15 - c its negative: a nibble read as a number in
// two's complement, from -8 to 7, grows with its level. No level is 0.
//
// A canonical row is dim / 2 bytes: channel 2 i is the lower nibble of byte i, channel 2 i + 1 the
// upper one.
//
// How a row y becomes codes (encode.cc), in integers, so that the bytes are the same everywhere:
//   z = round-to-nearest-even(y * (32767 / m)), m the row's largest |y|, each step rounded to f32
//   for every n of kReaches: the codes of the levels nearest to z, of a grid whose outermost level
//     is n / 16 of 32767, that is m (kBorders); a = sum of z * level, b = sum of level^2
//   the codes are those of the largest a^2 / b, by f64, the first of equals: for given levels the
//     best scale is a / b, and leaves the error sum z^2 - a^2 / b
//   scale = f32(f64(m / 32767) * (a / b)), m / 32767 by f32, not beyond 2^121 (127 times that is
//     finite); stored as bf16 it is rounded to nearest even
// A row with m < 2^-100 has scale 0 and codes 0.
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

// The largest |z|.
inline constexpr std::int32_t kLargestZ = 32767;
// Where the outermost level may lie, in sixteenths of the largest |z|. (Below 16: values beyond it
// are clipped.)
inline constexpr std::array<std::int32_t, 5> kReaches = {16, 15, 14, 13, 12};

// Code c + 1 stands for |z| above kBorders[reach][c]: the mean of two levels, rounded down.
inline constexpr std::array<std::array<std::int16_t, 7>, kReaches.size()> kBorders = [] {
  std::array<std::array<std::int16_t, 7>, kReaches.size()> borders{};
  for (std::size_t r = 0; r < kReaches.size(); ++r) {
    for (std::size_t c = 0; c < 7; ++c) {
      borders[r][c] = static_cast<std::int16_t>((kMagnitudes[c] + kMagnitudes[c + 1]) *
                                                kReaches[r] * kLargestZ / (2 * 127 * 16));
    }
  }
  return borders;
}();

}  // namespace kvmix::kernels

#endif  // KVMIX_KERNELS_LEVELS_H_
