// Rows -> codes and back, on every compiled target that this CPU runs: byte by byte against
// tests/reference/quantize.h, so all targets agree with each other. (Rotations and folds:
// transform_test.cc.)
#include "kvmix/quantize.h"

#include <gtest/gtest.h>

#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/levels.h"
#include "lib/tune/shaping.h"
#include "tests/reference/quantize.h"

namespace kvmix {
namespace {

constexpr Half kNaN = 0x7E00, kSign = 0x8000;
constexpr std::uint32_t kFloatSign = 0x80000000;
using Sizes = std::initializer_list<std::size_t>;
using Floats = std::vector<float>;
constexpr std::size_t kDims[] = {1, 3, 16, 31, 64, 80, 96, 100, 128, 256};
constexpr std::size_t kTokens[] = {0, 1, 7, 8, 9, 15, 17, 64};
constexpr Dtype kDtypes[] = {KVMIX_F16, KVMIX_BF16, KVMIX_F32};
constexpr std::uint8_t kUntouched = 0x80;  // -128: no code
const Floats kNoMean;

kernels::RowsIn In(const RowsView& v) {
  return {v.data, v.dtype, v.token_stride, v.tokens, v.head_dim};
}

// The nearest number of a type, raw. (bf16: of those towards zero, so that huge ones stay finite.)
std::uint32_t BitsOf(Dtype dtype, float x) {
  if (dtype == KVMIX_F16) return FloatToHalf(x);
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  return dtype == KVMIX_F32 ? bits : bits >> 16;
}

// Rows of one head in memory, with `gap` numbers (NaN) between them, the first one number past
// any alignment that a vector might like.
class Rows {
 public:
  using Bits = std::function<std::uint32_t(std::size_t t, std::size_t i)>;

  Rows(Dtype dtype, std::size_t tokens, std::size_t dim, std::size_t gap, const Bits& bits,
       bool backwards = false)
      : view_{nullptr, dtype, tokens, 1, dim, static_cast<std::ptrdiff_t>(dim + gap), 0} {
    const std::size_t size = view_.element_bytes(), row_bytes = (dim + gap) * size;
    aligned_.assign(tokens * row_bytes, 0xFF);
    for (std::size_t t = 0; t < tokens; ++t) {
      for (std::size_t i = 0; i < dim; ++i) {
        const std::uint32_t x = bits(t, i);
        const std::size_t place = backwards ? tokens - 1 - t : t;
        std::memcpy(&aligned_[place * row_bytes + i * size], &x, size);  // the lower bytes
      }
    }
    if (backwards && tokens > 0) {
      view_.token_stride = -view_.token_stride;
      first_ = (tokens - 1) * row_bytes;
    }
    shifted_.assign(view_.element_bytes(), 0xFF);
    shifted_.insert(shifted_.end(), aligned_.begin(), aligned_.end());
  }
  // For the kernels, and for the reference.
  RowsView shifted() const { return At(shifted_.data() + view_.element_bytes()); }
  RowsView aligned() const { return At(aligned_.data()); }

 private:
  RowsView At(const std::uint8_t* bytes) const {
    RowsView view = view_;
    view.data = bytes + first_;
    return view;
  }
  RowsView view_;
  std::size_t first_ = 0;
  std::vector<std::uint8_t> aligned_, shifted_;
};

// Like a KV head: rows of different size, some channels larger. Sizes of f32 and bf16 use more of
// their range.
Rows RandomRows(Dtype dtype, std::size_t tokens, std::size_t dim, std::size_t gap, unsigned seed,
                bool backwards = false) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const float range = dtype == KVMIX_F16 ? 4.0f : 40.0f;
  Floats size(tokens);
  for (float& s : size) s = std::exp2(std::round(range * normal(random)) / 2.0f);
  return Rows(
      dtype, tokens, dim, gap,
      [&](std::size_t t, std::size_t i) {
        return BitsOf(dtype, normal(random) * size[t] * (i % 13 == 5 ? 20.0f : 1.0f));
      },
      backwards);
}

Floats RandomMean(std::size_t dim, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  Floats mean(dim);
  for (float& m : mean) m = normal(random);
  return mean;
}

// A codec by its name, centred if there is a mean.
HeadCodec Codec(std::string name, const Floats& mean = kNoMean, float head_scale = 0.0f) {
  if (!mean.empty()) name += "+centre";
  HeadCodec codec{ParseCodecKind(name).value(), head_scale, nullptr};
  if (!mean.empty()) codec.vectors = std::make_shared<const CodecVectors>(CodecVectors{mean, {}});
  return codec;
}

kernels::RowFormat FormatOf(const HeadCodec& codec, std::size_t dim) {
  kernels::RowFormat format;
  format.dim = dim;
  format.storage = codec.kind.storage;
  if (codec.kind.scale == KVMIX_SCALE_HEAD) format.constant = codec.head_scale;
  if (codec.kind.scale == KVMIX_SCALE_TOKEN) format.scale = kernels::ScaleStore::kF32;
  if (codec.kind.scale == KVMIX_SCALE_TOKEN_BF16) format.scale = kernels::ScaleStore::kBF16;
  return format;
}

kernels::Transform TransformOf(const HeadCodec& codec) {
  kernels::Transform transform;
  if (codec.kind.centre) transform.mean = codec.mean().data();
  if (codec.kind.shape) transform.shaping = codec.shaping().data();
  return transform;
}

class QuantizeTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { ASSERT_NE(kernels::FindKernels(GetParam()), nullptr); }
  const kernels::EncodeKernels& kernel() const { return kernels::FindKernels(GetParam())->encode; }
  RowCodec Create(const HeadCodec& codec, std::size_t dim) const {
    return RowCodec::Create(codec, dim, GetParam()).value();
  }

  // Rows of codes with gaps between them and scales with one more after them, both checked, then
  // closed.
  reference::Coded Encode(const RowsView& rows, const HeadCodec& codec,
                          const kernels::Transform& transform) const {
    const kernels::RowFormat format = FormatOf(codec, rows.head_dim);
    const bool f16 = format.storage == KVMIX_STORAGE_F16;
    const bool stored = format.scale != kernels::ScaleStore::kConstant;
    const std::size_t bytes = kernels::RowBytes(format), gap = f16 ? 6 : 3, before = f16 ? 2 : 1;
    std::vector<std::uint8_t> coded(before + rows.tokens * (bytes + gap), kUntouched);
    reference::Coded out{{}, Floats(rows.tokens + 1, -1.0f), 0};
    out.clamped = kernel().encode({In(rows), transform, format, coded.data() + before, bytes + gap,
                                   stored ? out.scales.data() : nullptr});
    EXPECT_EQ(out.scales.back(), -1.0f);
    out.scales.resize(stored ? rows.tokens : 0);
    for (std::size_t i = 0; i < before; ++i) EXPECT_EQ(coded[i], kUntouched);
    for (std::size_t t = 0; t < rows.tokens; ++t) {
      const auto row = coded.begin() + static_cast<std::ptrdiff_t>(before + t * (bytes + gap));
      const auto end = row + static_cast<std::ptrdiff_t>(bytes);
      out.rows.insert(out.rows.end(), row, end);
      for (std::size_t i = 0; i < gap; ++i) {
        EXPECT_EQ(end[static_cast<std::ptrdiff_t>(i)], kUntouched) << "written past row " << t;
      }
    }
    return out;
  }

