#include "engines/llama_cpp/nodes.h"

#include <charconv>
#include <cstring>
#include <string_view>
#include <vector>

#include "engines/llama_cpp/rows.h"

namespace kvmix::llama {
namespace {

std::size_t Size(std::int64_t n) { return static_cast<std::size_t>(n); }

// K (1) or V (2) of an attention: llama.cpp gives it a copy of an f32 cache in f16.
const ggml_tensor* CacheOf(const ggml_tensor* op, int src) {
  const ggml_tensor* const t = op->src[src];
  const bool is_copy = t->op == GGML_OP_CPY && t->src[0]->type == GGML_TYPE_F32;
  return is_copy ? t->src[0] : t;
}

// The heads of a cell lie side by side.
bool IsDense(const ggml_tensor* t) { return t->nb[2] == ggml_row_size(t->type, t->ne[0]); }

}  // namespace

ggml_tensor* Base(const ggml_tensor* t) {
  return t->view_src != nullptr ? t->view_src : const_cast<ggml_tensor*>(t);
}

std::optional<std::size_t> LayerOf(const ggml_tensor* t, Tensor tensor) {
  if (t == nullptr) return {};
  const std::string_view name = Base(t)->name;
  const std::string_view prefix = tensor == KVMIX_K ? "cache_k_l" : "cache_v_l";
  if (!name.starts_with(prefix)) return {};
  const char *const digits = name.data() + prefix.size(), *const end = name.data() + name.size();
  std::size_t layer = 0;
  const auto [stop, error] = std::from_chars(digits, end, layer);
  if (error != std::errc() || stop != end) return {};
  return layer;
}

bool IsCache(const ggml_tensor* t) { return LayerOf(t, KVMIX_K) || LayerOf(t, KVMIX_V); }

bool IsView(const ggml_tensor* op) {
  return op->op == GGML_OP_NONE || op->op == GGML_OP_RESHAPE || op->op == GGML_OP_VIEW ||
         op->op == GGML_OP_PERMUTE || op->op == GGML_OP_TRANSPOSE;
}

bool IsWrite(const ggml_tensor* op) {
  return op->op == GGML_OP_SET_ROWS && IsCache(op->src[2]) && IsRowType(op->src[2]->type) &&
         op->src[2]->ne[0] > 1 && op->src[0]->type == GGML_TYPE_F32 &&
         op->src[1]->type == GGML_TYPE_I64 && op->src[0]->ne[2] == 1 && op->src[0]->ne[3] == 1;
}

std::optional<Attention> ReadAttention(ggml_tensor* op) {
  if (op->op != GGML_OP_FLASH_ATTN_EXT) return {};
  const ggml_tensor *q = op->src[0], *k = CacheOf(op, 1), *v = CacheOf(op, 2);
  const auto layer = LayerOf(k, KVMIX_K);
  if (!layer || layer != LayerOf(v, KVMIX_V)) return {};
  Attention a{op,
              q,
              k,
              v,
              op->src[3],
              *layer,
              {.kv_heads = Size(k->ne[2]),
               .query_heads = Size(q->ne[2]),
               .k_dim = Size(k->ne[0]),
               .v_dim = Size(v->ne[0])},
              KVMIX_INIT(kvmix_sight),
              0.0f};
  float params[3];
  std::memcpy(params, op->op_params, sizeof(params));
  a.sight.scale = params[0];
  a.max_bias = params[1];
  a.sight.soft_cap = params[2];
  if (op->src[4] != nullptr) a.sight.sinks = static_cast<const float*>(op->src[4]->data);
  return a;
}

std::string Refusal(const Attention& a, bool memory) {
  if (a.q->type != GGML_TYPE_F32 || !IsRowType(a.k->type) || !IsRowType(a.v->type)) {
    return std::string("K of ") + ggml_type_name(a.k->type) + ", V of " + ggml_type_name(a.v->type);
  }
  if (memory && (a.k != a.op->src[1] || a.v != a.op->src[2])) {
    return "a cache of f32, which the engine copies, with KVMIX_MEMORY";
  }
  if (a.mask == nullptr || (a.mask->type != GGML_TYPE_F16 && a.mask->type != GGML_TYPE_F32)) {
    return "attention without a mask";
  }
  if (!IsDense(a.k) || !IsDense(a.v)) return "heads of a cell that do not lie side by side";
  return CheckModel(Model{std::vector<LayerShape>{a.shape}}).message();
}

}  // namespace kvmix::llama
