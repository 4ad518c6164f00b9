// Kinds and their names, from one table a field; sizes; checks.
#include "kvmix/codec.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "lib/files/file.h"

namespace kvmix {
namespace {

struct StorageRow {
  Storage storage;
  std::string_view name;
  std::size_t bits;  // of a channel
  bool codes;        // rather than numbers: has a scale, and steps before it
};
constexpr std::array kStorages = {
    StorageRow{Storage::kF16, "f16", 16, false},
    StorageRow{Storage::kI8, "i8", 8, true},
};

struct ScaleRow {
  Scale scale;
  std::string_view name;
  std::size_t bytes;  // stored for each token
};
constexpr std::array kScales = {
    ScaleRow{Scale::kNone, "", 0},
    ScaleRow{Scale::kHead, "-head", 0},
    ScaleRow{Scale::kToken, "-token", 4},
    ScaleRow{Scale::kTokenBF16, "-token-bf16", 2},
};

struct StepRow {
  bool CodecKind::*step;
  std::string_view name;
};
constexpr std::array kSteps = {
    StepRow{&CodecKind::centre, "+centre"},
    StepRow{&CodecKind::fold, "+fold"},
    StepRow{&CodecKind::hadamard, "+hadamard"},
};

constexpr float kLargestFactor = 0x1p32f;

// The row of a table whose `member` is `value`; null if there is none.
template <class Table, class Row, class Value>
const Row* Find(const Table& table, Value Row::*member, Value value) {
  const auto it = std::ranges::find(table, value, member);
  return it == table.end() ? nullptr : &*it;
}
const StorageRow* Find(Storage storage) { return Find(kStorages, &StorageRow::storage, storage); }
const ScaleRow* Find(Scale scale) { return Find(kScales, &ScaleRow::scale, scale); }

bool Exists(const CodecKind& kind) {
  const StorageRow* storage = Find(kind.storage);
  if (storage == nullptr || Find(kind.scale) == nullptr || kind.rounding != Rounding::kNearest)
    return false;
  const bool plain = std::ranges::none_of(kSteps, [&](const auto& row) { return kind.*row.step; });
  return storage->codes == (kind.scale != Scale::kNone) && (storage->codes || plain);
}

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
  std::string name(Find(kind.storage)->name);
  name += Find(kind.scale)->name;
  for (const StepRow& row : kSteps) name += kind.*row.step ? row.name : "";
  return name;
}

Result<CodecKind> ParseCodecKind(std::string_view name) {
  for (const StorageRow& storage : kStorages) {
    for (const ScaleRow& scale : kScales) {
      CodecKind kind{.storage = storage.storage, .scale = scale.scale};
      for (const StepRow& row : kSteps) kind.*row.step = name.find(row.name) != name.npos;
      if (Exists(kind) && ToString(kind) == name) return kind;
    }
  }
  return Invalid(
      "codec: expected a storage ({}), but for f16 a scale ({}) and, in this order, any of {}; "
      "found \"{}\"",
      Names(kStorages), Names(kScales), Names(kSteps), name);
}

std::size_t BytesPerToken(const CodecKind& kind, std::size_t head_dim) {
  const StorageRow* storage = Find(kind.storage);
  const ScaleRow* scale = Find(kind.scale);
  if (storage == nullptr || scale == nullptr) return 0;
  return (storage->bits * head_dim + 7) / 8 + scale->bytes;
}

std::span<const float> HeadCodec::mean() const {
  if (vectors == nullptr) return {};
  return vectors->mean;
}

std::span<const float> HeadCodec::factor() const {
  if (vectors == nullptr) return {};
  return vectors->factor;
}

bool HeadCodec::operator==(const HeadCodec& other) const {
  return kind == other.kind && head_scale == other.head_scale &&
         std::ranges::equal(mean(), other.mean()) && std::ranges::equal(factor(), other.factor());
}

Status CheckCodec(const HeadCodec& codec, std::size_t head_dim) {
  if (!Exists(codec.kind)) {
    return Invalid(
        "expected a codec that exists, found a storage with a scale or with steps that it cannot "
        "have");
  }
  const float scale = codec.head_scale;
  if (codec.kind.scale == Scale::kHead && !(scale > 0.0f && std::isfinite(scale)))
    return Invalid("expected a scale above 0, found {}", scale);
  Status mean = CheckVector(codec.mean(), codec.kind.centre, head_dim, "mean",
                            [](float x) { return std::isfinite(x); });
  if (!mean.ok()) return mean;
  return CheckVector(codec.factor(), codec.kind.fold, head_dim, "factor",
                     [](float x) { return x >= 1.0f / kLargestFactor && x <= kLargestFactor; });
}

}  // namespace kvmix
