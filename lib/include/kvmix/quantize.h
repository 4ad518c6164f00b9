// fp16 rows <-> int8 codes and scales, on rows with a stride; and the errors that the codes make.
// The canonical form of a quantized head: codes [tokens, head_dim], scales [tokens] or one. The
// same bytes on every instruction set.
//
//   y = x - mean (f32; no mean: y = x)      scale = absmax(y) / 127 (f32 division; kBF16: then
//   rounded up to bf16) code = round-to-nearest-even(y / scale), f32 division, clamped to [-127,
//   127]          x' = mean + scale * code
//
// An all-zero row has scale 0 and codes 0 (so has a row whose |y| all lie below 2^-100). NaN counts
// as 0, infinities as +-65504. Pointers need no alignment beyond their types' own; outputs may not
// overlap inputs. Nothing allocates, nothing fails.
#ifndef KVMIX_QUANTIZE_H_
#define KVMIX_QUANTIZE_H_

#include <cstddef>
#include <cstdint>

#include "kvmix/export.h"
#include "kvmix/half.h"
#include "kvmix/plan.h"

namespace kvmix {

// `tokens` rows of head_dim halves, row t at x + t * stride. One head of [tokens, heads, head_dim]
// has stride heads * head_dim.
struct HalfRows {
  const Half* x = nullptr;
  std::size_t stride = 0;  // in elements
  std::size_t tokens = 0;
  std::size_t head_dim = 0;
  const Half* row(std::size_t t) const { return x + t * stride; }
};

// codes [tokens, head_dim] contiguous, scales [tokens]. mean [head_dim] or null.
KVMIX_API void QuantizePerToken(const HalfRows& rows, const float* mean, ScaleType type,
                                std::int8_t* codes, float* scales);

// The scale that covers every row: max |x - mean| / 127.
KVMIX_API float GlobalScale(const HalfRows& rows, const float* mean);
// Codes against a given scale; returns how many values were beyond it (|y| / scale rounds beyond
// 127) and were clamped. Scale 0 gives codes 0, and counts what is not zero. Large codes, like
// large outputs of Dequantize, are written past the caches.
KVMIX_API std::uint64_t QuantizeGlobal(const HalfRows& rows, const float* mean, float scale,
                                       std::int8_t* codes);

// x' of contiguous codes. scales: one per token (scale_step 1) or one for all (scale_step 0). out:
// row t at out + t * out_stride.
KVMIX_API void Dequantize(const std::int8_t* codes, const float* scales, std::size_t scale_step,
                          const float* mean, std::size_t tokens, std::size_t head_dim, float* out,
                          std::size_t out_stride);
KVMIX_API void Dequantize(const std::int8_t* codes, const float* scales, std::size_t scale_step,
                          const float* mean, std::size_t tokens, std::size_t head_dim, Half* out,
                          std::size_t out_stride);

// Error sums of x' against x, mergeable: MSE = sum_squared_error / count.
struct ErrorSums {
  std::uint64_t count = 0;
  double sum_squared_error = 0.0;
  double max_error = 0.0;  // max |x' - x|
  double max_abs = 0.0;    // max |x|
  double mse() const { return count ? sum_squared_error / static_cast<double>(count) : 0.0; }
  ErrorSums& operator+=(const ErrorSums& o);
};
KVMIX_API ErrorSums QuantizationError(const HalfRows& rows, const std::int8_t* codes,
                                      const float* scales, std::size_t scale_step,
                                      const float* mean);

inline ErrorSums& ErrorSums::operator+=(const ErrorSums& o) {
  count += o.count;
  sum_squared_error += o.sum_squared_error;
  if (o.max_error > max_error) max_error = o.max_error;
  if (o.max_abs > max_abs) max_abs = o.max_abs;
  return *this;
}

}  // namespace kvmix

#endif  // KVMIX_QUANTIZE_H_