  static void ExpectSame(const reference::Coded& found, const reference::Coded& expected,
                         const RowsView& rows, const HeadCodec& codec) {
    SCOPED_TRACE(testing::Message() << rows.tokens << " x " << rows.head_dim << ", dtype "
                                    << static_cast<int>(rows.dtype) << ", " << ToString(codec.kind)
                                    << " " << codec.head_scale);
    ASSERT_EQ(found.clamped, expected.clamped);
    ASSERT_EQ(found.scales, expected.scales);
    ASSERT_EQ(found.rows, expected.rows);
  }

  void Expect(const Rows& rows, const HeadCodec& codec) const {
    ExpectSame(Encode(rows.shifted(), codec, TransformOf(codec)),
               reference::Encode(rows.aligned(), codec), rows.aligned(), codec);
  }

  void ExpectPerHead(const Rows& rows, const Floats& mean, float scale) const {
    Expect(rows, Codec("i8-head", mean, scale));
  }

  void ExpectAll(const Rows& rows, const Floats& mean) const {
    Expect(rows, Codec("i8-token", mean));
    Expect(rows, Codec("i8-token-bf16", mean));
    for (const std::string name :
         {"i6-token", "i6-token-bf16", "i4-token", "i4-token-bf16", "i3-token", "i3-token-bf16"}) {
      const HeadCodec codec = Codec(name, mean);
      if (Fits(codec.kind, rows.aligned().head_dim)) Expect(rows, codec);
    }
    const HeadCodec codec = Codec("i8-head", mean);
    const float scale = kernel().head_scale(In(rows.shifted()), TransformOf(codec));
    ASSERT_EQ(scale, reference::HeadScale(rows.aligned(), codec));
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
  for (const Dtype dtype : kDtypes) {
    for (const std::size_t dim : kDims) {
      const Floats mean = RandomMean(dim, seed);
      for (const std::size_t tokens : kTokens) {
        for (const std::size_t gap : {std::size_t{0}, std::size_t{5}, dim}) {
          const Rows rows = RandomRows(dtype, tokens, dim, gap, ++seed, gap == 5);
          ExpectAll(rows, kNoMean);
          ExpectAll(rows, mean);
        }
      }
    }
  }
}

TEST_P(QuantizeTest, Long) {
  for (const Dtype dtype : kDtypes) {
    const Rows rows = RandomRows(dtype, 5003, 128, 128, 7);
    ExpectAll(rows, kNoMean);
    ExpectAll(rows, RandomMean(128, 8));
  }
}

// Large outputs with aligned rows are written past the caches.
TEST_P(QuantizeTest, LargeAligned) {
  constexpr std::size_t kMany = 4101;
  for (const std::size_t dim : Sizes{64, 80, 128}) {
    const Rows rows = RandomRows(KVMIX_F16, kMany, dim, 0, 9);
    const auto buffer = [](std::size_t bytes) {
      return std::unique_ptr<void, void (*)(void*)>(std::aligned_alloc(64, (bytes + 63) / 64 * 64),
                                                    std::free);
    };
    const auto codes = buffer(kMany * dim), f32 = buffer(kMany * dim * sizeof(float)),
               f16 = buffer(kMany * dim * sizeof(Half));
    for (const Floats& mean : {kNoMean, RandomMean(dim, 10)}) {
      HeadCodec codec = Codec("i8-head", mean);
      codec.head_scale = 0.75f * reference::HeadScale(rows.aligned(), codec);  // some are clamped
      const RowCodec compiled = Create(codec, dim);
      const reference::Coded expected = reference::Encode(rows.aligned(), codec);
      ASSERT_GT(expected.clamped, 0u);
      ASSERT_EQ(compiled.Encode(rows.shifted(), codes.get(), nullptr), expected.clamped);
      ASSERT_EQ(std::memcmp(codes.get(), expected.rows.data(), expected.rows.size()), 0) << dim;
      compiled.Decode(codes.get(), nullptr, kMany, static_cast<float*>(f32.get()), dim);
      compiled.Decode(codes.get(), nullptr, kMany, static_cast<Half*>(f16.get()), dim);
      const Floats decoded = reference::Decode(expected, kMany, dim, codec);
      for (std::size_t i = 0; i < kMany * dim; ++i) {
        ASSERT_EQ(static_cast<const float*>(f32.get())[i], decoded[i])
            << dim << " channels, value " << i;
        ASSERT_EQ(static_cast<const Half*>(f16.get())[i], FloatToHalf(decoded[i]))
            << dim << " channels, value " << i;
      }
    }
  }
}

// Against their own f32 scale halves are multiplied by an inverse: every significand of the maximum
// with every half that is not far below it. The binade does not matter.
TEST_P(QuantizeTest, EveryHalfAgainstEveryMaximum) {
  constexpr Half kOne = 0x3C00;
  constexpr std::size_t kDim = 512, kRows = 11 * 1024 / (kDim - 1) + 1;
  const kernels::RowFormat format = FormatOf(Codec("i8-token"), kDim);
  std::vector<std::uint8_t> codes(kRows * kDim);
  std::vector<Half> x(kRows * kDim);
  Floats scales(kRows);
  for (Half max = kOne; max < kOne + 1024; ++max) {
    for (std::size_t r = 0, below = 0; r < kRows; ++r) {
      for (std::size_t i = 0; i < kDim; ++i) {  // each row has the maximum, then those below it
        x[r * kDim + i] =
            static_cast<Half>((i == 0 ? max : max - ++below) | (i % 2 ? kSign : Half{0}));
      }
    }
    kernel().encode({In(RowsView::F16(x.data(), kRows, 1, kDim)),
                     {},
                     format,
                     codes.data(),
                     kDim,
                     scales.data()});
    const float scale = HalfToFloat(max) / 127.0f;
    ASSERT_EQ(scales, Floats(kRows, scale));
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      wrong += static_cast<std::int8_t>(codes[i]) !=
               static_cast<int>(std::nearbyint(HalfToFloat(x[i]) / scale));
    }
    ASSERT_EQ(wrong, 0u) << "max " << HalfToFloat(max);
  }
}

