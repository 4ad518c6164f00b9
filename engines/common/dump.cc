#include "engines/common/dump.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <numeric>

#include <signal.h>
#include <unistd.h>

#include "engines/common/mirror.h"

namespace kvmix::engine {
namespace {

Status IoError(const std::string& path, const char* what) {
  return {ErrorCode::kIo, path + ": cannot " + what + ": " + std::strerror(errno)};
}

constexpr const char* kParts = ".parts";
// An engine warms up on a token or two; that is no text.
constexpr std::size_t kShortestPrompt = 8;

// All digits, with a point in every locale.
std::string Number(float x) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof(text), x).ptr};
}

// A token of a view as halves.
void PutToken(const RowsView& rows, std::size_t token, std::vector<Half>* halves) {
  for (std::size_t h = 0; h < rows.heads; ++h) {
    for (std::size_t c = 0; c < rows.head_dim; ++c) {
      halves->push_back(FloatToHalf(rows.At(token, h, c)));
    }
  }
}

bool Append(const std::string& path, const std::vector<Half>& halves) {
  std::FILE* const file = std::fopen(path.c_str(), "ab");
  if (file == nullptr) return false;
  const bool good = std::fwrite(halves.data(), sizeof(Half), halves.size(), file) == halves.size();
  return std::fclose(file) == 0 && good;
}

// cells <- those that one query of a mask sees; returns how many.
std::size_t Seen(MaskView mask, std::size_t query, std::vector<std::uint8_t>* cells) {
  const auto number = static_cast<std::ptrdiff_t>(kvmix_dtype_bytes(mask.dtype));
  mask.data = static_cast<const char*>(mask.data) +
              static_cast<std::ptrdiff_t>(query) * mask.stride * number;
  mask.queries = 1;
  cells->resize(mask.cells);
  SeenCells(mask, cells->data());
  return mask.cells - static_cast<std::size_t>(std::ranges::count(*cells, 0));
}

}  // namespace

Dump::Dump(std::string path)
    : path_(std::move(path)), folder_(path_ + "." + std::to_string(getpid()) + kParts) {}

Dump::~Dump() {
  std::error_code ignored;
  std::filesystem::remove_all(folder_, ignored);
}

std::array<Dump::Tensor, 3> Dump::Tensors(const LayerShape& s) {
  return {{{"k", s.kv_heads, s.k_dim}, {"v", s.kv_heads, s.v_dim}, {"q", s.query_heads, s.k_dim}}};
}

std::string Dump::Part(std::size_t layer, std::size_t stream, const char* tensor) const {
  return folder_ + "/" + std::to_string(layer) + "." + std::to_string(stream) + "." + tensor;
}

// The parts of an engine that was killed.
void Dump::RemoveStale() const {
  const std::filesystem::path folder(folder_);
  const std::string begin = std::filesystem::path(path_).filename().string() + ".";
  std::error_code error;
  const std::filesystem::path parent = folder.has_parent_path() ? folder.parent_path() : ".";
  for (const auto& entry : std::filesystem::directory_iterator(parent, error)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(begin) || !name.ends_with(kParts)) continue;
    const std::string digits =
        name.substr(begin.size(), name.size() - begin.size() - std::strlen(kParts));
    const pid_t process = static_cast<pid_t>(std::strtol(digits.c_str(), nullptr, 10));
    if (process > 0 && kill(process, 0) != 0 && errno == ESRCH) {
      std::filesystem::remove_all(entry.path(), error);
    }
  }
}

Status Dump::Add(std::size_t number, const LayerShape& shape, const RowsView& q, const RowsView& k,
                 const RowsView& v, const MaskView& mask, std::size_t stream) {
  if (layers_.empty()) {
    RemoveStale();
    std::error_code ignored;  // the first part says it
    std::filesystem::create_directories(folder_, ignored);
  }
  const auto [at, is_new] = layers_.try_emplace(number);
  Layer& layer = at->second;
  if (is_new) layer.shape = shape;
  if (k.tokens != q.tokens || v.tokens != q.tokens) {  // reads another's K, or padded
    left_out_ += q.tokens;
    return {};
  }
  Stream& s = layer.streams[stream];
  std::vector<Half> rows[3];
  const auto write = [&]() -> Status {
    std::size_t i = 0;
    for (const Tensor& t : Tensors(shape)) {
      const std::string part = Part(number, stream, t.name);
      if (!Append(part, rows[i])) return IoError(part, "be written");
      rows[i++].clear();
    }
    return {};
  };
  std::vector<std::uint8_t> cells, before;
  for (std::size_t t = 0; t < q.tokens; ++t) {
    before.swap(cells);
    const std::size_t seen = Seen(mask, t, &cells);
    // A token does not see those after it; so no other sees the same cells, itself among them.
    not_causal_ = not_causal_ || (seen != 0 && cells == before);
    if (seen == 1) {
      if (Status error = write(); !error.ok()) return error;
      if (Status error = DropShortPrompt(number, stream); !error.ok()) return error;
      s.prompts.push_back(0);
    } else if (s.prompts.empty() || (seen != s.seen + 1 && seen != s.seen)) {
      ++left_out_;
      continue;
    } else if (seen == s.seen && seen == layer.most) {
      layer.shape.window = seen;  // it no longer grows
    }
    if (seen > layer.most) {  // it does: a token was computed twice
      layer.most = seen;
      layer.shape.window = 0;
    }
    s.seen = seen;
    PutToken(k, t, &rows[0]);
    PutToken(v, t, &rows[1]);
    PutToken(q, t, &rows[2]);
    ++s.prompts.back();
  }
  return write();
}

