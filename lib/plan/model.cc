// Models: checks, and the words for a shape.
#include "kvmix/model.h"

#include <algorithm>
#include <cmath>
#include <span>

#include <fmt/format.h>

#include "kvmix/codec.h"

namespace kvmix {
namespace {

Status CheckShape(const Model& model, std::size_t layer) {
  const LayerShape& shape = model.layers[layer];
  const auto bad = [&](const char* name, const std::string& expected, const auto& found) {
    return Status(ErrorCode::kInvalidArgument,
                  fmt::format("layer {}: {}: expected {}, found {}", layer, name, expected, found));
  };
  struct Bounded {
    const char* name;
    std::size_t value, most;
  };
  for (const auto& [name, value, most] :
       {Bounded{"kv_heads", shape.kv_heads, kMaxCount},
        Bounded{"query_heads", shape.query_heads, kMaxCount},
        Bounded{"k_dim", shape.k_dim, kMaxHeadDim}, Bounded{"v_dim", shape.v_dim, kMaxHeadDim}}) {
    if (value != 0 && value <= most) continue;
    // The latent cache of MLA: one row of 512 + 64 channels for all heads, V a part of K.
    const char* const hint = value == 576 ? " (a latent cache, MLA, is not supported)" : "";
    return bad(name, fmt::format("1 to {}{}", most, hint), value);
  }
  if (shape.query_heads % shape.kv_heads != 0) {
    return bad("query_heads", fmt::format("a multiple of the {} KV heads", shape.kv_heads),
               shape.query_heads);
  }
  for (const auto& [name, value] :
       {std::pair{"attention_scale", shape.attention_scale}, {"soft_cap", shape.soft_cap}}) {
    if (!std::isfinite(value) || value < 0.0f) return bad(name, "a finite number >= 0", value);
  }
  if (!shape.sinks.empty() && shape.sinks.size() != shape.query_heads) {
    return bad("sinks", fmt::format("none or {}", shape.query_heads), shape.sinks.size());
  }
  const auto is_finite = [](float x) { return std::isfinite(x); };
  if (const auto x = std::ranges::find_if_not(shape.sinks, is_finite); x != shape.sinks.end()) {
    return bad("sinks", "finite numbers", *x);
  }
  if (!shape.kv_layer.has_value()) return {};
  const std::size_t from = *shape.kv_layer;
  if (from >= layer || !model.layers[from].owns_kv()) {
    return bad("kv_layer", "an earlier layer with K and V of its own", from);
  }
  const LayerShape& owner = model.layers[from];
  if (owner.kv_heads == shape.kv_heads && owner.k_dim == shape.k_dim &&
      owner.v_dim == shape.v_dim) {
    return {};
  }
  return bad(
      "kv_layer",
      fmt::format("a layer of {} KV heads x {}/{}", shape.kv_heads, shape.k_dim, shape.v_dim),
      fmt::format("layer {} of {} x {}/{}", from, owner.kv_heads, owner.k_dim, owner.v_dim));
}

std::string Words(const LayerShape& shape) {
  if (!shape.has_kv()) return "no K and V";
  std::string words = fmt::format("{} KV heads x {}", shape.kv_heads, shape.k_dim);
  if (shape.v_dim != shape.k_dim) words += fmt::format("/{}", shape.v_dim);
  words += fmt::format(", {} query heads", shape.query_heads);
  if (shape.window != 0) words += fmt::format(", window {}", shape.window);
  if (shape.attention_scale != 0.0f) words += fmt::format(", scale {}", shape.attention_scale);
  if (shape.soft_cap != 0.0f) words += fmt::format(", soft cap {}", shape.soft_cap);
  if (!shape.sinks.empty()) words += ", sinks";
  if (shape.kv_layer.has_value()) words += ", of another layer";
  return words;
}

}  // namespace

float LayerShape::scale() const {
  return attention_scale != 0.0f ? attention_scale : 1.0f / std::sqrt(static_cast<float>(k_dim));
}

// More layers than CheckModel lets through need no memory.
Model::Model(const Geometry& g)
    : layers(std::min(g.layers, kMaxCount + 1), LayerShape{.kv_heads = g.kv_heads,
                                                           .query_heads = g.query_heads,
                                                           .k_dim = g.head_dim,
                                                           .v_dim = g.head_dim}) {}

std::vector<std::size_t> Model::readers(std::size_t layer) const {
  std::vector<std::size_t> readers;
  for (std::size_t i = layer; i < layers.size(); ++i) {
    if (layers[i].has_kv() && kv_layer(i) == layer) readers.push_back(i);
  }
  return readers;
}

std::vector<std::size_t> Model::queries(std::size_t layer, std::size_t kv_head) const {
  std::vector<std::size_t> places;
  for (const std::size_t reader : readers(layer)) {
    const std::size_t group = layers[reader].group(),
                      first = query_heads_before(reader) + kv_head * group;
    for (std::size_t q = first; q < first + group; ++q) places.push_back(q);
  }
  return places;
}

std::size_t Model::tokens_held(std::size_t layer, std::size_t context) const {
  std::size_t tokens = 0;
  for (const std::size_t reader : readers(layer)) {
    tokens = std::max(tokens, layers[reader].seen(context));
  }
  return tokens;
}

std::size_t Model::kv_heads_before(std::size_t layer) const {
  std::size_t heads = 0;
  for (const LayerShape& shape : std::span(layers).first(layer)) {
    if (shape.owns_kv()) heads += shape.kv_heads;
  }
  return heads;
}

std::size_t Model::query_heads_before(std::size_t layer) const {
  std::size_t heads = 0;
  for (const LayerShape& shape : std::span(layers).first(layer)) {
    if (shape.has_kv()) heads += shape.query_heads;
  }
  return heads;
}

std::optional<Geometry> Model::geometry() const {
  if (layers.empty()) return std::nullopt;
  const LayerShape& shape = layers[0];
  const Geometry geometry{layers.size(), shape.kv_heads, shape.query_heads, shape.k_dim};
  return *this == Model(geometry) ? std::optional(geometry) : std::nullopt;
}

Model Stored(Model model) {
  for (LayerShape& shape : model.layers) {
    shape.window = 0;
    shape.attention_scale = shape.soft_cap = 0.0f;
    shape.sinks.clear();
  }
  return model;
}

Status CheckModel(const Model& model) {
  if (model.layers.empty() || model.layers.size() > kMaxCount) {
    return {ErrorCode::kInvalidArgument,
            fmt::format("layers: expected 1 to {}, found {}", kMaxCount, model.layers.size())};
  }
  bool any = false;
  for (std::size_t layer = 0; layer < model.layers.size(); ++layer) {
    if (!model.layers[layer].has_kv()) continue;
    any = true;
    if (Status s = CheckShape(model, layer); !s.ok()) return s;
  }
  if (any) return {};
  return {ErrorCode::kInvalidArgument, "layers: expected one with K and V, found none"};
}

// Layers of the same words are counted together, in the order of their first.
std::string ToString(const Model& model) {
  std::vector<std::pair<std::string, std::size_t>> kinds;
  for (const LayerShape& shape : model.layers) {
    const std::string words = Words(shape);
    const auto known =
        std::ranges::find_if(kinds, [&](const auto& kind) { return kind.first == words; });
    if (known != kinds.end()) {
      ++known->second;
    } else {
      kinds.emplace_back(words, 1);
    }
  }
  std::string text;
  for (const auto& [words, count] : kinds) {
    text += fmt::format("{}{} layers x {}", text.empty() ? "" : "; ", count, words);
  }
  return text;
}

}  // namespace kvmix
