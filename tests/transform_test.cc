// The steps before rounding, on every compiled target that this CPU runs: rotations and folds of
// queries and outputs against double precision, and codecs with every mix of steps against
// tests/reference/quantize.h, bit by bit, so all targets agree with each other.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "kvmix/quantize.h"
#include "tests/reference/quantize.h"

namespace kvmix {
namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;
using Sizes = std::initializer_list<std::size_t>;

constexpr std::size_t kDims[] = {1, 2, 3, 6, 8, 16, 33, 64, 80, 96, 100, 128, 160, 256, 512};
constexpr double kRounding = 0x1p-24;  // relative error of one operation
constexpr Dtype kDtypes[] = {KVMIX_F16, KVMIX_BF16, KVMIX_F32};

std::size_t BlockOf(std::size_t dim) { return dim & (~dim + 1); }
double Log2(std::size_t block) { return static_cast<double>(std::countr_zero(block)); }

// R(x) by the matrix: entry (i, j) of a block is -1 to the number of bits that i and j share, over
// sqrt(b).
Doubles Rotated(const Doubles& x) {
  const std::size_t block = BlockOf(x.size());
  Doubles out(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    for (std::size_t j = 0; j < block; ++j) {
      const double term = x[i / block * block + j];
      out[i] += std::popcount(i % block & j) % 2 == 1 ? -term : term;
    }
    out[i] /= std::sqrt(static_cast<double>(block));
  }
  return out;
}

// The length of each block, by which rotations keep their promises: every sum and difference has an
// error of kRounding at most, and the steps in between are rotations, so that errors of all steps
// add up to log2(b) * kRounding of a block's length.
Doubles BlockLengths(const Doubles& x) {
  const std::size_t block = BlockOf(x.size());
  Doubles lengths(x.size() / block);
  for (std::size_t i = 0; i < x.size(); ++i) lengths[i / block] += x[i] * x[i];
  for (double& length : lengths) length = std::sqrt(length);
  return lengths;
}

template <class F>
Doubles Map(std::size_t n, const F& f) {
  Doubles out(n);
  for (std::size_t i = 0; i < n; ++i) out[i] = f(i);
  return out;
}

Floats RandomFloats(std::mt19937& random, std::size_t n) {
  std::normal_distribution<float> normal;
  Floats x(n);
  for (std::size_t i = 0; i < n; ++i) x[i] = normal(random) * (i % 13 == 5 ? 20.0f : 1.0f);
  return x;
}

Floats RandomFactor(std::mt19937& random, std::size_t n) {
  std::normal_distribution<float> normal;
  Floats factor(n);
  for (float& f : factor) f = std::exp2(2.0f * normal(random));
  return factor;
}

Floats Inverse(const Floats& x) {
  Floats inverse(x.size());
  std::ranges::transform(x, inverse.begin(), [](float f) { return 1.0f / f; });
  return inverse;
}

bool SameBits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

class TransformTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { ASSERT_NE(kernels::FindKernels(GetParam()), nullptr); }
  const kernels::Kernels& kernels() const { return *kernels::FindKernels(GetParam()); }

  Floats Prepared(Floats x, const Floats* factor, bool hadamard) const {
    kernels().transform.prepare(x.data(), x.size(), 1, x.size(),
                                factor != nullptr ? factor->data() : nullptr, hadamard);
    return x;
  }
  Floats Restored(Floats x, const Floats* factor, bool hadamard) const {
    kernels().transform.restore(x.data(), x.size(), 1, x.size(),
                                factor != nullptr ? factor->data() : nullptr, hadamard);
    return x;
  }
};

INSTANTIATE_TEST_SUITE_P(Targets, TransformTest, testing::ValuesIn([] {
                           std::vector<std::string> names;
                           for (const kernels::Kernels& k : kernels::AllKernels())
                             names.push_back(k.target);
                           return names;
                         }()),
                         [](const auto& param) { return param.param; });

