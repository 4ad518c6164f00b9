// Every compiled target that this CPU runs, byte by byte against tests/reference/quantize.h (so all
// targets agree with each other).
#include "kvmix/quantize.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "tests/reference/quantize.h"

namespace kvmix {
namespace {

constexpr Half kInf = 0x7C00, kNaN = 0x7E00, kSign = 0x8000;
using Sizes = std::initializer_list<std::size_t>;
constexpr std::size_t kDims[] = {1, 3, 16, 31, 64, 80, 96, 100, 128, 256};
constexpr std::size_t kTokens[] = {0, 1, 7, 8, 9, 15, 17, 64};
constexpr std::int8_t kUntouched = -128;  // no code

// Rows in memory with `gap` halves between them, the first at an odd address.
class Rows {
 public:
  Rows(std::size_t tokens, std::size_t dim, std::size_t gap,
       const std::function<Half(std::size_t t, std::size_t i)>& value)
      : bytes_((tokens * (dim + gap) + 1) * sizeof(Half), 0xFF) {
    rows_ = {reinterpret_cast<const Half*>(bytes_.data() + 1), dim + gap, tokens, dim};
    aligned_.assign(tokens * (dim + gap), kNaN);
    for (std::size_t t = 0; t < tokens; ++t) {
      for (std::size_t i = 0; i < dim; ++i) aligned_[t * (dim + gap) + i] = value(t, i);
    }
    if (!aligned_.empty())
      std::memcpy(bytes_.data() + 1, aligned_.data(), aligned_.size() * sizeof(Half));
  }
  const HalfRows& odd() const { return rows_; }  // for the kernels
  HalfRows aligned() const { return {aligned_.data(), rows_.stride, rows_.tokens, rows_.head_dim}; }
  kernels::RowsIn in(const float* mean) const {
    return {rows_.x, rows_.stride, rows_.tokens, rows_.head_dim, mean};
  }

 private:
  std::vector<std::uint8_t> bytes_;
  std::vector<Half> aligned_;
  HalfRows rows_;
};

// Like a KV head: rows of different size, some channels larger.
Rows RandomRows(std::size_t tokens, std::size_t dim, std::size_t gap, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> size(tokens);
  for (float& s : size) s = std::exp2(std::round(4.0f * normal(random)) / 2.0f);
  return Rows(tokens, dim, gap, [&](std::size_t t, std::size_t i) {
    return FloatToHalf(normal(random) * size[t] * (i % 13 == 5 ? 20.0f : 1.0f));
  });
}

std::vector<float> RandomMean(std::size_t dim, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  std::vector<float> mean(dim);
  for (float& m : mean) m = normal(random);
  return mean;
}

class QuantizeTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { ASSERT_TRUE(kernels::UseTarget(GetParam())); }
  void TearDown() override { kernels::UseTarget(""); }
  const kernels::QuantizeKernels& kernel() const { return kernels::ActiveKernels().quantize; }

  // Codes as [tokens, head_dim + 3] with the gaps checked, then closed.
  std::vector<std::int8_t> Closed(const std::vector<std::int8_t>& codes, std::size_t tokens,
                                  std::size_t dim) const {
    std::vector<std::int8_t> closed;
    for (std::size_t t = 0; t < tokens; ++t) {
      const std::int8_t* row = &codes[1 + t * (dim + 3)];
      closed.insert(closed.end(), row, row + dim);
      for (std::size_t i = 0; i < 3; ++i)
        EXPECT_EQ(row[dim + i], kUntouched) << "written past row " << t;
    }
    EXPECT_EQ(codes[0], kUntouched);
    return closed;
  }

  void ExpectPerToken(const Rows& rows, const float* mean) const {
    const std::size_t tokens = rows.odd().tokens, dim = rows.odd().head_dim;
    for (const ScaleType type : {ScaleType::kF32, ScaleType::kBF16}) {
      const reference::Codes expected = reference::QuantizePerToken(rows.aligned(), mean, type);
      std::vector<std::int8_t> codes(tokens * (dim + 3) + 1, kUntouched);
      std::vector<float> scales(tokens + 1, -1.0f);
      kernel().per_token(rows.in(mean), type == ScaleType::kBF16, codes.data() + 1, dim + 3,
                         scales.data());
      EXPECT_EQ(scales.back(), -1.0f);
      scales.pop_back();
      ASSERT_EQ(scales, expected.scales) << tokens << " x " << dim << (mean ? ", mean" : "")
                                         << (type == ScaleType::kBF16 ? ", bf16" : "");
      ASSERT_EQ(Closed(codes, tokens, dim), expected.codes)
          << tokens << " x " << dim << (mean ? ", mean" : "")
          << (type == ScaleType::kBF16 ? ", bf16" : "");
    }
  }

