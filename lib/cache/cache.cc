// A Cache: its life, and rows out of it and back. (Append and Store: append.cc; its pages:
// pool.cc.)
#include "kvmix/cache.h"

#include <algorithm>

#include <fmt/format.h>

#include "lib/cache/cache_impl.h"
#include "lib/cache/sight.h"
#include "lib/files/check.h"

namespace kvmix {

using internal::Access;
using internal::CacheImpl;
using internal::CacheLayer;
using internal::CompiledCodec;
using internal::PoolImpl;
using internal::PoolLayer;

namespace internal {

Status CheckAlive(const CacheImpl* c) {
  if (c != nullptr) return {};
  return {ErrorCode::kInvalidArgument, "the cache has been released"};
}

Status CheckLayer(const CacheImpl& c, std::size_t layer) {
  if (layer >= c.layers.size()) {
    return {ErrorCode::kInvalidArgument,
            fmt::format("layer {} of a cache of {} layers", layer, c.layers.size())};
  }
  if (c.pool->plan.model.layers[layer].has_kv()) return {};
  return {ErrorCode::kInvalidArgument, fmt::format("layer {} has no K and V", layer)};
}

Status CheckOwnLayer(const CacheImpl* c, std::size_t layer) {
  if (Status s = CheckAlive(c); !s.ok()) return s;
  if (Status s = CheckLayer(*c, layer); !s.ok()) return s;
  const LayerShape& shape = c->pool->plan.model.layers[layer];
  if (shape.owns_kv()) return {};
  return {ErrorCode::kInvalidArgument,
          fmt::format("layer {} has no K and V of its own: it reads those of layer {}", layer,
                      *shape.kv_layer)};
}

Status CheckRoom(const CacheImpl& c, std::size_t layer, std::size_t tokens) {
  const std::size_t held = c.layers[layer].tokens;
  if (tokens <= c.capacity - held) return {};
  return {ErrorCode::kOutOfMemory,
          fmt::format("layer {} holds {} of {} tokens: no room for {} more", layer, held,
                      c.capacity, tokens)};
}

Status RowsMismatch(const RowsView& rows, const char* name, std::size_t heads,
                    std::size_t head_dim) {
  return {ErrorCode::kMismatch, fmt::format("{}: expected {} heads x {}, found {} x {}", name,
                                            heads, head_dim, rows.heads, rows.head_dim)};
}

std::size_t ExactPlace(const PoolImpl& pool, const LayerShape& shape, Tensor tensor,
                       std::size_t head) {
  const std::size_t before = tensor == KVMIX_K ? 0 : shape.k_dim;
  return pool.plan.exact_first * (head * (shape.k_dim + shape.v_dim) + before);
}

void KeepExact(CacheImpl& c, std::size_t layer, Tensor tensor, std::size_t head, std::size_t cell,
               const kernels::RowsIn& rows) {
  const std::size_t exact = c.pool->plan.exact_first;
  if (cell >= exact) return;
  const PoolLayer& shape = c.pool->layers[layer];
  const CompiledCodec& f16 = (tensor == KVMIX_K ? shape.exact_k : shape.exact_v)[head];
  Half* const to = c.layers[layer].exact.data() + ExactPlace(*c.pool, shape.shape, tensor, head) +
                   cell * rows.dim;
  f16.Encode(rows.From(0, std::min(rows.count, exact - cell)), reinterpret_cast<std::uint8_t*>(to),
             nullptr);
}

void KeepExactOf(CacheImpl& c, std::size_t layer, Tensor tensor, std::size_t head, std::size_t cell,
                 std::size_t count, const void* rows, const float* scales) {
  const std::size_t exact = c.pool->plan.exact_first;
  if (cell >= exact) return;
  const PoolLayer& shape = c.pool->layers[layer];
  const std::size_t n = std::min(count, exact - cell), dim = shape.shape.dim(tensor);
  std::vector<float> floats(n * dim);
  shape.heads(tensor)[head].Decode(rows, scales, n, floats.data(), dim);
  KeepExact(c, layer, tensor, head, cell,
            TokenRows(RowsView::F32(floats.data(), n, 1, dim), 0, 0, n));
}

void StoreRows(const CacheImpl& c, std::size_t layer, Tensor tensor, std::size_t head,
               std::size_t cell, std::size_t count, const std::uint8_t* rows, const float* scales) {
  const PoolLayer& shape = c.pool->layers[layer];
  const CompiledCodec& codec = shape.heads(tensor)[head];
  const kernels::TileKernels& tiles = c.pool->kernels->tiles;
  (tensor == KVMIX_K ? tiles.store_k : tiles.store_v)(
      shape.formats[head], c.layers[layer].blocks_of(head), cell, count, rows, codec.row_bytes(),
      codec.stores_scales() ? scales : nullptr);
}

void LoadRows(const CacheImpl& c, std::size_t layer, Tensor tensor, std::size_t head,
              std::size_t cell, std::size_t count, std::uint8_t* rows, float* scales) {
  const PoolLayer& shape = c.pool->layers[layer];
  const CompiledCodec& codec = shape.heads(tensor)[head];
  const kernels::TileKernels& tiles = c.pool->kernels->tiles;
  (tensor == KVMIX_K ? tiles.load_k : tiles.load_v)(
      shape.formats[head], c.layers[layer].blocks_of(head), cell, count, rows, codec.row_bytes(),
      codec.stores_scales() ? scales : nullptr);
  if (tensor == KVMIX_V || codec.format().storage != KVMIX_STORAGE_I8) return;
  // Where tiles flip the sign of K's codes, memory that was never written reads as -128, which no
  // encoder makes: a session of it would be refused.
  std::replace(rows, rows + count * codec.row_bytes(), std::uint8_t{0x80}, std::uint8_t{0});
}

}  // namespace internal

using internal::CheckAlive;
using internal::CheckLayer;
using internal::CheckOwnLayer;
using internal::CheckRoom;

Cache::Cache(std::unique_ptr<CacheImpl> impl) : impl_(std::move(impl)) {}
Cache::Cache(Cache&&) noexcept = default;
Cache& Cache::operator=(Cache&&) noexcept = default;
Cache::~Cache() = default;

Result<Cache> Cache::Create(const Model& model, const Plan& plan, std::size_t capacity,
                            const CacheOptions& options) {
  if (Status s = CheckPlan(plan); !s.ok()) return s;
  if (Status s = CheckModelMatches(plan, model); !s.ok()) return s;
  Result<std::shared_ptr<PoolImpl>> pool =
      internal::MakePool(plan, {.target = options.target, .rollback = options.rollback});
  if (!pool.ok()) return pool.status();
  const std::size_t most = (*pool)->memory->most();
  if (internal::BytesForTokens(**pool, capacity) > most) {
    return Status(ErrorCode::kOutOfMemory,
                  fmt::format("a cache of {} tokens for {} needs more than the {:.1f} GiB of "
                              "memory that this process may have",
                              capacity, ToString(model), static_cast<double>(most) / (1 << 30)));
  }
  return Access::Make(std::move(*pool), capacity);
}

Cache Cache::Create(const Pool& pool, std::size_t capacity) {
  return Access::Make(pool.impl_, capacity);
}

Result<Cache> Cache::Fork() const {
  if (Status s = CheckAlive(impl_.get()); !s.ok()) return s;
  Cache fork = Access::Make(impl_->pool, impl_->capacity);
  fork.impl_->layers = impl_->layers;
  for (const CacheLayer& layer : fork.impl_->layers) layer.ForPages(internal::PageMemory::Share);
  return fork;
}

void Cache::Release() { impl_.reset(); }

Status Cache::Truncate(std::size_t tokens) {
  if (Status s = CheckAlive(impl_.get()); !s.ok()) return s;
  CacheImpl& c = *impl_;
  for (std::size_t layer = 0; layer < c.layers.size(); ++layer) {
    if (!c.pool->plan.model.layers[layer].owns_kv()) continue;
    const CacheLayer& at = c.layers[layer];
    if (tokens > at.tokens) {
      return {ErrorCode::kInvalidArgument,
              fmt::format("truncate to {} tokens: layer {} holds {}", tokens, layer, at.tokens)};
    }
    if (!internal::HasPast(c.pool->layers[layer].window, at.forgotten, at.dropped, tokens)) {
      return {ErrorCode::kInvalidArgument,
              fmt::format("truncate to {} tokens: layer {}, with a window of {}, has forgotten "
                          "those before {}",
                          tokens, layer, c.pool->layers[layer].window, at.forgotten)};
    }
  }
  for (std::size_t layer = 0; layer < c.layers.size(); ++layer) {
    c.layers[layer].tokens = std::min(c.layers[layer].tokens, tokens);
    if (tokens == 0) c.layers[layer].forgotten = c.layers[layer].dropped = 0;
    internal::DropUnused(c, layer);
  }
  return {};
}

Status Cache::Forget(std::size_t layer, std::size_t first) {
  if (Status s = CheckOwnLayer(impl_.get(), layer); !s.ok()) return s;
  CacheLayer& at = impl_->layers[layer];
  if (first > at.tokens) {
    return {ErrorCode::kInvalidArgument,
            fmt::format("forget the tokens before {}: layer {} holds {}", first, layer, at.tokens)};
  }
  at.forgotten = std::max(at.forgotten, first);
  at.dropped = std::max(at.dropped, first);
  internal::DropUnused(*impl_, layer);
  return {};
}

Status Cache::ExportRows(std::size_t layer, std::size_t kv_head, Tensor tensor, std::size_t first,
                         std::size_t count, void* codes, float* scales) const {
  if (Status s = CheckOwnLayer(impl_.get(), layer); !s.ok()) return s;
  const CacheImpl& c = *impl_;
  const CacheLayer& at = c.layers[layer];
  const std::size_t heads = c.pool->layers[layer].formats.size();
  if (kv_head >= heads || first < at.forgotten || first > at.tokens || count > at.tokens - first) {
    return {ErrorCode::kInvalidArgument,
            fmt::format("export of KV head {}, tokens {} + {}: the cache holds {} KV heads, layer "
                        "{} has the tokens from {} to {}",
                        kv_head, first, count, heads, layer, at.forgotten, at.tokens)};
  }
  internal::LoadRows(c, layer, tensor, kv_head, first, count, static_cast<std::uint8_t*>(codes),
                     scales);
  return {};
}

Status Cache::ImportRows(std::size_t layer, std::size_t count, const void* const* k_codes,
                         const float* const* k_scales, const void* const* v_codes,
                         const float* const* v_scales) {
  if (Status s = CheckOwnLayer(impl_.get(), layer); !s.ok()) return s;
  CacheImpl& c = *impl_;
  if (Status s = CheckRoom(c, layer, count); !s.ok()) return s;
  const PoolLayer& shape = c.pool->layers[layer];
  const auto for_tensors = [&](const auto& f) -> Status {
    for (std::size_t h = 0; h < shape.formats.size(); ++h) {
      if (Status s = f(KVMIX_K, h, k_codes[h], k_scales); !s.ok()) return s;
      if (Status s = f(KVMIX_V, h, v_codes[h], v_scales); !s.ok()) return s;
    }
    return {};
  };
  const auto scales_of = [&](Tensor t, std::size_t h, const float* const* scales) {
    return shape.heads(t)[h].stores_scales() ? scales[h] : nullptr;
  };
  Status s = for_tensors([&](Tensor t, std::size_t h, const void* codes, const float* const* all) {
    const Status bad = shape.heads(t)[h].CheckCoded(codes, scales_of(t, h, all), count);
    return bad.ok() ? Status()
                    : Status(bad.code(), fmt::format("layer {}, KV head {}, {}: {}", layer, h,
                                                     t == KVMIX_K ? "K" : "V", bad.message()));
  });
  if (!s.ok()) return s;
  const std::size_t held = c.layers[layer].tokens;
  internal::ForgetPast(c, layer, held);
  if (s = internal::MakeWritable(c, layer, held, count); !s.ok()) return s;
  s = for_tensors([&](Tensor t, std::size_t h, const void* codes, const float* const* all) {
    internal::StoreRows(c, layer, t, h, held, count, static_cast<const std::uint8_t*>(codes),
                        scales_of(t, h, all));
    internal::KeepExactOf(c, layer, t, h, held, count, codes, scales_of(t, h, all));
    return Status();
  });
  c.layers[layer].tokens += count;
  return s;
}

std::size_t Cache::RowBytes(std::size_t layer, std::size_t kv_head, Tensor tensor) const {
  const std::vector<PoolLayer>& layers = impl_->pool->layers;
  if (layer >= layers.size() || kv_head >= layers[layer].formats.size()) return 0;
  return layers[layer].heads(tensor)[kv_head].row_bytes();
}

const Plan& Cache::plan() const { return impl_->pool->plan; }
const Model& Cache::model() const { return impl_->pool->plan.model; }
std::size_t Cache::capacity() const { return impl_->capacity; }
std::size_t Cache::tokens(std::size_t layer) const {
  return layer < impl_->layers.size() ? impl_->held(layer).tokens : 0;
}
std::size_t Cache::forgotten(std::size_t layer) const {
  return layer < impl_->layers.size() ? impl_->held(layer).forgotten : 0;
}
std::size_t Cache::bytes() const {
  std::size_t sum = 0;
  for (const CacheLayer& layer : impl_->layers) {
    layer.ForPages(
        [&](const internal::Page* page) { sum += impl_->pool->memory->page_bytes(page->kind); });
  }
  return sum;
}
std::uint64_t Cache::saturated() const { return impl_->saturated.load(std::memory_order_relaxed); }
const char* Cache::target() const { return impl_->pool->kernels->target; }

}  // namespace kvmix
