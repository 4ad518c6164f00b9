// What a Cache holds, for its own files and for attention.
#ifndef KVMIX_LIB_CACHE_CACHE_IMPL_H_
#define KVMIX_LIB_CACHE_CACHE_IMPL_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/kernels.h"
#include "kvmix/plan.h"
#include "kvmix/status.h"
#include "lib/cache/head.h"

namespace kvmix::internal {

// One layer. Tokens of block b of a KV head lie at blocks_of(head)[b].
struct CacheLayer {
  CompiledHeads k, v;
  std::vector<kernels::BlockFormat> formats;  // [kv_heads]
  std::vector<std::uint8_t*> blocks;          // [kv_heads][blocks of the capacity]
  std::size_t tokens = 0;

  const CompiledHeads& heads(Tensor t) const { return t == Tensor::kK ? k : v; }
  std::uint8_t* const* blocks_of(std::size_t kv_head) const {
    return blocks.data() + kv_head * (blocks.size() / formats.size());
  }
};

struct Unmap {
  std::size_t bytes = 0;
  void operator()(std::uint8_t* memory) const;
};

struct CacheImpl {
  Plan plan;
  const kernels::Kernels* kernels = nullptr;  // the tiles are made by and for these
  std::size_t capacity = 0;
  std::size_t bytes = 0;
  std::unique_ptr<std::uint8_t, Unmap> memory;
  std::vector<CacheLayer> layers;
  std::atomic<std::uint64_t> saturated{0};
};

Status CheckLayer(const CacheImpl& cache, std::size_t layer);
Status CheckRoom(const CacheImpl& cache, std::size_t layer, std::size_t tokens);
// A view of rows has this many heads and this head_dim.
Status CheckRows(const RowsView& rows, const char* name, std::size_t heads, std::size_t head_dim);

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_CACHE_CACHE_IMPL_H_
