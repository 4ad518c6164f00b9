// Calibrations and measurements as files: safetensors with f64 tensors, and what they are of as a
// JSON text in the metadata. docs/formats.md says what stands where.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string_view>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "kvmix/tune/steps.h"
#include "lib/files/file.h"
#include "lib/files/json_view.h"
#include "lib/files/safetensors.h"
#include "lib/plan/model_json.h"
#include "lib/tune/parts.h"

namespace kvmix::tune {

using internal::FileError;
using internal::JsonView;
using internal::Quoted;
using Json = nlohmann::ordered_json;

namespace {

constexpr std::string_view kFormats[] = {"kvmix-calibration", "kvmix-measurement"};  // by PartKind
constexpr std::size_t kMajor = 1, kMinor = 0;
const std::string kAbout = "kvmix";  // the key of the JSON text

std::string NameOf(PartKind kind) { return std::string(kFormats[static_cast<std::size_t>(kind)]); }

// ---- what is written and read alike
// A field is a vector of numbers that every head has, one for K and one for V: a tensor,
// [kv_heads][...].

template <class Archive, class Heads>
void Statistics(const LayerShape& shape, const std::string& prefix, Archive* archive,
                Heads* heads) {
  for (const Tensor t : {KVMIX_K, KVMIX_V}) {
    const std::size_t dim = shape.dim(t);
    const std::string name = prefix + (t == KVMIX_K ? ".k." : ".v.");
    archive->Field(name + "sum", {dim}, t, &HeadStatistics::sum, heads);
    archive->Field(name + "min", {dim}, t, &HeadStatistics::min, heads);
    archive->Field(name + "max", {dim}, t, &HeadStatistics::max, heads);
    if (t == KVMIX_K)
      archive->Field(name + "query_moment", {dim, dim}, t, &HeadStatistics::query_moment, heads);
  }
}

// HeadErrors without what the dump and the candidates say.
struct Numbers {
  std::vector<double> values;     // [candidates][sum of squared errors, largest error, largest |x|]
  std::vector<double> attention;  // [candidates][queries][squared error, squared output, cosine]
};

template <class Archive, class Heads>
void Errors(const Measurement& m, std::size_t layer, const std::string& prefix, Archive* archive,
            Heads* heads) {
  const std::size_t queries = m.model.queries(layer, 0).size();
  for (const Tensor t : {KVMIX_K, KVMIX_V}) {
    const std::size_t candidates = KindsFor(m.candidates, m.model.layers[layer], t).size();
    const std::string name = prefix + (t == KVMIX_K ? ".k." : ".v.");
    archive->Field(name + "values", {candidates, 3}, t, &Numbers::values, heads);
    archive->Field(name + "attention", {candidates, queries, 3}, t, &Numbers::attention, heads);
  }
}

std::string PieceName(std::size_t dump, std::size_t layer) {
  return fmt::format("dumps.{}.layers.{}", dump, layer);
}
std::string LayerName(std::size_t layer) { return fmt::format("layers.{}", layer); }

// ---- writing

class Writer {
 public:
  template <class Head, class T>
  void Field(const std::string& name, const std::vector<std::uint64_t>& shape, Tensor t,
             std::vector<T> Head::*member, const std::vector<Head>* heads) {
    const std::size_t count = heads->size() / 2;
    Entry& entry = entries_.emplace_back(Entry{name, {count}, {}});
    entry.shape.insert(entry.shape.end(), shape.begin(), shape.end());
    for (std::size_t h = 0; h < count; ++h) {
      const std::vector<T>& numbers = (*heads)[2 * h + static_cast<std::size_t>(t)].*member;
      entry.numbers.insert(entry.numbers.end(), numbers.begin(), numbers.end());
    }
  }

  Status Write(const std::string& path, const Json& about) const {
    std::vector<internal::SafetensorsTensor> tensors;
    for (const Entry& e : entries_) {
      const std::string_view data(reinterpret_cast<const char*>(e.numbers.data()),
                                  e.numbers.size() * sizeof(double));
      tensors.push_back({e.name, "F64", e.shape, data});
    }
    const std::string text = about.dump(-1, ' ', false, Json::error_handler_t::replace);
    return internal::WriteSafetensors(path, {{kAbout, text}}, tensors);
  }

