// What nodes of llama.cpp's graphs are to kvmix: attention over the KV cache, and writes to it.
#ifndef KVMIX_ENGINES_LLAMA_CPP_NODES_H_
#define KVMIX_ENGINES_LLAMA_CPP_NODES_H_

#include <cstddef>
#include <optional>
#include <string>

#include "ggml.h"

#include <kvmix/attention.h>
#include <kvmix/model.h>

namespace kvmix::llama {

// The tensor that a view is a part of.
ggml_tensor* Base(const ggml_tensor* t);
// The layer of the engine's K or V that a tensor is a part of: "cache_k_l12" -> 12. Nothing for
// other tensors, and for null.
std::optional<std::size_t> LayerOf(const ggml_tensor* t, Tensor tensor);
bool IsCache(const ggml_tensor* t);

// A node that computes nothing.
bool IsView(const ggml_tensor* op);
// A SET_ROWS that writes rows of f32 to the cache.
bool IsWrite(const ggml_tensor* op);

// A FLASH_ATTN_EXT over the cache.
struct Attention {
  ggml_tensor* op;
  const ggml_tensor *q, *k, *v, *mask;  // k and v: of the cache, also where the engine copies it
  std::size_t layer;
  LayerShape shape;
  Sight sight;
  float max_bias;  // ALiBi's; 0: none
};
std::optional<Attention> ReadAttention(ggml_tensor* op);
// Why an attention stays with the CPU; empty: it does not. memory: the engine's rows are given
// back.
std::string Refusal(const Attention& a, bool memory);

}  // namespace kvmix::llama

#endif  // KVMIX_ENGINES_LLAMA_CPP_NODES_H_
