#include "kvmix/quantize.h"

#include "kernels/kernels.h"

namespace kvmix {
namespace {

const kernels::QuantizeKernels& Active() { return kernels::ActiveKernels().quantize; }

kernels::RowsIn Rows(const HalfRows& rows, const float* mean) {
  return {rows.x, rows.stride, rows.tokens, rows.head_dim, mean};
}

}  // namespace

void QuantizePerToken(const HalfRows& rows, const float* mean, ScaleType type, std::int8_t* codes,
                      float* scales) {
  Active().per_token(Rows(rows, mean), type == ScaleType::kBF16, codes, rows.head_dim, scales);
}

float GlobalScale(const HalfRows& rows, const float* mean) {
  const float absmax = Active().absmax(Rows(rows, mean));
  return absmax < 0x1p-100f ? 0.0f : absmax / 127.0f;
}

std::uint64_t QuantizeGlobal(const HalfRows& rows, const float* mean, float scale,
                             std::int8_t* codes) {
  return Active().per_head(Rows(rows, mean), scale, codes, rows.head_dim);
}

void Dequantize(const std::int8_t* codes, const float* scales, std::size_t scale_step,
                const float* mean, std::size_t tokens, std::size_t head_dim, float* out,
                std::size_t out_stride) {
  Active().dequantize_f32(codes, head_dim, scales, scale_step, mean, tokens, head_dim, out,
                          out_stride);
}

void Dequantize(const std::int8_t* codes, const float* scales, std::size_t scale_step,
                const float* mean, std::size_t tokens, std::size_t head_dim, Half* out,
                std::size_t out_stride) {
  Active().dequantize_f16(codes, head_dim, scales, scale_step, mean, tokens, head_dim, out,
                          out_stride);
}

ErrorSums QuantizationError(const HalfRows& rows, const std::int8_t* codes, const float* scales,
                            std::size_t scale_step, const float* mean) {
  const kernels::RowErrors errors =
      Active().errors(Rows(rows, mean), codes, rows.head_dim, scales, scale_step);
  return {rows.tokens * rows.head_dim, errors.sum_squared_error, errors.max_error, errors.max_abs};
}

}  // namespace kvmix
