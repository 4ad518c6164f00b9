// Kinds and their names, from one table a field; sizes; checks.
#include "kvmix/codec.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <numeric>
#include <utility>

#include "lib/files/file.h"

namespace kvmix {
namespace {

template <class T>
struct Row {
  T value;
  std::string_view name;
  std::size_t size;
};
constexpr Row<Storage> kStorages[] = {{Storage::kF16, "f16", 16},  // bits
                                      {Storage::kI8, "i8", 8},
                                      {Storage::kI6, "i6", 6},
                                      {Storage::kI4, "i4", 4},
                                      {Storage::kI3, "i3", 3}};
constexpr Row<Scale> kScales[] = {{Scale::kNone, "", 0},  // bytes beside every token's codes
                                  {Scale::kHead, "-head", 0},
                                  {Scale::kToken, "-token", 4},
                                  {Scale::kTokenBF16, "-token-bf16", 2}};
constexpr Row<bool CodecKind::*> kSteps[] = {{&CodecKind::centre, "+centre", 0},
                                             {&CodecKind::fold, "+fold", 0},
                                             {&CodecKind::hadamard, "+hadamard", 0},
                                             {&CodecKind::shape, "+shape", 0}};

constexpr float kLargestFactor = 0x1p32f, kLargestShaping = 0x1p16f;

// The row of a value; null for a value that is none of its enum's.
template <class Table, class T>
const Row<T>* Find(const Table& table, T value) {
  const auto* row = std::ranges::find(table, value, &Row<T>::value);
  return row == std::end(table) ? nullptr : row;
}

// Codes have a scale and maybe steps before it; numbers (f16) have neither. A scale of the head is
// for plain int8.
bool Exists(const CodecKind& kind) {
  if (Find(kStorages, kind.storage) == nullptr || Find(kScales, kind.scale) == nullptr ||
      kind.rounding != Rounding::kNearest)
    return false;
  if (kind.storage == Storage::kF16) return kind == CodecKind();
  if (kind.scale == Scale::kHead) return kind.storage == Storage::kI8 && !kind.shape;
  return kind.scale != Scale::kNone;
}

// head_dim must be a multiple of it: planes of a power of two of bits are whole bytes each.
std::size_t ChannelStep(Storage storage) { return 8 / std::gcd(BitsOf(storage), std::size_t{8}); }

template <class... Args>
Status Invalid(fmt::format_string<Args...> message, Args&&... args) {
  return internal::Error(ErrorCode::kInvalidArgument, message, std::forward<Args>(args)...);
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

// All names of a table, for an error.
template <class Table>
std::string Names(const Table& table) {
  std::string names;
  for (const auto& row : table) {
    if (!row.name.empty()) names += (names.empty() ? "" : ", ") + std::string(row.name);
  }
  return names;
}

}  // namespace

std::string ToString(const CodecKind& kind) {
  if (!Exists(kind)) return "invalid";
  std::string name(Find(kStorages, kind.storage)->name);
  name += Find(kScales, kind.scale)->name;
  for (const auto& step : kSteps) name += kind.*step.value ? step.name : "";
  return name;
}

Result<CodecKind> ParseCodecKind(std::string_view name) {
  for (const auto& storage : kStorages) {
    for (const auto& scale : kScales) {
      CodecKind kind{.storage = storage.value, .scale = scale.value};
      for (const auto& step : kSteps) kind.*step.value = name.find(step.name) != name.npos;
      if (Exists(kind) && ToString(kind) == name) return kind;
    }
  }
  return Invalid(
      "codec: expected a storage ({}), but for f16 a scale ({}; -head for i8 without +shape) "
      "and, in this order, any of {}; found \"{}\"",
      Names(kStorages), Names(kScales), Names(kSteps), name);
}

std::size_t BitsOf(Storage storage) {
  const Row<Storage>* row = Find(kStorages, storage);
  return row != nullptr ? row->size : 0;
}

bool Fits(const CodecKind& kind, std::size_t head_dim) {
  return head_dim % ChannelStep(kind.storage) == 0;
}

std::size_t BytesPerToken(const CodecKind& kind, std::size_t head_dim) {
  const Row<Storage>* storage = Find(kStorages, kind.storage);
  const Row<Scale>* scale = Find(kScales, kind.scale);
  if (storage == nullptr || scale == nullptr) return 0;
  return (storage->size * head_dim + 7) / 8 + scale->size;
}

std::span<const float> HeadCodec::mean() const {
  if (vectors == nullptr) return {};
  return vectors->mean;
}

std::span<const float> HeadCodec::factor() const {
  if (vectors == nullptr) return {};
  return vectors->factor;
}

std::span<const float> HeadCodec::shaping() const {
  if (vectors == nullptr) return {};
  return vectors->shaping;
}

bool HeadCodec::operator==(const HeadCodec& other) const {
  return kind == other.kind && head_scale == other.head_scale &&
         std::ranges::equal(mean(), other.mean()) && std::ranges::equal(factor(), other.factor()) &&
         std::ranges::equal(shaping(), other.shaping());
}

Status CheckCodec(const HeadCodec& codec, std::size_t head_dim) {
  if (!Exists(codec.kind)) {
    return Invalid(
        "expected a codec that exists, found a storage with a scale or with steps that it cannot "
        "have");
  }
  if (!Fits(codec.kind, head_dim))
    return Invalid("{}: expected a head_dim that is a multiple of {}, found {}",
                   ToString(codec.kind), ChannelStep(codec.kind.storage), head_dim);
  const float scale = codec.head_scale;
  if (codec.kind.scale == Scale::kHead && !(scale > 0.0f && std::isfinite(scale)))
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

}  // namespace kvmix