  void ExpectPerHead(const Rows& rows, const float* mean, float scale) const {
    const std::size_t tokens = rows.odd().tokens, dim = rows.odd().head_dim;
    const reference::Codes expected = reference::QuantizeGlobal(rows.aligned(), mean, scale);
    std::vector<std::int8_t> codes(tokens * (dim + 3) + 1, kUntouched);
    ASSERT_EQ(kernel().per_head(rows.in(mean), scale, codes.data() + 1, dim + 3), expected.clamped)
        << tokens << " x " << dim << ", scale " << scale;
    ASSERT_EQ(Closed(codes, tokens, dim), expected.codes)
        << tokens << " x " << dim << (mean ? ", mean" : "") << ", scale " << scale;
  }

  void ExpectAll(const Rows& rows, const float* mean) const {
    ExpectPerToken(rows, mean);
    const float scale = GlobalScale(rows.odd(), mean);
    ASSERT_EQ(scale, reference::GlobalScale(rows.aligned(), mean));
    ExpectPerHead(rows, mean, scale);
  }
};

INSTANTIATE_TEST_SUITE_P(Targets, QuantizeTest, testing::ValuesIn([] {
                           std::vector<std::string> names;
                           for (const kernels::Kernels& k : kernels::AllKernels())
                             names.push_back(k.target);
                           return names;
                         }()),
                         [](const auto& param) { return param.param; });

TEST_P(QuantizeTest, EveryShape) {
  unsigned seed = 1;
  for (const std::size_t dim : kDims) {
    const std::vector<float> mean = RandomMean(dim, seed);
    for (const std::size_t tokens : kTokens) {
      for (const std::size_t gap : {std::size_t{0}, std::size_t{5}, dim}) {
        const Rows rows = RandomRows(tokens, dim, gap, ++seed);
        ExpectAll(rows, nullptr);
        ExpectAll(rows, mean.data());
      }
    }
  }
}

TEST_P(QuantizeTest, Long) {
  const Rows rows = RandomRows(5003, 128, 128, 7);
  ExpectAll(rows, nullptr);
  ExpectAll(rows, RandomMean(128, 8).data());
}

// Large outputs with aligned rows are written past the caches.
TEST_P(QuantizeTest, LargeAligned) {
  constexpr std::size_t kMany = 4101;
  for (const std::size_t dim : Sizes{64, 80, 128}) {
    const Rows rows = RandomRows(kMany, dim, 0, 9);
    const std::vector<float> mean = RandomMean(dim, 10);
    const auto buffer = [](std::size_t bytes) {
      return std::unique_ptr<void, void (*)(void*)>(std::aligned_alloc(64, (bytes + 63) / 64 * 64),
                                                    std::free);
    };
    const auto codes = buffer(kMany * dim), f32 = buffer(kMany * dim * sizeof(float)),
               f16 = buffer(kMany * dim * sizeof(Half));
    for (const float* m : {static_cast<const float*>(nullptr), mean.data()}) {
      const float scale = 0.75f * GlobalScale(rows.odd(), m);  // some rows are clamped
      const reference::Codes expected = reference::QuantizeGlobal(rows.aligned(), m, scale);
      auto* const q = static_cast<std::int8_t*>(codes.get());
      ASSERT_EQ(QuantizeGlobal(rows.odd(), m, scale, q), expected.clamped);
      ASSERT_EQ(std::memcmp(q, expected.codes.data(), expected.codes.size()), 0) << dim;
      kvmix::Dequantize(q, &scale, 0, m, kMany, dim, static_cast<float*>(f32.get()), dim);
      kvmix::Dequantize(q, &scale, 0, m, kMany, dim, static_cast<Half*>(f16.get()), dim);
      for (std::size_t i = 0; i < kMany * dim; ++i) {
        const float x = reference::Dequantize(q[i], scale, m, i % dim);
        ASSERT_EQ(static_cast<const float*>(f32.get())[i], x) << dim << " channels, value " << i;
        ASSERT_EQ(static_cast<const Half*>(f16.get())[i], FloatToHalf(x))
            << dim << " channels, value " << i;
      }
    }
  }
}

// Against their own f32 scale halves are multiplied by an inverse: every significand of the maximum
// with every half that is not far below it. The binade does not matter.
TEST_P(QuantizeTest, EveryHalfAgainstEveryMaximum) {
  constexpr Half kOne = 0x3C00;
  const std::size_t dim = 11 * 1024;
  std::vector<std::int8_t> codes(dim);
  std::vector<Half> x(dim);
  for (Half max = kOne; max < kOne + 1024; ++max) {
    for (std::size_t i = 0; i < dim; ++i)
      x[i] = static_cast<Half>((max - i) | (i % 2 ? kSign : 0u));
    float scale;
    kernel().per_token({x.data(), dim, 1, dim, nullptr}, false, codes.data(), dim, &scale);
    ASSERT_EQ(scale, HalfToFloat(max) / 127.0f);
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < dim; ++i)
      wrong += codes[i] != static_cast<int>(std::nearbyint(HalfToFloat(x[i]) / scale));
    ASSERT_EQ(wrong, 0u) << "max " << HalfToFloat(max);
  }
}