// The scales whose significand is within 5 of a multiple of 2^17, with every tie: the only ones
// where the quotient from a reciprocal and two fused multiply-adds could round to another integer
// than the true one (kernels/encode.cc). y comes in as a mean, in rows with a mean each.
TEST_P(QuantizeTest, HardestQuotients) {
  constexpr int kNear = 6;  // floats on either side
  constexpr std::size_t kDim = 3 * (2 * kNear + 1), kRows = 127;
  const std::vector<Half> zero(kRows * kDim, 0);
  for (std::uint32_t multiple = 64; multiple <= 128; ++multiple) {
    for (int off = -kNear; off <= kNear; ++off) {
      const std::uint32_t significand = (multiple << 17) + static_cast<std::uint32_t>(off);
      if (significand < (1u << 23) || significand >= (1u << 24)) continue;
      const float scale = std::ldexp(static_cast<float>(significand), -30);
      Floats mean;
      for (int k = 0; k < 127; ++k) {
        const float tie = static_cast<float>(k) + 0.5f;
        for (const float quotient : {tie, std::nextafter(tie, 0.0f), std::nextafter(tie, 200.0f)}) {
          const std::uint32_t y = std::bit_cast<std::uint32_t>(quotient * scale);
          for (std::uint32_t d = 0; d <= 2 * kNear; ++d)
            mean.push_back(std::bit_cast<float>(y + d - kNear));
        }
      }
      ASSERT_EQ(mean.size(), zero.size());
      std::vector<std::uint8_t> codes(mean.size());
      kernels::Transform transform;
      transform.mean = mean.data();
      transform.row_stride = kDim;
      ASSERT_EQ(kernel().encode({In(RowsView::F16(zero.data(), kRows, 1, kDim)), transform,
                                 FormatOf(Codec("i8-head", kNoMean, scale), kDim), codes.data(),
                                 kDim, nullptr}),
                0u);
      std::size_t wrong = 0;
      for (std::size_t i = 0; i < mean.size(); ++i) {
        wrong += static_cast<std::int8_t>(codes[i]) !=
                 static_cast<int>(std::nearbyint(-mean[i] / scale));
      }
      ASSERT_EQ(wrong, 0u) << "scale " << scale;
    }
  }
}

// Quotients that are ties, exactly or but for the scale's rounding: maxima that are 127 times a
// power of two or a small integer; x = max/2.
TEST_P(QuantizeTest, Ties) {
  for (const Dtype dtype : kDtypes) {
    for (const float max : {127.0f, 127.0f * 3, 127.0f * 7, 127.0f * 13, 127.0f * 15 / 1024,
                            127.0f * 256, 100.0f, 0.37f, 65504.0f}) {
      const float step = max / 254.0f;
      const Rows rows(dtype, 9, 255, 1, [&](std::size_t t, std::size_t i) {
        const float x = i == 0 ? max : i % 3 == 1 ? max / 2 : step * static_cast<float>(i);
        return BitsOf(dtype, (i + t) % 2 ? -x : x);
      });
      ExpectAll(rows, kNoMean);
    }
    // bf16 scales of few bits meet exact ties at many codes.
    const Rows integers(dtype, 64, 100, 0, [&](std::size_t t, std::size_t i) {
      return BitsOf(dtype, static_cast<float>(i * (t + 1) % 1000) / 2);
    });
    ExpectAll(integers, kNoMean);
    ExpectAll(integers, Floats(100, 0.5f));
  }
}

TEST_P(QuantizeTest, ZeroTinyAndHugeRows) {
  const float sizes[] = {0.0f, 0x1p-24f, 0x1p-14f, 1.0f, 65504.0f};
  for (const std::size_t dim : {66, 67}) {  // i4 wants an even one
    const Rows rows(KVMIX_F16, 20, dim, 3, [&](std::size_t t, std::size_t i) {
      return static_cast<Half>(FloatToHalf(sizes[t % 5] * static_cast<float>(i % 8) / 7.0f) |
                               (t % 2 ? kSign : 0u));
    });
    ExpectAll(rows, kNoMean);
    // x = 0: y is the mean. On both sides of 2^-100, where scales begin, and of 2^-60, where
    // quotients are no longer divisions.
    for (const float size : {0x1p-149f, 0x1.fffffep-101f, 0x1p-100f, 0x1.234p-100f, 0x1p-61f,
                             0x1.fffffep-61f, 0x1p-60f, 0x1p60f, 0x1p120f}) {
      Floats mean(dim);
      for (std::size_t i = 0; i < mean.size(); ++i)
        mean[i] = size * (1.0f - static_cast<float>(i) / 60.0f);
      for (const Dtype dtype : kDtypes) {
        const Rows zeros(dtype, 3, dim, 0, [](std::size_t, std::size_t) { return 0u; });
        ExpectAll(zeros, mean);
      }
      ExpectAll(rows, mean);
    }
  }
}

// What f32 and bf16 have beyond the halves' range, down to subnormal numbers and up to the largest,
// minus means of any size: y itself stays finite.
TEST_P(QuantizeTest, NumbersFarBeyondHalves) {
  for (const std::size_t dim : {66, 67}) {  // i4 wants an even one
    std::vector<Floats> means = {kNoMean, RandomMean(dim, 31)};
    for (const float size : {1e-38f, 1e30f, -1e30f, FLT_MAX, -FLT_MAX}) {
      Floats mean(dim);
      for (std::size_t i = 0; i < dim; ++i) mean[i] = size * (1.0f - static_cast<float>(i) / 60.0f);
      means.push_back(mean);
    }
    const float sizes[] = {1e-45f,        1e-38f,          0x1.fffffep-101f, 0x1p-100f,
                           0x1.234p-100f, 0x1.fffffep-61f, 0x1p-60f,         1e-10f,
                           1e6f,          1e30f,           FLT_MAX};
    constexpr std::size_t kSizes = std::size(sizes);
    for (const Dtype dtype : {KVMIX_BF16, KVMIX_F32}) {
      const auto number = [&](std::size_t t, std::size_t i) {
        const float x = sizes[t % kSizes] * (static_cast<float>(i % 8) / 7.0f);
        return BitsOf(dtype, (t + i) % 2 ? -x : x);
      };
      const Rows rows(dtype, 2 * kSizes, dim, 3, number);
      for (const Floats& mean : means) {
        ExpectAll(rows, mean);
        for (const float scale : {1e-38f, 1e-3f, 1e28f, FLT_MAX / 127.0f, FLT_MAX})
          ExpectPerHead(rows, mean, scale);
      }
      for (std::size_t t = 0; t < kSizes; ++t) {  // each size by itself as a head
        const Rows row(dtype, 9, dim, 0, [&](std::size_t, std::size_t i) { return number(t, i); });
        ExpectAll(row, kNoMean);
      }
    }
  }
}

