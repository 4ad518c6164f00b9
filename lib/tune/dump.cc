// Dumps: opening, checking, views.
#include "kvmix/dump.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <new>
#include <optional>
#include <system_error>
#include <utility>

#include "lib/files/check.h"
#include "lib/files/file.h"
#include "lib/files/parse_number.h"
#include "lib/files/safetensors.h"

namespace kvmix {

using internal::FileError;
using internal::MappedFile;
using internal::ParseNumber;
using internal::Quoted;

namespace {

enum Kind : std::size_t { kKeys, kValues, kQueries };
constexpr std::string_view kLetters = "kvq";

std::string TensorName(bool raw, std::size_t layer, std::size_t kind) {
  return raw ? fmt::format("layer_{:02}.{}.bin", layer, kLetters[kind])
             : fmt::format("layers.{}.{}", layer, kLetters[kind]);
}

// A tensor as it lies in a file, by layer and kind.
struct Found {
  const char* data;
  Dtype dtype;
  std::vector<std::uint64_t> shape;  // [tokens, heads, head_dim], or [1, heads, tokens, head_dim]

  bool heads_first() const { return shape.size() == 4 && shape[0] == 1; }
  std::uint64_t tokens() const { return shape[heads_first() ? 2 : 0]; }
  std::uint64_t heads() const { return shape[1]; }
  std::uint64_t head_dim() const { return shape.back(); }
  bool is_valid() const { return shape.size() == 3 || heads_first(); }
};
using FoundTensors = std::map<std::pair<std::size_t, std::size_t>, Found>;

// The layer and kind that a name stands for, if it is one of TensorName's.
std::optional<std::pair<std::size_t, std::size_t>> ParseTensorName(bool raw,
                                                                   std::string_view name) {
  const std::size_t digit = name.find_first_of("0123456789");
  if (digit == name.npos) return std::nullopt;
  const std::size_t point = name.find('.', digit);
  if (point == name.npos || point + 1 >= name.size()) return std::nullopt;
  const std::optional<std::size_t> layer =
      ParseNumber<std::size_t>(name.substr(digit, point - digit));
  const std::size_t kind = kLetters.find(name[point + 1]);
  if (!layer || kind == kLetters.npos || name != TensorName(raw, *layer, kind)) return std::nullopt;
  return std::pair{*layer, kind};
}

std::string ShapeText(const std::vector<std::uint64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

// By the name that safetensors has for it.
std::optional<Dtype> ParseDtype(std::string_view name) {
  if (name == "F16") return Dtype::kF16;
  if (name == "BF16") return Dtype::kBF16;
  if (name == "F32") return Dtype::kF32;
  return std::nullopt;
}

// The index of the first of `count` numbers whose exponent is all ones, NaN or Inf; or `count`.
// Bits: signed, because every SIMD instruction set has that maximum.
template <class Bits>
std::size_t FindNonFinite(const void* numbers, std::size_t count, Bits infinity) {
  constexpr std::size_t kBlock = 4096;
  constexpr Bits kMagnitude = std::numeric_limits<Bits>::max();
  const Bits* x = static_cast<const Bits*>(numbers);
  const auto magnitude = [](Bits bits) { return static_cast<Bits>(bits & kMagnitude); };
  for (std::size_t begin = 0; begin < count; begin += kBlock) {
    const std::size_t end = std::min(count, begin + kBlock);
    Bits largest = 0;
    for (std::size_t i = begin; i < end; ++i) largest = std::max(largest, magnitude(x[i]));
    if (largest < infinity) continue;
    const auto is_bad = [&](Bits bits) { return magnitude(bits) >= infinity; };
    return static_cast<std::size_t>(std::find_if(x + begin, x + end, is_bad) - x);
  }
  return count;
}

}  // namespace

struct Dump::Impl {
  std::string path;
  bool raw = false;
  std::string model;
  std::string corpus;
  Geometry geometry;
  bool has_q = false;
  std::size_t tokens = 0;
  std::vector<std::size_t> prompt_tokens;
  float attention_scale = 0.0f;