 private:
  struct Entry {
    std::string name;
    std::vector<std::uint64_t> shape;
    std::vector<double> numbers;
  };
  std::vector<Entry> entries_;
};

template <class T>
Json About(PartKind kind, const Model& model, const std::vector<DumpId>& dumps,
           const Pieces<T>& pieces) {
  Json about = {{"format", NameOf(kind)},
                {"version", {kMajor, kMinor}},
                {"layers", Json::parse(internal::LayersText(model))},
                {"dumps", Json::array()}};
  for (const DumpId& id : dumps) {
    Json done = Json::array();
    for (const auto& [layer, of_layer] : pieces)
      if (of_layer.contains(id.hash)) done.push_back(layer);
    about["dumps"].push_back({{"name", id.name},
                              {"model", id.model_name},
                              {"tokens", id.tokens},
                              {"longest_prompt", id.longest_prompt},
                              {"hash", id.hash},
                              {"layer_hashes", id.layers},
                              {"pieces", done}});
  }
  return about;
}

Json KindsJson(const std::vector<CodecKind>& kinds) {
  Json names = Json::array();
  for (const CodecKind& kind : kinds) names.push_back(ToString(kind));
  return names;
}

Numbers ToNumbers(const HeadErrors& head) {
  Numbers numbers;
  for (const CandidateError& c : head.candidates) {
    const ErrorSums& v = c.values;
    numbers.values.insert(numbers.values.end(), {v.sum_squared_error, v.max_error, v.max_abs});
    for (const AttentionError& e : c.queries)
      numbers.attention.insert(numbers.attention.end(),
                               {e.sum_squared_error, e.sum_squared_output, e.sum_cosine});
  }
  return numbers;
}

// ---- reading

// Errors go to `status`, the first one stays.
class Reader {
 public:
  // Nothing but the format's own rules, and the JSON text.
  static Result<Reader> Open(const std::string& path) {
    Result<std::string> file = internal::ReadFile(path);
    if (!file.ok()) return file.status();
    Result<internal::Safetensors> content = internal::ParseSafetensors(*file, path);
    if (!content.ok()) return content.status();
    const auto text = content->metadata.find(kAbout);
    if (text == content->metadata.end())
      return FileError(ErrorCode::kCorrupt, path, "metadata " + kAbout,
                       fmt::format("what a {} or {} says of itself", kFormats[0], kFormats[1]),
                       "none");
    Result<nlohmann::json> about = internal::ParseJson(text->second, path, "metadata " + kAbout);
    if (!about.ok()) return about.status();
    return Reader(path, std::move(*file), std::move(*content), std::move(*about));
  }

  JsonView root() { return {about_, path_, &status_}; }
  const Status& status() const { return status_; }
  void Fail(std::string_view what, std::string_view expected, std::string_view found) {
    if (status_.ok()) status_ = FileError(ErrorCode::kCorrupt, path_, what, expected, found);
  }

  // Format and version first, then the checksum: a newer major version may have another.
  Status Check(PartKind kind) {
    internal::CheckVersion(root(), NameOf(kind), kMajor);
    if (status_.ok()) status_ = internal::CheckChecksum(file_, path_);
    return status_;
  }

  template <class Head, class T>
  void Field(const std::string& name, const std::vector<std::uint64_t>& shape, Tensor t,
             std::vector<T> Head::*member, std::vector<Head>* heads) {
    std::vector<std::uint64_t> expected = {heads->size() / 2};
    expected.insert(expected.end(), shape.begin(), shape.end());
    const Result<std::string_view> data =
        internal::TensorData(file_, content_, path_, name, "F64", expected, "a tensor");
    if (!data.ok()) {
      if (status_.ok()) status_ = data.status();
      return;
    }
    const char* from = data->data();
    const std::size_t count = data->size() / sizeof(double) / expected[0];
    for (std::size_t h = 0; h < expected[0]; ++h) {
      std::vector<T>& numbers = (*heads)[2 * h + static_cast<std::size_t>(t)].*member;
      for (std::size_t i = 0; i < count; ++i, from += sizeof(double)) {
        double number = 0.0;
        std::memcpy(&number, from, sizeof number);
        numbers.push_back(static_cast<T>(number));
      }
    }
  }

 private:
  Reader(const std::string& path, std::string file, internal::Safetensors content,
         nlohmann::json about)
      : path_(path),
        file_(std::move(file)),
        content_(std::move(content)),
        about_(std::move(about)) {}