// The scales whose significand is within 5 of a multiple of 2^17, with every tie: the only ones
// where the quotient from a reciprocal and two fused multiply-adds could round to another integer
// than the true one (kernels/quantize.cc). y comes in as a mean.
TEST_P(QuantizeTest, HardestQuotients) {
  constexpr int kNear = 6;  // floats on either side
  for (std::uint32_t multiple = 64; multiple <= 128; ++multiple) {
    for (int off = -kNear; off <= kNear; ++off) {
      const std::uint32_t significand = (multiple << 17) + static_cast<std::uint32_t>(off);
      if (significand < (1u << 23) || significand >= (1u << 24)) continue;
      const float scale = std::ldexp(static_cast<float>(significand), -30);
      std::vector<float> mean;
      for (int k = 0; k < 127; ++k) {
        const float tie = static_cast<float>(k) + 0.5f;
        for (const float quotient : {tie, std::nextafter(tie, 0.0f), std::nextafter(tie, 200.0f)}) {
          const std::uint32_t y = std::bit_cast<std::uint32_t>(quotient * scale);
          for (std::uint32_t d = 0; d <= 2 * kNear; ++d)
            mean.push_back(std::bit_cast<float>(y + d - kNear));
        }
      }
      const std::vector<Half> zero(mean.size(), 0);
      std::vector<std::int8_t> codes(mean.size());
      ASSERT_EQ(kernel().per_head({zero.data(), zero.size(), 1, zero.size(), mean.data()}, scale,
                                  codes.data(), codes.size()),
                0u);
      std::size_t wrong = 0;
      for (std::size_t i = 0; i < mean.size(); ++i)
        wrong += codes[i] != static_cast<int>(std::nearbyint(-mean[i] / scale));
      ASSERT_EQ(wrong, 0u) << "scale " << scale;
    }
  }
}

// Quotients that are ties, exactly or but for the scale's rounding: maxima that are 127 times a
// power of two or a small integer; x = max/2.
TEST_P(QuantizeTest, Ties) {
  for (const float max : {127.0f, 127.0f * 3, 127.0f * 7, 127.0f * 13, 127.0f * 15 / 1024,
                          127.0f * 256, 100.0f, 0.37f, 65504.0f}) {
    const float step = max / 254.0f;
    const Rows rows(9, 255, 1, [&](std::size_t t, std::size_t i) {
      const float x = i == 0 ? max : i % 3 == 1 ? max / 2 : step * static_cast<float>(i);
      return static_cast<Half>(FloatToHalf(x) | ((i + t) % 2 ? kSign : 0u));
    });
    ExpectAll(rows, nullptr);
  }
  // bf16 scales of few bits meet exact ties at many codes.
  const Rows integers(64, 100, 0, [](std::size_t t, std::size_t i) {
    return FloatToHalf(static_cast<float>(i * (t + 1) % 1000) / 2);
  });
  ExpectAll(integers, nullptr);
  const std::vector<float> mean(100, 0.5f);
  ExpectAll(integers, mean.data());
}

