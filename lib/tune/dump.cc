// Dumps: opening, checking, views.
#include "kvmix/tune/dump.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <sstream>
#include <utility>

#include <fmt/format.h>

#include "lib/files/check.h"
#include "lib/files/file.h"
#include "lib/files/json_view.h"
#include "lib/files/parse_number.h"
#include "lib/files/safetensors.h"
#include "lib/plan/model_json.h"

namespace kvmix::tune {

using internal::File;
using internal::FileError;
using internal::ParseNumber;
using internal::Quoted;

namespace {

enum Kind : std::size_t { kKeys, kValues, kQueries };
constexpr std::string_view kLetters = "kvq";

std::string TensorName(std::size_t layer, std::size_t kind) {
  return fmt::format("layers.{}.{}", layer, kLetters[kind]);
}

using Place = std::pair<std::size_t, std::size_t>;  // layer and kind

// The layer and kind of a name, if it is one of TensorName's.
std::optional<Place> ParseTensorName(std::string_view name) {
  const std::size_t digit = std::min(name.find_first_of("0123456789"), name.size());
  const std::size_t point = name.find('.', digit);
  if (point == name.npos || point + 1 == name.size()) return std::nullopt;
  const auto layer = ParseNumber<std::size_t>(name.substr(digit, point - digit));
  const std::size_t kind = kLetters.find(name[point + 1]);
  if (!layer || kind == kLetters.npos || name != TensorName(*layer, kind)) return std::nullopt;
  return Place{*layer, kind};
}

std::string ShapeText(const std::vector<std::uint64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

// A tensor as it lies in the file.
struct Found {
  std::uint64_t first = 0, bytes = 0;  // in the file
  Dtype dtype = KVMIX_F16;
  // [tokens, heads, head_dim], or [1, heads, tokens, head_dim]; empty: there is no such tensor.
  std::vector<std::uint64_t> shape;

  bool heads_first() const { return shape.size() == 4 && shape[0] == 1; }
  bool is_valid() const { return shape.size() == 3 || heads_first(); }
  std::uint64_t tokens() const { return shape[heads_first() ? 2 : 0]; }
  std::uint64_t heads() const { return shape[1]; }
  std::uint64_t head_dim() const { return shape.back(); }
  // The tensor once it is read to `data`; without a gap, in either order of its axes.
  RowsView Rows(const void* data) const {
    RowsView rows = RowsView::Dense(data, dtype, tokens(), heads(), head_dim());
    if (!heads_first()) return rows;
    rows.token_stride = static_cast<std::ptrdiff_t>(rows.head_dim);
    rows.head_stride = static_cast<std::ptrdiff_t>(rows.tokens * rows.head_dim);
    return rows;
  }
};
using FoundTensors = std::map<Place, Found>;

constexpr std::pair<std::string_view, Dtype> kDtypes[] = {
    {"F16", KVMIX_F16}, {"BF16", KVMIX_BF16}, {"F32", KVMIX_F32}};

// The index of the first of `count` numbers whose exponent is all ones, NaN or Inf; or `count`.
// Bits: signed, because every SIMD instruction set has that maximum.
template <class Bits>
std::size_t FindNonFinite(const void* numbers, std::size_t count, Bits infinity) {
  const Bits* x = static_cast<const Bits*>(numbers);
  const auto magnitude = [](Bits bits) {
    return static_cast<Bits>(bits & std::numeric_limits<Bits>::max());
  };
  Bits largest = 0;
  for (std::size_t i = 0; i < count; ++i) largest = std::max(largest, magnitude(x[i]));
  if (largest < infinity) return count;
  const auto is_bad = [&](Bits bits) { return magnitude(bits) >= infinity; };
  return static_cast<std::size_t>(std::find_if(x, x + count, is_bad) - x);
}

// A layer's own tensors in memory.
struct LayerMemory {
  std::vector<std::uint32_t> numbers[3];  // aligned for floats
  RowsView rows[3];                       // without data where there is no such tensor
};

// A layer is here while somebody has it.
struct Slot {
  std::mutex mutex;
  std::weak_ptr<const LayerMemory> memory;
};

}  // namespace

struct Dump::Impl {
  std::string path;
  std::string model;
  std::string corpus;
  Model shapes;
  bool has_q = false;
  std::size_t tokens = 0;
  std::vector<std::size_t> prompt_tokens;

