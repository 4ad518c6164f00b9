// Rows of numbers as they come into the kernels: some type, some stride.
#ifndef KVMIX_KERNELS_ROWS_H_
#define KVMIX_KERNELS_ROWS_H_

#include <cstddef>

#include "kvmix/types.h"

namespace kvmix::kernels {

// `count` rows of `dim` contiguous numbers, row r from element r * stride of `x` on. The rows can
// be one head's tokens, or one token's heads.
struct RowsIn {
  const void* x = nullptr;
  Dtype dtype = KVMIX_F16;
  std::ptrdiff_t stride = 0;
  std::size_t count = 0;
  std::size_t dim = 0;

  // Rows from `first` on.
  RowsIn From(std::size_t first, std::size_t n) const {
    const std::ptrdiff_t skip = static_cast<std::ptrdiff_t>(first) * stride *
                                static_cast<std::ptrdiff_t>(kvmix_dtype_bytes(dtype));
    return {static_cast<const char*>(x) + skip, dtype, stride, n, dim};
  }
};

}  // namespace kvmix::kernels

#endif  // KVMIX_KERNELS_ROWS_H_