  std::vector<MappedFile> files;
  std::vector<std::vector<float>> copies;       // of the tensors that are misaligned in the file
  std::vector<std::array<RowsView, 3>> layers;  // K, V and Q (or no data), into files or copies

  Status OpenSafetensors();
  Status OpenRaw(const RawFormat& format);
  Status Assemble(const FoundTensors& found);
  Status CheckPresent(const FoundTensors& found) const;
  Status CheckShapes(const FoundTensors& found) const;
  RowsView View(const Found& tensor);
  Status CheckOrder() const;
  Status ReadMetadata(const std::map<std::string, std::string>& metadata);
  Status ReadPrompts(const std::string& list);
  Status CheckPrompts() const;

  std::size_t heads(std::size_t kind) const {
    return kind == kQueries ? geometry.query_heads : geometry.kv_heads;
  }
  Status Error(ErrorCode code, std::string_view what, std::string_view expected,
               std::string_view found) const {
    return FileError(code, path, what, expected, found);
  }
};

Status Dump::Impl::OpenSafetensors() {
  Result<MappedFile> file = MappedFile::Open(path);
  if (!file.ok()) return file.status();
  files.push_back(std::move(*file));
  const Result<internal::Safetensors> content = internal::ParseSafetensors(files[0].bytes(), path);
  if (!content.ok()) return content.status();

  // Other programs write formats of their own there ("pt"): the tensors tell.
  const auto format = content->metadata.find("format");
  if (format != content->metadata.end() && format->second.starts_with("kvmix-dump-") &&
      format->second != "kvmix-dump-1") {
    return Error(ErrorCode::kVersion, "metadata format", "kvmix-dump-1", Quoted(format->second));
  }
  FoundTensors found;
  for (const auto& [name, tensor] : content->tensors) {
    const auto key = ParseTensorName(raw, name);
    if (!key) continue;
    const std::optional<Dtype> dtype = ParseDtype(tensor.dtype);
    if (!dtype) {
      return Error(ErrorCode::kMismatch, "tensor " + name, "dtype F16, BF16 or F32", tensor.dtype);
    }
    found[*key] = Found{tensor.data.data(), *dtype, tensor.shape};
  }
  if (Status s = Assemble(found); !s.ok()) return s;
  const bool says_order =
      content->metadata.contains("kv_heads") || content->metadata.contains("tokens");
  if (!says_order && !found.at({0, kKeys}).heads_first()) {
    if (Status s = CheckOrder(); !s.ok()) return s;
  }
  return ReadMetadata(content->metadata);
}

Status Dump::Impl::OpenRaw(const RawFormat& format) {
  // Layers are counted below; the rest must be sound before sizes are computed from it.
  const std::size_t query_heads = format.query_heads != 0 ? format.query_heads : format.kv_heads;
  if (Status s = CheckGeometry({1, format.kv_heads, query_heads, format.head_dim}); !s.ok()) {
    return Status(s.code(), path + ": " + s.message());
  }
  FoundTensors found;
  std::error_code error;
  for (std::filesystem::directory_iterator entry(path, error), end; !error && entry != end;
       entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    const auto key = ParseTensorName(raw, name);
    if (!key || (key->second == kQueries && format.query_heads == 0)) continue;
    Result<MappedFile> file = MappedFile::Open(entry->path().string());
    if (!file.ok()) return file.status();
    const std::size_t heads = key->second == kQueries ? format.query_heads : format.kv_heads;
    const std::size_t row_bytes = heads * format.head_dim * sizeof(Half);
    const std::string_view bytes = file->bytes();
    if (bytes.size() % row_bytes != 0) {
      return Error(ErrorCode::kMismatch, name,
                   fmt::format("whole tokens of {} heads x {} x 2 bytes", heads, format.head_dim),
                   fmt::format("{} bytes", bytes.size()));
    }
    found[*key] =
        Found{bytes.data(), Dtype::kF16, {bytes.size() / row_bytes, heads, format.head_dim}};
    files.push_back(std::move(*file));
  }
  if (error) return Error(ErrorCode::kIo, "", "a folder that can be read", error.message());
  prompt_tokens = format.prompt_tokens;
  if (Status s = Assemble(found); !s.ok()) return s;
  geometry.query_heads = query_heads;
  return CheckPrompts();
}

// The geometry, and all tensors checked against it.
Status Dump::Impl::Assemble(const FoundTensors& found) {
  if (found.empty())
    return Error(ErrorCode::kNotFound, "", "tensors " + TensorName(raw, 0, kKeys) + " and so on",
                 "none");
  if (Status s = CheckPresent(found); !s.ok()) return s;
  const Found& k = found.at({0, kKeys});
  if (!k.is_valid()) {
    return Error(ErrorCode::kMismatch, TensorName(raw, 0, kKeys),
                 "a shape [tokens, heads, head_dim]", ShapeText(k.shape));
  }
  tokens = k.tokens();
  has_q = found.contains({0, kQueries});
  geometry = Geometry{found.rbegin()->first.first + 1, k.heads(), k.heads(), k.head_dim()};
  if (has_q) {
    const Found& q = found.at({0, kQueries});
    if (q.is_valid()) geometry.query_heads = q.heads();
  }
  if (tokens == 0) return Error(ErrorCode::kMismatch, "", "at least 1 token", "an empty dump");
  if (Status s = CheckGeometry(geometry); !s.ok())
    return Status(s.code(), path + ": " + s.message());
  if (Status s = CheckShapes(found); !s.ok()) return s;

  attention_scale = 1.0f / std::sqrt(static_cast<float>(geometry.head_dim));
  if (prompt_tokens.empty()) prompt_tokens = {tokens};
  layers.resize(geometry.layers);
  for (const auto& [key, tensor] : found) layers[key.first][key.second] = View(tensor);
  return {};
}

// Layers from 0 on without a gap, each with K and V, and with Q in all or in none.
Status Dump::Impl::CheckPresent(const FoundTensors& found) const {
  const std::size_t last = found.rbegin()->first.first;
  const std::size_t kinds = std::any_of(found.begin(), found.end(),
                                        [](const auto& f) { return f.first.second == kQueries; })
                                ? 3
                                : 2;
  // As many steps as there are tensors, whatever number the last layer claims to have.
  for (std::size_t layer = 0; layer <= last; ++layer) {
    for (std::size_t kind = 0; kind < kinds; ++kind) {
      if (found.contains({layer, kind})) continue;
      return Error(ErrorCode::kMismatch, TensorName(raw, layer, kind),
                   fmt::format("one in every layer from 0 to {}", last), "none");
    }
  }
  return {};
}

Status Dump::Impl::CheckShapes(const FoundTensors& found) const {
  const bool heads_first = found.at({0, kKeys}).heads_first();
  for (const auto& [key, tensor] : found) {
    std::vector<std::uint64_t> expected = {tokens, heads(key.second), geometry.head_dim};
    if (heads_first) expected = {1, heads(key.second), tokens, geometry.head_dim};
    if (tensor.shape != expected) {
      return Error(ErrorCode::kMismatch, TensorName(raw, key.first, key.second),
                   "shape " + ShapeText(expected), ShapeText(tensor.shape));
    }
  }
  return {};
}

// Nothing in the file says which axis is which: few tokens of many heads are more likely to be few
// heads of many tokens.
Status Dump::Impl::CheckOrder() const {
  if (geometry.kv_heads <= tokens) return {};
  return Error(ErrorCode::kMismatch, TensorName(raw, 0, kKeys),
               "[tokens, heads, head_dim], with kv_heads in the metadata where there are fewer "
               "tokens than heads",
               ShapeText({tokens, geometry.kv_heads, geometry.head_dim}) +
                   ", which looks like [heads, tokens, head_dim]");
}

RowsView Dump::Impl::View(const Found& tensor) {
  RowsView view = RowsView::Dense(tensor.data, tensor.dtype, tensor.tokens(), tensor.heads(),
                                  tensor.head_dim());
  if (tensor.heads_first()) {
    view.token_stride = static_cast<std::ptrdiff_t>(view.head_dim);
    view.head_stride = static_cast<std::ptrdiff_t>(view.tokens * view.head_dim);
  }
  if (reinterpret_cast<std::uintptr_t>(tensor.data) % view.element_bytes() == 0) return view;
  const std::size_t bytes = view.tokens * view.heads * view.head_dim * view.element_bytes();
  std::vector<float>& copy = copies.emplace_back((bytes + sizeof(float) - 1) / sizeof(float));
  std::memcpy(copy.data(), tensor.data, bytes);
  view.data = copy.data();
  return view;
}

Status Dump::Impl::ReadMetadata(const std::map<std::string, std::string>& metadata) {
  const auto find = [&](const char* key) {
    const auto it = metadata.find(key);
    return it == metadata.end() ? nullptr : &it->second;
  };
  if (const std::string* text = find("model")) model = *text;
  if (const std::string* text = find("corpus")) corpus = *text;
  if (const std::string* text = find("query_heads"); text != nullptr && !has_q) {
    const auto value = ParseNumber<std::size_t>(*text);
    if (!value)
      return Error(ErrorCode::kCorrupt, "metadata query_heads", "a whole number", Quoted(*text));
    geometry.query_heads = *value;
    if (Status s = CheckGeometry(geometry); !s.ok())
      return Status(s.code(), path + ": metadata: " + s.message());
  }
  const std::pair<const char*, std::size_t> known[] = {{"layers", geometry.layers},
                                                       {"tokens", tokens},
                                                       {"kv_heads", geometry.kv_heads},
                                                       {"query_heads", geometry.query_heads},
                                                       {"head_dim", geometry.head_dim}};
  for (const auto& [key, value] : known) {
    const std::string* text = find(key);
    if (text != nullptr && ParseNumber<std::size_t>(*text) != value) {
      return Error(ErrorCode::kMismatch, fmt::format("metadata {}", key),
                   fmt::format("{}, as the tensors have it", value), Quoted(*text));
    }
  }
  if (const std::string* text = find("attention_scale")) {
    attention_scale = ParseNumber<float>(*text).value_or(0.0f);
    if (!(attention_scale > 0.0f) || !std::isfinite(attention_scale)) {
      return Error(ErrorCode::kCorrupt, "metadata attention_scale", "a number above 0",
                   Quoted(*text));
    }
  }
  if (const std::string* text = find("prompt_tokens")) return ReadPrompts(*text);
  return {};
}

// "512,512,256"
Status Dump::Impl::ReadPrompts(const std::string& list) {
  prompt_tokens.clear();
  for (std::string_view rest = list;;) {
    const std::size_t comma = rest.find(',');
    const auto length = ParseNumber<std::size_t>(rest.substr(0, comma));
    if (!length)
      return Error(ErrorCode::kCorrupt, "metadata prompt_tokens",
                   "whole numbers with commas between them", Quoted(list));
    prompt_tokens.push_back(*length);
    if (comma == rest.npos) return CheckPrompts();
    rest.remove_prefix(comma + 1);
  }
}

Status Dump::Impl::CheckPrompts() const {
  std::size_t sum = 0;
  for (const std::size_t length : prompt_tokens) {
    if (length == 0)
      return Error(ErrorCode::kMismatch, "prompt_tokens", "lengths of at least 1", "0");
    if (length > tokens - sum) {
      return Error(ErrorCode::kMismatch, "prompt_tokens",
                   fmt::format("a sum of {}, the dump's tokens", tokens),
                   fmt::format("more, with a prompt of {}", length));
    }
    sum += length;
  }
  if (sum != tokens)
    return Error(ErrorCode::kMismatch, "prompt_tokens",
                 fmt::format("a sum of {}, the dump's tokens", tokens), fmt::format("{}", sum));
  return {};
}

Result<Dump> Dump::Open(const std::string& path, const RawFormat* raw) try {
  std::error_code error;
  const bool is_folder = std::filesystem::is_directory(path, error);
  if (is_folder && raw == nullptr) {
    return FileError(ErrorCode::kInvalidArgument, path, "",
                     "a safetensors file, or the heads and the head_dim of a raw folder",
                     "a folder alone");
  }
  if (!is_folder && raw != nullptr && std::filesystem::exists(path, error)) {
    return FileError(ErrorCode::kInvalidArgument, path, "",
                     "a raw folder, as its geometry was given", "a file");
  }
  auto impl = std::make_unique<Impl>();
  impl->path = path;
  impl->raw = is_folder;
  if (Status s = is_folder ? impl->OpenRaw(*raw) : impl->OpenSafetensors(); !s.ok()) return s;
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
const std::string& Dump::model() const { return impl_->model; }
const std::string& Dump::corpus() const { return impl_->corpus; }
const Geometry& Dump::geometry() const { return impl_->geometry; }
bool Dump::has_q() const { return impl_->has_q; }
std::size_t Dump::tokens() const { return impl_->tokens; }
const std::vector<std::size_t>& Dump::prompt_tokens() const { return impl_->prompt_tokens; }
float Dump::attention_scale() const { return impl_->attention_scale; }

RowsView Dump::k(std::size_t layer) const {
  KVMIX_CHECK(layer, <, impl_->layers.size());
  return impl_->layers[layer][kKeys];
}
RowsView Dump::v(std::size_t layer) const {
  KVMIX_CHECK(layer, <, impl_->layers.size());
  return impl_->layers[layer][kValues];
}
RowsView Dump::q(std::size_t layer) const {
  KVMIX_CHECK(layer, <, impl_->layers.size());
  return impl_->layers[layer][kQueries];
}
RowsView Dump::head(std::size_t layer, std::size_t kv_head, Tensor t) const {
  KVMIX_CHECK(kv_head, <, impl_->geometry.kv_heads);
  return (t == Tensor::kK ? k(layer) : v(layer)).Head(kv_head);
}
std::string Dump::k_name(std::size_t layer) const { return TensorName(impl_->raw, layer, kKeys); }
std::string Dump::v_name(std::size_t layer) const { return TensorName(impl_->raw, layer, kValues); }

Status Dump::CheckFinite(std::size_t layer) const {
  KVMIX_CHECK(layer, <, impl_->layers.size());
  for (std::size_t kind = 0; kind < 3; ++kind) {
    const RowsView& x = impl_->layers[layer][kind];
    if (x.data == nullptr) continue;
    const std::size_t count = x.tokens * x.heads * x.head_dim;
    const std::size_t at =
        x.dtype == Dtype::kF32
            ? FindNonFinite<std::int32_t>(x.data, count, 0x7F800000)
            : FindNonFinite<std::int16_t>(x.data, count, x.dtype == Dtype::kF16 ? 0x7C00 : 0x7F80);
    if (at == count) continue;
    const std::size_t channel = at % x.head_dim, row = at / x.head_dim;
    const bool heads_first = x.token_stride < x.head_stride;
    const std::size_t head = heads_first ? row / x.tokens : row % x.heads;
    const std::size_t token = heads_first ? row % x.tokens : row / x.heads;
    return impl_->Error(ErrorCode::kNonFinite, TensorName(impl_->raw, layer, kind),
                        "finite numbers",
                        fmt::format("{} at layer {}, {} head {}, token {}, channel {}",
                                    std::isnan(x.At(token, head, channel)) ? "NaN" : "Inf", layer,
                                    kind == kQueries ? "query" : "KV", head, token, channel));
  }
  return {};
}

void Dump::Release(std::size_t layer) const {
  KVMIX_CHECK(layer, <, impl_->layers.size());
  const auto inside = [this](const char* data) {
    return std::any_of(impl_->files.begin(), impl_->files.end(), [data](const MappedFile& f) {
      return data >= f.bytes().data() && data < f.bytes().data() + f.bytes().size();
    });
  };
  for (const RowsView& x : impl_->layers[layer]) {
    const char* data = static_cast<const char*>(x.data);
    // A copy is the only one that there is: it stays.
    if (data != nullptr && inside(data)) {
      internal::ReleasePages(data, x.tokens * x.heads * x.head_dim * x.element_bytes());
    }
  }
}

}  // namespace kvmix
