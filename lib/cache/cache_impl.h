// A pool and a cache from inside.
#ifndef KVMIX_LIB_CACHE_CACHE_IMPL_H_
#define KVMIX_LIB_CACHE_CACHE_IMPL_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "kernels/kernels.h"
#include "kvmix/plan.h"
#include "kvmix/rope.h"
#include "kvmix/rows.h"
#include "kvmix/runner.h"
#include "kvmix/status.h"
#include "lib/cache/head.h"
#include "lib/cache/newest.h"
#include "lib/cache/pages.h"
#include "lib/cache/views.h"

namespace kvmix::internal {

// What all caches of a pool know of a layer with K and V of its own (of another: only its shape).
struct PoolLayer {
  LayerShape shape;
  CompiledHeads k = {}, v = {};
  std::vector<kernels::BlockFormat> formats = {};  // [kv_heads]

  // A page holds the same blocks of all KV heads, [kv_heads][blocks][block_bytes]: one block in
  // each of the first kOneBlockPages pages, 2^run_log2 neighbouring ones in the pages after them.
  std::size_t run_log2 = 0;
  CompiledHeads exact_k = {}, exact_v = {};  // f16, where the plan keeps tokens exact
  std::size_t stretch = 0;                   // Plan::exact_newest
  std::size_t window = 0;  // of this layer and those that read it, the longest; 0: all is seen
  std::size_t kept = 0;    // the window and what may be rolled back; 0: all tokens
  std::size_t one_block_kind = 0, run_kind = 0, exact_kind = 0;  // of PageMemory
  std::vector<std::size_t> head_bytes = {};  // [kv_heads]: those of the heads before, per block

  const CompiledHeads& heads(Tensor t) const { return t == KVMIX_K ? k : v; }
  const CompiledHeads& f16(Tensor t) const { return t == KVMIX_K ? exact_k : exact_v; }
  // Of a stretch's exact rows.
  std::size_t exact_bytes() const {
    return stretch == 0 ? 0 : shape.kv_heads * ExactRows::HeadBytes(shape, stretch);
  }
  std::size_t PageOf(std::size_t block) const;
  std::size_t FirstBlock(std::size_t page) const;
  std::size_t BlocksOf(std::size_t page) const { return FirstBlock(page + 1) - FirstBlock(page); }
  std::size_t KindOf(std::size_t page) const;
};

struct PoolImpl {
  Plan plan;
  const kernels::Kernels* kernels = nullptr;  // the tiles are made by and for these
  std::vector<PoolLayer> layers;
  std::shared_ptr<PageMemory> memory;     // perhaps of several pools
  std::unique_ptr<std::uint8_t[]> zeros;  // a block for whoever reads where nothing was written
};

// One layer of one cache. Tokens of block b of a KV head lie at blocks_of(head)[b].
struct CacheLayer {
  std::size_t tokens = 0;     // the cell after the last one that was written
  std::size_t forgotten = 0;  // tokens before this one are gone
  std::size_t dropped = 0;    // of these, tokens before this one went on purpose (Forget, Shift)
  std::vector<Page*> pages;   // null where nothing was written, or all is forgotten
  // With a window: this page's memory is also that of the page a window before, whose forgotten
  // tokens are overwritten one by one; so one token a call never takes more memory.
  std::size_t again = SIZE_MAX;
  std::vector<std::uint8_t*> blocks;  // [kv_heads][block_stride]
  std::size_t block_stride = 0;
  std::vector<std::uint8_t> exact;  // ExactRows of the plan's exact_first, of every head
  Newest newest;

  std::uint8_t* const* blocks_of(std::size_t kv_head) const {
    return blocks.data() + kv_head * block_stride;
  }
  // f(page) for every page that this cache is a user of, the last first.
  template <class F>
  void ForPages(const F& f) const {
    for (std::size_t p = pages.size(); p-- > 0;) {
      if (pages[p] != nullptr && p != again) f(pages[p]);
    }
    for (const Stretch& s : newest.stretches) f(s.page);
  }
};

// A cache. kvmix/cache.h says what each function does.
struct CacheImpl {
  std::shared_ptr<PoolImpl> pool;
  std::size_t capacity;
  std::vector<CacheLayer> layers;
  std::atomic<std::uint64_t> saturated{0};

  CacheImpl(std::shared_ptr<PoolImpl> of, std::size_t tokens)
      : pool(std::move(of)), capacity(tokens), layers(pool->layers.size()) {}
  ~CacheImpl();
  // The layer that a layer's tokens are in: its own, or the one whose K and V it reads.
  const CacheLayer& held(std::size_t layer) const {
    return layers[pool->plan.model.kv_layer(layer)];
  }