  File file;
  std::vector<std::array<Found, 3>> layers;  // K, V and Q
  std::unique_ptr<Slot[]> slots;             // [layers]

  Status Fail(ErrorCode code, std::string_view what, std::string_view expected,
              const auto& found) const {
    return FileError(code, path, what, expected, found);
  }

  Status CheckShapes(const char* what = "") const {
    const Status s = CheckModel(shapes);
    return s.ok() ? s : internal::Error(s.code(), "{}: {}{}", path, what, s.message());
  }

  Status Open() {
    Result<File> opened = File::Open(path);
    if (!opened.ok()) return opened.status();
    file = std::move(*opened);
    const auto content = internal::ReadSafetensors(file);
    if (!content.ok()) return content.status();

    // Other programs write formats of their own there ("pt"): the tensors tell.
    const auto& metadata = content->metadata;
    const auto format = metadata.find("format");
    if (format != metadata.end() && format->second.starts_with("kvmix-dump-") &&
        format->second != "kvmix-dump-1")
      return Fail(ErrorCode::kVersion, "metadata format", "kvmix-dump-1", Quoted(format->second));
    FoundTensors found;
    for (const auto& [name, tensor] : content->tensors) {
      const std::optional<Place> place = ParseTensorName(name);
      if (!place) continue;
      const auto* dtype =
          std::ranges::find(kDtypes, tensor.dtype, [](const auto& d) { return d.first; });
      if (dtype == std::end(kDtypes))
        return Fail(ErrorCode::kMismatch, "tensor " + name, "dtype F16, BF16 or F32", tensor.dtype);
      found[*place] = {tensor.first, tensor.bytes, dtype->second, tensor.shape};
    }
    if (Status s = ReadShapes(metadata, found); !s.ok()) return s;
    if (Status s = Assemble(found); !s.ok()) return s;
    // Nothing says which axis is which: few tokens of many heads are more likely to be few heads of
    // many tokens.
    const bool says_order =
        std::ranges::any_of(std::array{"layer_shapes", "kv_heads", "tokens"},
                            [&](const char* key) { return metadata.contains(key); });
    const auto& [place, k] = FirstK(found);
    if (!says_order && !k.heads_first() && k.heads() > k.tokens()) {
      return Fail(ErrorCode::kMismatch, TensorName(place.first, kKeys),
                  "[tokens, heads, head_dim], with kv_heads in the metadata where there are fewer "
                  "tokens than heads",
                  ShapeText(k.shape) + ", which looks like [heads, tokens, head_dim]");
    }
    return ReadMetadata(metadata);
  }

  static bool HasQ(const FoundTensors& found) {
    return std::ranges::any_of(found, [](const auto& f) { return f.first.second == kQueries; });
  }

  // The first K of a dump that has one.
  static const FoundTensors::value_type& FirstK(const FoundTensors& found) {
    return *std::ranges::find_if(found, [](const auto& f) { return f.first.second == kKeys; });
  }

  // All tensors checked against the shapes, and nothing missing.
  Status Assemble(const FoundTensors& found) {
    if (Status s = CheckShapes(); !s.ok()) return s;
    has_q = HasQ(found);
    layers.resize(shapes.layers.size());
    slots = std::make_unique<Slot[]>(layers.size());
    for (const auto& [place, tensor] : found) {
      if (place.first >= layers.size()) {
        return Fail(ErrorCode::kMismatch, TensorName(place.first, place.second),
                    fmt::format("layers from 0 to {}", layers.size() - 1), "one more");
      }
    }
    bool heads_first = false;
    for (std::size_t layer = 0; layer < layers.size(); ++layer) {
      const LayerShape& shape = shapes.layers[layer];
      for (const std::size_t kind : {kKeys, kValues, kQueries}) {
        const auto at = found.find({layer, kind});
        const bool wanted = kind == kQueries ? has_q && shape.has_kv() : shape.owns_kv();
        if (wanted != (at != found.end())) {
          return Fail(ErrorCode::kMismatch, TensorName(layer, kind),
                      wanted ? "a tensor, as the shape of the layer says" : WhyNone(shape),
                      wanted ? "none" : "one");
        }
        if (!wanted) continue;
        const Found& tensor = at->second;
        if (tokens == 0) {
          tokens = tensor.tokens();
          heads_first = tensor.heads_first();
        }
        const std::uint64_t heads = kind == kQueries ? shape.query_heads : shape.kv_heads,
                            dim = kind == kValues ? shape.v_dim : shape.k_dim;
        std::vector<std::uint64_t> expected = {tokens, heads, dim};
        if (heads_first) expected = {1, heads, tokens, dim};
        if (tensor.shape != expected)
          return Fail(ErrorCode::kMismatch, TensorName(layer, kind), "shape " + ShapeText(expected),
                      ShapeText(tensor.shape));
        if (tokens == 0) return Fail(ErrorCode::kMismatch, "", "at least 1 token", "an empty dump");
        layers[layer][kind] = tensor;
      }
    }
    prompt_tokens = {tokens};
    return {};
  }