TEST_P(QuantizeTest, NotANumber) {
  struct Special {
    Dtype dtype;
    std::uint32_t bits;
  };
  std::vector<Special> specials;
  for (const std::uint32_t half : {0x7C00, 0x7E00, 0x7C01}) {  // infinity, quiet and signalling NaN
    specials.push_back({KVMIX_F16, half});
    specials.push_back({KVMIX_F16, half | kSign});
  }
  for (const std::uint32_t bits : {0x7F800000u, 0x7FC00000u, 0x7F810000u, 0x7F800001u}) {
    for (const std::uint32_t sign : {0u, kFloatSign}) {
      specials.push_back({KVMIX_F32, bits | sign});
      if ((bits & 0xFFFF) == 0) specials.push_back({KVMIX_BF16, (bits | sign) >> 16});
    }
  }
  for (const Special& special : specials) {
    for (const std::size_t dim : Sizes{1, 31, 64, 80}) {
      const Rows base = RandomRows(special.dtype, 17, dim, 2, 3);
      const Rows rows(special.dtype, 17, dim, 2, [&](std::size_t t, std::size_t i) {
        return t % 4 == 1 && i % 30 == 0 ? special.bits
                                         : BitsOf(special.dtype, base.aligned().At(t, 0, i));
      });
      ExpectAll(rows, kNoMean);
      ExpectAll(rows, RandomMean(dim, 4));
    }
  }
}

TEST_P(QuantizeTest, ClampsAndCounts) {
  for (const Dtype dtype : kDtypes) {
    for (const std::size_t dim : Sizes{3, 64, 100}) {
      const Rows rows = RandomRows(dtype, 33, dim, 0, 5);
      const Floats mean = RandomMean(dim, 6);
      const float full = reference::HeadScale(rows.aligned(), Codec("i8-head"));
      for (const float scale :
           {full * 0.99f, full * 0.5f, full * 0.1f, 1e-30f, 0x1p-126f, 1e30f, 3e38f, 0.0f, 0.02f}) {
        ExpectPerHead(rows, kNoMean, scale);
        ExpectPerHead(rows, mean, scale);
      }
    }
    // 127.49 stays, 127.5 (a tie, to even: 128) is clamped.
    const Rows edge(dtype, 1, 4, 0, [&](std::size_t, std::size_t i) {
      return BitsOf(dtype, i < 2 ? (dtype == KVMIX_BF16 ? 127.0f : 127.4375f) : 127.5f);
    });
    std::int8_t codes[4];
    EXPECT_EQ(Create(Codec("i8-head", kNoMean, 1.0f), 4).Encode(edge.shifted(), codes, nullptr),
              2u);
    EXPECT_EQ(codes[0], 127);
    EXPECT_EQ(codes[3], 127);
  }
}

// Numbers that all types have, NaN and infinities among them: nothing but the numbers counts.
TEST_P(QuantizeTest, TheTypeOfTheNumbersDoesNotMatter) {
  for (const std::size_t dim : Sizes{1, 3, 31, 64, 80, 101, 128}) {
    for (const std::size_t tokens : Sizes{1, 9, 17}) {
      const Floats mean = RandomMean(dim, 41);
      const Rows random = RandomRows(KVMIX_F16, tokens, dim, 0, 42);
      const auto number = [&](std::size_t t, std::size_t i) {
        if (t % 8 == 3 && i % 50 == 0) return t % 16 == 3 ? HUGE_VALF : std::nanf("");
        const float x = random.aligned().At(t, 0, i) * (t % 7 == 2 ? 0x1p-14f : 1.0f);
        return HalfToFloat(FloatToHalf(x) & 0xFFF8u);  // 8 bits: a bf16 number as well
      };
      for (const std::string name : {"f16", "i8-token", "i8-token-bf16", "i8-head", "i4-token"}) {
        if (name == "i4-token" && dim % 2 != 0) continue;
        for (const Floats& m : {kNoMean, mean}) {
          if (name == "f16" && !m.empty()) continue;
          const HeadCodec codec = Codec(name, m, name == "i8-head" ? 0.04f : 0.0f);
          std::vector<reference::Coded> coded;
          Floats head_scales;
          for (const Dtype dtype : kDtypes) {
            for (const bool backwards : {false, true}) {
              const Rows rows(
                  dtype, tokens, dim, 5,
                  [&](std::size_t t, std::size_t i) { return BitsOf(dtype, number(t, i)); },
                  backwards);
              coded.push_back(Encode(rows.shifted(), codec, TransformOf(codec)));
              head_scales.push_back(kernel().head_scale(In(rows.shifted()), TransformOf(codec)));
              ExpectSame(coded.back(), coded.front(), rows.aligned(), codec);
              ASSERT_EQ(head_scales.back(), head_scales.front());
            }
          }
        }
      }
    }
  }
}

// The rows of one token: heads, each with a mean of its own.
TEST_P(QuantizeTest, HeadsWithMeansSideBySide) {
  for (const Dtype dtype : kDtypes) {
    for (const std::size_t dim : Sizes{3, 64, 80, 128}) {
      for (const std::size_t heads : Sizes{1, 7, 8, 9, 19}) {
        const Rows rows = RandomRows(dtype, heads, dim, 4, 51);
        const Floats means = RandomMean(heads * dim, 52);
        kernels::Transform transform;
        transform.mean = means.data();
        transform.row_stride = dim;
        const auto own = [&](std::size_t h) {
          return Floats(means.begin() + static_cast<std::ptrdiff_t>(h * dim),
                        means.begin() + static_cast<std::ptrdiff_t>((h + 1) * dim));
        };
        float head_scale = 0.0f;
        for (std::size_t h = 0; h < heads; ++h) {
          head_scale = std::max(head_scale, reference::HeadScale(rows.aligned().Tokens(h, 1),
                                                                 Codec("i8-head", own(h))));
        }
        ASSERT_EQ(kernel().head_scale(In(rows.shifted()), transform), head_scale);
        for (const std::string name : {"i8-token", "i8-token-bf16", "i8-head", "i4-token-bf16"}) {
          if (name == "i4-token-bf16" && dim % 2 != 0) continue;
          const float scale = name == "i8-head" ? 0.5f * head_scale : 0.0f;
          const HeadCodec codec = Codec(name, own(0), scale);
          reference::Coded expected;
          Floats decoded;
          for (std::size_t h = 0; h < heads; ++h) {
            const HeadCodec head = Codec(name, own(h), scale);
            const reference::Coded one = reference::Encode(rows.aligned().Tokens(h, 1), head);
            expected.rows.insert(expected.rows.end(), one.rows.begin(), one.rows.end());
            expected.scales.insert(expected.scales.end(), one.scales.begin(), one.scales.end());
            expected.clamped += one.clamped;
            const Floats row = reference::Decode(one, 1, dim, head);
            decoded.insert(decoded.end(), row.begin(), row.end());
          }
          ExpectSame(Encode(rows.shifted(), codec, transform), expected, rows.aligned(), codec);
          Floats out(decoded.size());
          kernel().decode_f32({FormatOf(codec, dim), transform, expected.rows.data(),
                               kernels::RowBytes(FormatOf(codec, dim)),
                               expected.scales.empty() ? nullptr : expected.scales.data(), heads},
                              out.data(), dim);
          ASSERT_EQ(out, decoded) << name << ", " << heads << " heads, " << dim << " channels";
        }
      }
    }
  }
}

