// fp16 rows -> int8 codes and back. Formulas, NaN and Inf, zero rows: lib/include/kvmix/quantize.h.
// Halves are 16 raw bits. Source of the idea (integer absmax over fp16 bit patterns, several rows
// at a time): measured for this project; codes are exact quotients: multiplied by the reciprocal,
// and divided again only where the product is too near a tie to tell.
#ifndef KVMIX_KERNELS_QUANTIZE_H_
#define KVMIX_KERNELS_QUANTIZE_H_

#include <cstddef>
#include <cstdint>

namespace kvmix::kernels {

// Strided rows: row t starts at x + t * stride (elements); `dim` channels each. mean: [dim] or
// null, row t's at mean + t * mean_stride. (So the rows can be one head's tokens, or one token's
// heads.)
struct RowsIn {
  const std::uint16_t* x;
  std::size_t stride;
  std::size_t tokens;
  std::size_t dim;
  const float* mean;
  std::size_t mean_stride = 0;
};

struct RowErrors {
  double sum_squared_error;
  double max_error;
  double max_abs;  // of x
};

struct QuantizeKernels {
  // codes: row t at codes + t * code_stride. scales: [tokens]. bf16_scale: scales are rounded up to
  // bf16 first.
  void (*per_token)(const RowsIn& in, bool bf16_scale, std::int8_t* codes, std::size_t code_stride,
                    float* scales);
  // max |x - mean| over all rows.
  float (*absmax)(const RowsIn& in);
  // Against one scale; returns the number of clamped values.
  std::uint64_t (*per_head)(const RowsIn& in, float scale, std::int8_t* codes,
                            std::size_t code_stride);
  // codes: row t at codes + t * code_stride; scale of row t: scales[t * scale_step], scale_step 0
  // or 1.
  void (*dequantize_f32)(const std::int8_t* codes, std::size_t code_stride, const float* scales,
                         std::size_t scale_step, const float* mean, std::size_t tokens,
                         std::size_t dim, float* out, std::size_t out_stride);
  void (*dequantize_f16)(const std::int8_t* codes, std::size_t code_stride, const float* scales,
                         std::size_t scale_step, const float* mean, std::size_t tokens,
                         std::size_t dim, std::uint16_t* out, std::size_t out_stride);
  RowErrors (*errors)(const RowsIn& in, const std::int8_t* codes, std::size_t code_stride,
                      const float* scales, std::size_t scale_step);
  // Plain conversions of n contiguous values. to_float is exact. finite: NaN -> 0, infinities ->
  // +-65504.
  void (*to_float)(const std::uint16_t* x, std::size_t n, float* out);
  void (*finite)(const std::uint16_t* x, std::size_t n, std::uint16_t* out);
};

// The table of one Highway target (a HWY_TARGET bit).
QuantizeKernels QuantizeKernelsFor(std::int64_t target);

}  // namespace kvmix::kernels

#endif  // KVMIX_KERNELS_QUANTIZE_H_