  std::string path_;
  std::string file_;
  internal::Safetensors content_;
  nlohmann::json about_;
  Status status_;
};

// A dump, and the layers that there are pieces of.
std::pair<DumpId, std::vector<std::size_t>> ReadDump(const JsonView& dump, const Model& model) {
  DumpId id{dump["hash"].Text(),
            dump["name"].Text(),
            dump["model"].Text(),
            dump["tokens"].Count(),
            dump["longest_prompt"].Count(),
            {}};
  if (id.tokens == 0) dump["tokens"].Fail(ErrorCode::kCorrupt, "1 or more", "0");
  const JsonView hashes = dump["layer_hashes"];
  if (hashes.HasSize(model.layers.size(), "layers"))
    for (std::size_t l = 0; l < model.layers.size(); ++l) id.layers.push_back(hashes[l].Text());
  std::vector<std::size_t> layers = dump["pieces"].Counts();
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const bool follows = i == 0 || layers[i - 1] < layers[i];
    if (!follows || layers[i] >= model.layers.size() || !model.layers[layers[i]].owns_kv())
      dump["pieces"].Fail(ErrorCode::kCorrupt, "layers with K and V of their own, in order",
                          fmt::format("{}", layers[i]));
  }
  return {std::move(id), std::move(layers)};
}

// Model and dumps of either kind; read(dump, layer) reads each piece. False after an error.
template <class Part>
bool ReadPart(Reader* reader, Part* part,
              const std::function<void(std::size_t dump, std::size_t layer)>& read) {
  const JsonView root = reader->root();
  part->model = internal::ReadLayers(root["layers"]);
  if (!reader->status().ok()) return false;
  if (const Status s = CheckModel(part->model); !s.ok()) {
    root["layers"].Fail(s.code(), "a model", s.message());
    return false;
  }
  std::vector<std::vector<std::size_t>> layers;
  const JsonView dumps = root["dumps"];
  const std::size_t size = dumps.size();
  for (std::size_t d = 0; d < size && reader->status().ok(); ++d) {
    auto [id, of_dump] = ReadDump(dumps[d], part->model);
    if (d > 0 && part->dumps.back().hash >= id.hash)
      dumps[d]["hash"].Fail(ErrorCode::kCorrupt, "dumps in the order of their hashes",
                            Quoted(id.hash));
    part->dumps.push_back(std::move(id));
    layers.push_back(std::move(of_dump));
  }
  if (size == 0) dumps.Fail(ErrorCode::kCorrupt, "1 dump or more", "none");
  for (std::size_t d = 0; d < layers.size(); ++d) {
    for (const std::size_t layer : layers[d])
      if (reader->status().ok()) read(d, layer);
  }
  return reader->status().ok();
}

std::vector<HeadStatistics> ReadStatistics(const LayerShape& shape, const std::string& prefix,
                                           std::uint64_t tokens, Reader* reader) {
  std::vector<HeadStatistics> heads(2 * shape.kv_heads);
  Statistics(shape, prefix, reader, &heads);
  const auto is_finite = [](const auto& numbers) {
    return std::ranges::all_of(numbers, [](auto x) { return std::isfinite(x); });
  };
  for (HeadStatistics& s : heads) {
    s.tokens = tokens;
    if (!is_finite(s.sum) || !is_finite(s.min) || !is_finite(s.max) || !is_finite(s.query_moment))
      reader->Fail(prefix, "finite numbers", "NaN or Inf");
  }
  return heads;
}

std::vector<CodecKind> ReadKinds(const JsonView& names) {
  std::vector<CodecKind> kinds;
  const std::size_t size = names.size();
  for (std::size_t i = 0; i < size; ++i) {
    const std::string name = names[i].Text();
    const Result<CodecKind> kind = ParseCodecKind(name);
    if (kind.ok())
      kinds.push_back(*kind);
    else
      names[i].Fail(ErrorCode::kCorrupt, "a codec that this version knows", Quoted(name));
  }
  if (size == 0) names.Fail(ErrorCode::kCorrupt, "1 codec or more", "none");
  return kinds;
}

std::vector<HeadErrors> ReadErrors(const Measurement& m, std::size_t dump, std::size_t layer,
                                   Reader* reader) {
  const LayerShape& shape = m.model.layers[layer];
  std::vector<Numbers> numbers(2 * shape.kv_heads);
  Errors(m, layer, PieceName(dump, layer), reader, &numbers);
  std::vector<HeadErrors> heads;
  for (std::size_t i = 0; i < numbers.size() && reader->status().ok(); ++i) {
    const Tensor t = static_cast<Tensor>(i % 2);
    const std::vector<CodecKind> kinds = KindsFor(m.candidates, shape, t);
    const std::size_t tokens = m.dumps[dump].tokens,
                      queries = numbers[i].attention.size() / 3 / kinds.size();
    HeadErrors& head = heads.emplace_back(HeadErrors{layer, i / 2, t, 0.0, {}});
    for (std::size_t c = 0; c < kinds.size(); ++c) {
      const double* v = &numbers[i].values[3 * c];
      CandidateError& candidate = head.candidates.emplace_back();
      candidate.codec.kind = kinds[c];
      candidate.values = {tokens * shape.dim(t), v[0], v[1], v[2]};
      head.max_abs = v[2];
      for (std::size_t q = 0; q < queries; ++q) {
        const double* e = &numbers[i].attention[3 * (c * queries + q)];
        candidate.queries.push_back({e[0], e[1], e[2], tokens});
      }
    }
  }
  return heads;
}

}  // namespace

