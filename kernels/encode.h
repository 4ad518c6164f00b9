// Rows of f16, bf16 or f32 -> codes and scales, and back; and what the codes cost.
// Formulas, NaN and Inf, zero rows: lib/include/kvmix/quantize.h. The steps before rounding:
// kernels/transform.h. The proof that codes are exact quotients: docs/numerics.md.
#ifndef KVMIX_KERNELS_ENCODE_H_
#define KVMIX_KERNELS_ENCODE_H_

#include <cstddef>
#include <cstdint>

#include "kernels/formats.h"
#include "kernels/rows.h"
#include "kernels/transform.h"

namespace kvmix::kernels {

// References: a task is made for a call, and copying would cost an append of one token a tenth.
struct EncodeTask {
  const RowsIn& in;
  const Transform& transform;  // none of it with f16 storage
  const RowFormat& format;     // format.dim == in.dim
  std::uint8_t* rows;          // row r at rows + r * row_stride
  std::size_t row_stride;      // bytes
  float* scales;               // [in.count], or null where the format stores none
};

// Canonical rows.
struct CodedRows {
  const RowFormat& format;
  const Transform& transform;
  const std::uint8_t* rows;  // row r at rows + r * row_stride
  std::size_t row_stride;    // bytes
  const float* scales;       // [count], or null where the format stores none
  std::size_t count;
};

struct RowErrors {
  double sum_squared_error;
  double max_error;
  double max_abs;  // of x
};

struct EncodeKernels {
  // Returns how many values were beyond what the format holds and were clamped to its largest.
  std::uint64_t (*encode)(const EncodeTask& task);
  // Row r to out + r * out_stride (elements).
  void (*decode_f32)(const CodedRows& in, float* out, std::size_t out_stride);
  void (*decode_f16)(const CodedRows& in, std::uint16_t* out, std::size_t out_stride);
  // Of the decoded rows against x.
  RowErrors (*errors)(const CodedRows& coded, const RowsIn& x);
  // The scale that covers every row: max |y| / 127, or 0 where that is below 2^-100 / 127.
  float (*head_scale)(const RowsIn& in, const Transform& transform);
  // The numbers as they are (NaN and Inf too), row r to out + r * out_stride.
  void (*to_float)(const RowsIn& in, float* out, std::size_t out_stride);
};

EncodeKernels EncodeKernelsFor(std::int64_t target);

}  // namespace kvmix::kernels

#endif  // KVMIX_KERNELS_ENCODE_H_