TEST_P(TransformTest, PrepareAndRestoreFollowTheFormula) {
  std::mt19937 random(1);
  for (const std::size_t dim : kDims) {
    const Floats factor = RandomFactor(random, dim);
    for (const bool folds : {false, true}) {
      for (const bool hadamard : {false, true}) {
        SCOPED_TRACE(testing::Message() << dim << " channels" << (folds ? ", factor" : "")
                                        << (hadamard ? ", hadamard" : ""));
        const Floats x = RandomFloats(random, dim);
        const auto f = [&](std::size_t i) { return folds ? static_cast<double>(factor[i]) : 1.0; };
        const auto rotated = [&](const Doubles& v) { return hadamard ? Rotated(v) : v; };
        // The factor, the sums, 1 / sqrt(b) and its product: each is rounded.
        const double most =
            1.01 * kRounding * ((folds ? 1.0 : 0.0) + (hadamard ? Log2(BlockOf(dim)) + 2.0 : 0.0));

        const Doubles folded = Map(dim, [&](std::size_t i) { return f(i) * x[i]; });
        const Doubles prepared = rotated(folded);
        const Floats q = Prepared(x, folds ? &factor : nullptr, hadamard);
        const Doubles q_errors =
            BlockLengths(Map(dim, [&](std::size_t i) { return q[i] - prepared[i]; }));
        const Doubles q_lengths = BlockLengths(folded);
        for (std::size_t b = 0; b < q_errors.size(); ++b) {
          EXPECT_LE(q_errors[b], most * q_lengths[b]) << "prepare, block " << b;
        }

        const Doubles back = rotated(Doubles(x.begin(), x.end()));
        const Floats out = Restored(x, folds ? &factor : nullptr, hadamard);
        const Doubles out_errors =
            BlockLengths(Map(dim, [&](std::size_t i) { return out[i] / f(i) - back[i]; }));
        const Doubles out_lengths = BlockLengths(back);
        for (std::size_t b = 0; b < out_errors.size(); ++b) {
          EXPECT_LE(out_errors[b], most * out_lengths[b]) << "restore, block " << b;
        }
      }
    }
  }
}

// The sums have one order, so there is one result. Rows with gaps; what lies between them stays.
TEST_P(TransformTest, BitsAndStridesAreThoseOfTheReference) {
  constexpr float kGap = -1e9f;
  std::mt19937 random(2);
  for (const std::size_t dim : kDims) {
    const Floats factor = RandomFactor(random, dim);
    for (const std::size_t count : Sizes{0, 1, 5}) {
      for (const std::size_t gap : Sizes{0, 1, 7}) {
        for (const bool folds : {false, true}) {
          for (const bool hadamard : {false, true}) {
            const std::size_t stride = dim + gap;
            Floats rows(1 + count * stride, kGap), prepared = rows, restored = rows;
            for (std::size_t r = 0; r < count; ++r) {
              const Floats x = RandomFloats(random, dim);
              const auto at = static_cast<std::ptrdiff_t>(1 + r * stride);
              Floats q = x, out = x;
              for (std::size_t i = 0; folds && i < dim; ++i)
                q[i] = reference::Product(q[i], factor[i]);
              if (hadamard) reference::Rotate(q);
              if (hadamard) reference::Rotate(out);
              for (std::size_t i = 0; folds && i < dim; ++i)
                out[i] = reference::Product(out[i], factor[i]);
              std::ranges::copy(x, rows.begin() + at);
              std::ranges::copy(q, prepared.begin() + at);
              std::ranges::copy(out, restored.begin() + at);
            }
            const float* const by = folds ? factor.data() : nullptr;
            Floats found = rows;
            kernels().transform.prepare(found.data() + 1, stride, count, dim, by, hadamard);
            ASSERT_TRUE(SameBits(found, prepared)) << count << " x " << dim << ", gap " << gap;
            found = rows;
            kernels().transform.restore(found.data() + 1, stride, count, dim, by, hadamard);
            ASSERT_TRUE(SameBits(found, restored)) << count << " x " << dim << ", gap " << gap;
          }
        }
      }
    }
  }
}