  static std::string WhyNone(const LayerShape& shape) {
    if (!shape.has_kv()) return "none, as the layer has no K and V";
    return fmt::format("none, as the layer reads K and V of layer {}", *shape.kv_layer);
  }

  // Layers from 0 on without a gap, each with K and V, and with Q in all or in none.
  Status CheckPresent(const FoundTensors& found) const {
    if (found.empty())
      return Fail(ErrorCode::kNotFound, "", "tensors " + TensorName(0, kKeys) + " and so on",
                  "none");
    const std::size_t last = found.rbegin()->first.first;
    // The steps are as many as the tensors, whatever number the last layer claims to have.
    for (std::size_t layer = 0; layer <= last; ++layer) {
      for (std::size_t kind = 0; kind < (HasQ(found) ? 3 : 2); ++kind) {
        if (!found.contains({layer, kind}))
          return Fail(
              ErrorCode::kMismatch, TensorName(layer, kind),
              fmt::format("one in every layer from 0 to {}, or layer_shapes in the metadata", last),
              "none");
      }
    }
    return {};
  }

  // From layer_shapes, or else from the tensors.
  Status ReadShapes(const std::map<std::string, std::string>& metadata, const FoundTensors& found) {
    for (const auto& [place, tensor] : found) {
      if (!tensor.is_valid())
        return Fail(ErrorCode::kMismatch, TensorName(place.first, place.second),
                    "a shape [tokens, heads, head_dim]", ShapeText(tensor.shape));
    }
    if (const auto text = metadata.find("layer_shapes"); text != metadata.end()) {
      const std::string where = path + ": metadata layer_shapes";
      const auto json = internal::ParseJson(text->second, where, "");
      if (!json.ok()) return json.status();
      Status status;
      shapes = internal::ReadLayers(internal::JsonView(*json, where, &status));
      return status;
    }
    if (Status s = CheckPresent(found); !s.ok()) return s;
    shapes.layers.resize(found.rbegin()->first.first + 1);
    for (const auto& [place, tensor] : found) {
      LayerShape& shape = shapes.layers[place.first];
      if (place.second == kKeys) {
        shape = {
            .kv_heads = tensor.heads(), .query_heads = tensor.heads(), .k_dim = tensor.head_dim()};
      } else if (place.second == kValues) {
        shape.v_dim = tensor.head_dim();
      } else {
        shape.query_heads = tensor.heads();
      }
    }
    return {};
  }