  std::unique_ptr<CacheImpl> Fork() const;
  // In append.cc.
  Status Append(std::size_t layer, const kvmix_rows& k, const kvmix_rows& v, const Runner& runner);
  Status Store(std::size_t layer, std::span<const std::int64_t> cells, const kvmix_rows& k,
               const kvmix_rows& v);
  // In cache.cc.
  Status Truncate(std::size_t tokens);
  Status Forget(std::size_t layer, std::size_t first);
  Status Decode(std::size_t layer, Tensor tensor, std::size_t first, std::size_t count,
                const kvmix_out& out) const;
  Status ExportRows(std::size_t layer, std::size_t kv_head, Tensor tensor, std::size_t first,
                    std::size_t count, void* codes, float* scales) const;
  Status ImportRows(std::size_t layer, std::size_t count, const void* const* k_codes,
                    const float* const* k_scales, const void* const* v_codes,
                    const float* const* v_scales);
  std::size_t RowBytes(std::size_t layer, std::size_t kv_head, Tensor tensor) const;
  std::size_t bytes() const;
  // In shift.cc.
  Status Shift(std::size_t keep, std::size_t drop, std::span<const Rope> ropes);
};

// bytes: 0 for as many as this process may have. beside: memory that the pool takes, or null.
struct PoolSettings {
  std::size_t bytes = 0;
  std::string_view target = {};
  std::size_t rollback = 0;
  std::shared_ptr<PageMemory> beside = nullptr;
};
// plan: a valid one.
Result<std::shared_ptr<PoolImpl>> MakePool(const Plan& plan, const PoolSettings& settings);
// Bytes of blocks that hold this many tokens in every layer, or a window of them.
std::size_t BytesForTokens(const PoolImpl& pool, std::size_t tokens);
// An error where all of the pool's memory could not hold this many tokens.
Status CheckCapacity(const PoolImpl& pool, std::size_t tokens);

// One of many caches that the same layer is appended to.
struct AppendPart {
  CacheImpl* cache;
  kvmix_rows k, v;
};
Status AppendAll(std::span<const AppendPart> parts, std::size_t layer, const Runner& runner);

// A layer of the model, with K and V.
Status CheckLayer(const CacheImpl& cache, std::size_t layer);
// The same, and the K and V are its own.
Status CheckOwnLayer(const CacheImpl& cache, std::size_t layer);
Status CheckRoom(const CacheImpl& cache, std::size_t layer, std::size_t tokens);
// Whether cells [first, first + count) of a layer can be written: there are pages, and no other
// cache shares them.
bool IsWritable(const CacheImpl& cache, std::size_t layer, std::size_t first, std::size_t count);
// The error of a pool that has none for these cells.
Status NoPage(const CacheImpl& cache, std::size_t layer, std::size_t first, std::size_t count);
// Makes it so. kPoolFull, and nothing has changed, if it is full.
Status MakeWritable(CacheImpl& cache, std::size_t layer, std::size_t first, std::size_t count);
// Gives back pages that hold only tokens before `forgotten` or at `tokens` and after.
void DropUnused(CacheImpl& cache, std::size_t layer);
// Forgets what no query from token `next` on sees through the layer's window (lib/cache/sight.h).
void ForgetPast(CacheImpl& cache, std::size_t layer, std::size_t next);

// Rows of cells [cell, cell + rows.count) of one head: those among the plan's first tokens are kept
// exact as well.
void KeepExact(CacheImpl& cache, std::size_t layer, Tensor tensor, std::size_t head,
               std::size_t cell, const kernels::RowsIn& rows);
// The same for canonical rows: they are kept as exact as their codes.
void KeepExactOf(CacheImpl& cache, std::size_t layer, Tensor tensor, std::size_t head,
                 std::size_t cell, std::size_t count, const void* rows, const float* scales);
// One head's exact first tokens.
ExactRows ExactFirst(const PoolImpl& pool, const CacheLayer& held, const LayerShape& shape,
                     std::size_t head);

// Canonical rows of one head into cells, and out of them.
void StoreRows(const CacheImpl& cache, std::size_t layer, Tensor tensor, std::size_t head,
               std::size_t cell, std::size_t count, const std::uint8_t* rows, const float* scales);
void LoadRows(const CacheImpl& cache, std::size_t layer, Tensor tensor, std::size_t head,
              std::size_t cell, std::size_t count, std::uint8_t* rows, float* scales);

// The numbers that codes stand for: tokens [first, first + count) of one head, to [count][dim].
void DecodeCodes(const CacheImpl& cache, std::size_t layer, Tensor tensor, std::size_t head,
                 std::size_t first, std::size_t count, float* out);

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_CACHE_CACHE_IMPL_H_