TEST_P(QuantizeTest, F16StorageOfEveryType) {
  for (const Dtype dtype : kDtypes) {
    for (const std::size_t dim : kDims) {
      for (const std::size_t tokens : Sizes{0, 1, 9})
        Expect(RandomRows(dtype, tokens, dim, 3, 61, tokens == 9), Codec("f16"));
    }
  }
}

// Rounding to halves, written out.
TEST_P(QuantizeTest, F16StorageRoundsCutsAndCounts) {
  struct Case {
    float x;
    Half half;
    bool clamped;
  };
  const std::vector<Case> cases = {
      {1.0f, 0x3C00, false},
      {0x1.002p0f, 0x3C00, false},     // a tie, to even
      {0x1.002002p0f, 0x3C01, false},  // just above
      {0x1.006p0f, 0x3C02, false},     // a tie, to even
      {0x1.ffep0f, 0x4000, false},     // up to the next binade
      {0x1p-24f, 0x0001, false},       // the smallest
      {0x1p-25f, 0x0000, false},       // a tie, to even
      {0x1.000002p-25f, 0x0001, false},
      {0x1.8p-24f, 0x0002, false},    // a tie, to even
      {0x1.ff8p-15f, 0x03FF, false},  // the largest subnormal
      {0x1.ffcp-15f, 0x0400, false},  // a tie, to even: 2^-14
      {1e-45f, 0x0000, false},
      {65504.0f, 0x7BFF, false},
      {0x1.ffdffep15f, 0x7BFF, false},  // rounds down to 65504
      {65520.0f, 0x7BFF, true},         // a tie, to even: beyond
      {65536.0f, 0x7BFF, true},
      {1e30f, 0x7BFF, true},
      {FLT_MAX, 0x7BFF, true},
      {HUGE_VALF, 0x7BFF, false},  // counts as 65504
      {std::nanf(""), 0x0000, false},
      {std::bit_cast<float>(0x7F800001u), 0x0000, false},
  };
  for (const bool negative : {false, true}) {
    for (std::size_t dim = 1; dim <= cases.size(); ++dim) {  // each at every place of a vector
      const Rows rows(KVMIX_F32, cases.size(), dim, 1, [&](std::size_t t, std::size_t i) {
        return std::bit_cast<std::uint32_t>(cases[(t + i) % cases.size()].x) |
               (negative ? kFloatSign : 0u);
      });
      const reference::Coded coded = Encode(rows.shifted(), Codec("f16"), {});
      std::uint64_t clamped = 0;
      for (std::size_t i = 0; i < cases.size() * dim; ++i) {
        const Case& c = cases[(i / dim + i % dim) % cases.size()];
        clamped += c.clamped;
        const int half = coded.rows[2 * i] | coded.rows[2 * i + 1] << 8;
        const Half sign = negative && !std::isnan(c.x) ? kSign : Half{0};
        ASSERT_EQ(half, c.half | sign) << c.x << (negative ? ", negative" : "");
      }
      ASSERT_EQ(coded.clamped, clamped);
    }
  }
}