TEST_P(QuantizeTest, ZeroTinyAndHugeRows) {
  const float sizes[] = {0.0f, 0x1p-24f, 0x1p-14f, 1.0f, 65504.0f};
  const Rows rows(20, 67, 3, [&](std::size_t t, std::size_t i) {
    return static_cast<Half>(FloatToHalf(sizes[t % 5] * static_cast<float>(i % 8) / 7.0f) |
                             (t % 2 ? kSign : 0u));
  });
  ExpectAll(rows, nullptr);
  // x = 0: y is the mean. On both sides of 2^-100, where scales begin, and of 2^-60, where
  // quotients are no longer divisions.
  const Rows zeros(3, 67, 0, [](std::size_t, std::size_t) { return Half{0}; });
  for (const float size : {0x1p-149f, 0x1.fffffep-101f, 0x1p-100f, 0x1.234p-100f, 0x1p-61f,
                           0x1.fffffep-61f, 0x1p-60f, 0x1p60f, 0x1p120f}) {
    std::vector<float> mean(67);
    for (std::size_t i = 0; i < mean.size(); ++i)
      mean[i] = size * (1.0f - static_cast<float>(i) / 60.0f);
    ExpectAll(zeros, mean.data());
    ExpectAll(rows, mean.data());
  }
}

TEST_P(QuantizeTest, NotANumber) {
  for (const Half special : {kInf, static_cast<Half>(kInf | kSign), kNaN,
                             static_cast<Half>(kNaN | kSign), Half{0x7C01}}) {
    for (const std::size_t dim : Sizes{1, 31, 64, 80}) {
      const Rows base = RandomRows(17, dim, 2, 3);
      const Rows rows(17, dim, 2, [&](std::size_t t, std::size_t i) {
        return t % 4 == 1 && i % 30 == 0 ? special : base.aligned().row(t)[i];
      });
      ExpectAll(rows, nullptr);
      ExpectAll(rows, RandomMean(dim, 4).data());
    }
  }
}

TEST_P(QuantizeTest, ClampsAndCounts) {
  for (const std::size_t dim : Sizes{3, 64, 100}) {
    const Rows rows = RandomRows(33, dim, 0, 5);
    const std::vector<float> mean = RandomMean(dim, 6);
    const float full = reference::GlobalScale(rows.aligned(), nullptr);
    for (const float scale :
         {full * 0.99f, full * 0.5f, full * 0.1f, 1e-30f, 0x1p-126f, 1e30f, 3e38f, 0.0f, 0.02f}) {
      ExpectPerHead(rows, nullptr, scale);
      ExpectPerHead(rows, mean.data(), scale);
    }
  }
  // 127.49 stays, 127.5 (a tie, to even: 128) is clamped.
  const Rows edge(
      1, 4, 0, [](std::size_t, std::size_t i) { return FloatToHalf(i < 2 ? 127.4375f : 127.5f); });
  std::int8_t codes[4];
  EXPECT_EQ(QuantizeGlobal(edge.odd(), nullptr, 1.0f, codes), 2u);
  EXPECT_EQ(codes[0], 127);
  EXPECT_EQ(codes[3], 127);
}

TEST_P(QuantizeTest, Dequantize) {
  for (const std::size_t dim : kDims) {
    for (const std::size_t tokens : Sizes{0, 1, 9}) {
      const Rows rows = RandomRows(tokens, dim, 0, 11);
      const std::vector<float> mean = RandomMean(dim, 12);
      for (const float* m : {static_cast<const float*>(nullptr), mean.data()}) {
        const reference::Codes q = reference::QuantizePerToken(rows.aligned(), m, ScaleType::kF32);
        const std::size_t stride = dim + 2;
        std::vector<float> f32(tokens * stride + 1, -1e9f);
        std::vector<Half> f16(tokens * stride + 1, kNaN);
        kvmix::Dequantize(q.codes.data(), q.scales.data(), 1, m, tokens, dim, f32.data() + 1,
                          stride);
        kvmix::Dequantize(q.codes.data(), q.scales.data(), 1, m, tokens, dim, f16.data() + 1,
                          stride);
        for (std::size_t t = 0; t < tokens; ++t) {
          for (std::size_t i = 0; i < stride; ++i) {
            const float expected =
                i < dim ? reference::Dequantize(q.codes[t * dim + i], q.scales[t], m, i) : -1e9f;
            const std::size_t at = t * stride + i + 1;
            if (at == f32.size()) continue;
            ASSERT_EQ(f32[at], expected) << dim << " channels, row " << t << ", channel " << i;
            ASSERT_EQ(f16[at], i < dim ? FloatToHalf(expected) : kNaN)
                << dim << " channels, row " << t << ", channel " << i;
          }
        }
      }
    }
  }
}