TEST_P(TransformTest, RotationsUndoThemselves) {
  std::mt19937 random(3);
  for (const std::size_t dim : kDims) {
    const Floats x = RandomFloats(random, dim);
    const Floats once = Prepared(x, nullptr, true), twice = Prepared(once, nullptr, true);
    const Doubles errors =
        BlockLengths(Map(dim, [&](std::size_t i) { return double{twice[i]} - x[i]; }));
    const Doubles lengths = BlockLengths(Doubles(x.begin(), x.end()));
    for (std::size_t b = 0; b < errors.size(); ++b) {
      EXPECT_LE(errors[b], 2.02 * kRounding * (Log2(BlockOf(dim)) + 2.0) * lengths[b]) << dim;
    }
    EXPECT_EQ(SameBits(once, x), BlockOf(dim) == 1) << dim << " channels: only odd ones stay";
  }
}

// What attention relies on: q . x = R(factor * q) . y, and x = factor * R(y), y = R(x / factor).
TEST_P(TransformTest, ScoresAndOutputsArePreserved) {
  std::mt19937 random(4);
  for (const std::size_t dim : kDims) {
    const Floats factor = RandomFactor(random, dim), inverse = Inverse(factor);
    const Floats q = RandomFloats(random, dim), x = RandomFloats(random, dim);
    for (const bool hadamard : {false, true}) {
      const double steps = hadamard ? Log2(BlockOf(dim)) + 2.0 : 0.0;
      const Floats y = Prepared(x, &inverse, hadamard), prepared = Prepared(q, &factor, hadamard),
                   restored = Restored(y, &factor, hadamard);
      double expected = 0.0, found = 0.0, bound = 0.0;
      const Doubles q_lengths =
          BlockLengths(Map(dim, [&](std::size_t i) { return double{q[i]} * factor[i]; }));
      const Doubles z_lengths =
          BlockLengths(Map(dim, [&](std::size_t i) { return double{x[i]} / factor[i]; }));
      const Doubles errors = BlockLengths(
          Map(dim, [&](std::size_t i) { return (double{restored[i]} - x[i]) / factor[i]; }));
      for (std::size_t i = 0; i < dim; ++i) {
        expected += double{q[i]} * x[i];
        found += double{prepared[i]} * y[i];
      }
      // Both sides' steps; x's and q's factor, and the inverse.
      const double most = 1.01 * kRounding * (2.0 * steps + 3.0);
      for (std::size_t b = 0; b < errors.size(); ++b) {
        bound += most * q_lengths[b] * z_lengths[b];
        EXPECT_LE(errors[b], most * z_lengths[b]) << dim << " channels, block " << b;
      }
      EXPECT_NEAR(found, expected, bound) << dim << " channels";
    }
  }
}

// ---- codecs

// Every mix of steps with every storage and scale that rows of dim channels can have.
std::vector<std::string> KindNames(std::size_t dim) {
  std::vector<std::string> names;
  for (const std::string scale :
       {"i8-head", "i8-token", "i8-token-bf16", "i4-token", "i4-token-bf16"}) {
    if (scale.starts_with("i4") && dim % 2 != 0) continue;
    for (int steps = 0; steps < 8; ++steps) {
      names.push_back(scale + (steps & 1 ? "+centre" : "") + (steps & 2 ? "+fold" : "") +
                      (steps & 4 ? "+hadamard" : ""));
    }
  }
  return names;
}

HeadCodec Codec(const std::string& name, const Floats& mean, const Floats& factor,
                float head_scale = 0.0f) {
  HeadCodec codec{ParseCodecKind(name).value(), head_scale, nullptr};
  CodecVectors vectors;
  if (codec.kind.centre) vectors.mean = mean;
  if (codec.kind.fold) vectors.factor = factor;
  codec.vectors = std::make_shared<const CodecVectors>(vectors);
  return codec;
}

