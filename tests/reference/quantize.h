// Codecs straight from the formulas of kvmix/codec.h and kvmix/quantize.h, one number at a time:
// what every encode kernel is held against, byte by byte. Products go through double and everything
// else is a single operation, so that no compiler can fuse two roundings into one.
#ifndef KVMIX_TESTS_REFERENCE_QUANTIZE_H_
#define KVMIX_TESTS_REFERENCE_QUANTIZE_H_

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "kvmix/codec.h"
#include "kvmix/half.h"
#include "kvmix/quantize.h"
#include "kvmix/rows.h"

namespace kvmix::reference {

// Canonical rows of one head.
struct Coded {
  std::vector<std::uint8_t> rows;  // [tokens][head_dim] codes, or as many halves
  std::vector<float> scales;       // [tokens], where the codec stores them
  std::uint64_t clamped = 0;
};

inline float Finite(float x) {
  if (std::isnan(x)) return 0.0f;
  return std::isinf(x) ? std::copysign(65504.0f, x) : x;
}

// a * b, rounded once.
inline float Product(float a, float b) { return static_cast<float>(static_cast<double>(a) * b); }

// x <- R(x), the sums at distances 1, 2, 4, ...
inline void Rotate(std::vector<float>& x) {
  const std::size_t block = x.size() & (~x.size() + 1);
  for (std::size_t distance = 1; distance < block; distance *= 2) {
    for (std::size_t i = 0; i < x.size(); ++i) {
      if ((i & distance) != 0) continue;
      const float a = x[i], b = x[i + distance];
      x[i] = a + b;
      x[i + distance] = a - b;
    }
  }
  const float norm = 1.0f / std::sqrt(static_cast<float>(block));
  for (float& v : x) v = Product(v, norm);
}

// y of one row: what is divided by the scale and rounded.
inline std::vector<float> Stepped(const RowsView& rows, std::size_t token, const HeadCodec& codec) {
  const bool cut = codec.kind.fold || codec.kind.hadamard;
  const float most = cut ? 0x1p64f : std::numeric_limits<float>::max();
  std::vector<float> y(rows.head_dim);
  for (std::size_t c = 0; c < y.size(); ++c) {
    float v = Finite(rows.At(token, 0, c));
    if (codec.kind.centre) v -= codec.mean()[c];
    v = std::clamp(v, -most, most);
    y[c] = codec.kind.fold ? Product(v, 1.0f / codec.factor()[c]) : v;
  }
  if (codec.kind.hadamard) Rotate(y);
  return y;
}

inline float AbsMax(const std::vector<float>& y) {
  float max = 0.0f;
  for (const float v : y) max = std::max(max, std::fabs(v));
  return max;
}

inline float ScaleOf(float absmax, bool bf16) {
  if (absmax < 0x1p-100f) return 0.0f;
  const float scale = absmax / 127.0f;
  if (!bf16) return scale;
  return std::bit_cast<float>((std::bit_cast<std::uint32_t>(scale) + 0xFFFFu) & 0xFFFF0000u);
}

inline float HeadScale(const RowsView& rows, const HeadCodec& codec) {
  float max = 0.0f;
  for (std::size_t t = 0; t < rows.tokens; ++t) {
    max = std::max(max, AbsMax(Stepped(rows, t, codec)));
  }
  return ScaleOf(max, false);
}

inline Coded Encode(const RowsView& rows, const HeadCodec& codec) {
  Coded out;
  for (std::size_t t = 0; t < rows.tokens; ++t) {
    if (codec.kind.storage == Storage::kF16) {
      for (std::size_t c = 0; c < rows.head_dim; ++c) {
        const float x = Finite(rows.At(t, 0, c));
        out.clamped += std::fabs(x) >= 65520.0f;  // rounds to infinity
        const Half half = FloatToHalf(std::clamp(x, -65504.0f, 65504.0f));
        out.rows.push_back(static_cast<std::uint8_t>(half & 0xFFu));
        out.rows.push_back(static_cast<std::uint8_t>(half >> 8));
      }
      continue;
    }
    const std::vector<float> y = Stepped(rows, t, codec);
    float scale = codec.head_scale;
    if (codec.kind.scale != Scale::kHead) {
      scale = ScaleOf(AbsMax(y), codec.kind.scale == Scale::kTokenBF16);
      out.scales.push_back(scale);
    }
    for (const float v : y) {
      float code = 0.0f;
      if (scale == 0.0f) {
        out.clamped += std::fabs(v) >= 0x1p-100f;
      } else {
        code = std::nearbyint(v / scale);
        out.clamped += std::fabs(code) > 127.0f;
        code = std::clamp(code, -127.0f, 127.0f);
      }
      out.rows.push_back(static_cast<std::uint8_t>(static_cast<std::int8_t>(code)));
    }
  }
  return out;
}

// What the codes stand for: [tokens, head_dim]. scales: [tokens], or null where none are stored.
inline std::vector<float> Decode(const void* rows, const float* scales, std::size_t tokens,
                                 std::size_t head_dim, const HeadCodec& codec) {
  const std::uint8_t* bytes = static_cast<const std::uint8_t*>(rows);
  std::vector<float> out;
  for (std::size_t t = 0; t < tokens; ++t) {
    std::vector<float> x(head_dim);
    for (std::size_t c = 0; c < head_dim; ++c) {
      const std::size_t at = t * head_dim + c;
      if (codec.kind.storage == Storage::kF16) {
        x[c] = HalfToFloat(static_cast<Half>(bytes[2 * at] | bytes[2 * at + 1] << 8));
      } else {
        const float scale = scales != nullptr ? scales[t] : codec.head_scale;
        x[c] = Product(scale, static_cast<std::int8_t>(bytes[at]));
      }
    }
    if (codec.kind.hadamard) Rotate(x);
    for (std::size_t c = 0; c < head_dim; ++c) {
      if (codec.kind.fold) x[c] = Product(x[c], codec.factor()[c]);
      if (codec.kind.centre) x[c] += codec.mean()[c];
    }
    out.insert(out.end(), x.begin(), x.end());
  }
  return out;
}

inline std::vector<float> Decode(const Coded& coded, std::size_t tokens, std::size_t head_dim,
                                 const HeadCodec& codec) {
  return Decode(coded.rows.data(), coded.scales.empty() ? nullptr : coded.scales.data(), tokens,
                head_dim, codec);
}

inline ErrorSums Errors(const RowsView& rows, const Coded& coded, const HeadCodec& codec) {
  const std::vector<float> decoded = Decode(coded, rows.tokens, rows.head_dim, codec);
  ErrorSums sums;
  for (std::size_t i = 0; i < decoded.size(); ++i) {
    const double x = Finite(rows.At(i / rows.head_dim, 0, i % rows.head_dim));
    const double error = decoded[i] - x;
    ++sums.count;
    sums.sum_squared_error += error * error;
    sums.max_error = std::max(sums.max_error, std::fabs(error));
    sums.max_abs = std::max(sums.max_abs, std::fabs(x));
  }
  return sums;
}

}  // namespace kvmix::reference

#endif  // KVMIX_TESTS_REFERENCE_QUANTIZE_H_
