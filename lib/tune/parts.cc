#include "lib/tune/parts.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <iterator>
#include <numeric>
#include <tuple>
#include <utility>

#include <fmt/ranges.h>

#include "lib/plan/model_json.h"

namespace kvmix::tune {

using internal::Error;

namespace {

std::string HashText(std::uint64_t hash) { return fmt::format("{:016x}", hash); }

template <class T>
Status MergePieces(const Pieces<T>& from, const std::vector<DumpId>& dumps, Pieces<T>* to) {
  std::vector<Place> twice;
  for (const auto& [layer, of_layer] : from) {
    for (const auto& [hash, piece] : of_layer) {
      if (!(*to)[layer].emplace(hash, piece).second) twice.emplace_back(hash, layer);
    }
  }
  if (twice.empty()) return {};
  return Error(ErrorCode::kMismatch, "parts cannot be merged: both have {}",
               PlacesText(std::move(twice), dumps));
}

// Kinds by name.
std::string KindsText(const std::vector<CodecKind>& kinds) {
  std::vector<std::string> names;
  for (const CodecKind& kind : kinds) names.push_back(ToString(kind));
  return fmt::format("{}", fmt::join(names, ","));
}

std::string IdsText(const std::vector<DumpId>& dumps) {
  std::vector<std::string> names;
  for (const DumpId& id : dumps) names.push_back(fmt::format("{} ({})", id.name, id.hash));
  return fmt::format("{}", fmt::join(names, ", "));
}

}  // namespace

Result<std::vector<std::string>> LayerHashes(const Dump& dump,
                                             const std::vector<std::size_t>& layers,
                                             const Runner& runner) {
  std::vector<std::string> hashes(layers.size());
  std::vector<Status> read(layers.size());
  runner.Run(layers.size(), [&](std::size_t i) {
    const Result<std::uint64_t> hash = dump.LayerHash(layers[i]);
    if (hash.ok()) hashes[i] = HashText(*hash);
    read[i] = hash.status();
  });
  if (const auto bad = std::ranges::find_if_not(read, &Status::ok); bad != read.end()) return *bad;
  return hashes;
}

std::string Names(const std::vector<DumpId>& dumps) {
  std::vector<std::string> names;
  for (const DumpId& id : dumps) names.push_back(id.name);
  std::ranges::sort(names);
  return fmt::format("{}", fmt::join(names, ", "));
}

Status GivenTwice(const Dump& first, const Dump& second) {
  return Error(ErrorCode::kInvalidArgument, "{}: the same dump as {}: expected each once",
               second.path(), first.path());
}

Status OtherCalibration(std::size_t layer) {
  return Error(ErrorCode::kMismatch, "layer {} was measured with another calibration", layer);
}

std::vector<CodecKind> KindsFor(const CandidateKinds& candidates, const LayerShape& shape,
                                Tensor t) {
  std::vector<CodecKind> kinds;
  std::ranges::copy_if(t == KVMIX_K ? candidates.k : candidates.v, std::back_inserter(kinds),
                       [&](const CodecKind& kind) { return Fits(kind, shape.dim(t)); });
  return kinds;
}

std::vector<HeadStatistics> Sum(const std::map<std::string, std::vector<HeadStatistics>>& dumps) {
  std::vector<HeadStatistics> sum = dumps.begin()->second;
  for (auto dump = std::next(dumps.begin()); dump != dumps.end(); ++dump)
    for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += dump->second[i];
  return sum;
}

std::string PlacesText(std::vector<Place> places, const std::vector<DumpId>& dumps) {
  std::ranges::sort(places);
  std::vector<std::string> texts;
  for (auto place = places.begin(); place != places.end();) {
    const std::string& hash = place->first;
    std::vector<std::string> ranges;
    bool many = false;
    while (place != places.end() && place->first == hash) {
      const std::size_t first = place->second;
      std::size_t last = first;
      while (++place != places.end() && *place == Place(hash, last + 1)) ++last;
      ranges.push_back(first == last ? fmt::format("{}", first)
                                     : fmt::format("{} to {}", first, last));
      many = many || first != last || ranges.size() > 1;
    }
    const std::string last_range = ranges.back();
    ranges.pop_back();
    texts.push_back(fmt::format("layer{} {}{}{} of {}", many ? "s" : "", fmt::join(ranges, ", "),
                                ranges.empty() ? "" : " and ", last_range,
                                std::ranges::find(dumps, hash, &DumpId::hash)->name));
  }
  return fmt::format("{}", fmt::join(texts, ", "));
}

Status CheckSameOrigin(const Measurement& a, const Measurement& b) {
  const std::tuple<const char*, std::string, std::string> origins[] = {
      {"layers", ToString(a.model), ToString(b.model)},
      {"calibration dumps", IdsText(a.dumps), IdsText(b.dumps)},
      {"candidates of K", KindsText(a.candidates.k), KindsText(b.candidates.k)},
      {"candidates of V", KindsText(a.candidates.v), KindsText(b.candidates.v)},
      {"exact first tokens", fmt::format("{}", a.exact_first), fmt::format("{}", b.exact_first)},
      {"exact newest tokens", fmt::format("{}", a.exact_newest), fmt::format("{}", b.exact_newest)},
      {"instruction set", a.target, b.target},
      {"version of kvmix", a.library_version, b.library_version}};
  for (const auto& [what, of_a, of_b] : origins) {
    if (of_a != of_b)
      return Error(ErrorCode::kMismatch, "{}: expected {}, found {}", what, of_a, of_b);
  }
  return {};
}

Result<DumpId> Identify(const Dump& dump, const MeasureOptions& options) {
  if (Status s = options.runner.Check(); !s.ok()) return s;
  std::vector<std::size_t> all(dump.model().layers.size());
  std::iota(all.begin(), all.end(), std::size_t{0});
  const auto hashes = LayerHashes(dump, all, options.runner);
  if (!hashes.ok()) return hashes.status();
  DumpId id{.name = internal::FileName(dump.path()),
            .model_name = dump.model_name(),
            .tokens = dump.tokens(),
            .longest_prompt = std::ranges::max(dump.prompt_tokens()),
            .layers = *hashes};
  const std::string text =
      fmt::format("{}\n{}\n{}\n{}\n", dump.model_name(), fmt::join(dump.prompt_tokens(), ","),
                  internal::LayersText(dump.model()), fmt::join(id.layers, "\n"));
  id.hash = HashText(XXH3_64bits(text.data(), text.size()));
  return id;
}

Result<Calibration> Merge(const Calibration& a, const Calibration& b) {
  if (a.model != b.model)
    return Error(ErrorCode::kMismatch, "parts cannot be merged: layers: expected {}, found {}",
                 ToString(a.model), ToString(b.model));
  Calibration merged = a;
  for (const DumpId& id : b.dumps) {
    const auto at = std::ranges::lower_bound(merged.dumps, id.hash, {}, &DumpId::hash);
    if (at == merged.dumps.end() || at->hash != id.hash) {
      merged.dumps.insert(at, id);
    } else {
      at->name = std::min(at->name, id.name);  // so that the order does not matter
    }
  }
  if (Status s = MergePieces(b.pieces, merged.dumps, &merged.pieces); !s.ok()) return s;
  return merged;
}

Result<Measurement> Merge(const Measurement& a, const Measurement& b) {
  if (Status s = CheckSameOrigin(a, b); !s.ok())
    return Error(s.code(), "parts cannot be merged: {}", s.message());
  Measurement merged = a;
  for (const auto& [layer, statistics] : b.statistics) {
    const auto [known, is_new] = merged.statistics.emplace(layer, statistics);
    if (!is_new && known->second != statistics) return OtherCalibration(layer);
  }
  if (Status s = MergePieces(b.pieces, merged.dumps, &merged.pieces); !s.ok()) return s;
  return merged;
}

}  // namespace kvmix::tune