// Numbers as a type has them, in C order.
struct Numbers {
  Numbers(Dtype dtype, const Floats& x, std::size_t dim) : f32(x), f16(x.size()) {
    for (std::size_t i = 0; i < x.size(); ++i) {
      const std::uint32_t bits = std::bit_cast<std::uint32_t>(x[i]);
      f16[i] = dtype == KVMIX_F16 ? FloatToHalf(x[i]) : static_cast<std::uint16_t>(bits >> 16);
    }
    const std::size_t rows = x.size() / dim;
    view = dtype == KVMIX_F32   ? RowsView::F32(f32.data(), rows, 1, dim)
           : dtype == KVMIX_F16 ? RowsView::F16(f16.data(), rows, 1, dim)
                                : RowsView::BF16(f16.data(), rows, 1, dim);
  }
  Numbers(const Numbers&) = delete;
  Floats f32;
  std::vector<Half> f16;
  RowsView view;
};

kernels::RowsIn In(const RowsView& v) {
  return {v.data, v.dtype, v.token_stride, v.tokens, v.head_dim};
}

class CodecStepsTest : public TransformTest {
 protected:
  reference::Coded Encode(const RowsView& rows, const HeadCodec& codec) const {
    const RowCodec compiled = RowCodec::Create(codec, rows.head_dim, GetParam()).value();
    reference::Coded coded{std::vector<std::uint8_t>(rows.tokens * compiled.row_bytes()),
                           Floats(compiled.stores_scales() ? rows.tokens : 0), 0};
    coded.clamped = compiled.Encode(rows, coded.rows.data(), coded.scales.data());
    return coded;
  }
  Floats Decode(const reference::Coded& coded, std::size_t dim, const HeadCodec& codec) const {
    const RowCodec compiled = RowCodec::Create(codec, dim, GetParam()).value();
    const std::size_t tokens = coded.rows.size() / compiled.row_bytes();
    Floats out(tokens * dim);
    compiled.Decode(coded.rows.data(), coded.scales.data(), tokens, out.data(), dim);
    return out;
  }
  // Codes, scales and what they stand for are the reference's.
  void ExpectReference(const RowsView& rows, const HeadCodec& codec) const {
    SCOPED_TRACE(testing::Message() << ToString(codec.kind) << ", " << rows.tokens << " x "
                                    << rows.head_dim << ", dtype " << static_cast<int>(rows.dtype));
    const reference::Coded expected = reference::Encode(rows, codec);
    const reference::Coded found = Encode(rows, codec);
    ASSERT_EQ(found.clamped, expected.clamped);
    ASSERT_EQ(found.scales, expected.scales);
    ASSERT_EQ(found.rows, expected.rows);
    const Floats decoded = reference::Decode(expected, rows.tokens, rows.head_dim, codec);
    ASSERT_EQ(Decode(found, rows.head_dim, codec), decoded);
    std::vector<Half> halves(decoded.size());
    RowCodec::Create(codec, rows.head_dim, GetParam())
        .value()
        .Decode(found.rows.data(), found.scales.data(), rows.tokens, halves.data(), rows.head_dim);
    for (std::size_t i = 0; i < halves.size(); ++i) {
      ASSERT_EQ(halves[i], FloatToHalf(decoded[i])) << "value " << i << " as a half";
    }
  }
};

INSTANTIATE_TEST_SUITE_P(Targets, CodecStepsTest, testing::ValuesIn([] {
                           std::vector<std::string> names;
                           for (const kernels::Kernels& k : kernels::AllKernels())
                             names.push_back(k.target);
                           return names;
                         }()),
                         [](const auto& param) { return param.param; });

