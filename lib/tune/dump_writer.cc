// Dumps: writing, row by row into files of parts, which become one file at the end.
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "kvmix/half.h"
#include "kvmix/tune/dump.h"
#include "lib/files/file.h"
#include "lib/files/safetensors.h"
#include "lib/plan/model_json.h"

namespace kvmix::tune {

using internal::Error;
using internal::FileError;

namespace {

namespace fs = std::filesystem;

enum Kind : std::size_t { kKeys, kValues, kQueries };
constexpr std::array kLetters = {"k", "v", "q"};
constexpr std::string_view kParts = ".parts";

// The rows of one tensor and one stream, in a file of halves.
struct Part {
  std::size_t tokens = 0, heads = 0, dim = 0;

  std::uint64_t bytes() const { return std::uint64_t{tokens} * heads * dim * sizeof(Half); }
};
using Place =
    std::tuple<std::size_t, std::size_t, std::size_t>;  // layer, index of kLetters, stream

std::string TensorName(std::size_t layer, std::size_t kind) {
  return fmt::format("layers.{}.{}", layer, kLetters[kind]);
}

bool Append(const std::string& path, const std::vector<Half>& halves) {
  std::FILE* const file = std::fopen(path.c_str(), "abe");
  if (file == nullptr) return false;
  const bool good = std::fwrite(halves.data(), sizeof(Half), halves.size(), file) == halves.size();
  return std::fclose(file) == 0 && good;
}

bool Copy(const std::string& from, std::FILE* to) {
  std::FILE* const file = std::fopen(from.c_str(), "rbe");
  if (file == nullptr) return false;
  std::vector<char> buffer(1 << 20);
  bool good = true;
  for (std::size_t n = 1; good && n > 0;) {
    n = std::fread(buffer.data(), 1, buffer.size(), file);
    good = std::ferror(file) == 0 && std::fwrite(buffer.data(), 1, n, to) == n;
  }
  std::fclose(file);
  return good;
}

// A name ends in "123.parts", or "123-4.tmp" for a file that was not renamed any more, and process
// 123 has ended.
bool IsOfDeadProcess(std::string_view end) {
  pid_t process = 0;
  const auto [rest, error] = std::from_chars(end.data(), end.data() + end.size(), process);
  end.remove_prefix(static_cast<std::size_t>(rest - end.data()));
  const bool is_ours = end == kParts || (end.starts_with('-') && end.ends_with(".tmp"));
  return is_ours && process > 0 && kill(process, 0) != 0 && errno == ESRCH;
}

}  // namespace

std::string LayerShapesText(const Model& model) { return internal::LayersText(model); }

struct DumpWriter::Impl {
  std::string path, folder;
  std::map<Place, Part> parts;
  Status failed;  // the first error; after it the parts are no use

  std::string File(const Place& place) const {
    const auto& [layer, kind, stream] = place;
    return fmt::format("{}/{}.{}.{}", folder, layer, stream, kLetters[kind]);
  }

  Status Fail(int error) {
    return failed = Error(ErrorCode::kIo, "{}: the dump's parts cannot be written: {}", path,
                          std::generic_category().message(error));
  }

  // Makes the folder, and removes what processes that were killed have left.
  Status Begin() {
    const fs::path whole(internal::RealPath(path));
    const fs::path parent = whole.has_parent_path() ? whole.parent_path() : fs::path(".");
    const std::string begin = whole.filename().string().substr(0, internal::kNameBesideBytes) + ".";
    std::error_code error;
    for (fs::directory_iterator at(parent, error), end; !error && at != end; at.increment(error)) {
      const std::string name = at->path().filename().string();
      std::error_code ignored;
      if (name.starts_with(begin) && IsOfDeadProcess(std::string_view(name).substr(begin.size())))
        fs::remove_all(at->path(), ignored);
    }
    folder = internal::NameBeside(whole.string(), fmt::format(".{}{}", getpid(), kParts));
    fs::remove_all(folder, error);  // of an earlier process that had this number
    return fs::create_directories(folder, error) || !error ? Status() : Fail(error.value());
  }

  Status AddRows(const Place& place, const RowsView& rows) {
    Part& part = parts[place];
    if (part.tokens != 0 && (part.heads != rows.heads || part.dim != rows.head_dim)) {
      return failed = FileError(ErrorCode::kInvalidArgument, path,
                                TensorName(std::get<0>(place), std::get<1>(place)),
                                fmt::format("{} heads x {}, as before", part.heads, part.dim),
                                fmt::format("{} x {}", rows.heads, rows.head_dim));
    }
    std::vector<Half> halves;
    halves.reserve(rows.tokens * rows.heads * rows.head_dim);
    for (std::size_t t = 0; t < rows.tokens; ++t) {
      for (std::size_t h = 0; h < rows.heads; ++h) {
        for (std::size_t c = 0; c < rows.head_dim; ++c)
          halves.push_back(FloatToHalf(rows.At(t, h, c)));
      }
    }
    if (!Append(File(place), halves)) return Fail(errno);
    part = {part.tokens + rows.tokens, rows.heads, rows.head_dim};
    return {};
  }

