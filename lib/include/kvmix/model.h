// The shape of a model's attention: a list of layers, which may differ.
#ifndef KVMIX_MODEL_H_
#define KVMIX_MODEL_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kvmix/codec.h"
#include "kvmix/kvmix.h"
#include "kvmix/status.h"

namespace kvmix {

// Upper bound of layers and of heads, far beyond any model: products of a model's numbers stay far
// below 2^64.
inline constexpr std::size_t kMaxCount = KVMIX_MAX_COUNT;

// One layer. Its place in Model::layers is the model's own number of it.
struct LayerShape {
  std::size_t kv_heads = 0;       // 0: a layer without K and V, as the recurrent ones of hybrids
  std::size_t query_heads = 0;    // a multiple of kv_heads; their ratio is the GQA group
  std::size_t k_dim = 0;          // head_dim of Q and K
  std::size_t v_dim = 0;          // head_dim of V and of the output
  std::size_t window = 0;         // a query sees this many last tokens, itself included; 0: all
  float attention_scale = 0.0f;   // 0: 1 / sqrt(k_dim)
  float soft_cap = 0.0f;          // s -> soft_cap * tanh(s / soft_cap); 0: none
  std::vector<float> sinks = {};  // [query_heads] logits that take weight but have no
                                  // V (gpt-oss); empty: none
  std::optional<std::size_t> kv_layer = {};  // an earlier layer whose K and V this one reads

  bool has_kv() const { return kv_heads != 0; }
  bool owns_kv() const { return has_kv() && !kv_layer.has_value(); }
  std::size_t group() const { return query_heads / kv_heads; }
  std::size_t dim(Tensor t) const { return t == KVMIX_K ? k_dim : v_dim; }
  // How many of a context's tokens a query sees.
  std::size_t seen(std::size_t context) const {
    return window == 0 ? context : std::min(context, window);
  }
  // attention_scale, or the number that 0 stands for.
  float scale() const {
    return attention_scale != 0.0f ? attention_scale : 1.0f / std::sqrt(static_cast<float>(k_dim));
  }
  bool operator==(const LayerShape&) const = default;
};

namespace internal {

inline kvmix_layer ViewOf(const LayerShape& shape) {
  return {sizeof(kvmix_layer), shape.kv_heads,
          shape.query_heads,   shape.k_dim,
          shape.v_dim,         shape.kv_layer.has_value() ? *shape.kv_layer + 1 : 0,
          shape.window,        shape.attention_scale,
          shape.soft_cap,      shape.sinks.data(),
          shape.sinks.size()};
}

inline LayerShape ValueOf(const kvmix_layer& layer) {
  LayerShape shape{layer.kv_heads, layer.query_heads, layer.k_dim,   layer.v_dim,
                   layer.window,   layer.scale,       layer.soft_cap};
  shape.sinks.assign(layer.sinks, layer.sinks + layer.sinks_size);
  if (layer.reads != 0) shape.kv_layer = layer.reads - 1;
  return shape;
}

}  // namespace internal

// Like layers, the short form of a Model.
struct Geometry {
  std::size_t layers = 0;
  std::size_t kv_heads = 0;
  std::size_t query_heads = 0;
  std::size_t head_dim = 0;

  std::size_t group() const { return query_heads / kv_heads; }
  bool operator==(const Geometry&) const = default;
};

struct Model {
  std::vector<LayerShape> layers;

  Model() = default;
  explicit Model(std::vector<LayerShape> shapes) : layers(std::move(shapes)) {}
  Model(const Geometry& g)                         // NOLINT: the short form stands for the long one
      : layers(std::min(g.layers, kMaxCount + 1),  // more are refused, and need no memory
               LayerShape{g.kv_heads, g.query_heads, g.head_dim, g.head_dim}) {}

  // The layer whose K and V this layer reads: itself, or another's.
  std::size_t kv_layer(std::size_t layer) const { return layers[layer].kv_layer.value_or(layer); }
  // The layers that read this one's K and V, itself first.
  std::vector<std::size_t> readers(std::size_t layer) const {
    std::vector<std::size_t> readers;
    for (std::size_t i = layer; i < layers.size(); ++i) {
      if (layers[i].has_kv() && kv_layer(i) == layer) readers.push_back(i);
    }
    return readers;
  }
  // The query heads that read one KV head of this layer: those of the first reader, then the next
  // one's. Each as its place among all layers' query heads.
  std::vector<std::size_t> queries(std::size_t layer, std::size_t kv_head) const {
    std::vector<std::size_t> places;
    for (const std::size_t reader : readers(layer)) {
      const std::size_t group = layers[reader].group(),
                        first = query_heads_before(reader) + kv_head * group;
      for (std::size_t q = first; q < first + group; ++q) places.push_back(q);
    }
    return places;
  }
  // How many of a context's tokens they see: what the layer keeps.
  std::size_t tokens_held(std::size_t layer, std::size_t context) const {
    std::size_t tokens = 0;
    for (const std::size_t reader : readers(layer)) {
      tokens = std::max(tokens, layers[reader].seen(context));
    }
    return tokens;
  }
  // KV heads that the layers before this one own, and query heads of those that have K and V: where
  // a layer begins in lists over all heads. layer = layers.size(): how many there are.
  std::size_t kv_heads_before(std::size_t layer) const {
    std::size_t heads = 0;
    for (std::size_t i = 0; i < layer; ++i) heads += layers[i].owns_kv() ? layers[i].kv_heads : 0;
    return heads;
  }
  std::size_t query_heads_before(std::size_t layer) const {
    std::size_t heads = 0;
    for (std::size_t i = 0; i < layer; ++i) heads += layers[i].has_kv() ? layers[i].query_heads : 0;
    return heads;
  }
  // The short form; nothing where layers differ or have more than it says.
  std::optional<Geometry> geometry() const {
    if (layers.empty()) return std::nullopt;
    const LayerShape& shape = layers[0];
    const Geometry geometry{layers.size(), shape.kv_heads, shape.query_heads, shape.k_dim};
    return *this == Model(geometry) ? std::optional(geometry) : std::nullopt;
  }
  bool operator==(const Model&) const = default;
};

namespace internal {

inline std::vector<kvmix_layer> ViewOf(const Model& model) {
  std::vector<kvmix_layer> layers;
  for (const LayerShape& shape : model.layers) layers.push_back(ViewOf(shape));
  return layers;
}

}  // namespace internal

// At least one layer with K and V of its own; every number in its range (head_dim <= kMaxHeadDim,
// counts <= kMaxCount), query_heads a multiple of kv_heads, sinks for every query head; a layer
// that reads another's K and V has its kv_heads and widths. Else an error naming layer and number.
inline Status CheckModel(const Model& model) {
  const std::vector<kvmix_layer> layers = internal::ViewOf(model);
  internal::CallError error;
  return error.Of(kvmix_layers_check(layers.data(), layers.size(), error));
}

// The numbers that storing K and V needs: the same without windows, scales, soft caps and sinks,
// which only attention knows.
inline Model Stored(Model model) {
  for (LayerShape& shape : model.layers) {
    shape.window = 0;
    shape.attention_scale = shape.soft_cap = 0.0f;
    shape.sinks.clear();
  }
  return model;
}

// "24 layers x 2 KV heads x 64, 14 query heads"; unlike layers in groups.
inline std::string ToString(const Model& model) {
  const std::vector<kvmix_layer> layers = internal::ViewOf(model);
  return internal::TextOf([&](char* text, std::size_t size) {
    return kvmix_layers_name(layers.data(), layers.size(), text, size);
  });
}

}  // namespace kvmix

#endif  // KVMIX_MODEL_H_