TEST_P(CodecStepsTest, EveryMixGivesTheReferencesBytes) {
  std::mt19937 random(5);
  for (const std::size_t dim : kDims) {
    const Floats mean = RandomFloats(random, dim), factor = RandomFactor(random, dim);
    for (const std::size_t tokens : Sizes{1, 8, 19}) {
      const Floats x = RandomFloats(random, tokens * dim);
      for (const Dtype dtype : kDtypes) {
        const Numbers rows(dtype, x, dim);
        for (const std::string& name : KindNames(dim)) {
          HeadCodec codec = Codec(name, mean, factor);
          if (codec.kind.scale == KVMIX_SCALE_HEAD) {
            kernels::Transform transform;
            const Floats inverse = Inverse(factor);
            if (codec.kind.centre) transform.mean = mean.data();
            if (codec.kind.fold) transform.factor = factor.data();
            if (codec.kind.fold) transform.inv_factor = inverse.data();
            transform.hadamard = codec.kind.hadamard;
            codec.head_scale = kernels().encode.head_scale(In(rows.view), transform);
            ASSERT_EQ(codec.head_scale, reference::HeadScale(rows.view, codec)) << name;
            ASSERT_EQ(codec.head_scale, HeadScale(rows.view, codec)) << name;
            codec.head_scale *= tokens == 8 ? 0.6f : 1.0f;  // some saturate
          }
          ExpectReference(rows.view, codec);
        }
      }
    }
  }
}

// |x' - x|: a code is off by at most half a scale (and the roundings of a quotient near 127), so y
// of a block by sqrt(b) / 2 scales; R keeps lengths, so that is the length of (x' - x) / factor
// within the block. f32's roundings come on top.
TEST_P(CodecStepsTest, ErrorIsThatOfHalfACode) {
  constexpr std::size_t kTokens = 9;
  std::mt19937 random(6);
  for (const std::size_t dim : kDims) {
    const Floats mean = RandomFloats(random, dim), factor = RandomFactor(random, dim);
    const Numbers rows(KVMIX_F32, RandomFloats(random, kTokens * dim), dim);
    const double b = static_cast<double>(BlockOf(dim));
    for (const std::string& name : KindNames(dim)) {
      HeadCodec codec = Codec(name, mean, factor);
      if (codec.kind.storage != KVMIX_STORAGE_I8) continue;
      if (codec.kind.scale == KVMIX_SCALE_HEAD) codec.head_scale = HeadScale(rows.view, codec);
      const reference::Coded coded = Encode(rows.view, codec);
      ASSERT_EQ(coded.clamped, 0u);
      const Floats decoded = Decode(coded, dim, codec);
      for (std::size_t t = 0; t < kTokens; ++t) {
        const double scale = coded.scales.empty() ? codec.head_scale : coded.scales[t];
        const auto x = [&](std::size_t i) { return double{rows.f32[t * dim + i]}; };
        const auto f = [&](std::size_t i) { return codec.kind.fold ? double{factor[i]} : 1.0; };
        const auto m = [&](std::size_t i) { return codec.kind.centre ? double{mean[i]} : 0.0; };
        const Doubles errors = BlockLengths(
            Map(dim, [&](std::size_t i) { return (double{decoded[t * dim + i]} - x(i)) / f(i); }));
        const Doubles centred =
            BlockLengths(Map(dim, [&](std::size_t i) { return (x(i) - m(i)) / f(i); }));
        const Doubles whole = BlockLengths(
            Map(dim, [&](std::size_t i) { return (std::fabs(x(i)) + std::fabs(m(i))) / f(i); }));
        for (std::size_t i = 0; i < errors.size(); ++i) {
          const double half_codes = 0.5 * scale * std::sqrt(b) * (1.0 + 0x1p-15);
          const double floats =
              1.01 * kRounding *
              ((2.0 * Log2(BlockOf(dim)) + 9.0) * (centred[i] + half_codes) + whole[i]);
          EXPECT_LE(errors[i], half_codes + floats)
              << name << ", " << dim << " channels, row " << t;
        }
      }
    }
  }
}

