// Masks for tests: their numbers in any type and at any place, and as the type rounds them.
#ifndef KVMIX_TESTS_MASK_CASES_H_
#define KVMIX_TESTS_MASK_CASES_H_

#include <bit>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kvmix/attention.h"
#include "kvmix/half.h"
#include "tests/reference/masked_attention.h"

namespace kvmix::testing {

inline constexpr Dtype kDtypes[] = {KVMIX_F16, KVMIX_BF16, KVMIX_F32};

inline std::uint32_t BitsOf(float x, Dtype dtype) {
  if (dtype == KVMIX_F16) return FloatToHalf(x);
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  return dtype == KVMIX_BF16 ? bits >> 16 : bits;
}
inline float FromBits(std::uint32_t bits, Dtype dtype) {
  if (dtype == KVMIX_F16) return HalfToFloat(static_cast<Half>(bits));
  return std::bit_cast<float>(dtype == KVMIX_BF16 ? bits << 16 : bits);
}

// A mask in memory. Between its rows lie NaN, and it may begin at any element.
struct MaskData {
  std::vector<char> bytes;
  MaskView view;
  reference::MaskNumbers numbers;  // as the type rounds them

  MaskData(const std::vector<float>& x, std::size_t queries, Dtype dtype, std::size_t gap = 0,
           bool backwards = false, std::size_t offset = 0) {
    const std::size_t cells = queries != 0 ? x.size() / queries : 0, row = cells + gap;
    const std::size_t size = kvmix_dtype_bytes(dtype);
    bytes.assign((queries * row + offset) * size + 1, static_cast<char>(0xFF));
    numbers.cells = cells;
    const std::size_t first = offset + (backwards && queries != 0 ? (queries - 1) * row : 0);
    const auto stride = static_cast<std::ptrdiff_t>(row);
    view = {bytes.data() + first * size,  dtype,  queries, cells,
            backwards ? -stride : stride, nullptr};
    for (std::size_t i = 0; i < x.size(); ++i) {
      const std::uint32_t bits = BitsOf(x[i], dtype);
      const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(i / cells) * view.stride +
                                static_cast<std::ptrdiff_t>(first + i % cells);
      std::memcpy(bytes.data() + at * static_cast<std::ptrdiff_t>(size), &bits, size);
      numbers.numbers.push_back(FromBits(bits, dtype));
    }
  }
};

}  // namespace kvmix::testing

#endif  // KVMIX_TESTS_MASK_CASES_H_
