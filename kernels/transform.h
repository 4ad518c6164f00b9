// What a codec does to a row before it is rounded, and what undoes it.
//
//   y = R((x - mean) / factor)        x = mean + factor * R(y)
//
// R is the Hadamard matrix over sqrt(b), which is its own inverse, in blocks of b channels: b is
// the largest power of two that divides dim (64, 128: the whole row; 80: five blocks of 16; an odd
// dim: nothing). Its sums are made in one order (distances 1, 2, 4, ...) on every target, so that
// the bytes are the same. Attention needs no inverse for K, since q . x = q . mean + R(factor * q)
// . y.
#ifndef KVMIX_KERNELS_TRANSFORM_H_
#define KVMIX_KERNELS_TRANSFORM_H_

#include <cstddef>
#include <cstdint>

namespace kvmix::kernels {

// Pointers to [dim] each (shaping: [dim][dim], kernels/shape-inl.h), or null where a step is left
// out. Row r's vectors are r * row_stride floats further: 0 for the tokens of one head, dim where
// the rows are heads with vectors in a row. Its matrix is dim times as far: ShapingOf().
struct Transform {
  const float* mean = nullptr;
  const float* factor = nullptr;
  const float* inv_factor = nullptr;  // 1 / factor, f32: encoding multiplies by it
  const float* shaping = nullptr;
  bool hadamard = false;
  std::size_t row_stride = 0;

  bool rotates_or_folds() const { return hadamard || factor != nullptr; }
  Transform From(std::size_t row) const {
    const auto at = [&](const float* p) { return p != nullptr ? p + row * row_stride : nullptr; };
    return {at(mean), at(factor), at(inv_factor), nullptr, hadamard, row_stride};
  }
  const float* ShapingOf(std::size_t row, std::size_t dim) const {
    return shaping + row * row_stride * dim;
  }
};

struct TransformKernels {
  // In place, row r at x + r * stride: x <- R(factor * x) for a query; x <- factor * R(x) for an
  // output. factor may be null.
  void (*prepare)(float* x, std::size_t stride, std::size_t count, std::size_t dim,
                  const float* factor, bool hadamard);
  void (*restore)(float* x, std::size_t stride, std::size_t count, std::size_t dim,
                  const float* factor, bool hadamard);
};

TransformKernels TransformKernelsFor(std::int64_t target);

}  // namespace kvmix::kernels

#endif  // KVMIX_KERNELS_TRANSFORM_H_