TEST_P(CodecStepsTest, ErrorsAreTheReferences) {
  std::mt19937 random(7);
  for (const std::size_t dim : Sizes{1, 6, 64, 80, 128}) {
    const Floats mean = RandomFloats(random, dim), factor = RandomFactor(random, dim);
    for (const Dtype dtype : kDtypes) {
      const Numbers rows(dtype, RandomFloats(random, 30 * dim), dim);
      for (const std::string& name : KindNames(dim)) {
        HeadCodec codec = Codec(name, mean, factor, 0.2f);
        const reference::Coded coded = reference::Encode(rows.view, codec);
        const ErrorSums expected = reference::Errors(rows.view, coded, codec);
        const ErrorSums errors = RowCodec::Create(codec, dim, GetParam())
                                     .value()
                                     .Errors(rows.view, coded.rows.data(), coded.scales.data());
        EXPECT_EQ(errors.count, expected.count);
        EXPECT_NEAR(errors.sum_squared_error, expected.sum_squared_error,
                    1e-5 * expected.sum_squared_error);
        EXPECT_NEAR(errors.max_error, expected.max_error, 1e-6 * expected.max_error);
        EXPECT_EQ(errors.max_abs, expected.max_abs);
      }
    }
  }
}

// NaN is 0 and infinities are +-65504 before any step: they cannot spread over a row.
TEST_P(CodecStepsTest, NotANumber) {
  constexpr std::size_t kTokens = 17;
  std::mt19937 random(8);
  for (const std::size_t dim : Sizes{1, 6, 33, 64, 80, 128}) {
    const Floats mean = RandomFloats(random, dim), factor = RandomFactor(random, dim);
    const Floats base = RandomFloats(random, kTokens * dim);
    for (const Dtype dtype : kDtypes) {
      const Floats specials[] = {{std::nanf(""), 0.0f},
                                 {-std::nanf(""), 0.0f},
                                 {HUGE_VALF, 65504.0f},
                                 {-HUGE_VALF, -65504.0f}};
      for (const Floats& special : specials) {
        Floats with = base, instead = base;
        for (std::size_t t = 1; t < kTokens; t += 4) {
          for (std::size_t i = t % dim; i < dim; i += 30) {
            with[t * dim + i] = special[0];
            instead[t * dim + i] = special[1];
          }
        }
        const Numbers rows(dtype, with, dim), finite(dtype, instead, dim);
        // bf16 has no 65504.
        const bool same = dtype != KVMIX_BF16 || special[1] == 0.0f;
        for (const std::string& name : KindNames(dim)) {
          const HeadCodec codec = Codec(name, mean, factor, 0.3f);
          ExpectReference(rows.view, codec);
          if (!same) continue;
          const reference::Coded a = Encode(rows.view, codec), b = Encode(finite.view, codec);
          EXPECT_EQ(a.rows, b.rows) << name;
          EXPECT_EQ(a.scales, b.scales) << name;
          EXPECT_EQ(a.clamped, b.clamped) << name;
        }
      }
    }
  }
}

// Any finite number, mean and factor: what is beyond 2^64 without its mean is cut there, so nothing
// overflows on the way to codes.
TEST_P(CodecStepsTest, HugeNumbersMeansAndFactors) {
  for (const std::size_t dim : Sizes{3, 64, 80}) {
    for (const Dtype dtype : {KVMIX_BF16, KVMIX_F32}) {
      const float sizes[] = {1e-45f, 1e-35f, 1.0f, 65504.0f, 0x1p64f, 0x1.8p64f, 1e30f, FLT_MAX};
      constexpr std::size_t kTokens = 2 * std::size(sizes);
      Floats x(kTokens * dim);
      for (std::size_t i = 0; i < x.size(); ++i) {
        const float size = sizes[i / dim % std::size(sizes)];
        x[i] = (i % 3 == 0 ? -size : size) * (static_cast<float>(i % 8) / 7.0f);
      }
      const Numbers rows(dtype, x, dim);
      for (const float mean_size : {1.0f, -0x1p64f, 1e30f, -FLT_MAX}) {
        for (const float factor_size : {1.0f, 0x1p-32f, 0x1p32f}) {
          Floats mean(dim), factor(dim);
          for (std::size_t i = 0; i < dim; ++i) {
            mean[i] = mean_size * (1.0f - static_cast<float>(i) / 100.0f);
            factor[i] = i % 5 == 0 ? 1.0f : factor_size;
          }
          for (const std::string& name : KindNames(dim)) {
            const HeadCodec codec = Codec(name, mean, factor, 1e16f);
            SCOPED_TRACE(testing::Message() << "mean " << mean_size << ", factor " << factor_size);
            ExpectReference(rows.view, codec);
          }
        }
      }
    }
  }
}

