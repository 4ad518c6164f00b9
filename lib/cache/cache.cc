// A Cache: its memory, and rows out of it and back. (Append: append.cc.)
#include "kvmix/cache.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include <fmt/format.h>

#include "lib/cache/cache_impl.h"
#include "lib/files/machine.h"

namespace kvmix {

using internal::CacheImpl;
using internal::CacheLayer;
using internal::CompiledHeads;
using kernels::kBlockTokens;

namespace {

// Vectors of a layer's codecs, of K or of V.
CompiledHeads Compile(const Plan& plan, std::size_t layer, Tensor tensor,
                      const kernels::Kernels& kernels) {
  std::vector<const HeadCodec*> codecs;
  for (std::size_t h = 0; h < plan.geometry.kv_heads; ++h) {
    codecs.push_back(&plan.codec(layer, h, tensor));
  }
  return CompiledHeads(codecs, plan.geometry.head_dim, kernels);
}

}  // namespace

namespace internal {

void Unmap::operator()(std::uint8_t* memory) const { munmap(memory, bytes); }

Status CheckLayer(const CacheImpl& c, std::size_t layer) {
  if (layer < c.layers.size()) return {};
  return {ErrorCode::kInvalidArgument,
          fmt::format("layer {} of a cache of {} layers", layer, c.layers.size())};
}

Status CheckRoom(const CacheImpl& c, std::size_t layer, std::size_t tokens) {
  const std::size_t held = c.layers[layer].tokens;
  if (tokens <= c.capacity - held) return {};
  return {ErrorCode::kOutOfMemory,
          fmt::format("layer {} holds {} of {} tokens: no room for {} more", layer, held,
                      c.capacity, tokens)};
}

Status CheckRows(const RowsView& rows, const char* name, std::size_t heads, std::size_t head_dim) {
  if (rows.heads == heads && rows.head_dim == head_dim) return {};
  return {ErrorCode::kMismatch, fmt::format("{}: expected {} heads x {}, found {} x {}", name,
                                            heads, head_dim, rows.heads, rows.head_dim)};
}

}  // namespace internal

using internal::CheckLayer;
using internal::CheckRoom;

Cache::Cache(std::unique_ptr<CacheImpl> impl) : impl_(std::move(impl)) {}
Cache::Cache(Cache&&) noexcept = default;
Cache& Cache::operator=(Cache&&) noexcept = default;
Cache::~Cache() = default;

Result<Cache> Cache::Create(const Geometry& geometry, const Plan& plan, std::size_t capacity,
                            const CacheOptions& options) {
  if (Status s = CheckPlan(plan); !s.ok()) return s;
  if (Status s = CheckGeometryMatches(plan, geometry); !s.ok()) return s;
  const Result<const kernels::Kernels*> kernels = internal::KernelsFor(options.target);
  if (!kernels.ok()) return kernels.status();
  auto c = std::make_unique<CacheImpl>();
  c->plan = plan;
  c->kernels = *kernels;
  c->capacity = capacity;

  const std::size_t blocks = capacity / kBlockTokens + (capacity % kBlockTokens != 0);
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t memory = internal::MemoryBytes();
  const auto too_large = [&] {
    return Status(
        ErrorCode::kOutOfMemory,
        fmt::format("a cache of {} tokens for {} needs more than the {:.1f} GiB of "
                    "memory that this process may have",
                    capacity, ToString(geometry), static_cast<double>(memory) / (1 << 30)));
  };
  for (std::size_t layer = 0; layer < geometry.layers; ++layer) {
    CacheLayer at{Compile(plan, layer, Tensor::kK, *c->kernels),
                  Compile(plan, layer, Tensor::kV, *c->kernels),
                  {},
                  {}};
    for (std::size_t h = 0; h < geometry.kv_heads; ++h) {
      kernels::BlockFormat format{{at.k[h].format()}, {at.v[h].format()}};
      c->kernels->tiles.lay_out(format);
      if (blocks != 0 && format.block_bytes > (memory - c->bytes) / blocks) return too_large();
      c->bytes += blocks * format.block_bytes;
      at.formats.push_back(format);
    }
    c->layers.push_back(std::move(at));
  }
  const std::size_t mapped = std::max(c->bytes, page);
  void* p = mmap(nullptr, mapped, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);  // zeros: finite everywhere
  if (p == MAP_FAILED) return too_large();
  madvise(p, mapped, MADV_HUGEPAGE);  // a wish; a few percent of decode speed at long contexts
  c->memory = {static_cast<std::uint8_t*>(p), internal::Unmap{mapped}};
  std::uint8_t* next = c->memory.get();
  for (CacheLayer& layer : c->layers) {
    layer.blocks.reserve(layer.formats.size() * blocks);
    for (const kernels::BlockFormat& format : layer.formats) {
      for (std::size_t b = 0; b < blocks; ++b, next += format.block_bytes) {
        layer.blocks.push_back(next);
      }
    }
  }
  return Cache(std::move(c));
}

Status Cache::Truncate(std::size_t tokens) {
  for (std::size_t layer = 0; layer < impl_->layers.size(); ++layer) {
    const std::size_t held = impl_->layers[layer].tokens;
    if (tokens > held) {
      return {ErrorCode::kInvalidArgument,
              fmt::format("truncate to {} tokens: layer {} holds {}", tokens, layer, held)};
    }
  }
  for (CacheLayer& layer : impl_->layers) layer.tokens = tokens;
  return {};
}

Status Cache::ExportRows(std::size_t layer, std::size_t kv_head, Tensor tensor, std::size_t first,
                         std::size_t count, void* codes, float* scales) const {
  const CacheImpl& c = *impl_;
  if (Status s = CheckLayer(c, layer); !s.ok()) return s;
  const CacheLayer& at = c.layers[layer];
  if (kv_head >= at.formats.size() || first > at.tokens || count > at.tokens - first) {
    return {ErrorCode::kInvalidArgument,
            fmt::format("export of KV head {}, tokens {} + {}: the cache holds {} KV heads, layer "
                        "{} has {} tokens",
                        kv_head, first, count, at.formats.size(), layer, at.tokens)};
  }
  const internal::CompiledCodec& codec = at.heads(tensor)[kv_head];
  const auto load = tensor == Tensor::kK ? c.kernels->tiles.load_k : c.kernels->tiles.load_v;
  load(at.formats[kv_head], at.blocks_of(kv_head), first, count, static_cast<std::uint8_t*>(codes),
       codec.row_bytes(), codec.stores_scales() ? scales : nullptr);
  return {};
}

Status Cache::ImportRows(std::size_t layer, std::size_t count, const void* const* k_codes,
                         const float* const* k_scales, const void* const* v_codes,
                         const float* const* v_scales) {
  CacheImpl& c = *impl_;
  if (Status s = CheckLayer(c, layer); !s.ok()) return s;
  if (Status s = CheckRoom(c, layer, count); !s.ok()) return s;
  CacheLayer& at = c.layers[layer];
  for (std::size_t h = 0; h < at.formats.size(); ++h) {
    const auto import = [&](const internal::CompiledCodec& codec, auto store, const void* codes,
                            const float* const* scales) {
      store(at.formats[h], at.blocks_of(h), at.tokens, count,
            static_cast<const std::uint8_t*>(codes), codec.row_bytes(),
            codec.stores_scales() ? scales[h] : nullptr);
    };
    import(at.k[h], c.kernels->tiles.store_k, k_codes[h], k_scales);
    import(at.v[h], c.kernels->tiles.store_v, v_codes[h], v_scales);
  }
  at.tokens += count;
  return {};
}

std::size_t Cache::RowBytes(std::size_t layer, std::size_t kv_head, Tensor tensor) const {
  if (layer >= impl_->layers.size() || kv_head >= impl_->layers[layer].formats.size()) return 0;
  return impl_->layers[layer].heads(tensor)[kv_head].row_bytes();
}

const Plan& Cache::plan() const { return impl_->plan; }
std::size_t Cache::capacity() const { return impl_->capacity; }
std::size_t Cache::tokens(std::size_t layer) const {
  return layer < impl_->layers.size() ? impl_->layers[layer].tokens : 0;
}
std::size_t Cache::bytes() const { return impl_->bytes; }
std::uint64_t Cache::saturated() const { return impl_->saturated.load(std::memory_order_relaxed); }
const char* Cache::target() const { return impl_->kernels->target; }

}  // namespace kvmix
