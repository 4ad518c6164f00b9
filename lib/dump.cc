#include "kvmix/dump.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <new>
#include <optional>
#include <system_error>
#include <utility>

#include "check.h"
#include "file.h"
#include "parse_number.h"
#include "safetensors.h"

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
  std::vector<std::uint64_t> shape;
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

bool IsFinite(Half h) { return (h & 0x7C00u) != 0x7C00u; }

// The index of the first NaN or Inf among `count` halves, or `count`.
std::size_t FindNonFinite(const Half* x, std::size_t count) {
  constexpr std::size_t kBlock = 4096;
  for (std::size_t begin = 0; begin < count; begin += kBlock) {
    const std::size_t end = std::min(count, begin + kBlock);
    std::int16_t largest = 0;  // of the magnitudes' bits; signed 16 bit, as every SIMD instruction
                               // set has that maximum
    for (std::size_t i = begin; i < end; ++i)
      largest = std::max(largest, static_cast<std::int16_t>(x[i] & 0x7FFF));
    if (largest >= 0x7C00)
      return static_cast<std::size_t>(std::find_if_not(x + begin, x + end, IsFinite) - x);
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
  std::vector<std::vector<Half>> copies;           // of the tensors that are misaligned in the file
  std::vector<std::array<const Half*, 3>> layers;  // K, V and Q (or null), into files or copies

  Status OpenSafetensors();
  Status OpenRaw(const RawFormat& format);
  Status Assemble(const FoundTensors& found);
  Status CheckPresent(const FoundTensors& found) const;
  Status CheckShapes(const FoundTensors& found) const;
  const Half* Aligned(const Found& tensor);
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

  const auto format = content->metadata.find("format");
  if (format != content->metadata.end() && format->second != "kvmix-dump-1") {
    const ErrorCode code =
        format->second.starts_with("kvmix-dump-") ? ErrorCode::kVersion : ErrorCode::kCorrupt;
    return Error(code, "metadata format", "kvmix-dump-1", Quoted(format->second));
  }
  FoundTensors found;
  for (const auto& [name, tensor] : content->tensors) {
    const auto key = ParseTensorName(raw, name);
    if (!key) continue;
    if (tensor.dtype != "F16")
      return Error(ErrorCode::kMismatch, "tensor " + name, "dtype F16", tensor.dtype);
    found[*key] = Found{tensor.data.data(), tensor.shape};
  }
  if (Status s = Assemble(found); !s.ok()) return s;
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
    found[*key] = Found{bytes.data(), {bytes.size() / row_bytes, heads, format.head_dim}};
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
  const std::vector<std::uint64_t>& k_shape = found.at({0, kKeys}).shape;
  if (k_shape.size() != 3)
    return Error(ErrorCode::kMismatch, TensorName(raw, 0, kKeys),
                 "a shape [tokens, heads, head_dim]", ShapeText(k_shape));
  tokens = k_shape[0];
  has_q = found.contains({0, kQueries});
  geometry = Geometry{found.rbegin()->first.first + 1, k_shape[1], k_shape[1], k_shape[2]};
  if (has_q) {
    const std::vector<std::uint64_t>& q_shape = found.at({0, kQueries}).shape;
    if (q_shape.size() == 3) geometry.query_heads = q_shape[1];
  }
  if (tokens == 0) return Error(ErrorCode::kMismatch, "", "at least 1 token", "an empty dump");
  if (Status s = CheckGeometry(geometry); !s.ok())
    return Status(s.code(), path + ": " + s.message());
  if (Status s = CheckShapes(found); !s.ok()) return s;

  attention_scale = 1.0f / std::sqrt(static_cast<float>(geometry.head_dim));
  if (prompt_tokens.empty()) prompt_tokens = {tokens};
  layers.resize(geometry.layers);
  for (const auto& [key, tensor] : found) layers[key.first][key.second] = Aligned(tensor);
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
  for (const auto& [key, tensor] : found) {
    const std::vector<std::uint64_t> expected = {tokens, heads(key.second), geometry.head_dim};
    if (tensor.shape != expected) {
      return Error(ErrorCode::kMismatch, TensorName(raw, key.first, key.second),
                   "shape " + ShapeText(expected), ShapeText(tensor.shape));
    }
  }
  return {};
}

const Half* Dump::Impl::Aligned(const Found& tensor) {
  if (reinterpret_cast<std::uintptr_t>(tensor.data) % alignof(Half) == 0)
    return reinterpret_cast<const Half*>(tensor.data);
  std::vector<Half>& copy =
      copies.emplace_back(tensor.shape[0] * tensor.shape[1] * tensor.shape[2]);
  std::memcpy(copy.data(), tensor.data, copy.size() * sizeof(Half));
  return copy.data();
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

const Half* Dump::k(std::size_t layer) const {
  KVMIX_CHECK(layer, <, impl_->layers.size());
  return impl_->layers[layer][kKeys];
}
const Half* Dump::v(std::size_t layer) const {
  KVMIX_CHECK(layer, <, impl_->layers.size());
  return impl_->layers[layer][kValues];
}
const Half* Dump::q(std::size_t layer) const {
  KVMIX_CHECK(layer, <, impl_->layers.size());
  return impl_->layers[layer][kQueries];
}

HalfRows Dump::head(std::size_t layer, std::size_t kv_head, Tensor t) const {
  const Geometry& g = impl_->geometry;
  KVMIX_CHECK(kv_head, <, g.kv_heads);
  return {(t == Tensor::kK ? k(layer) : v(layer)) + kv_head * g.head_dim, g.kv_heads * g.head_dim,
          impl_->tokens, g.head_dim};
}

Status Dump::CheckFinite(std::size_t layer) const {
  KVMIX_CHECK(layer, <, impl_->layers.size());
  const std::size_t head_dim = impl_->geometry.head_dim;
  for (std::size_t kind = 0; kind < 3; ++kind) {
    const Half* x = impl_->layers[layer][kind];
    if (x == nullptr) continue;
    const std::size_t heads = impl_->heads(kind);
    const std::size_t count = impl_->tokens * heads * head_dim;
    const std::size_t at = FindNonFinite(x, count);
    if (at == count) continue;
    return impl_->Error(
        ErrorCode::kNonFinite, TensorName(impl_->raw, layer, kind), "finite numbers",
        fmt::format("{} at layer {}, {} head {}, token {}, channel {}",
                    (x[at] & 0x3FFu) != 0 ? "NaN" : "Inf", layer, kind == kQueries ? "query" : "KV",
                    at / head_dim % heads, at / head_dim / heads, at % head_dim));
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
  for (std::size_t kind = 0; kind < 3; ++kind) {
    const auto* data = reinterpret_cast<const char*>(impl_->layers[layer][kind]);
    // A copy is the only one that there is: it stays.
    if (data != nullptr && inside(data))
      internal::ReleasePages(
          data, impl_->tokens * impl_->heads(kind) * impl_->geometry.head_dim * sizeof(Half));
  }
}

}  // namespace kvmix
