#include "lib/plan/model_json.h"

#include <utility>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace kvmix::internal {
namespace {

constexpr std::pair<const char*, std::size_t LayerShape::*> kCounts[] = {
    {"kv_heads", &LayerShape::kv_heads},
    {"query_heads", &LayerShape::query_heads},
    {"k_dim", &LayerShape::k_dim},
    {"v_dim", &LayerShape::v_dim}};
constexpr std::pair<const char*, float LayerShape::*> kFloats[] = {
    {"attention_scale", &LayerShape::attention_scale}, {"soft_cap", &LayerShape::soft_cap}};

// Nine digits give a float back exactly.
std::string LayerText(const LayerShape& shape) {
  if (!shape.has_kv()) return "null";
  std::vector<std::string> fields;
  const auto add = [&](const char* key, const auto& value) {
    fields.push_back(fmt::format("\"{}\": {}", key, value));
  };
  for (const auto& [key, count] : kCounts) add(key, shape.*count);
  if (shape.window != 0) add("window", shape.window);
  for (const auto& [key, number] : kFloats) {
    if (shape.*number != 0.0f) add(key, fmt::format("{:.9g}", shape.*number));
  }
  if (!shape.sinks.empty()) add("sinks", fmt::format("[{:.9g}]", fmt::join(shape.sinks, ", ")));
  if (shape.kv_layer.has_value()) add("kv_layer", *shape.kv_layer);
  return fmt::format("{{{}}}", fmt::join(fields, ", "));
}

LayerShape ReadLayer(const JsonView& layer) {
  LayerShape shape;
  if (layer.is_null()) return shape;
  for (const auto& [key, count] : kCounts) shape.*count = layer[key].Count();
  if (layer["kv_heads"].Count() == 0) {
    layer["kv_heads"].Fail(ErrorCode::kCorrupt, "at least 1, or null for a layer without K and V",
                           "0");
  }
  if (layer.has("window")) shape.window = layer["window"].Count();
  for (const auto& [key, number] : kFloats) {
    if (layer.has(key)) shape.*number = layer[key].Float();
  }
  if (layer.has("sinks")) shape.sinks = layer["sinks"].Floats();
  if (layer.has("kv_layer")) shape.kv_layer = layer["kv_layer"].Count();
  return shape;
}

}  // namespace

std::string LayersText(const Model& model) {
  std::vector<std::string> layers;
  for (const LayerShape& shape : model.layers) layers.push_back(LayerText(shape));
  return fmt::format("[\n    {}\n  ]", fmt::join(layers, ",\n    "));
}

Model ReadLayers(const JsonView& layers) {
  std::vector<LayerShape> shapes(layers.size());
  for (std::size_t i = 0; i < shapes.size(); ++i) shapes[i] = ReadLayer(layers[i]);
  return Model(std::move(shapes));
}

}  // namespace kvmix::internal