  Status ReadMetadata(const std::map<std::string, std::string>& metadata) {
    const auto find = [&](const char* key) {
      const auto it = metadata.find(key);
      return it == metadata.end() ? nullptr : &it->second;
    };
    if (const std::string* text = find("model")) model = *text;
    if (const std::string* text = find("corpus")) corpus = *text;
    if (const std::string* text = find("query_heads");
        text != nullptr && !has_q && find("layer_shapes") == nullptr) {
      const auto value = ParseNumber<std::size_t>(*text);
      if (!value)
        return Fail(ErrorCode::kCorrupt, "metadata query_heads", "a whole number", Quoted(*text));
      for (LayerShape& shape : shapes.layers) shape.query_heads = shape.has_kv() ? *value : 0;
      if (Status s = CheckShapes("metadata: "); !s.ok()) return s;
    }
    const auto check = [&](const char* key, std::size_t value) {
      const std::string* text = find(key);
      if (text == nullptr || ParseNumber<std::size_t>(*text) == value) return Status();
      return Fail(ErrorCode::kMismatch, fmt::format("metadata {}", key),
                  fmt::format("{}, as the tensors have it", value), Quoted(*text));
    };
    if (Status s = check("layers", layers.size()); !s.ok()) return s;
    if (Status s = check("tokens", tokens); !s.ok()) return s;
    for (const LayerShape& shape : shapes.layers) {
      if (!shape.has_kv()) continue;
      for (const auto& [key, value] : {std::pair{"kv_heads", shape.kv_heads},
                                       {"query_heads", shape.query_heads},
                                       {"head_dim", shape.k_dim},
                                       {"head_dim", shape.v_dim}}) {
        if (Status s = check(key, value); !s.ok()) return s;
      }
    }
    if (const std::string* text = find("attention_scale")) {
      const float scale = ParseNumber<float>(*text).value_or(0.0f);
      if (!(scale > 0.0f) || !std::isfinite(scale))
        return Fail(ErrorCode::kCorrupt, "metadata attention_scale", "a number above 0",
                    Quoted(*text));
      for (LayerShape& shape : shapes.layers) {
        if (!shape.has_kv()) continue;
        if (shape.attention_scale != 0.0f && shape.attention_scale != scale)
          return Fail(ErrorCode::kMismatch, "metadata attention_scale",
                      fmt::format("{}, as layer_shapes has it", shape.attention_scale),
                      Quoted(*text));
        shape.attention_scale = scale;
      }
    }
    // What a layer has anyway is nothing to write into plans.
    for (LayerShape& shape : shapes.layers) {
      const float usual = LayerShape{.k_dim = shape.k_dim}.scale();
      if (std::fabs(shape.attention_scale - usual) <= 1e-6f * usual) shape.attention_scale = 0.0f;
    }
    const std::string* prompts = find("prompt_tokens");
    return prompts != nullptr ? ReadPrompts(*prompts) : Status();
  }

  // "512,512,256": lengths of at least 1 that add up to all tokens.
  Status ReadPrompts(const std::string& list) {
    prompt_tokens.clear();
    std::istringstream lengths(list + ',');  // so that every length has a comma behind it
    for (std::string text; std::getline(lengths, text, ',');) {
      const auto length = ParseNumber<std::size_t>(text);
      if (!length)
        return Fail(ErrorCode::kCorrupt, "metadata prompt_tokens",
                    "whole numbers with commas between them", Quoted(list));
      prompt_tokens.push_back(*length);
    }
    const std::string expected = fmt::format("a sum of {}, the dump's tokens", tokens);
    std::size_t sum = 0;
    for (const std::size_t length : prompt_tokens) {
      if (length == 0)
        return Fail(ErrorCode::kMismatch, "prompt_tokens", "lengths of at least 1", 0);
      if (length > tokens - sum)
        return Fail(ErrorCode::kMismatch, "prompt_tokens", expected,
                    fmt::format("more, with a prompt of {}", length));
      sum += length;
    }
    if (sum != tokens) return Fail(ErrorCode::kMismatch, "prompt_tokens", expected, sum);
    return {};
  }

  // Reads a layer's own tensors.
  Status Read(std::size_t layer, LayerMemory* memory) const {
    for (std::size_t kind = 0; kind < 3; ++kind) {
      const Found& tensor = layers[layer][kind];
      if (tensor.shape.empty()) continue;
      std::vector<std::uint32_t>& numbers = memory->numbers[kind];
      numbers.resize((tensor.bytes + sizeof(std::uint32_t) - 1) / sizeof(std::uint32_t));
      char* const bytes = reinterpret_cast<char*>(numbers.data());
      if (Status s = file.Read(tensor.first, {bytes, tensor.bytes}); !s.ok()) return s;
      memory->rows[kind] = tensor.Rows(bytes);
    }
    return {};
  }

