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
#include <span>
#include <vector>

#include "kvmix/codec.h"
#include "kvmix/half.h"
#include "kvmix/quantize.h"
#include "kvmix/rows.h"

namespace kvmix::reference {

// Canonical rows of one head.
struct Coded {
  std::vector<std::uint8_t> rows;  // [tokens] codes, those below i8 in planes, or halves
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
  const bool cut = codec.kind.fold || codec.kind.hadamard || codec.kind.shape;
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

// The storages below i8 as docs/formats.md defines them. The Lloyd-Max quantizers of a normal
// distribution have their outermost levels at 2.7326 (16) and 2.1520 (8), which are 127 here.
struct Below8 {
  int bits;
  std::vector<int> levels;   // by code
  std::vector<int> reaches;  // in the order in which they are tried
};

inline Below8 Below8Of(Storage storage) {
  if (storage == KVMIX_STORAGE_I4) {
    return {4,
            {6, 18, 31, 44, 58, 75, 96, 127, -127, -96, -75, -58, -44, -31, -18, -6},
            {16, 15, 14, 13, 12}};
  }
  if (storage == KVMIX_STORAGE_I3)
    return {3, {14, 45, 79, 127, -127, -79, -45, -14}, {15, 13, 12, 11, 10}};
  Below8 i6{6, {}, {31, 34, 38, 43}};
  for (int code = 0; code < 64; ++code)  // -32 is never written
    i6.levels.push_back(code < 32 ? code : code == 32 ? 0 : code - 64);
  return i6;
}

// The code of z within a reach.
inline int CodeOf(const Below8& storage, int z, int reach) {
  const int largest = 1 << (storage.bits - 1);
  if (storage.bits == 6) {
    const int level = std::min(31, (std::abs(z) * reach + (1 << 14)) >> 15);
    return (z < 0 ? -level : level) & 63;
  }
  int code = 0;
  while (code + 1 < largest && std::abs(z) > (storage.levels[code] + storage.levels[code + 1]) *
                                                 reach * 32767 / (2 * 127 * 16)) {
    ++code;
  }
  return z < 0 ? 2 * largest - 1 - code : code;
}

struct LevelRow {
  std::vector<int> codes;  // [head_dim]
  float scale = 0.0f;
};

inline LevelRow EncodeBelow8(const std::vector<float>& y, const Below8& storage, bool bf16) {
  LevelRow row{std::vector<int>(y.size()), 0.0f};
  const float absmax = AbsMax(y);
  if (absmax < 0x1p-100f) return row;
  std::vector<int> codes(y.size());
  double best = -1.0, best_scale = 0.0;
  for (const int reach : storage.reaches) {
    std::int64_t a = 0, b = 0;
    for (std::size_t c = 0; c < y.size(); ++c) {
      const int z = static_cast<int>(std::nearbyint(Product(y[c], 32767.0f / absmax)));
      codes[c] = CodeOf(storage, z, reach);
      const int level = storage.levels[static_cast<std::size_t>(codes[c])];
      a += z * level;
      b += level * level;
    }
    const double a_f64 = static_cast<double>(a), b_f64 = static_cast<double>(b);
    const double squared = a_f64 * a_f64, gain = squared / b_f64;
    if (gain <= best) continue;
    best = gain;
    best_scale = a_f64 / b_f64;
    row.codes = codes;
  }
  const float unit = absmax / 32767.0f, most = storage.bits == 6 ? 0x1p123f : 0x1p121f;
  row.scale = std::min(static_cast<float>(double{unit} * best_scale), most);
  if (bf16) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(row.scale);
    row.scale = std::bit_cast<float>((bits + 0x7FFFu + (bits >> 16 & 1u)) & 0xFFFF0000u);
  }
  return row;
}

// The canonical row: planes of 4 and 2, 4, or 2 and 1 bits; of 8 bits the codes themselves.
inline std::vector<std::uint8_t> Planes(const std::vector<int>& codes, int bits) {
  std::vector<std::uint8_t> row;
  const auto plane = [&](int from, int width) {
    const std::size_t first = row.size(), of_byte = static_cast<std::size_t>(8 / width);
    row.resize(first + codes.size() / of_byte);
    for (std::size_t c = 0; c < codes.size(); ++c) {
      const int part = codes[c] >> from & ((1 << width) - 1);
      row[first + c / of_byte] = static_cast<std::uint8_t>(
          row[first + c / of_byte] | part << (static_cast<int>(c % of_byte) * width));
    }
  };
  if (bits == 8) plane(0, 8);
  if (bits == 6 || bits == 4) plane(0, 4);
  if (bits == 6) plane(4, 2);
  if (bits == 3) plane(0, 2);
  if (bits == 3) plane(2, 1);
  return row;
}

// Code c of such a row.
inline int CodeAt(const std::uint8_t* row, std::size_t dim, std::size_t c, int bits) {
  if (bits == 4) return row[c / 2] >> (c % 2 * 4) & 15;
  if (bits == 6)
    return (row[c / 2] >> (c % 2 * 4) & 15) | (row[dim / 2 + c / 4] >> (c % 4 * 2) & 3) << 4;
  return (row[c / 4] >> (c % 4 * 2) & 3) | (row[dim / 4 + c / 8] >> (c % 8) & 1) << 2;
}

// +shape: the codes of y at a scale, from the last channel to the first. levels: by code.
inline std::vector<int> Shaped(const std::vector<float>& y, std::span<const float> matrix,
                               const std::vector<int>& levels, float scale) {
  const std::size_t dim = y.size();
  std::vector<float> t = y;
  std::vector<int> codes(dim);
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  for (std::size_t k = dim; k-- > 0;) {
    const int n =
        static_cast<int>(std::nearbyint(std::clamp(Product(t[k], inverse), -127.0f, 127.0f)));
    for (std::size_t code = 1; code < levels.size(); ++code) {
      const int best = levels[static_cast<std::size_t>(codes[k])], level = levels[code];
      const int far = std::abs(n - level), best_far = std::abs(n - best);
      if (far < best_far || (far == best_far && std::abs(level) < std::abs(best)))
        codes[k] = static_cast<int>(code);
    }
    const float decoded =
        Product(scale, static_cast<float>(levels[static_cast<std::size_t>(codes[k])]));
    const float error = y[k] - decoded;
    for (std::size_t i = 0; i < k; ++i) t[i] += Product(matrix[k * dim + i], error);
  }
  return codes;
}

inline Coded Encode(const RowsView& rows, const HeadCodec& codec) {
  Coded out;
  for (std::size_t t = 0; t < rows.tokens; ++t) {
    if (codec.kind.storage == KVMIX_STORAGE_F16) {
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
    const auto append = [&](const std::vector<int>& codes, int bits) {
      const std::vector<std::uint8_t> row = Planes(codes, bits);
      out.rows.insert(out.rows.end(), row.begin(), row.end());
    };
    if (codec.kind.storage != KVMIX_STORAGE_I8) {
      const Below8 storage = Below8Of(codec.kind.storage);
      LevelRow row = EncodeBelow8(y, storage, codec.kind.scale == KVMIX_SCALE_TOKEN_BF16);
      if (codec.kind.shape) row.codes = Shaped(y, codec.shaping(), storage.levels, row.scale);
      out.scales.push_back(row.scale);
      append(row.codes, storage.bits);
      continue;
    }
    float scale = codec.head_scale;
    if (codec.kind.scale != KVMIX_SCALE_HEAD) {
      scale = ScaleOf(AbsMax(y), codec.kind.scale == KVMIX_SCALE_TOKEN_BF16);
      out.scales.push_back(scale);
    }
    if (codec.kind.shape) {
      std::vector<int> levels(256);
      for (int code = 0; code < 256; ++code)
        levels[static_cast<std::size_t>(code)] = static_cast<std::int8_t>(code);
      append(Shaped(y, codec.shaping(), levels, scale), 8);
      continue;
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
      if (codec.kind.storage == KVMIX_STORAGE_F16) {
        x[c] = HalfToFloat(static_cast<Half>(bytes[2 * at] | bytes[2 * at + 1] << 8));
      } else if (codec.kind.storage != KVMIX_STORAGE_I8) {
        const Below8 storage = Below8Of(codec.kind.storage);
        const std::size_t row_bytes = head_dim * static_cast<std::size_t>(storage.bits) / 8;
        const int code = CodeAt(bytes + t * row_bytes, head_dim, c, storage.bits);
        const int level = storage.levels[static_cast<std::size_t>(code)];
        x[c] = Product(scales[t], static_cast<float>(level));
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
