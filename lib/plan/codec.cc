// Names of kinds, sizes, checks.

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "lib/files/file.h"
#include "lib/plan/plan.h"

namespace kvmix::internal {
namespace {

constexpr std::pair<bool CodecKind::*, std::string_view> kSteps[] = {
    {&CodecKind::centre, "+centre"},
    {&CodecKind::own_centre, "+own-centre"},
    {&CodecKind::fold, "+fold"},
    {&CodecKind::hadamard, "+hadamard"},
    {&CodecKind::shape, "+shape"}};

// A part of a kind's name; null for a number that is none of its enum's.
constexpr const char* NameOf(Storage storage) {
  switch (storage) {
    case KVMIX_STORAGE_F16:
      return "f16";
    case KVMIX_STORAGE_I8:
      return "i8";
    case KVMIX_STORAGE_I6:
      return "i6";
    case KVMIX_STORAGE_I4:
      return "i4";
    case KVMIX_STORAGE_I3:
      return "i3";
  }
  return nullptr;
}
constexpr const char* NameOf(Scale scale) {
  switch (scale) {
    case KVMIX_SCALE_NONE:
      return "";
    case KVMIX_SCALE_HEAD:
      return "-head";
    case KVMIX_SCALE_TOKEN:
      return "-token";
    case KVMIX_SCALE_TOKEN_BF16:
      return "-token-bf16";
  }
  return nullptr;
}

constexpr const char* NameOf(Operands operands) {
  switch (operands) {
    case KVMIX_OPERANDS_USUAL:
      return "";
    case KVMIX_OPERANDS_8:
      return "x8";
    case KVMIX_OPERANDS_16:
      return "x16";
  }
  return nullptr;
}

constexpr float kLargestFactor = 0x1p32f, kLargestShaping = 0x1p16f;

// Bytes beside every token's codes.
std::size_t BytesOf(Scale scale) {
  switch (scale) {
    case KVMIX_SCALE_NONE:
    case KVMIX_SCALE_HEAD:
      break;
    case KVMIX_SCALE_TOKEN:
      return 4;
    case KVMIX_SCALE_TOKEN_BF16:
      return 2;
  }
  return 0;
}

// All values of an enum, in the order of their numbers.
template <class T>
std::vector<T> All() {
  std::vector<T> values;
  for (int i = 0; NameOf(static_cast<T>(i)) != nullptr; ++i) values.push_back(static_cast<T>(i));
  return values;
}

bool IsKnown(const CodecKind& kind) {
  return NameOf(kind.storage) != nullptr && NameOf(kind.scale) != nullptr &&
         NameOf(kind.operands) != nullptr;
}

// Codes have a scale and maybe steps before it; numbers (f16) have neither. A scale of the head is
// for plain int8.
bool Exists(const CodecKind& kind) {
  if (!IsKnown(kind)) return false;
  if (kind.storage == KVMIX_STORAGE_F16) return kind == CodecKind();
  if (kind.centre && kind.own_centre) return false;
  const bool is_i8 = kind.storage == KVMIX_STORAGE_I8;
  if (kind.operands == (is_i8 ? KVMIX_OPERANDS_16 : KVMIX_OPERANDS_8)) return false;
  if (kind.scale == KVMIX_SCALE_HEAD) return is_i8 && !kind.shape;
  return kind.scale != KVMIX_SCALE_NONE;
}

// head_dim must be a multiple of it: planes of a power of two of bits are whole bytes each.
std::size_t ChannelStep(Storage storage) { return 8 / std::gcd(BitsOf(storage), std::size_t{8}); }

template <class... Args>
Status Invalid(fmt::format_string<Args...> message, Args&&... args) {
  return Error(ErrorCode::kInvalidArgument, message, std::forward<Args>(args)...);
}

Status CheckVector(std::span<const float> vector, bool wanted, std::size_t head_dim,
                   std::string_view what, bool (*valid)(float)) {
  const std::size_t expected = wanted ? head_dim : 0;
  if (vector.size() != expected)
    return Invalid("expected a {} of {} channels, found {}", what, expected, vector.size());
  const auto bad = std::ranges::find_if_not(vector, valid);
  if (bad == vector.end()) return {};
  return Invalid("expected a {} of finite numbers in its range, found {} in channel {}", what, *bad,
                 bad - vector.begin());
}

Status CheckShaping(std::span<const float> matrix, bool wanted, std::size_t head_dim) {
  const std::size_t expected = wanted ? head_dim * head_dim : 0;
  if (matrix.size() != expected)
    return Invalid("expected a shaping matrix of {} numbers, found {}", expected, matrix.size());
  for (std::size_t i = 0; i < matrix.size(); ++i) {
    const std::size_t row = i / head_dim, column = i % head_dim;
    const float x = matrix[i];
    const bool valid = column < row ? std::fabs(x) <= kLargestShaping  // no NaN
                                    : x == (column == row ? 1.0f : 0.0f);
    if (!valid) {
      return Invalid("expected a shaping matrix that is unit lower triangular, found {} at {}, {}",
                     x, row, column);
    }
  }
  return {};
}

// Names for an error.
template <class T>
std::string Names() {
  std::string names;
  for (const T value : All<T>()) {
    const std::string name = NameOf(value);
    if (!name.empty()) names += (names.empty() ? "" : ", ") + name;
  }
  return names;
}

std::string StepNames() {
  std::string names;
  for (const auto& [step, suffix] : kSteps) names.append(names.empty() ? "" : ", ").append(suffix);
  return names;
}

}  // namespace

std::string ToString(const CodecKind& kind) {
  if (!Exists(kind)) return "invalid";
  std::string name = std::string(NameOf(kind.storage)) + NameOf(kind.operands) + NameOf(kind.scale);
  for (const auto& [step, suffix] : kSteps) name += kind.*step ? suffix : "";
  return name;
}

Result<CodecKind> ParseCodecKind(std::string_view name) {
  for (const Storage storage : All<Storage>()) {
    for (const Operands operands : All<Operands>()) {
      for (const Scale scale : All<Scale>()) {
        CodecKind kind{.storage = storage, .scale = scale, .operands = operands};
        for (const auto& [step, suffix] : kSteps) kind.*step = name.find(suffix) != name.npos;
        if (Exists(kind) && internal::ToString(kind) == name) return kind;
      }
    }
  }
  return Invalid(
      "codec: expected a storage ({}), x8 after i8 or x16 after those below it for other operands "
      "than the usual ones, but for f16 a scale ({}; -head for i8 without +shape) and, in this "
      "order, any of {}, of both centres one; found \"{}\"",
      Names<Storage>(), Names<Scale>(), StepNames(), name);
}

std::size_t BytesPerToken(const CodecKind& kind, std::size_t head_dim) {
  if (!IsKnown(kind)) return 0;
  return (BitsOf(kind.storage) * head_dim + 7) / 8 + BytesOf(kind.scale);
}

Status CheckCodec(const HeadCodec& codec, std::size_t head_dim) {
  if (!Exists(codec.kind)) {
    return Invalid(
        "expected a codec that exists, found a storage with a scale or with steps that it cannot "
        "have");
  }
  if (!Fits(codec.kind, head_dim))
    return Invalid("{}: expected a head_dim that is a multiple of {}, found {}",
                   internal::ToString(codec.kind), ChannelStep(codec.kind.storage), head_dim);
  const float scale = codec.head_scale;
  if (codec.kind.scale == KVMIX_SCALE_HEAD && !(scale > 0.0f && std::isfinite(scale)))
    return Invalid("expected a scale above 0, found {}", scale);
  Status mean = CheckVector(codec.mean(), codec.kind.centre, head_dim, "mean",
                            [](float x) { return std::isfinite(x); });
  if (!mean.ok()) return mean;
  Status factor = CheckVector(codec.factor(), codec.kind.fold, head_dim, "factor", [](float x) {
    return x >= 1.0f / kLargestFactor && x <= kLargestFactor;
  });
  if (!factor.ok()) return factor;
  return CheckShaping(codec.shaping(), codec.kind.shape, head_dim);
}

}  // namespace kvmix::internal
