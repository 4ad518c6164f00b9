// Models: checks, and the words for a shape.
#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "lib/plan/plan.h"

namespace kvmix::internal {
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

}  // namespace kvmix::internal