TEST_P(QuantizeTest, Dequantize) {
  for (const std::size_t dim : kDims) {
    for (const std::size_t tokens : Sizes{0, 1, 9}) {
      const Rows rows = RandomRows(KVMIX_F16, tokens, dim, 0, 11);
      const Floats mean = RandomMean(dim, 12);
      for (const HeadCodec& codec :
           {Codec("i8-token"), Codec("i8-token", mean), Codec("i8-token-bf16"),
            Codec("i8-head", mean, 0.3f), Codec("f16"), Codec("i4-token"),
            Codec("i4-token-bf16", mean)}) {
        if (codec.kind.storage == KVMIX_STORAGE_I4 && dim % 2 != 0) continue;
        const reference::Coded q = reference::Encode(rows.aligned(), codec);
        const Floats decoded = reference::Decode(q, tokens, dim, codec);
        const std::size_t stride = dim + 2;
        Floats f32(tokens * stride + 1, -1e9f);
        std::vector<Half> f16(tokens * stride + 1, kNaN);
        const RowCodec compiled = Create(codec, dim);
        compiled.Decode(q.rows.data(), q.scales.data(), tokens, f32.data() + 1, stride);
        compiled.Decode(q.rows.data(), q.scales.data(), tokens, f16.data() + 1, stride);
        ASSERT_EQ(f32[0], -1e9f);
        ASSERT_EQ(f16[0], kNaN);
        for (std::size_t t = 0; t < tokens; ++t) {
          for (std::size_t i = 0; i < stride; ++i) {
            const float expected = i < dim ? decoded[t * dim + i] : -1e9f;
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
  std::vector<std::uint8_t> codes(4 * 255);
  for (std::size_t i = 0; i < codes.size(); ++i)
    codes[i] = static_cast<std::uint8_t>(static_cast<int>(i % 255) - 127);
  std::vector<Half> out(codes.size());
  for (const float scale : {0.0f, 515.9f, 515.7795f, 600.0f, 1e6f, 1.0f / 3, 0x1.8p-24f, 0x1p-25f,
                            0x1.000002p-25f, 0x1.5p-20f, 0x1.003p-5f}) {
    const HeadCodec codec = Codec("i8-head", kNoMean, scale);
    kernel().decode_f16({FormatOf(codec, 255), {}, codes.data(), 255, nullptr, 4}, out.data(), 255);
    const Floats decoded = reference::Decode(codes.data(), nullptr, 4, 255, codec);
    for (std::size_t i = 0; i < codes.size(); ++i) {
      ASSERT_EQ(out[i], FloatToHalf(decoded[i]))
          << int{static_cast<std::int8_t>(codes[i])} << " x " << scale;
    }
  }
}

// ---- +shape

// A random unit lower triangular matrix; row after row its numbers get smaller.
Floats RandomMatrix(std::size_t dim, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, 1.0f / std::sqrt(static_cast<float>(dim)));
  Floats matrix(dim * dim, 0.0f);
  for (std::size_t i = 0; i < dim; ++i) {
    for (std::size_t j = 0; j < i; ++j) matrix[i * dim + j] = normal(random);
    matrix[i * dim + i] = 1.0f;
  }
  return matrix;
}

HeadCodec ShapedCodec(const std::string& name, const Floats& mean, const Floats& matrix) {
  HeadCodec codec{ParseCodecKind(name + (mean.empty() ? "+shape" : "+centre+shape")).value()};
  codec.vectors = std::make_shared<const CodecVectors>(CodecVectors{mean, {}, matrix});
  return codec;
}

constexpr const char* kShapedNames[] = {"i8-token",      "i8-token-bf16", "i6-token",
                                        "i6-token-bf16", "i4-token-bf16", "i3-token-bf16"};

TEST_P(QuantizeTest, ShapedCodesAreTheReferences) {
  for (const std::string name : kShapedNames) {
    for (const std::size_t dim : Sizes{1, 2, 7, 8, 16, 24, 31, 40, 64, 80, 128, 256, 512}) {
      const Floats matrix = RandomMatrix(dim, 95);
      for (const bool centred : {false, true}) {
        const HeadCodec codec = ShapedCodec(name, centred ? RandomMean(dim, 96) : kNoMean, matrix);
        if (!Fits(codec.kind, dim)) continue;
        for (const std::size_t tokens : Sizes{1, 2, 8, 13}) {
          std::mt19937 random(97);
          std::normal_distribution<float> normal(0.0f, 5.0f);
          Expect(Rows(KVMIX_F16, tokens, dim, 0,
                      [&](std::size_t, std::size_t) { return BitsOf(KVMIX_F16, normal(random)); }),
                 codec);
        }
      }
    }
  }
}

// Zeros, tiny and huge values, NaN, Inf: finite, and the same on every target.
TEST_P(QuantizeTest, ShapedRowsOfAnyValues) {
  constexpr std::size_t kDim = 40;
  Floats matrix = RandomMatrix(kDim, 98);
  for (std::size_t i = 0; i < kDim; ++i) {
    for (std::size_t j = 0; j < i; ++j) matrix[i * kDim + j] *= i % 2 == 0 ? 1.0f : 1000.0f;
  }
  const Floats values = {0.0f,     1.0f,  0x1p-100f, 0x1p-101f, 0x1p-149f, FLT_MAX,
                         -FLT_MAX, 1e30f, NAN,       INFINITY,  -INFINITY, 3.0f};
  for (const std::string name : kShapedNames) {
    const HeadCodec codec = ShapedCodec(name, kNoMean, matrix);
    const Rows rows(KVMIX_F32, 50, kDim, 0, [&](std::size_t t, std::size_t i) {
      return BitsOf(KVMIX_F32, values[t % 7 == 0 ? t / 7 : (t * t + 5 * t * i) % values.size()]);
    });
    Expect(rows, codec);
  }
}

// What it is for: the mean of (q . e)^2 falls, for queries that do not look everywhere.
TEST_P(QuantizeTest, ShapingMovesErrorsToWhereNoQueryLooks) {
  constexpr std::size_t kDim = 64, kRank = 8;
  std::mt19937 random(99);
  std::normal_distribution<double> normal;
  std::vector<double> basis(kRank * kDim), moment(kDim * kDim, 0.0);
  for (double& x : basis) x = normal(random);
  for (std::size_t i = 0; i < kDim * kDim; ++i) {
    for (std::size_t r = 0; r < kRank; ++r)
      moment[i] += basis[r * kDim + i / kDim] * basis[r * kDim + i % kDim];
  }
  const Floats matrix = tune::ShapingMatrix(moment, {}, false, kDim);
  const Rows rows(KVMIX_F32, 500, kDim, 0, [&](std::size_t, std::size_t) {
    return BitsOf(KVMIX_F32, static_cast<float>(normal(random)));
  });
  for (const std::string name : kShapedNames) {
    double missed[2] = {0.0, 0.0};
    for (const bool shaped : {false, true}) {
      const HeadCodec codec = shaped ? ShapedCodec(name, kNoMean, matrix) : Codec(name);
      const Floats decoded =
          reference::Decode(Encode(rows.shifted(), codec, TransformOf(codec)), 500, kDim, codec);
      for (std::size_t t = 0; t < 500; ++t) {
        for (std::size_t r = 0; r < kRank; ++r) {
          double dot = 0.0;
          for (std::size_t c = 0; c < kDim; ++c)
            dot += basis[r * kDim + c] * (rows.aligned().At(t, 0, c) - decoded[t * kDim + c]);
          missed[shaped] += dot * dot;
        }
      }
    }
    EXPECT_LT(missed[1], 0.25 * missed[0]) << name;
  }
}

// H = L D L^T, of queries as the kernel sees them: what is left of H between L's inverses is
// diagonal.
TEST(ShapingMatrix, FactorsTheQueriesSecondMoment) {
  constexpr std::size_t kDim = 24, kQueries = 50;
  std::mt19937 random(90);
  std::normal_distribution<float> normal;
  Floats factor(kDim);
  for (float& f : factor) f = std::exp(normal(random));
  std::vector<double> moment(kDim * kDim, 0.0), h(kDim * kDim, 0.0);
  for (std::size_t n = 0; n < kQueries; ++n) {
    Floats q(kDim);
    for (float& x : q) x = normal(random);
    Floats seen = q;
    for (std::size_t c = 0; c < kDim; ++c) seen[c] *= factor[c];
    reference::Rotate(seen);
    for (std::size_t i = 0; i < kDim * kDim; ++i) {
      moment[i] += static_cast<double>(q[i / kDim]) * q[i % kDim];
      h[i] += static_cast<double>(seen[i / kDim]) * seen[i % kDim];
    }
  }
  double trace = 0.0;
  for (std::size_t i = 0; i < kDim; ++i) trace += h[i * kDim + i];
  for (std::size_t i = 0; i < kDim; ++i) h[i * kDim + i] += 0.03 * trace / kDim;
  const Floats l = tune::ShapingMatrix(moment, factor, true, kDim);
  for (int side = 0; side < 2; ++side) {  // h <- L^-1 h, then the same from the right
    for (std::size_t row = 0; row < kDim; ++row) {
      for (std::size_t k = 0; k < row; ++k) {
        for (std::size_t c = 0; c < kDim; ++c)
          h[row * kDim + c] -= double{l[row * kDim + k]} * h[k * kDim + c];
      }
    }
    for (std::size_t i = 0; i < kDim * kDim; ++i) {
      if (i / kDim < i % kDim) std::swap(h[i], h[i % kDim * kDim + i / kDim]);
    }
  }
  for (std::size_t i = 0; i < kDim * kDim; ++i) {
    if (i / kDim == i % kDim) {
      EXPECT_GT(h[i], 0.0);
    } else {
      EXPECT_NEAR(h[i], 0.0, 1e-5 * trace) << i / kDim << ", " << i % kDim;
    }
  }
  // Of a head at which no query looked.
  const Floats unit = tune::ShapingMatrix(std::vector<double>(kDim * kDim), {}, false, kDim);
  for (std::size_t i = 0; i < unit.size(); ++i)
    EXPECT_EQ(unit[i], i / kDim == i % kDim ? 1.0f : 0.0f);
}

// ---- i6, i4, i3

// The table is that of the quantizer whose levels are the means of a normal distribution between
// the borders, and whose borders lie halfway between the levels.
TEST(I4Levels, AreLloydAndMaxs) {
  const auto density = [](double x) { return std::exp(-0.5 * x * x) / std::sqrt(2.0 * M_PI); };
  const auto above = [](double x) { return 0.5 * std::erfc(x / std::sqrt(2.0)); };
  double levels[8];
  for (int i = 0; i < 8; ++i) levels[i] = 0.3 * (i + 0.5);
  for (int round = 0; round < 5000; ++round) {
    double borders[9] = {0.0};
    for (int i = 1; i < 8; ++i) borders[i] = 0.5 * (levels[i - 1] + levels[i]);
    borders[8] = 30.0;
    for (int i = 0; i < 8; ++i) {
      levels[i] = (density(borders[i]) - density(borders[i + 1])) /
                  (above(borders[i]) - above(borders[i + 1]));
    }
  }
  EXPECT_NEAR(levels[7], 2.7326, 1e-4);
  for (int i = 0; i < 8; ++i) {
    EXPECT_EQ(kernels::kLevels[static_cast<std::size_t>(i)],
              std::lround(127.0 * levels[i] / levels[7]));
    EXPECT_EQ(kernels::kLevels[static_cast<std::size_t>(15 - i)],
              -kernels::kLevels[static_cast<std::size_t>(i)]);
  }
}

// The squared error of a row in i4 at a scale, every value at its nearest level; best: with the
// scale then made the best one for these levels.
double I4Error(const RowsView& rows, std::size_t token, double scale, bool best) {
  double a = 0.0, b = 0.0, square = 0.0;
  for (std::size_t c = 0; c < rows.head_dim; ++c) {
    const double x = rows.At(token, 0, c);
    double nearest = kernels::kLevels[0];
    for (const double level : kernels::kLevels) {
      if (std::fabs(x - scale * level) < std::fabs(x - scale * nearest)) nearest = level;
    }
    a += x * nearest;
    b += nearest * nearest;
    square += x * x;
  }
  const double by = best ? a / b : scale;
  return square - 2.0 * by * a + by * by * b;
}

// A row's scale is never worse than absmax / 127, which i8 takes, and hardly worse than the best of
// many.
TEST_P(QuantizeTest, I4ScalesAreNearTheBest) {
  for (const std::size_t dim : Sizes{64, 128}) {
    for (const bool outliers : {false, true}) {
      std::mt19937 random(91);
      std::normal_distribution<float> normal;
      const Rows rows(KVMIX_F32, 100, dim, 0, [&](std::size_t, std::size_t i) {
        return BitsOf(KVMIX_F32, normal(random) * (outliers && i % 13 == 5 ? 4.0f : 1.0f));
      });
      const RowCodec codec = Create(Codec("i4-token"), dim);
      std::vector<std::uint8_t> codes(dim / 2);
      double sum = 0.0, best_sum = 0.0;
      for (std::size_t t = 0; t < 100; ++t) {
        const RowsView row = rows.aligned().Tokens(t, 1);
        float scale = 0.0f, absmax = 0.0f;
        codec.Encode(row, codes.data(), &scale);
        const double error = codec.Errors(row, codes.data(), &scale).sum_squared_error;
        for (std::size_t c = 0; c < dim; ++c) absmax = std::max(absmax, std::fabs(row.At(0, 0, c)));
        EXPECT_LE(error, 1.0001 * I4Error(row, 0, absmax / 127.0, false));
        double best = HUGE_VAL;
        for (int i = 0; i < 400; ++i)
          best = std::min(best, I4Error(row, 0, absmax / 127.0 * (0.4 + 0.002 * i), true));
        EXPECT_LE(error, 1.25 * best) << "row " << t;
        sum += error;
        best_sum += best;
      }
      EXPECT_LE(sum, 1.04 * best_sum) << dim << (outliers ? ", outliers" : "");
    }
  }
}

// A rotated row of any model is near normal: 16 levels for a whole normal distribution leave 9.5e-3
// of its square, and a scale for each row somewhat less.
TEST_P(QuantizeTest, I4ErrorOfRotatedRows) {
  for (const std::size_t dim : Sizes{64, 80, 128, 256}) {
    for (const std::string name : {"i4-token+hadamard", "i4-token-bf16+hadamard"}) {
      std::mt19937 random(92);
      std::normal_distribution<float> normal;
      const Rows rows(KVMIX_F16, 2000, dim, 0, [&](std::size_t t, std::size_t) {
        return BitsOf(KVMIX_F16, normal(random) * (t % 2 == 0 ? 1.0f : 100.0f));
      });
      const RowCodec codec = Create(Codec(name), dim);
      std::vector<std::uint8_t> codes(2000 * dim / 2);
      Floats scales(2000);
      codec.Encode(rows.aligned(), codes.data(), scales.data());
      double square = 0.0;
      for (std::size_t i = 0; i < 2000 * dim; ++i) {
        const double x = rows.aligned().At(i / dim, 0, i % dim);
        square += x * x;
      }
      const ErrorSums errors = codec.Errors(rows.aligned(), codes.data(), scales.data());
      EXPECT_LE(errors.sum_squared_error / square, 9.5e-3) << name << ", " << dim;
    }
  }
}

// The largest floats come back as finite numbers, which a scale rounded up would not let them.
TEST_P(QuantizeTest, I4OfTheLargestFloatsIsFinite) {
  for (const std::string name : {"i4-token", "i4-token-bf16"}) {
    const Rows rows(KVMIX_F32, 2, 34, 0, [](std::size_t t, std::size_t i) {
      return BitsOf(KVMIX_F32, t == 0 || i == 0 ? (i % 2 == 0 ? FLT_MAX : -FLT_MAX) : 0.0f);
    });
    const RowCodec codec = Create(Codec(name), 34);
    std::uint8_t codes[34];
    float scales[2], out[68];
    codec.Encode(rows.shifted(), codes, scales);
    codec.Decode(codes, scales, 2, out, 34);
    for (const float x : out) EXPECT_TRUE(std::isfinite(x)) << name;
    EXPECT_NEAR(out[0] / FLT_MAX, 1.0f, 0.01f) << name;
    EXPECT_NEAR(out[33] / FLT_MAX, -1.0f, 0.01f) << name;
  }
}

TEST_P(QuantizeTest, Errors) {
  for (const Dtype dtype : kDtypes) {
    for (const std::size_t dim : kDims) {
      for (const std::size_t tokens : Sizes{0, 1, 9, 300}) {
        const Rows rows = RandomRows(dtype, tokens, dim, 7, 21);
        const Floats mean = RandomMean(dim, 22);
        for (const HeadCodec& codec : {Codec("i8-token-bf16"), Codec("i8-token-bf16", mean),
                                       Codec("f16"), Codec("i4-token", mean)}) {
          if (dtype != KVMIX_F16 && codec.kind.storage == KVMIX_STORAGE_F16) continue;
          if (codec.kind.storage == KVMIX_STORAGE_I4 && dim % 2 != 0) continue;
          const reference::Coded q = reference::Encode(rows.aligned(), codec);
          const ErrorSums expected = reference::Errors(rows.aligned(), q, codec);
          const ErrorSums errors =
              Create(codec, dim).Errors(rows.shifted(), q.rows.data(), q.scales.data());
          EXPECT_EQ(errors.count, tokens * dim);
          EXPECT_NEAR(errors.sum_squared_error, expected.sum_squared_error,
                      1e-5 * expected.sum_squared_error);  // f32 within a row
          EXPECT_NEAR(errors.max_error, expected.max_error, 1e-6 * expected.max_error);
          EXPECT_EQ(errors.max_abs, expected.max_abs);
        }
      }
    }
  }
}

TEST_P(QuantizeTest, ErrorsOfNotANumber) {
  const std::int8_t codes[] = {0, 127, 0, 0};
  for (const Dtype dtype : kDtypes) {
    const float x[] = {std::nanf(""), HUGE_VALF, 1.0f, -1.0f};
    const Rows rows(dtype, 1, 4, 0,
                    [&](std::size_t, std::size_t i) { return BitsOf(dtype, x[i]); });
    const ErrorSums errors = Create(Codec("i8-head", kNoMean, 65504.0f / 127.0f), 4)
                                 .Errors(rows.shifted(), codes, nullptr);
    EXPECT_NEAR(errors.sum_squared_error, 2.0, 1e-3);
    EXPECT_EQ(errors.max_abs, 65504.0);
  }
}

TEST_P(QuantizeTest, EveryHalfToFloatAndFinite) {
  constexpr std::size_t kDim = 509, kRows = 65536 / kDim + 1;
  const Rows all(KVMIX_F16, kRows, kDim, 0, [](std::size_t t, std::size_t i) {
    return static_cast<std::uint32_t>((t * kDim + i) & 0xFFFF);
  });
  Floats floats(kRows * kDim);
  kernel().to_float(In(all.shifted()), floats.data(), kDim);
  const reference::Coded finite = Encode(all.shifted(), Codec("f16"), {});
  EXPECT_EQ(finite.clamped, 0u);
  for (std::size_t i = 0; i < floats.size(); ++i) {
    const float expected = all.aligned().At(i / kDim, 0, i % kDim);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(floats[i])) << i;
    } else {
      ASSERT_EQ(std::bit_cast<std::uint32_t>(floats[i]), std::bit_cast<std::uint32_t>(expected))
          << i;
    }
    const Half half = static_cast<Half>(finite.rows[2 * i] | finite.rows[2 * i + 1] << 8);
    ASSERT_EQ(HalfToFloat(half), reference::Finite(expected)) << i;
  }
}

// f32 and bf16 as they are, NaN's bits too; strides and what lies between rows.
TEST_P(QuantizeTest, ToFloatKeepsTheBits) {
  std::mt19937 random(71);
  for (const Dtype dtype : {KVMIX_BF16, KVMIX_F32}) {
    for (const std::size_t dim : Sizes{1, 31, 64, 100}) {
      for (const bool backwards : {false, true}) {
        const Rows rows(
            dtype, 9, dim, 2,
            [&](std::size_t t, std::size_t i) {
              const auto bits =
                  static_cast<std::uint32_t>(random() | ((t + i) % 5 == 0 ? 0x7F800000u : 0u));
              return dtype == KVMIX_F32 ? bits : bits >> 16;
            },
            backwards);
        Floats out(9 * (dim + 3), -1e9f);
        kernel().to_float(In(rows.shifted()), out.data(), dim + 3);
        for (std::size_t t = 0; t < 9; ++t) {
          for (std::size_t i = 0; i < dim + 3; ++i) {
            const float expected = i < dim ? rows.aligned().At(t, 0, i) : -1e9f;
            ASSERT_EQ(std::bit_cast<std::uint32_t>(out[t * (dim + 3) + i]),
                      std::bit_cast<std::uint32_t>(expected));
          }
        }
      }
    }
  }
}

TEST_P(QuantizeTest, RowCodecTakesStridedRowsOfEveryType) {
  for (const Dtype dtype : kDtypes) {
    const Rows rows = RandomRows(dtype, 21, 80, 9, 81, true);
    const Floats mean = RandomMean(80, 82);
    for (const HeadCodec& codec :
         {Codec("f16"), Codec("i8-head", kNoMean, 0.1f), Codec("i8-token", mean),
          Codec("i8-token-bf16"), Codec("i8-head", mean, 0.1f)}) {
      const RowCodec compiled = Create(codec, 80);
      EXPECT_EQ(compiled.row_bytes(), codec.kind.storage == KVMIX_STORAGE_F16 ? 160u : 80u);
      EXPECT_EQ(compiled.stores_scales(), codec.kind.scale == KVMIX_SCALE_TOKEN ||
                                              codec.kind.scale == KVMIX_SCALE_TOKEN_BF16);
      reference::Coded coded{std::vector<std::uint8_t>(21 * compiled.row_bytes()),
                             Floats(compiled.stores_scales() ? 21 : 0), 0};
      coded.clamped = compiled.Encode(rows.shifted(), coded.rows.data(), coded.scales.data());
      ExpectSame(coded, reference::Encode(rows.aligned(), codec), rows.aligned(), codec);
      EXPECT_EQ(HeadScale(rows.shifted(), codec), reference::HeadScale(rows.aligned(), codec));
    }
  }
}

TEST(RowCodec, RefusesWhatItCannotDo) {
  EXPECT_TRUE(RowCodec::Create(Codec("i8-token"), 512).ok());
  EXPECT_FALSE(RowCodec::Create(Codec("i8-token"), 0).ok());
  EXPECT_FALSE(RowCodec::Create(Codec("i8-token"), 513).ok());
  EXPECT_FALSE(RowCodec::Create(Codec("i8-token"), 64, "no such target").ok());
  EXPECT_FALSE(RowCodec::Create(Codec("i8-head", kNoMean, 0.0f), 64).ok());
  EXPECT_FALSE(RowCodec::Create(Codec("i8-token", Floats(63)), 64).ok());
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