// The rows of one token, heads with vectors side by side, are encoded and decoded as each head by
// itself.
TEST_P(CodecStepsTest, HeadsOfATokenAreEncodedAsTheirTokens) {
  constexpr std::size_t kHeads = 19;
  std::mt19937 random(9);
  for (const std::size_t dim : Sizes{1, 6, 64, 80, 100, 128, 512}) {
    const Floats means = RandomFloats(random, kHeads * dim),
                 factors = RandomFactor(random, kHeads * dim), inverses = Inverse(factors);
    for (const Dtype dtype : kDtypes) {
      const Numbers rows(dtype, RandomFloats(random, kHeads * dim), dim);
      for (const std::string& name : KindNames(dim)) {
        SCOPED_TRACE(testing::Message() << name << ", " << dim << " channels");
        const CodecKind kind = ParseCodecKind(name).value();
        kernels::RowFormat format;
        format.storage = kind.storage;
        format.scale = kind.scale == KVMIX_SCALE_HEAD    ? kernels::ScaleStore::kConstant
                       : kind.scale == KVMIX_SCALE_TOKEN ? kernels::ScaleStore::kF32
                                                         : kernels::ScaleStore::kBF16;
        format.constant = 0.2f;
        format.dim = dim;
        const bool stored = format.scale != kernels::ScaleStore::kConstant;
        kernels::Transform transform;
        if (kind.centre) transform.mean = means.data();
        if (kind.fold) transform.factor = factors.data();
        if (kind.fold) transform.inv_factor = inverses.data();
        transform.hadamard = kind.hadamard;
        transform.row_stride = dim;

        std::vector<std::uint8_t> codes(kHeads * dim), own(dim);
        Floats scales(kHeads, -1.0f), decoded(kHeads * dim), own_decoded(dim);
        const kernels::EncodeKernels& k = kernels().encode;
        std::uint64_t clamped = k.encode({In(rows.view), transform, format, codes.data(), dim,
                                          stored ? scales.data() : nullptr});
        float head_scale = 0.0f;
        k.decode_f32(
            {format, transform, codes.data(), dim, stored ? scales.data() : nullptr, kHeads},
            decoded.data(), dim);
        for (std::size_t h = 0; h < kHeads; ++h) {
          kernels::Transform alone = transform.From(h);
          alone.row_stride = 0;
          const kernels::RowsIn row = In(rows.view.Tokens(h, 1));
          float scale = -1.0f;
          clamped -= k.encode({row, alone, format, own.data(), dim, stored ? &scale : nullptr});
          ASSERT_EQ(std::memcmp(own.data(), &codes[h * dim], dim), 0) << "head " << h;
          ASSERT_EQ(scale, scales[h]) << "head " << h;
          head_scale = std::max(head_scale, k.head_scale(row, alone));
          k.decode_f32({format, alone, own.data(), dim, stored ? &scale : nullptr, 1},
                       own_decoded.data(), dim);
          ASSERT_TRUE(SameBits(
              own_decoded, Floats(decoded.begin() + static_cast<std::ptrdiff_t>(h * dim),
                                  decoded.begin() + static_cast<std::ptrdiff_t>((h + 1) * dim))))
              << "head " << h;
        }
        EXPECT_EQ(clamped, 0u) << "of the heads together, without those of each";
        EXPECT_EQ(k.head_scale(In(rows.view), transform), head_scale);
      }
    }
  }
}

}  // namespace
}  // namespace kvmix