  Status CheckFinite(std::size_t layer, std::size_t kind, const RowsView& x) const {
    const std::size_t count = x.tokens * x.heads * x.head_dim;  // 0: no such tensor
    const std::size_t at =
        x.dtype == KVMIX_F32
            ? FindNonFinite<std::int32_t>(x.data, count, 0x7F800000)
            : FindNonFinite<std::int16_t>(x.data, count, x.dtype == KVMIX_F16 ? 0x7C00 : 0x7F80);
    if (at == count) return {};
    const std::size_t channel = at % x.head_dim, row = at / x.head_dim;
    const bool heads_first = x.token_stride < x.head_stride;
    const std::size_t head = heads_first ? row / x.tokens : row % x.heads;
    const std::size_t token = heads_first ? row % x.tokens : row / x.heads;
    return Fail(ErrorCode::kNonFinite, TensorName(layer, kind), "finite numbers",
                fmt::format("{} at layer {}, {} head {}, token {}, channel {}",
                            std::isnan(x.At(token, head, channel)) ? "NaN" : "Inf", layer,
                            kind == kQueries ? "query" : "KV", head, token, channel));
  }

  // A layer's own tensors, read unless somebody has them.
  Result<std::shared_ptr<const LayerMemory>> Memory(std::size_t layer) const {
    const std::lock_guard lock(slots[layer].mutex);
    if (auto known = slots[layer].memory.lock(); known != nullptr) return known;
    const auto memory = std::make_shared<LayerMemory>();
    if (Status s = Read(layer, memory.get()); !s.ok()) return s;
    for (std::size_t kind = 0; kind < 3; ++kind) {
      if (Status s = CheckFinite(layer, kind, memory->rows[kind]); !s.ok()) return s;
    }
    slots[layer].memory = memory;
    return std::shared_ptr<const LayerMemory>(memory);
  }

  Status OutOfMemory() const {
    return Fail(ErrorCode::kOutOfMemory, "", "a dump that fits into memory", "one that does not");
  }
};

RowsView DumpLayer::head(std::size_t kv_head, Tensor t) const {
  const RowsView& rows = t == KVMIX_K ? k : v;
  KVMIX_CHECK(kv_head, <, rows.heads);
  return rows.Head(kv_head);
}

Result<Dump> Dump::Open(const std::string& path) try {
  auto impl = std::make_unique<Impl>();
  impl->path = path;
  if (Status s = impl->Open(); !s.ok()) return s;
  return Dump(std::move(impl));
} catch (const std::bad_alloc&) {
  return FileError(ErrorCode::kOutOfMemory, path, "", "a dump that fits into memory",
                   "one that does not");
}

Dump::Dump(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Dump::Dump(Dump&&) noexcept = default;
Dump& Dump::operator=(Dump&&) noexcept = default;
Dump::~Dump() = default;

const std::string& Dump::path() const { return impl_->path; }
const std::string& Dump::model_name() const { return impl_->model; }
const std::string& Dump::corpus() const { return impl_->corpus; }
const Model& Dump::model() const { return impl_->shapes; }
bool Dump::has_q() const { return impl_->has_q; }
std::size_t Dump::tokens() const { return impl_->tokens; }
const std::vector<std::size_t>& Dump::prompt_tokens() const { return impl_->prompt_tokens; }

std::string Dump::k_name(std::size_t layer) const { return TensorName(layer, kKeys); }
std::string Dump::v_name(std::size_t layer) const { return TensorName(layer, kValues); }

Result<DumpLayer> Dump::Load(std::size_t layer) const try {
  KVMIX_CHECK(layer, <, impl_->layers.size());
  const auto own = impl_->Memory(layer);
  if (!own.ok()) return own.status();
  const std::size_t kv_layer = impl_->shapes.kv_layer(layer);
  const auto kv = kv_layer == layer ? own : impl_->Memory(kv_layer);
  if (!kv.ok()) return kv.status();
  return DumpLayer{(*kv)->rows[kKeys], (*kv)->rows[kValues], (*own)->rows[kQueries], {*own, *kv}};
} catch (const std::bad_alloc&) {
  return impl_->OutOfMemory();
}

Result<std::uint64_t> Dump::LayerHash(std::size_t layer) const try {
  KVMIX_CHECK(layer, <, impl_->layers.size());
  LayerMemory memory;
  if (Status s = impl_->Read(layer, &memory); !s.ok()) return s;
  XXH3_state_t hash;
  XXH3_64bits_reset(&hash);
  for (std::size_t kind = 0; kind < 3; ++kind)
    XXH3_64bits_update(&hash, memory.numbers[kind].data(), impl_->layers[layer][kind].bytes);
  return XXH3_64bits_digest(&hash);
} catch (const std::bad_alloc&) {
  return impl_->OutOfMemory();
}

}  // namespace kvmix::tune