Status Dump::NoPrompt() const {
  if (not_causal_) {
    return {ErrorCode::kMismatch,
            path_ + ": expected causal attention, found tokens that see those after them"};
  }
  return {ErrorCode::kMismatch, path_ + ": expected a prompt of " +
                                    std::to_string(kShortestPrompt) +
                                    " tokens or more into an empty cache, found none"};
}

// The last prompt, if it is too short to be one.
Status Dump::DropShortPrompt(std::size_t number, std::size_t stream) {
  Layer& layer = layers_.at(number);
  std::vector<std::size_t>& prompts = layer.streams.at(stream).prompts;
  if (prompts.empty() || prompts.back() >= kShortestPrompt) return {};
  const std::size_t tokens = prompts.back();
  prompts.pop_back();
  left_out_ += tokens;
  for (const Tensor& t : Tensors(layer.shape)) {
    const std::string part = Part(number, stream, t.name);
    std::error_code error;
    const std::uintmax_t bytes = std::filesystem::file_size(part, error);
    if (!error) {
      std::filesystem::resize_file(part, bytes - tokens * t.heads * t.dim * sizeof(Half), error);
    }
    if (error) return {ErrorCode::kIo, part + ": cannot be cut: " + error.message()};
  }
  return {};
}

// The header says where every tensor lies; the parts follow as they are.
Status Dump::Finish() {
  if (layers_.empty()) return {};  // a context that the engine only tried
  const auto prompts_of = [](const Layer& layer) {
    std::vector<std::size_t> all;
    for (const auto& [_, s] : layer.streams) {
      all.insert(all.end(), s.prompts.begin(), s.prompts.end());
    }
    return all;
  };
  for (const auto& [number, layer] : layers_) {
    for (const auto& [stream, _] : layer.streams) {
      if (Status error = DropShortPrompt(number, stream); !error.ok()) return error;
    }
  }
  const std::vector<std::size_t> prompts = prompts_of(layers_.begin()->second);
  const std::size_t tokens = std::accumulate(prompts.begin(), prompts.end(), std::size_t{0});
  if (std::ranges::all_of(layers_, [&](const auto& l) { return prompts_of(l.second).empty(); })) {
    return NoPrompt();
  }
  std::string tensors, shapes, lengths;
  std::size_t at = 0, next = 0;
  std::vector<std::string> parts;
  for (auto& [number, layer] : layers_) {
    if (prompts_of(layer) != prompts) {
      return {ErrorCode::kMismatch, path_ + ": layers saw unlike prompts"};
    }
    for (; next < number; ++next) shapes += "null, ";
    ++next;
    const LayerShape& s = layer.shape;
    shapes += "{\\\"kv_heads\\\": " + std::to_string(s.kv_heads) +
              ", \\\"query_heads\\\": " + std::to_string(s.query_heads) +
              ", \\\"k_dim\\\": " + std::to_string(s.k_dim) +
              ", \\\"v_dim\\\": " + std::to_string(s.v_dim);
    if (s.window != 0) shapes += ", \\\"window\\\": " + std::to_string(s.window);
    const float usual = 1.0f / std::sqrt(static_cast<float>(s.k_dim));
    if (std::abs(s.attention_scale / usual - 1.0f) > 1e-6f) {
      shapes += ", \\\"attention_scale\\\": " + Number(s.attention_scale);
    }
    if (s.soft_cap != 0.0f) shapes += ", \\\"soft_cap\\\": " + Number(s.soft_cap);
    shapes += "}, ";
    for (const Tensor& t : Tensors(s)) {
      const std::size_t end = at + tokens * t.heads * t.dim * sizeof(Half);
      tensors += ", \"layers." + std::to_string(number) + "." + t.name +
                 "\": {\"dtype\": \"F16\", \"shape\": [" + std::to_string(tokens) + ", " +
                 std::to_string(t.heads) + ", " + std::to_string(t.dim) + "], \"data_offsets\": [" +
                 std::to_string(at) + ", " + std::to_string(end) + "]}";
      at = end;
      for (const auto& [stream, _] : layer.streams) parts.push_back(Part(number, stream, t.name));
    }
  }
  shapes.resize(shapes.size() - 2);
  for (const std::size_t n : prompts) lengths += (lengths.empty() ? "" : ",") + std::to_string(n);
  std::string header = "{\"__metadata__\": {\"format\": \"kvmix-dump-1\", \"prompt_tokens\": \"" +
                       lengths + "\", \"layer_shapes\": \"[" + shapes + "]\"}" + tensors + "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');

  const std::string whole = folder_ + "/whole";
  std::FILE* const out = std::fopen(whole.c_str(), "wb");
  if (out == nullptr) return IoError(whole, "be written");
  const std::uint64_t size = header.size();
  bool good = std::fwrite(&size, sizeof(size), 1, out) == 1 &&
              std::fwrite(header.data(), 1, header.size(), out) == header.size();
  std::vector<char> buffer(1 << 20);
  for (const std::string& part : parts) {
    std::FILE* const file = std::fopen(part.c_str(), "rb");
    if (file == nullptr) {
      std::fclose(out);
      return IoError(part, "be read");
    }
    for (std::size_t n = 1; good && n > 0;) {
      n = std::fread(buffer.data(), 1, buffer.size(), file);
      good = std::ferror(file) == 0 && std::fwrite(buffer.data(), 1, n, out) == n;
    }
    std::fclose(file);
  }
  good = std::fclose(out) == 0 && good;
  if (!good) return IoError(whole, "be written");
  std::error_code error;
  std::filesystem::rename(whole, path_, error);
  if (error) return {ErrorCode::kIo, path_ + ": " + error.message()};
  std::fprintf(stderr, "kvmix: %s: %zu layers, %zu prompts, %zu tokens (%zu rows left out)\n",
               path_.c_str(), layers_.size(), prompts.size(), tokens, left_out_);
  return {};
}

}  // namespace kvmix::engine
