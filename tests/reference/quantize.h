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
#include <cstdlib>
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
  std::vector<std::uint8_t> rows;  // [tokens][head_dim] codes, those of i4 two a byte, or halves
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

// i4's levels by code: the Lloyd-Max quantizer of a normal distribution has its outermost level at
// 2.7326, which is 127 here.
inline constexpr int kI4Levels[16] = {6,    18,  31,  44,  58,  75,  96,  127,
                                      -127, -96, -75, -58, -44, -31, -18, -6};

// The codes and the scale of one row in i4, as docs/formats.md defines them.
struct I4Row {
  std::vector<int> codes;  // [head_dim]
  float scale = 0.0f;
};

inline I4Row EncodeI4(const std::vector<float>& y, bool bf16) {
  I4Row row{std::vector<int>(y.size()), 0.0f};
  const float absmax = AbsMax(y);
  if (absmax < 0x1p-100f) return row;
  std::vector<int> z(y.size()), codes(y.size());
  for (std::size_t c = 0; c < y.size(); ++c)
    z[c] = static_cast<int>(std::nearbyint(Product(y[c], 32767.0f / absmax)));
  double best = -1.0, best_scale = 0.0;
  for (int reach = 16; reach >= 12; --reach) {
    std::int64_t a = 0, b = 0;
    for (std::size_t c = 0; c < y.size(); ++c) {
      int code = 0;
      while (code < 7 &&
             std::abs(z[c]) > (kI4Levels[code] + kI4Levels[code + 1]) * reach * 32767 / 4064) {
        ++code;
      }
      codes[c] = z[c] < 0 ? 15 - code : code;
      a += z[c] * kI4Levels[codes[c]];
      b += kI4Levels[code] * kI4Levels[code];
    }
    const double a_f64 = static_cast<double>(a), b_f64 = static_cast<double>(b);
    const double squared = a_f64 * a_f64, gain = squared / b_f64;
    if (gain <= best) continue;
    best = gain;
    best_scale = a_f64 / b_f64;
    row.codes = codes;
  }
  const float unit = absmax / 32767.0f;
  row.scale = std::min(static_cast<float>(double{unit} * best_scale), 0x1p121f);
  if (bf16) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(row.scale);
    row.scale = std::bit_cast<float>((bits + 0x7FFFu + (bits >> 16 & 1u)) & 0xFFFF0000u);
  }
  return row;
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
    if (codec.kind.storage == Storage::kI4) {
      const I4Row row = EncodeI4(y, codec.kind.scale == Scale::kTokenBF16);
      out.scales.push_back(row.scale);
      for (std::size_t c = 0; c < y.size(); c += 2)
        out.rows.push_back(static_cast<std::uint8_t>(row.codes[c] | row.codes[c + 1] << 4));
      continue;
    }
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
      } else if (codec.kind.storage == Storage::kI4) {
        const int code = bytes[at / 2] >> (c % 2 == 0 ? 0 : 4) & 0x0F;  // a row is whole bytes
        x[c] = Product(scales[t], static_cast<float>(kI4Levels[code]));
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
