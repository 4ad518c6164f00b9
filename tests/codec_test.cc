// Codecs: names, sizes, which kinds exist, which numbers they must have.
#include "kvmix/codec.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "dump_files.h"

namespace kvmix {
namespace {

using testing::ExpectGoodMessage;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr std::size_t kDim = 8;

// Every combination of fields, whether it exists or not.
std::vector<CodecKind> AllFields() {
  std::vector<CodecKind> kinds;
  for (const Storage storage : {KVMIX_STORAGE_F16, KVMIX_STORAGE_I8, KVMIX_STORAGE_I6,
                                KVMIX_STORAGE_I4, KVMIX_STORAGE_I3}) {
    for (const Scale scale :
         {KVMIX_SCALE_NONE, KVMIX_SCALE_HEAD, KVMIX_SCALE_TOKEN, KVMIX_SCALE_TOKEN_BF16}) {
      for (unsigned i = 0; i < 48; ++i) {
        kinds.push_back({storage, scale, (i & 1) != 0, (i & 2) != 0, (i & 4) != 0, (i & 8) != 0,
                         static_cast<Operands>(i / 16)});
      }
    }
  }
  return kinds;
}

// f16 is stored as it is; codes have a scale, and any steps before it. The scale is a head's only
// of int8 that is not shaped.
bool Exists(const CodecKind& kind) {
  if (kind.storage == KVMIX_STORAGE_F16) return kind == CodecKind();
  if (kind.operands == KVMIX_OPERANDS_8 && kind.storage != KVMIX_STORAGE_I8) return false;
  if (kind.operands == KVMIX_OPERANDS_16 && kind.storage == KVMIX_STORAGE_I8) return false;
  if (kind.scale == KVMIX_SCALE_HEAD && (kind.storage != KVMIX_STORAGE_I8 || kind.shape))
    return false;
  return kind.scale != KVMIX_SCALE_NONE;
}

std::size_t Bits(Storage storage) {
  switch (storage) {
    case KVMIX_STORAGE_F16:
      return 16;
    case KVMIX_STORAGE_I8:
      return 8;
    case KVMIX_STORAGE_I6:
      return 6;
    case KVMIX_STORAGE_I4:
      return 4;
    case KVMIX_STORAGE_I3:
      return 3;
  }
  return 0;
}

// What ToString says that a kind is called.
std::string Name(const CodecKind& kind) {
  std::string name =
      kind.storage == KVMIX_STORAGE_F16 ? "f16" : "i" + std::to_string(Bits(kind.storage));
  if (kind.operands == KVMIX_OPERANDS_8) name += "x8";
  if (kind.operands == KVMIX_OPERANDS_16) name += "x16";
  if (kind.scale == KVMIX_SCALE_HEAD) name += "-head";
  if (kind.scale == KVMIX_SCALE_TOKEN) name += "-token";
  if (kind.scale == KVMIX_SCALE_TOKEN_BF16) name += "-token-bf16";
  if (kind.centre) name += "+centre";
  if (kind.fold) name += "+fold";
  if (kind.hadamard) name += "+hadamard";
  if (kind.shape) name += "+shape";
  return name;
}

std::shared_ptr<const CodecVectors> Vectors(std::vector<float> mean, std::vector<float> factor,
                                            std::vector<float> shaping = {}) {
  return std::make_shared<const CodecVectors>(
      CodecVectors{std::move(mean), std::move(factor), std::move(shaping)});
}

// [kDim][kDim]: 1 on the diagonal, 0.5 below.
std::vector<float> Matrix() {
  std::vector<float> matrix(kDim * kDim, 0.0f);
  for (std::size_t i = 0; i < kDim; ++i) {
    for (std::size_t j = 0; j <= i; ++j) matrix[i * kDim + j] = i == j ? 1.0f : 0.5f;
  }
  return matrix;
}

// kDim numbers, one of them another.
std::vector<float> With(std::size_t channel, float x, float others = 1.0f) {
  std::vector<float> numbers(kDim, others);
  numbers[channel] = x;
  return numbers;
}

// A kind with good numbers.
HeadCodec Whole(const CodecKind& kind) {
  return {kind, kind.scale == KVMIX_SCALE_HEAD ? 0.5f : 0.0f,
          Vectors(std::vector<float>(kind.centre ? kDim : 0, -1.5f),
                  std::vector<float>(kind.fold ? kDim : 0, 2.0f),
                  kind.shape ? Matrix() : std::vector<float>())};
}

void ExpectRefused(const HeadCodec& codec, const std::string& text) {
  const Status status = CheckCodec(codec, kDim);
  EXPECT_EQ(status.code(), ErrorCode::kInvalidArgument) << "expected: " << text;
  ExpectGoodMessage(status, "expected ");
  EXPECT_NE(status.message().find(text), std::string::npos)
      << status.message() << "\nshould speak of: " << text;
}

TEST(CodecKind, NamesOfEveryKindAndBack) {
  std::set<std::string> names;
  for (const CodecKind& kind : AllFields()) {
    if (!Exists(kind)) continue;
    EXPECT_EQ(ToString(kind), Name(kind));
    const Result<CodecKind> parsed = ParseCodecKind(Name(kind));
    ASSERT_TRUE(parsed.ok()) << parsed.status().message();
    EXPECT_EQ(*parsed, kind) << Name(kind);
    names.insert(ToString(kind));
  }
  // f16; i8 with a head's scale and any of three steps; two scales of four storages with any of
  // four; all but f16 with two widths of operands.
  EXPECT_EQ(names.size(), 1u + 2u * (8u + 2u * 4u * 16u));
  EXPECT_EQ(ToString({KVMIX_STORAGE_I8, KVMIX_SCALE_TOKEN_BF16, true, true, true}),
            "i8-token-bf16+centre+fold+hadamard");
  EXPECT_EQ(ToString({KVMIX_STORAGE_I4, KVMIX_SCALE_TOKEN, true, false, true}),
            "i4-token+centre+hadamard");
}

TEST(CodecKind, KindsThatDoNotExistHaveNoName) {
  for (const CodecKind& kind : AllFields()) {
    if (Exists(kind)) continue;
    EXPECT_EQ(ToString(kind), "invalid");
    EXPECT_FALSE(ParseCodecKind(Name(kind)).ok()) << Name(kind);
    ExpectRefused(Whole(kind), "expected a codec that exists");
  }
  EXPECT_FALSE(ParseCodecKind("invalid").ok());
}

// An error says what the parts are.
TEST(CodecKind, RefusesNamesOfNone) {
  for (const char* name : {"",
                           "f16-head",
                           "f16-token",
                           "f16-token-bf16",
                           "f16+centre",
                           "f16+fold",
                           "f16+hadamard",
                           "i8",
                           "i8+centre",
                           "i8-",
                           "i8-head-bf16",
                           "i8-head-token",
                           "i8-token-bf16-bf16",
                           "i8-tokens",
                           "f16x8",
                           "f16x16",
                           "i8x16-token",
                           "i4x8-token",
                           "i8x4-token",
                           "i8-tokenx8",
                           "i4",
                           "i4-head",
                           "i4-head+hadamard",
                           "i3",
                           "i6-head",
                           "i5-token",
                           "i8-head+shape",
                           "f16+shape",
                           "i8-token+shape+hadamard",
                           "F16",
                           "I8-token",
                           "f16 ",
                           " f16",
                           "-token",
                           "+centre",
                           "i8-token+",
                           "i8-token++centre",
                           "i8-token+center",
                           "i8-token+center+hadamard",
                           "i8-token +centre",
                           "i8-token+centre ",
                           "i8-token+centre+centre",
                           "i8-token+hadamard+hadamard",
                           "i8-token+fold+centre",
                           "i8-token+hadamard+centre",
                           "i8-token+hadamard+fold",
                           "i8-token+centre+hadamard+fold",
                           "i8+centre-token",
                           "i8-token\n"}) {
    const Status status = ParseCodecKind(name).status();
    SCOPED_TRACE(name);
    EXPECT_EQ(status.code(), ErrorCode::kInvalidArgument);
    for (const std::string part : {"expected", "f16", "i8", "i6", "i4", "i3", "-head", "-token",
                                   "-token-bf16", "+centre", "+fold", "+hadamard", "+shape"}) {
      EXPECT_NE(status.message().find(part), std::string::npos)
          << status.message() << " does not name " << part;
    }
    EXPECT_TRUE(status.message().starts_with("codec: ")) << status.message();
    EXPECT_NE(status.message().find("found \""), std::string::npos) << status.message();
  }
  EXPECT_NE(ParseCodecKind("i5-token").status().message().find("found \"i5-token\""),
            std::string::npos);
}

TEST(CodecKind, OperandBits) {
  const std::pair<const char*, std::size_t> bits[] = {
      {"f16", 32},        {"i8-token", 16},     {"i8x8-head", 8},    {"i6-token", 8},
      {"i4-token", 8},    {"i3-token-bf16", 8}, {"i6x16-token", 16}, {"i4x16-token+hadamard", 16},
      {"i3x16-token", 16}};
  for (const auto& [name, expected] : bits)
    EXPECT_EQ(OperandBits(ParseCodecKind(name).value()), expected) << name;
}

TEST(CodecKind, BytesPerToken) {
  for (const CodecKind& kind : AllFields()) {
    if (!Exists(kind)) continue;
    for (const std::size_t dim : {8, 40, 64, 512}) {
      const std::size_t scale = kind.scale == KVMIX_SCALE_TOKEN        ? 4
                                : kind.scale == KVMIX_SCALE_TOKEN_BF16 ? 2
                                                                       : 0;
      EXPECT_EQ(BytesPerToken(kind, dim), dim * Bits(kind.storage) / 8 + scale)
          << ToString(kind) << ", " << dim;
    }
  }
}

TEST(HeadCodec, NumbersThatItsKindAsksFor) {
  for (const CodecKind& kind : AllFields()) {
    if (!Exists(kind)) continue;
    SCOPED_TRACE(ToString(kind));
    const HeadCodec good = Whole(kind);
    const Status status = CheckCodec(good, kDim);
    EXPECT_TRUE(status.ok()) << status.message();
    const std::vector<float> mean(good.mean().begin(), good.mean().end()),
        factor(good.factor().begin(), good.factor().end()),
        matrix(good.shaping().begin(), good.shaping().end());
    EXPECT_EQ(mean.size(), kind.centre ? kDim : 0);
    EXPECT_EQ(factor.size(), kind.fold ? kDim : 0);

    HeadCodec bad = good;  // without any
    bad.vectors = nullptr;
    EXPECT_TRUE(bad.mean().empty() && bad.factor().empty());
    if (kind.centre) {
      ExpectRefused(bad, "expected a mean of 8 channels, found 0");
    } else if (kind.fold) {
      ExpectRefused(bad, "expected a factor of 8 channels, found 0");
    } else if (kind.shape) {
      ExpectRefused(bad, "expected a shaping matrix of 64 numbers, found 0");
    } else {
      EXPECT_TRUE(CheckCodec(bad, kDim).ok());
    }

    std::vector<float> longer = mean;  // one more than there should be
    longer.push_back(1.0f);
    bad.vectors = Vectors(longer, factor, matrix);
    ExpectRefused(bad, kind.centre ? "expected a mean of 8 channels, found 9"
                                   : "expected a mean of 0 channels, found 1");
    longer = factor;
    longer.push_back(1.0f);
    bad.vectors = Vectors(mean, longer, matrix);
    ExpectRefused(bad, kind.fold ? "expected a factor of 8 channels, found 9"
                                 : "expected a factor of 0 channels, found 1");
    longer = matrix;
    longer.push_back(1.0f);
    bad.vectors = Vectors(mean, factor, longer);
    ExpectRefused(bad, kind.shape ? "expected a shaping matrix of 64 numbers, found 65"
                                  : "expected a shaping matrix of 0 numbers, found 1");
  }
}

TEST(HeadCodec, RowsBelowEightBitsAreWholeBytes) {
  const std::pair<const char*, std::size_t> steps[] = {
      {"i8-token", 1}, {"i6-token", 4}, {"i4-token", 2}, {"i3-token-bf16+hadamard", 8}};
  for (const auto& [name, step] : steps) {
    const HeadCodec codec{ParseCodecKind(name).value()};
    for (std::size_t dim = 1; dim <= 24; ++dim) {
      const Status status = CheckCodec(codec, dim);
      EXPECT_EQ(status.ok(), dim % step == 0) << name << ", " << dim;
      EXPECT_EQ(Fits(codec.kind, dim), status.ok());
      if (status.ok()) continue;
      EXPECT_EQ(status.message(), std::string(name) +
                                      ": expected a head_dim that is a multiple of " +
                                      std::to_string(step) + ", found " + std::to_string(dim));
    }
  }
}

TEST(HeadCodec, ShapingMatricesAreUnitLowerTriangular) {
  const CodecKind kind{.storage = KVMIX_STORAGE_I4, .scale = KVMIX_SCALE_TOKEN, .shape = true};
  const auto with = [&](std::size_t row, std::size_t column, float x) {
    std::vector<float> matrix = Matrix();
    matrix[row * kDim + column] = x;
    return HeadCodec{kind, 0.0f, Vectors({}, {}, matrix)};
  };
  for (const float bad : {std::nanf(""), kInf, -kInf, 65537.0f})
    ExpectRefused(with(5, 2, bad), "unit lower triangular, found");
  ExpectRefused(with(2, 5, 0.25f), "found 0.25 at 2, 5");
  ExpectRefused(with(3, 3, 2.0f), "found 2 at 3, 3");  // of a singular one: 0
  ExpectRefused(with(3, 3, 0.0f), "found 0 at 3, 3");
  for (const float good : {0.0f, -65536.0f, 65536.0f})
    EXPECT_TRUE(CheckCodec(with(5, 2, good), kDim).ok()) << good;
}

TEST(HeadCodec, MeansAreFinite) {
  const CodecKind kind{KVMIX_STORAGE_I8, KVMIX_SCALE_TOKEN, true};
  HeadCodec codec{kind, 0.0f, nullptr};
  for (const float bad : {std::nanf(""), kInf, -kInf}) {
    codec.vectors = Vectors(With(2, bad), {});
    ExpectRefused(codec, "a mean of finite numbers in its range");
    ExpectRefused(codec, "in channel 2");
  }
  for (const float good : {0.0f, -0.0f, std::numeric_limits<float>::max(),
                           -std::numeric_limits<float>::denorm_min()}) {
    codec.vectors = Vectors(With(2, good), {});
    EXPECT_TRUE(CheckCodec(codec, kDim).ok()) << good;
  }
}

TEST(HeadCodec, FactorsAreFromTwoToTheMinus32ToTwoToThe32) {
  const CodecKind kind{KVMIX_STORAGE_I8, KVMIX_SCALE_TOKEN, false, true};
  HeadCodec codec{kind, 0.0f, nullptr};
  for (const float bad : {std::nanf(""), kInf, -kInf, 0.0f, -0.0f, -1.0f, 0x1.FFFFFEp-33f,
                          0x1.000002p32f, std::numeric_limits<float>::denorm_min()}) {
    codec.vectors = Vectors({}, With(3, bad));
    ExpectRefused(codec, "a factor of finite numbers in its range");
    ExpectRefused(codec, "in channel 3");
  }
  for (const float good : {0x1p-32f, 0x1p32f, 1.0f}) {
    codec.vectors = Vectors({}, With(3, good));
    EXPECT_TRUE(CheckCodec(codec, kDim).ok()) << good;
  }
}

TEST(HeadCodec, AHeadsScaleIsAboveZeroAndFinite) {
  HeadCodec codec{{KVMIX_STORAGE_I8, KVMIX_SCALE_HEAD}};
  for (const float bad : {0.0f, -0.0f, -1.0f, std::nanf(""), kInf, -kInf}) {
    codec.head_scale = bad;
    ExpectRefused(codec, "expected a scale above 0");
  }
  for (const float good :
       {1.0f, std::numeric_limits<float>::max(), std::numeric_limits<float>::denorm_min()}) {
    codec.head_scale = good;
    EXPECT_TRUE(CheckCodec(codec, kDim).ok()) << good;
  }
  // Other kinds have none, and do not look at it.
  codec = {{KVMIX_STORAGE_I8, KVMIX_SCALE_TOKEN}, -1.0f, nullptr};
  EXPECT_TRUE(CheckCodec(codec, kDim).ok());
}

TEST(HeadCodec, EqualByItsNumbers) {
  const CodecKind kind{KVMIX_STORAGE_I8, KVMIX_SCALE_HEAD, true, true};
  const HeadCodec codec = Whole(kind);
  HeadCodec other = Whole(kind);
  ASSERT_NE(codec.vectors, other.vectors);
  EXPECT_EQ(codec, other);
  other.head_scale = 0.25f;
  EXPECT_NE(codec, other);
  other = codec;
  other.kind.hadamard = true;
  EXPECT_NE(codec, other);
  other = codec;
  other.vectors = Vectors(With(3, -1.25f, -1.5f), std::vector<float>(kDim, 2.0f));
  EXPECT_NE(codec, other);
  other.vectors = Vectors(std::vector<float>(kDim, -1.5f), With(2, 2.5f, 2.0f));
  EXPECT_NE(codec, other);
  other.vectors = nullptr;
  EXPECT_NE(codec, other);
  // No vectors and empty ones are the same.
  const HeadCodec plain{{KVMIX_STORAGE_I8, KVMIX_SCALE_TOKEN}};
  other = plain;
  other.vectors = Vectors({}, {});
  EXPECT_EQ(plain, other);
}

TEST(HeadCodec, CopiesShareTheirVectors) {
  const HeadCodec codec = Whole({KVMIX_STORAGE_I8, KVMIX_SCALE_TOKEN, true, true, true});
  const HeadCodec copy = codec;
  EXPECT_EQ(copy.vectors, codec.vectors);
  EXPECT_EQ(copy.mean().data(), codec.mean().data());
  EXPECT_EQ(copy.factor().data(), codec.factor().data());
  EXPECT_EQ(codec.vectors.use_count(), 2);
}

}  // namespace
}  // namespace kvmix