  // The tensors as they lie in the dump: all that the model and the prompts ask for, and no others.
  Result<std::vector<internal::SafetensorsSize>> Tensors(const DumpInfo& info) const {
    const std::vector<LayerShape>& layers = info.model.layers;
    const auto fail = [&](std::size_t layer, std::size_t kind, std::string_view expected,
                          std::string_view found) {
      return FileError(ErrorCode::kMismatch, path, TensorName(layer, kind), expected, found);
    };
    std::map<std::pair<std::size_t, std::size_t>, Part> tensors;  // all streams of each
    for (const auto& [place, part] : parts) {
      Part& sum = tensors[{std::get<0>(place), std::get<1>(place)}];
      sum = {sum.tokens + part.tokens, part.heads, part.dim};
    }
    const std::size_t tokens =
        std::accumulate(info.prompt_tokens.begin(), info.prompt_tokens.end(), std::size_t{0});
    std::vector<internal::SafetensorsSize> sizes;
    for (const auto& [place, part] : tensors) {
      const auto [layer, kind] = place;
      const LayerShape shape = layer < layers.size() ? layers[layer] : LayerShape();
      if (!(kind == kQueries ? shape.has_kv() : shape.owns_kv()))
        return fail(layer, kind, "none, as the model says", "one");
      const std::vector<std::uint64_t> found{part.tokens, part.heads, part.dim},
          expected{tokens, kind == kQueries ? shape.query_heads : shape.kv_heads,
                   kind == kValues ? shape.v_dim : shape.k_dim};
      if (found != expected)
        return fail(layer, kind, fmt::format("[{}]", fmt::join(expected, ", ")),
                    fmt::format("[{}]", fmt::join(found, ", ")));
      sizes.push_back({TensorName(layer, kind), "F16", found, part.bytes()});
    }
    const bool has_q = std::ranges::any_of(
        tensors, [](const auto& tensor) { return tensor.first.second == kQueries; });
    for (std::size_t layer = 0; layer < layers.size(); ++layer) {
      for (const std::size_t kind : {kKeys, kValues, kQueries}) {
        const bool wanted =
            kind == kQueries ? has_q && layers[layer].has_kv() : layers[layer].owns_kv();
        if (wanted && !tensors.contains({layer, kind}))
          return fail(layer, kind, "a tensor, as the model says", "none");
      }
    }
    return sizes;
  }
};

DumpWriter::DumpWriter(std::string path) : impl_(std::make_unique<Impl>()) {
  impl_->path = std::move(path);
}
DumpWriter::DumpWriter(DumpWriter&&) noexcept = default;
DumpWriter& DumpWriter::operator=(DumpWriter&&) noexcept = default;
DumpWriter::~DumpWriter() {
  std::error_code ignored;
  if (impl_ != nullptr && !impl_->folder.empty()) fs::remove_all(impl_->folder, ignored);
}

Status DumpWriter::Add(std::size_t layer, const RowsView& k, const RowsView& v, const RowsView& q,
                       std::size_t stream) {
  if (!impl_->failed.ok()) return impl_->failed;
  if (impl_->folder.empty()) {
    if (Status s = impl_->Begin(); !s.ok()) return s;
  }
  const RowsView* const rows[] = {&k, &v, &q};
  for (std::size_t kind = 0; kind < kLetters.size(); ++kind) {
    if (rows[kind]->data == nullptr) continue;
    if (Status s = impl_->AddRows({layer, kind, stream}, *rows[kind]); !s.ok()) return s;
  }
  return {};
}

Status DumpWriter::Drop(std::size_t layer, std::size_t tokens, std::size_t stream) {
  if (!impl_->failed.ok()) return impl_->failed;
  for (std::size_t kind = 0; kind < kLetters.size(); ++kind) {
    const auto at = impl_->parts.find({layer, kind, stream});
    if (at == impl_->parts.end()) continue;
    at->second.tokens -= std::min(tokens, at->second.tokens);
    std::error_code error;
    fs::resize_file(impl_->File(at->first), at->second.bytes(), error);
    if (error) return impl_->Fail(error.value());
  }
  return {};
}

Status DumpWriter::Finish(const DumpInfo& info) {
  Impl& w = *impl_;
  if (!w.failed.ok()) return w.failed;
  if (Status s = CheckModel(info.model); !s.ok())
    return Error(s.code(), "{}: {}", w.path, s.message());
  const auto tensors = w.Tensors(info);
  if (!tensors.ok()) return tensors.status();
  std::map<std::string, std::string> metadata = {
      {"format", "kvmix-dump-1"},
      {"prompt_tokens", fmt::format("{}", fmt::join(info.prompt_tokens, ","))},
      {"layer_shapes", internal::LayersText(info.model)}};
  if (!info.model_name.empty()) metadata["model"] = info.model_name;
  if (!info.corpus.empty()) metadata["corpus"] = info.corpus;
  const std::string header = internal::SafetensorsHeader(metadata, *tensors);
  return internal::WriteFileAtomically(
      w.path, "room for the dump and the right to write it", [&](std::FILE* file) {
        bool good = std::fwrite(header.data(), 1, header.size(), file) == header.size();
        for (const auto& [place, part] : w.parts) good = good && Copy(w.File(place), file);
        return good;
      });
}

}  // namespace kvmix::tune