// One scale for all rows; results beyond the halves' range and below their normal range.
TEST_P(QuantizeTest, DequantizeToHalfRounds) {
  std::vector<std::int8_t> codes(4 * 255);
  for (std::size_t i = 0; i < codes.size(); ++i)
    codes[i] = static_cast<std::int8_t>(static_cast<int>(i % 255) - 127);
  std::vector<Half> out(codes.size());
  for (const float scale : {0.0f, 515.9f, 515.7795f, 600.0f, 1e6f, 1.0f / 3, 0x1.8p-24f, 0x1p-25f,
                            0x1.000002p-25f, 0x1.5p-20f, 0x1.003p-5f}) {
    kvmix::Dequantize(codes.data(), &scale, 0, nullptr, 4, 255, out.data(), 255);
    for (std::size_t i = 0; i < codes.size(); ++i) {
      ASSERT_EQ(out[i], FloatToHalf(reference::Dequantize(codes[i], scale, nullptr, 0)))
          << int{codes[i]} << " x " << scale;
    }
  }
}

TEST_P(QuantizeTest, Errors) {
  for (const std::size_t dim : kDims) {
    for (const std::size_t tokens : Sizes{0, 1, 9, 300}) {
      const Rows rows = RandomRows(tokens, dim, 7, 21);
      const std::vector<float> mean = RandomMean(dim, 22);
      for (const float* m : {static_cast<const float*>(nullptr), mean.data()}) {
        const reference::Codes q = reference::QuantizePerToken(rows.aligned(), m, ScaleType::kBF16);
        const ErrorSums expected = reference::QuantizationError(rows.aligned(), q, m);
        const ErrorSums errors =
            QuantizationError(rows.odd(), q.codes.data(), q.scales.data(), 1, m);
        EXPECT_EQ(errors.count, tokens * dim);
        EXPECT_NEAR(errors.sum_squared_error, expected.sum_squared_error,
                    1e-5 * expected.sum_squared_error);  // f32 within a row
        EXPECT_NEAR(errors.max_error, expected.max_error, 1e-6 * expected.max_error);
        EXPECT_EQ(errors.max_abs, expected.max_abs);
      }
    }
  }
}

TEST_P(QuantizeTest, ErrorsOfNotANumber) {
  const Half x[] = {kNaN, kInf, 0x3C00, 0xBC00};
  const std::int8_t codes[] = {0, 127, 0, 0};
  const float scale = 65504.0f / 127.0f;
  const ErrorSums errors = QuantizationError({x, 4, 1, 4}, codes, &scale, 0, nullptr);
  EXPECT_NEAR(errors.sum_squared_error, 2.0, 1e-3);
  EXPECT_EQ(errors.max_abs, 65504.0);
}

TEST_P(QuantizeTest, EveryHalfToFloatAndFinite) {
  std::vector<Half> all(65536 + 5), finite(all.size());
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<Half>(i);
  std::vector<float> floats(all.size());
  kernel().to_float(all.data(), all.size(), floats.data());
  kernel().finite(all.data(), all.size(), finite.data());
  for (std::size_t i = 0; i < all.size(); ++i) {
    const float expected = HalfToFloat(all[i]);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(floats[i])) << i;
    } else {
      ASSERT_EQ(std::bit_cast<std::uint32_t>(floats[i]), std::bit_cast<std::uint32_t>(expected))
          << i;
    }
    ASSERT_EQ(HalfToFloat(finite[i]), reference::FiniteFloat(all[i])) << i;
  }
}

TEST(ErrorSums, Merge) {
  ErrorSums a{4, 2.0, 0.5, 3.0};
  a += {12, 6.0, 0.25, 7.0};
  EXPECT_EQ(a.count, 16u);
  EXPECT_EQ(a.mse(), 0.5);
  EXPECT_EQ(a.max_error, 0.5);
  EXPECT_EQ(a.max_abs, 7.0);
  EXPECT_EQ(ErrorSums().mse(), 0.0);
}

}  // namespace
}  // namespace kvmix
