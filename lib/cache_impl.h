// What a Cache holds, for attention.cc.
#ifndef KVMIX_LIB_CACHE_IMPL_H_
#define KVMIX_LIB_CACHE_IMPL_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/kernels.h"
#include "kvmix/plan.h"

namespace kvmix::internal {

// One KV head of one layer: a stream of blocks in the cache's memory.
struct HeadStream {
  kernels::BlockFormat format;
  std::uint8_t* blocks = nullptr;

  std::uint8_t* block_of(std::size_t token) const {
    return blocks + token / kernels::kBlockTokens * format.block_bytes;
  }
};

struct Unmap {
  std::size_t bytes = 0;
  void operator()(std::uint8_t* memory) const;
};

struct CacheImpl {
  Plan plan;
  kernels::Kernels kernels;  // the tiles are made by and for these
  std::size_t capacity = 0;
  std::size_t bytes = 0;
  std::unique_ptr<std::uint8_t, Unmap> memory;
  std::vector<HeadStream> heads;  // [layers][kv_heads]
  std::vector<float>
      means;  // [layers][K, V][kv_heads][head_dim], zeros where a codec is not centred
  std::vector<std::size_t> alike;  // [layers][K, V][kv_heads]: heads from this one on whose rows of
                                   // one token can be encoded together
  std::vector<std::size_t> tokens;  // [layers]
  std::atomic<std::uint64_t> saturated{0};

  std::size_t index(std::size_t layer, std::size_t kv_head, Tensor t) const {
    return (layer * 2 + static_cast<std::size_t>(t)) * plan.geometry.kv_heads + kv_head;
  }
  const HeadStream& head(std::size_t layer, std::size_t kv_head) const {
    return heads[layer * plan.geometry.kv_heads + kv_head];
  }
};

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_CACHE_IMPL_H_
