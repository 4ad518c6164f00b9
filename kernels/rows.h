// Rows of numbers as they come into the kernels: some type, some stride.
#ifndef KVMIX_KERNELS_ROWS_H_
#define KVMIX_KERNELS_ROWS_H_

#include <cstddef>
#include <cstdint>

namespace kvmix::kernels {

enum class Dtype : std::uint8_t { kF16, kBF16, kF32 };

constexpr std::size_t BytesOf(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : 2; }

// `count` rows of `dim` contiguous numbers, row r from element r * stride of `x` on. The rows can
// be one head's tokens, or one token's heads.
struct RowsIn {
  const void* x = nullptr;
  Dtype dtype = Dtype::kF16;
  std::ptrdiff_t stride = 0;
  std::size_t count = 0;
  std::size_t dim = 0;

  // Rows from `first` on.
  RowsIn From(std::size_t first, std::size_t n) const {
    const std::ptrdiff_t skip =
        static_cast<std::ptrdiff_t>(first) * stride * static_cast<std::ptrdiff_t>(BytesOf(dtype));
    return {static_cast<const char*>(x) + skip, dtype, stride, n, dim};
  }
};

}  // namespace kvmix::kernels

#endif  // KVMIX_KERNELS_ROWS_H_