Status SavePart(const Calibration& calibration, const std::string& path) {
  Writer writer;
  for (std::size_t d = 0; d < calibration.dumps.size(); ++d) {
    for (const auto& [layer, of_layer] : calibration.pieces) {
      const auto piece = of_layer.find(calibration.dumps[d].hash);
      if (piece != of_layer.end())
        Statistics(calibration.model.layers[layer], PieceName(d, layer), &writer, &piece->second);
    }
  }
  return writer.Write(path, About(PartKind::kCalibration, calibration.model, calibration.dumps,
                                  calibration.pieces));
}

Status SavePart(const Measurement& m, const std::string& path) {
  Writer writer;
  for (const auto& [layer, statistics] : m.statistics)
    Statistics(m.model.layers[layer], LayerName(layer), &writer, &statistics);
  for (std::size_t d = 0; d < m.dumps.size(); ++d) {
    for (const auto& [layer, of_layer] : m.pieces) {
      const auto piece = of_layer.find(m.dumps[d].hash);
      if (piece == of_layer.end()) continue;
      std::vector<Numbers> numbers;
      std::ranges::transform(piece->second, std::back_inserter(numbers), ToNumbers);
      Errors(m, layer, PieceName(d, layer), &writer, &std::as_const(numbers));
    }
  }
  Json about = About(PartKind::kMeasurement, m.model, m.dumps, m.pieces);
  about["candidates"] = {{"name", m.candidate_set},
                         {"k", KindsJson(m.candidates.k)},
                         {"v", KindsJson(m.candidates.v)}};
  about["exact_first"] = m.exact_first;
  about["exact_newest"] = m.exact_newest;
  about["target"] = m.target;
  about["library_version"] = m.library_version;
  return writer.Write(path, about);
}

Result<PartKind> KindOfPart(const std::string& path) {
  Result<Reader> reader = Reader::Open(path);
  if (!reader.ok()) return reader.status();
  const std::string format = reader->root()["format"].Text();
  for (const PartKind kind : {PartKind::kCalibration, PartKind::kMeasurement})
    if (format == NameOf(kind)) return kind;
  return FileError(ErrorCode::kCorrupt, path, "format",
                   fmt::format("{} or {}", kFormats[0], kFormats[1]), Quoted(format));
}

Result<Calibration> LoadCalibration(const std::string& path) {
  Result<Reader> reader = Reader::Open(path);
  if (!reader.ok()) return reader.status();
  if (Status s = reader->Check(PartKind::kCalibration); !s.ok()) return s;
  Calibration c;
  const auto read = [&](std::size_t d, std::size_t layer) {
    c.pieces[layer].emplace(
        c.dumps[d].hash,
        ReadStatistics(c.model.layers[layer], PieceName(d, layer), c.dumps[d].tokens, &*reader));
  };
  if (!ReadPart(&*reader, &c, read)) return reader->status();
  return c;
}

Result<Measurement> LoadMeasurement(const std::string& path) {
  Result<Reader> reader = Reader::Open(path);
  if (!reader.ok()) return reader.status();
  if (Status s = reader->Check(PartKind::kMeasurement); !s.ok()) return s;
  const JsonView root = reader->root(), candidates = root["candidates"];
  Measurement m{.candidates = {ReadKinds(candidates["k"]), ReadKinds(candidates["v"])},
                .candidate_set = candidates["name"].Text(),
                .exact_first = root["exact_first"].Count(),
                .exact_newest = root["exact_newest"].Count(),
                .target = root["target"].Text(),
                .library_version = root["library_version"].Text()};
  const auto read = [&](std::size_t d, std::size_t layer) {
    m.pieces[layer].emplace(m.dumps[d].hash, ReadErrors(m, d, layer, &*reader));
    if (m.statistics.contains(layer)) return;
    std::uint64_t tokens = 0;
    for (const DumpId& id : m.dumps) tokens += id.tokens;
    m.statistics[layer] = ReadStatistics(m.model.layers[layer], LayerName(layer), tokens, &*reader);
  };
  if (!reader->status().ok() || !ReadPart(&*reader, &m, read)) return reader->status();
  return m;
}

}  // namespace kvmix::tune
