// Parts of calibrations and measurements: which dump they are of, what they lack, how they add up.
#ifndef KVMIX_LIB_TUNE_PARTS_H_
#define KVMIX_LIB_TUNE_PARTS_H_

#include <cstddef>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "kvmix/status.h"
#include "kvmix/tune/dump.h"
#include "kvmix/tune/steps.h"
#include "lib/files/file.h"

namespace kvmix::tune {

// The DumpId::layers of these layers.
Result<std::vector<std::string>> LayerHashes(const Dump& dump,
                                             const std::vector<std::size_t>& layers,
                                             const Runner& runner);

std::string Names(const std::vector<DumpId>& dumps);  // "a.safetensors, b.safetensors"

Status GivenTwice(const Dump& first, const Dump& second);
Status OtherCalibration(std::size_t layer);

// The candidates that fit the dimension of a layer's K or V.
std::vector<CodecKind> KindsFor(const CandidateKinds& candidates, const LayerShape& shape,
                                Tensor t);

// The sums over the dumps (by their hash) of one layer, [kv_heads][K, V].
std::vector<HeadStatistics> Sum(const std::map<std::string, std::vector<HeadStatistics>>& dumps);

// Every dump has a piece in every one of these layers; else an error that lists the missing ones.
template <class T>
Status CheckWhole(const Pieces<T>& pieces, const std::vector<std::size_t>& layers,
                  const std::vector<DumpId>& dumps) {
  std::vector<Place> missing;
  for (const std::size_t layer : layers) {
    const auto of_layer = pieces.find(layer);
    for (const DumpId& id : dumps) {
      if (of_layer == pieces.end() || !of_layer->second.contains(id.hash))
        missing.emplace_back(id.hash, layer);
    }
  }
  if (missing.empty()) return {};
  return {ErrorCode::kMismatch, PlacesText(std::move(missing), dumps)};
}

// Refuses two measurements whose pieces may not come together: their origins differ.
Status CheckSameOrigin(const Measurement& a, const Measurement& b);

}  // namespace kvmix::tune

#endif  // KVMIX_LIB_TUNE_PARTS_H_
