// Quantization straight from the formulas of kvmix/quantize.h, one number at a time: what every
// quantize kernel is held against, byte by byte. Intermediates go through double or are single
// operations, so that no compiler can fuse two roundings into one.
#ifndef KVMIX_TESTS_REFERENCE_QUANTIZE_H_
#define KVMIX_TESTS_REFERENCE_QUANTIZE_H_

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kvmix/half.h"
#include "kvmix/quantize.h"

namespace kvmix::reference {

struct Codes {
  std::vector<std::int8_t> codes;  // [tokens, head_dim]
  std::vector<float> scales;       // [tokens], or one
  std::uint64_t clamped = 0;
};

inline float FiniteFloat(Half h) {
  const float x = HalfToFloat(h);
  if (std::isnan(x)) return 0.0f;
  return std::clamp(x, -65504.0f, 65504.0f);
}

inline float Centred(const HalfRows& rows, const float* mean, std::size_t t, std::size_t i) {
  const float x = FiniteFloat(rows.row(t)[i]);
  return mean ? x - mean[i] : x;
}

inline float RowAbsMax(const HalfRows& rows, const float* mean, std::size_t t) {
  float max = 0.0f;
  for (std::size_t i = 0; i < rows.head_dim; ++i)
    max = std::max(max, std::fabs(Centred(rows, mean, t, i)));
  return max;
}

inline float ScaleOf(float absmax, ScaleType type) {
  if (absmax < 0x1p-100f) return 0.0f;
  const float scale = absmax / 127.0f;
  if (type == ScaleType::kF32) return scale;
  return std::bit_cast<float>((std::bit_cast<std::uint32_t>(scale) + 0xFFFFu) & 0xFFFF0000u);
}

// Appends row t's codes.
inline void QuantizeRow(const HalfRows& rows, const float* mean, std::size_t t, float scale,
                        Codes& out) {
  for (std::size_t i = 0; i < rows.head_dim; ++i) {
    const float y = Centred(rows, mean, t, i);
    float code = 0.0f;
    if (scale == 0.0f) {
      out.clamped += std::fabs(y) >= 0x1p-100f;
    } else {
      code = std::nearbyint(y / scale);
      out.clamped += std::fabs(code) > 127.0f;
      code = std::clamp(code, -127.0f, 127.0f);
    }
    out.codes.push_back(static_cast<std::int8_t>(code));
  }
}

inline Codes QuantizePerToken(const HalfRows& rows, const float* mean, ScaleType type) {
  Codes out;
  for (std::size_t t = 0; t < rows.tokens; ++t) {
    out.scales.push_back(ScaleOf(RowAbsMax(rows, mean, t), type));
    QuantizeRow(rows, mean, t, out.scales.back(), out);
  }
  return out;
}

inline float GlobalScale(const HalfRows& rows, const float* mean) {
  float max = 0.0f;
  for (std::size_t t = 0; t < rows.tokens; ++t) max = std::max(max, RowAbsMax(rows, mean, t));
  return ScaleOf(max, ScaleType::kF32);
}

inline Codes QuantizeGlobal(const HalfRows& rows, const float* mean, float scale) {
  Codes out{{}, {scale}, 0};
  for (std::size_t t = 0; t < rows.tokens; ++t) QuantizeRow(rows, mean, t, scale, out);
  return out;
}

// One value. The product of a float and a code is exact in double.
inline float Dequantize(std::int8_t code, float scale, const float* mean, std::size_t channel) {
  const float y = static_cast<float>(static_cast<double>(scale) * code);
  return mean ? mean[channel] + y : y;
}

inline ErrorSums QuantizationError(const HalfRows& rows, const Codes& q, const float* mean) {
  ErrorSums sums;
  for (std::size_t t = 0; t < rows.tokens; ++t) {
    for (std::size_t i = 0; i < rows.head_dim; ++i) {
      const double x = FiniteFloat(rows.row(t)[i]);
      const double error = Dequantize(q.codes[t * rows.head_dim + i],
                                      q.scales[q.scales.size() > 1 ? t : 0], mean, i) -
                           x;
      ++sums.count;
      sums.sum_squared_error += error * error;
      sums.max_error = std::max(sums.max_error, std::fabs(error));
      sums.max_abs = std::max(sums.max_abs, std::fabs(x));
    }
  }
  return sums;
}

}  // namespace kvmix::reference

#endif  // KVMIX_TESTS_REFERENCE_QUANTIZE_H_
