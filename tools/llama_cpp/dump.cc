#include "dump.h"

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

#include <kvmix/mirror.h>

namespace kvmix::llama {
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

// Token t of a view as halves, appended to a file.
bool WriteToken(const RowsView& rows, std::size_t t, std::FILE* file) {
  std::vector<Half> halves;
  for (std::size_t h = 0; h < rows.heads; ++h) {
    for (std::size_t c = 0; c < rows.head_dim; ++c) {
      halves.push_back(FloatToHalf(rows.At(t, h, c)));
    }
  }
  return std::fwrite(halves.data(), sizeof(Half), halves.size(), file) == halves.size();
}

// Cells that one query of a mask sees.
std::size_t Seen(MaskView mask, std::size_t query) {
  const std::ptrdiff_t number = mask.dtype == Dtype::kF32 ? 4 : 2;
  mask.data = static_cast<const char*>(mask.data) +
              static_cast<std::ptrdiff_t>(query) * mask.stride * number;
  mask.queries = 1;
  std::vector<std::uint8_t> cells(mask.cells);
  SeenCells(mask, cells.data());
  return mask.cells - static_cast<std::size_t>(std::ranges::count(cells, 0));
}

}  // namespace

Dump::Dump(std::string path)
    : path_(std::move(path)), folder_(path_ + "." + std::to_string(getpid()) + kParts) {}

Dump::~Dump() {
  for (auto& [_, layer] : layers_) {
    for (std::FILE* file : {layer.k, layer.v, layer.q}) {
      if (file != nullptr) std::fclose(file);
    }
  }
  std::error_code ignored;
  std::filesystem::remove_all(folder_, ignored);
}

std::string Dump::Part(std::size_t layer, const char* tensor) const {
  return folder_ + "/" + std::to_string(layer) + "." + tensor;
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

Status Dump::Open(std::size_t number, Layer* layer) {
  std::error_code error;
  if (layers_.size() == 1) RemoveStale();
  std::filesystem::create_directories(folder_, error);
  for (auto& [file, name] : {std::pair{&layer->k, "k"}, {&layer->v, "v"}, {&layer->q, "q"}}) {
    *file = std::fopen(Part(number, name).c_str(), "wb+");
    if (*file == nullptr) return IoError(Part(number, name), "be written");
  }
  return {};
}

Status Dump::Add(std::size_t number, const LayerShape& shape, const RowsView& q, const RowsView& k,
                 const RowsView& v, const MaskView& mask) {
  Layer& layer = layers_[number];
  if (layer.k == nullptr) {
    layer.shape = shape;
    if (Status s = Open(number, &layer); !s.ok()) return s;
  }
  if (k.tokens != q.tokens || v.tokens != q.tokens) {  // reads another's K, or padded
    left_out_ += q.tokens;
    return {};
  }
  for (std::size_t t = 0; t < q.tokens; ++t) {
    const std::size_t seen = Seen(mask, t);
    if (seen == 1) {
      if (!DropShortPrompt(&layer)) return IoError(folder_, "be written");
      layer.prompts.push_back(0);
    } else if (layer.prompts.empty() || (seen != layer.seen + 1 && seen != layer.seen)) {
      ++left_out_;
      continue;
    } else if (seen == layer.seen && seen == layer.most) {
      layer.shape.window = seen;  // it no longer grows
    }
    if (seen > layer.most) {  // it does: a token was computed twice
      layer.most = seen;
      layer.shape.window = 0;
    }
    layer.seen = seen;
    if (!WriteToken(k, t, layer.k) || !WriteToken(v, t, layer.v) || !WriteToken(q, t, layer.q)) {
      return IoError(folder_, "be written");
    }
    ++layer.prompts.back();
  }
  return {};
}

// The last prompt, if it is too short to be one.
bool Dump::DropShortPrompt(Layer* layer) {
  if (layer->prompts.empty() || layer->prompts.back() >= kShortestPrompt) return true;
  const std::size_t tokens = layer->prompts.back();
  layer->prompts.pop_back();
  left_out_ += tokens;
  const LayerShape& s = layer->shape;
  const auto back = [&](std::FILE* file, std::size_t row) {
    const long bytes = static_cast<long>(tokens * row * sizeof(Half));
    return std::fseek(file, -bytes, SEEK_CUR) == 0;
  };
  return back(layer->k, s.kv_heads * s.k_dim) && back(layer->v, s.kv_heads * s.v_dim) &&
         back(layer->q, s.query_heads * s.k_dim);
}

// The header says where every tensor lies; the parts follow as they are.
Status Dump::Finish() {
  if (layers_.empty()) return {};  // a context that the engine only tried
  for (auto& [_, layer] : layers_) {
    if (!DropShortPrompt(&layer)) return IoError(folder_, "be written");
  }
  const std::vector<std::size_t>& prompts = layers_.begin()->second.prompts;
  const std::size_t tokens = std::accumulate(prompts.begin(), prompts.end(), std::size_t{0});
  if (std::ranges::all_of(layers_, [](const auto& l) { return l.second.prompts.empty(); })) {
    return {ErrorCode::kMismatch, path_ + ": expected a prompt of " +
                                      std::to_string(kShortestPrompt) +
                                      " tokens or more, found none"};
  }
  std::string tensors, shapes, lengths;
  std::size_t at = 0, next = 0;
  std::vector<std::FILE*> files;
  for (auto& [number, layer] : layers_) {
    if (layer.prompts != prompts) {
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
    struct Tensor {
      const char* name;
      std::FILE* file;
      std::size_t heads, dim;
    };
    for (const Tensor& t :
         {Tensor{"k", layer.k, s.kv_heads, s.k_dim}, Tensor{"v", layer.v, s.kv_heads, s.v_dim},
          Tensor{"q", layer.q, s.query_heads, s.k_dim}}) {
      const std::size_t end = at + tokens * t.heads * t.dim * sizeof(Half);
      tensors += ", \"layers." + std::to_string(number) + "." + t.name +
                 "\": {\"dtype\": \"F16\", \"shape\": [" + std::to_string(tokens) + ", " +
                 std::to_string(t.heads) + ", " + std::to_string(t.dim) + "], \"data_offsets\": [" +
                 std::to_string(at) + ", " + std::to_string(end) + "]}";
      at = end;
      files.push_back(t.file);
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
  for (std::FILE* file : files) {
    // What was written after the last place was dropped.
    std::size_t left = static_cast<std::size_t>(std::ftell(file));
    std::rewind(file);
    for (std::size_t n; good && left > 0; left -= n) {
      n = std::fread(buffer.data(), 1, std::min(left, buffer.size()), file);
      good = n > 0 && std::fwrite(buffer.data(), 1, n, out) == n;
    }
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

}  // namespace kvmix::llama
