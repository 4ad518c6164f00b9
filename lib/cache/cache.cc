// A Cache: its life, and rows out of it and back. (Append and Store: append.cc; its pages:
// pool.cc.)
#include <algorithm>

#include <fmt/format.h>

#include "lib/cache/cache_impl.h"
#include "lib/cache/sight.h"
#include "lib/plan/plan.h"

namespace kvmix::internal {

Status CheckLayer(const CacheImpl& c, std::size_t layer) {
  if (layer >= c.layers.size()) {
    return {ErrorCode::kInvalidArgument,
            fmt::format("layer {} of a cache of {} layers", layer, c.layers.size())};
  }
  if (c.pool->plan.model.layers[layer].has_kv()) return {};
  return {ErrorCode::kInvalidArgument, fmt::format("layer {} has no K and V", layer)};
}

Status CheckOwnLayer(const CacheImpl& c, std::size_t layer) {
  if (Status s = CheckLayer(c, layer); !s.ok()) return s;
  const LayerShape& shape = c.pool->plan.model.layers[layer];
  if (shape.owns_kv()) return {};
  return {ErrorCode::kInvalidArgument,
          fmt::format("layer {} has no K and V of its own: it reads those of layer {}", layer,
                      *shape.kv_layer)};
}

Status CheckRoom(const CacheImpl& c, std::size_t layer, std::size_t tokens) {
  const std::size_t held = c.layers[layer].tokens;
  if (tokens <= c.capacity - held) return {};
  return {ErrorCode::kPastCapacity,
          fmt::format("layer {} holds {} of {} tokens: no room for {} more", layer, held,
                      c.capacity, tokens)};
}

ExactRows ExactFirst(const PoolImpl& pool, const CacheLayer& held, const LayerShape& shape,
                     std::size_t head) {
  return {const_cast<std::uint8_t*>(held.exact.data()), shape, pool.plan.exact_first, head};
}

void KeepExact(CacheImpl& c, std::size_t layer, Tensor tensor, std::size_t head, std::size_t cell,
               const kernels::RowsIn& rows) {
  const std::size_t exact = c.pool->plan.exact_first;
  if (cell >= exact) return;
  const PoolLayer& shape = c.pool->layers[layer];
  ExactFirst(*c.pool, c.layers[layer], shape.shape, head)
      .Keep(shape.f16(tensor)[head], tensor, cell,
            rows.From(0, std::min(rows.count, exact - cell)));
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

void DecodeCodes(const CacheImpl& c, std::size_t layer, Tensor tensor, std::size_t head,
                 std::size_t first, std::size_t count, float* out) {
  constexpr std::size_t kRowsAtATime = 16;
  const PoolLayer& shape = c.pool->layers[layer];
  const CompiledCodec& codec = shape.heads(tensor)[head];
  const bool around = tensor == KVMIX_K && codec.own_centre();
  std::uint8_t rows[kRowsAtATime * kMaxHeadDim * sizeof(Half)];
  float scales[kRowsAtATime];
  for (std::size_t t = first, n; t < first + count; t += n) {
    n = std::min(kRowsAtATime - t % kRowsAtATime, first + count - t);  // of one stretch
    LoadRows(c, layer, tensor, head, t, n, rows, scales);
    codec.DecodeAround(around ? CentreOf(c, layer, head, t) : nullptr, rows, scales, n,
                       out + (t - first) * shape.shape.dim(tensor));
  }
}

Status CheckCapacity(const PoolImpl& pool, std::size_t tokens) {
  const std::size_t most = pool.memory->most();
  if (BytesForTokens(pool, tokens) <= most) return {};
  return {ErrorCode::kOutOfMemory,
          fmt::format("a cache of {} tokens for {} needs more than the {:.1f} GiB of memory that "
                      "this process may have",
                      tokens, internal::ToString(pool.plan.model),
                      static_cast<double>(most) / (1 << 30))};
}

std::unique_ptr<CacheImpl> CacheImpl::Fork() const {
  std::vector<CacheLayer> same = layers;
  auto fork = std::make_unique<CacheImpl>(pool, capacity);
  for (const CacheLayer& layer : same) layer.ForPages(PageMemory::Share);
  fork->layers.swap(same);  // nothing fails from where the pages have another user
  return fork;
}

namespace {

// Opens the stretch that a cut to `tokens` tokens leaves unfinished, in every layer. kPoolFull, and
// nothing has changed, if there is no page for it.
Status OpenCut(CacheImpl& c, std::size_t tokens) {
  const std::size_t stretch = c.pool->plan.exact_newest;
  if (stretch == 0 || tokens % stretch == 0) return {};
  for (std::size_t layer = 0; layer < c.layers.size(); ++layer) {
    if (c.layers[layer].tokens <= tokens) continue;
    const Status s = OpenStretches(c, layer, tokens, 1);
    if (s.ok()) continue;
    for (std::size_t ready = 0; ready < layer; ++ready) {  // they are whole again
      const std::size_t end = std::min(c.layers[ready].tokens, (tokens / stretch + 1) * stretch);
      if (end <= tokens) continue;
      MarkStretches(c, ready, tokens, end - tokens);
    }
    return s;
  }
  return {};
}

// Rows in canonical form can be had, and given, without their stretch.
Status CheckNoStretches(const CacheImpl& c, const char* call) {
  if (c.pool->plan.exact_newest == 0) return {};
  return {
      ErrorCode::kInvalidArgument,
      fmt::format("{}: expected a plan with exact_newest 0, found {}: a session has all rows of "
                  "such a cache",
                  call, c.pool->plan.exact_newest)};
}

}  // namespace

Status CacheImpl::Truncate(std::size_t tokens) {
  CacheImpl& c = *this;
  for (std::size_t layer = 0; layer < c.layers.size(); ++layer) {
    if (!c.pool->plan.model.layers[layer].owns_kv()) continue;
    const CacheLayer& at = c.layers[layer];
    if (tokens > at.tokens) {
      return {ErrorCode::kInvalidArgument,
              fmt::format("truncate to {} tokens: layer {} holds {}", tokens, layer, at.tokens)};
    }
    if (!HasPast(c.pool->layers[layer].window, at.forgotten, at.dropped, tokens)) {
      return {ErrorCode::kInvalidArgument,
              fmt::format("truncate to {} tokens: layer {}, with a window of {}, has forgotten "
                          "those before {}",
                          tokens, layer, c.pool->layers[layer].window, at.forgotten)};
    }
  }
  if (Status s = OpenCut(c, tokens); !s.ok()) return s;
  for (std::size_t layer = 0; layer < c.layers.size(); ++layer) {
    c.layers[layer].tokens = std::min(c.layers[layer].tokens, tokens);
    if (tokens == 0) c.layers[layer].forgotten = c.layers[layer].dropped = 0;
    DropUnused(c, layer);
  }
  return {};
}

Status CacheImpl::Forget(std::size_t layer, std::size_t first) {
  if (Status s = CheckOwnLayer(*this, layer); !s.ok()) return s;
  CacheLayer& at = layers[layer];
  if (first > at.tokens) {
    return {ErrorCode::kInvalidArgument,
            fmt::format("forget the tokens before {}: layer {} holds {}", first, layer, at.tokens)};
  }
  at.forgotten = std::max(at.forgotten, first);
  at.dropped = std::max(at.dropped, first);
  DropUnused(*this, layer);
  return {};
}

namespace {

// The layer's own K and V of tokens [first, first + count) are there.
Status CheckHeld(const CacheImpl& c, std::size_t layer, std::size_t first, std::size_t count) {
  if (Status s = CheckOwnLayer(c, layer); !s.ok()) return s;
  const CacheLayer& at = c.layers[layer];
  if (first >= at.forgotten && first <= at.tokens && count <= at.tokens - first) return {};
  return {ErrorCode::kInvalidArgument,
          fmt::format("tokens {} + {}: layer {} has the tokens from {} to {}", first, count, layer,
                      at.forgotten, at.tokens)};
}

}  // namespace

Status CacheImpl::ExportRows(std::size_t layer, std::size_t kv_head, Tensor tensor,
                             std::size_t first, std::size_t count, void* codes,
                             float* scales) const {
  if (Status s = CheckNoStretches(*this, "export"); !s.ok()) return s;
  if (Status s = CheckHeld(*this, layer, first, count); !s.ok()) return s;
  const PoolLayer& shape = pool->layers[layer];
  if (kv_head >= shape.formats.size()) {
    return {ErrorCode::kInvalidArgument, fmt::format("export of KV head {}: layer {} has {}",
                                                     kv_head, layer, shape.formats.size())};
  }
  if (count == 0) return {};
  if (codes == nullptr || (shape.heads(tensor)[kv_head].stores_scales() && scales == nullptr)) {
    return {ErrorCode::kInvalidArgument, "export: expected codes and scales, found null"};
  }
  LoadRows(*this, layer, tensor, kv_head, first, count, static_cast<std::uint8_t*>(codes), scales);
  return {};
}

Status CacheImpl::Decode(std::size_t layer, Tensor tensor, std::size_t first, std::size_t count,
                         const kvmix_out& out) const {
  constexpr std::size_t kRowsAtATime = 64;
  if (Status s = CheckHeld(*this, layer, first, count); !s.ok()) return s;
  const PoolLayer& shape = pool->layers[layer];
  const std::size_t heads = shape.formats.size(), dim = shape.shape.dim(tensor);
  const Result<OutRows> to = OutRows::Make(out, count, heads, dim);
  if (!to.ok()) return to.status();
  std::vector<float> rows(kRowsAtATime * dim);
  for (std::size_t h = 0; h < heads; ++h) {
    std::size_t t = first;
    for (; t < std::min(pool->plan.exact_first, first + count); ++t) {
      ExactFirst(*pool, layers[layer], shape.shape, h)
          .Get(shape.f16(tensor)[h], tensor, t, 1, rows.data());
      to->Put(t - first, h, rows.data());
    }
    for (std::size_t n; t < first + count; t += n) {
      const std::size_t end =
          shape.stretch == 0 ? SIZE_MAX : (t / shape.stretch + 1) * shape.stretch;
      n = std::min({first + count - t, kRowsAtATime, end - t});
      const Stretch* const s =
          shape.stretch == 0 ? nullptr : layers[layer].newest.Find(t / shape.stretch);
      if (s != nullptr && !s->whole) {
        RowsOf(shape, *s, h).Get(shape.f16(tensor)[h], tensor, t % shape.stretch, n, rows.data());
      } else {
        DecodeCodes(*this, layer, tensor, h, t, n, rows.data());
      }
      for (std::size_t i = 0; i < n; ++i) to->Put(t + i - first, h, rows.data() + i * dim);
    }
  }
  return {};
}

Status CacheImpl::ImportRows(std::size_t layer, std::size_t count, const void* const* k_codes,
                             const float* const* k_scales, const void* const* v_codes,
                             const float* const* v_scales) {
  if (Status s = CheckOwnLayer(*this, layer); !s.ok()) return s;
  CacheImpl& c = *this;
  if (Status s = CheckNoStretches(c, "import"); !s.ok()) return s;
  if (Status s = CheckRoom(c, layer, count); !s.ok()) return s;
  if (count == 0) return {};
  const PoolLayer& shape = c.pool->layers[layer];
  for (std::size_t i = 0; i < 2 * shape.formats.size(); ++i) {
    const Tensor t = i % 2 == 0 ? KVMIX_K : KVMIX_V;
    const void* const* const codes = t == KVMIX_K ? k_codes : v_codes;
    const float* const* const scales = t == KVMIX_K ? k_scales : v_scales;
    if (codes != nullptr && codes[i / 2] != nullptr &&
        (!shape.heads(t)[i / 2].stores_scales() ||
         (scales != nullptr && scales[i / 2] != nullptr))) {
      continue;
    }
    return {ErrorCode::kInvalidArgument,
            fmt::format("import: KV head {}: expected codes and scales, found null", i / 2)};
  }
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
  ForgetPast(c, layer, held);
  if (s = MakeWritable(c, layer, held, count); !s.ok()) return s;
  s = for_tensors([&](Tensor t, std::size_t h, const void* codes, const float* const* all) {
    StoreRows(c, layer, t, h, held, count, static_cast<const std::uint8_t*>(codes),
              scales_of(t, h, all));
    KeepExactOf(c, layer, t, h, held, count, codes, scales_of(t, h, all));
    return Status();
  });
  c.layers[layer].tokens += count;
  return s;
}

std::size_t CacheImpl::RowBytes(std::size_t layer, std::size_t kv_head, Tensor tensor) const {
  const std::vector<PoolLayer>& all = pool->layers;
  if (layer >= all.size() || kv_head >= all[layer].formats.size()) return 0;
  return all[layer].heads(tensor)[kv_head].row_bytes();
}

std::size_t CacheImpl::bytes() const {
  std::size_t sum = 0;
  for (const CacheLayer& layer : layers) {
    layer.ForPages([&](const Page* page) { sum += pool->memory->page_bytes(page->kind); });
  }
  return sum;
}

}  // namespace kvmix::internal
