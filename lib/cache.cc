#include "kvmix/cache.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include <fmt/format.h>

#include "lib/cache_impl.h"
#include "lib/machine.h"

namespace kvmix {

using internal::CacheImpl;
using internal::HeadStream;
using kernels::kBlockTokens;

namespace internal {

void Unmap::operator()(std::uint8_t* memory) const { munmap(memory, bytes); }

}  // namespace internal

namespace {

// Rows that are encoded at a time, on the stack.
constexpr std::size_t kRowsAtATime = 16;

kernels::TileFormat FormatOf(const HeadCodec& codec) {
  kernels::TileFormat f;
  if (codec.storage == Storage::kF16) return f;
  f.storage = kernels::TileStorage::kI8;
  if (codec.scale == ScaleKind::kHead) f.constant = codec.head_scale;
  if (codec.scale == ScaleKind::kToken)
    f.scale =
        codec.scale_type == ScaleType::kF32 ? kernels::TileScale::kF32 : kernels::TileScale::kBF16;
  return f;
}

// Of codes in the canonical form.
std::size_t RowBytes(const HeadCodec& codec, std::size_t head_dim) {
  return head_dim * (codec.storage == Storage::kF16 ? sizeof(Half) : 1);
}

// Some of a head's rows in the canonical form.
struct Rows {
  const std::uint8_t* codes;
  std::size_t row_bytes;
  const float* scales;  // null: none are stored
};

using StoreRow = decltype(kernels::TileKernels::store_k);

void StoreRows(const HeadStream& head, StoreRow store, std::size_t first, std::size_t count,
               const Rows& rows) {
  for (std::size_t t = 0; t < count; ++t) {
    const std::size_t token = first + t;
    store(head.format, head.block_of(token), token % kBlockTokens, rows.codes + t * rows.row_bytes,
          rows.scales != nullptr ? rows.scales[t] : 0.0f);
  }
}

// Rows to append: `count` <= kRowsAtATime of them, `stride` apart; one head's tokens, or one
// token's heads of the same kind.
struct NewRows {
  const Half* x;
  std::size_t stride, count;
  const float* mean;
  std::size_t mean_stride;
};

// Encodes rows into `codes` (room for kRowsAtATime) and `scales`; returns the number of saturated
// codes.
std::uint64_t Encode(const CacheImpl& c, const HeadCodec& codec, const NewRows& rows,
                     std::uint8_t* codes, float* scales) {
  const std::size_t dim = c.plan.geometry.head_dim;
  const kernels::QuantizeKernels& quantize = c.kernels.quantize;
  if (codec.storage == Storage::kF16) {
    for (std::size_t r = 0; r < rows.count; ++r)
      quantize.finite(rows.x + r * rows.stride, dim, reinterpret_cast<Half*>(codes) + r * dim);
    return 0;
  }
  const kernels::RowsIn in{
      rows.x,          rows.stride, rows.count, dim, codec.centred() ? rows.mean : nullptr,
      rows.mean_stride};
  std::int8_t* i8 = reinterpret_cast<std::int8_t*>(codes);
  if (codec.scale == ScaleKind::kHead) return quantize.per_head(in, codec.head_scale, i8, dim);
  quantize.per_token(in, codec.scale_type == ScaleType::kBF16, i8, dim, scales);
  return 0;
}

// Appends one tensor's rows of `count` <= kRowsAtATime tokens; returns the number of saturated
// codes.
std::uint64_t AppendTensor(const CacheImpl& c, std::size_t layer, Tensor tensor, const Half* x,
                           std::size_t first, std::size_t count) {
  alignas(64) std::uint8_t codes[kRowsAtATime * kMaxHeadDim * sizeof(Half)];
  float scales[kRowsAtATime] = {};
  const Geometry& g = c.plan.geometry;
  const StoreRow store = tensor == Tensor::kK ? c.kernels.tiles.store_k : c.kernels.tiles.store_v;
  std::uint64_t saturated = 0;
  for (std::size_t h = 0, heads = 0; h < g.kv_heads; h += heads) {
    const HeadCodec& codec = c.plan.codec(layer, h, tensor);
    const std::size_t row_bytes = RowBytes(codec, g.head_dim);
    const std::size_t index = c.index(layer, h, tensor);
    const float* mean = c.means.data() + index * g.head_dim;
    heads = count == 1 ? std::min(c.alike[index], kRowsAtATime) : 1;
    saturated +=
        Encode(c, codec,
               count == 1 ? NewRows{x + h * g.head_dim, g.head_dim, heads, mean, g.head_dim}
                          : NewRows{x + h * g.head_dim, g.kv_heads * g.head_dim, count, mean, 0},
               codes, scales);
    for (std::size_t i = 0; i < heads; ++i) {
      StoreRows(c.head(layer, h + i), store, first, count,
                {codes + i * row_bytes, row_bytes, scales + i});
    }
  }
  return saturated;
}

// Fills in `means` and `alike`.
void PrepareEncoding(CacheImpl& c) {
  const Geometry& g = c.plan.geometry;
  c.means.assign(2 * g.layers * g.kv_heads * g.head_dim, 0.0f);
  c.alike.assign(2 * g.layers * g.kv_heads, 1);
  for (std::size_t layer = 0; layer < g.layers; ++layer) {
    for (const Tensor t : {Tensor::kK, Tensor::kV}) {
      for (std::size_t h = g.kv_heads; h-- > 0;) {
        const HeadCodec& codec = c.plan.codec(layer, h, t);
        const std::size_t index = c.index(layer, h, t);
        std::copy(codec.mean.begin(), codec.mean.end(),
                  c.means.begin() + static_cast<std::ptrdiff_t>(index * g.head_dim));
        const bool own_scale = codec.scale == ScaleKind::kHead;  // a number of this head's own
        if (h + 1 < g.kv_heads && !own_scale &&
            KindOf(codec) == KindOf(c.plan.codec(layer, h + 1, t)))
          c.alike[index] = c.alike[index + 1] + 1;
      }
    }
  }
}

Status CheckLayer(const CacheImpl& c, std::size_t layer) {
  if (layer < c.tokens.size()) return {};
  return {ErrorCode::kInvalidArgument,
          fmt::format("layer {} of a cache of {} layers", layer, c.tokens.size())};
}

Status CheckRoom(const CacheImpl& c, std::size_t layer, std::size_t tokens) {
  const std::size_t held = c.tokens[layer];
  if (tokens <= c.capacity - held) return {};
  return {ErrorCode::kOutOfMemory,
          fmt::format("layer {} holds {} of {} tokens: no room for {} more", layer, held,
                      c.capacity, tokens)};
}

}  // namespace

Cache::Cache(std::unique_ptr<CacheImpl> impl) : impl_(std::move(impl)) {}
Cache::Cache(Cache&&) noexcept = default;
Cache& Cache::operator=(Cache&&) noexcept = default;
Cache::~Cache() = default;

Result<Cache> Cache::Create(const Geometry& geometry, const Plan& plan, std::size_t capacity) {
  if (Status s = CheckPlan(plan); !s.ok()) return s;
  if (Status s = CheckGeometryMatches(plan, geometry); !s.ok()) return s;
  auto c = std::make_unique<CacheImpl>();
  c->plan = plan;
  c->kernels = kernels::ActiveKernels();
  c->capacity = capacity;
  c->tokens.assign(geometry.layers, 0);

  const std::size_t blocks = capacity / kBlockTokens + (capacity % kBlockTokens != 0);
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t memory = internal::MemoryBytes();
  const auto too_large = [&] {
    return Status(
        ErrorCode::kOutOfMemory,
        fmt::format("a cache of {} tokens for {} needs more than the {:.1f} GiB of memory that "
                    "this process may have",
                    capacity, ToString(geometry), static_cast<double>(memory) / (1 << 30)));
  };
  std::size_t bytes = 0;
  std::vector<std::size_t> offsets;
  for (std::size_t layer = 0; layer < geometry.layers; ++layer) {
    for (std::size_t h = 0; h < geometry.kv_heads; ++h) {
      HeadStream head;
      head.format = {FormatOf(plan.codec(layer, h, Tensor::kK)),
                     FormatOf(plan.codec(layer, h, Tensor::kV)), geometry.head_dim, 0};
      c->kernels.tiles.lay_out(head.format);
      if (blocks != 0 && head.format.block_bytes > (memory - bytes) / blocks) return too_large();
      offsets.push_back(bytes);
      bytes += blocks * head.format.block_bytes;
      c->heads.push_back(head);
    }
  }
  c->bytes = bytes;
  const std::size_t mapped = std::max(bytes, page);
  void* p =
      mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
           0);  // zeros: finite in every storage
  if (p == MAP_FAILED) return too_large();
  madvise(p, mapped, MADV_HUGEPAGE);  // a wish; a few percent of decode speed at long contexts
  c->memory = {static_cast<std::uint8_t*>(p), internal::Unmap{mapped}};
  for (std::size_t i = 0; i < offsets.size(); ++i)
    c->heads[i].blocks = c->memory.get() + offsets[i];
  PrepareEncoding(*c);
  return Cache(std::move(c));
}

Status Cache::Append(std::size_t layer, const Half* k, const Half* v, std::size_t tokens) {
  CacheImpl& c = *impl_;
  if (Status s = CheckLayer(c, layer); !s.ok()) return s;
  if (Status s = CheckRoom(c, layer, tokens); !s.ok()) return s;
  const std::size_t stride = c.plan.geometry.kv_heads * c.plan.geometry.head_dim,
                    held = c.tokens[layer];
  std::uint64_t saturated = 0;
  for (std::size_t t = 0; t < tokens; t += kRowsAtATime) {
    const std::size_t count = std::min(kRowsAtATime, tokens - t);
    saturated += AppendTensor(c, layer, Tensor::kK, k + t * stride, held + t, count);
    saturated += AppendTensor(c, layer, Tensor::kV, v + t * stride, held + t, count);
  }
  if (saturated != 0) c.saturated.fetch_add(saturated, std::memory_order_relaxed);
  c.tokens[layer] = held + tokens;
  return {};
}

Status Cache::Truncate(std::size_t tokens) {
  for (std::size_t layer = 0; layer < impl_->tokens.size(); ++layer) {
    if (tokens > impl_->tokens[layer]) {
      return {ErrorCode::kInvalidArgument, fmt::format("truncate to {} tokens: layer {} holds {}",
                                                       tokens, layer, impl_->tokens[layer])};
    }
  }
  std::fill(impl_->tokens.begin(), impl_->tokens.end(), tokens);
  return {};
}

Status Cache::ExportRows(std::size_t layer, std::size_t kv_head, Tensor tensor, std::size_t first,
                         std::size_t count, void* codes, float* scales) const {
  const CacheImpl& c = *impl_;
  if (Status s = CheckLayer(c, layer); !s.ok()) return s;
  if (kv_head >= c.plan.geometry.kv_heads || first > c.tokens[layer] ||
      count > c.tokens[layer] - first) {
    return {ErrorCode::kInvalidArgument,
            fmt::format("export of KV head {}, tokens {} + {}: the cache holds {} KV heads, layer "
                        "{} has {} tokens",
                        kv_head, first, count, c.plan.geometry.kv_heads, layer, c.tokens[layer])};
  }
  const HeadStream& head = c.head(layer, kv_head);
  const HeadCodec& codec = c.plan.codec(layer, kv_head, tensor);
  const std::size_t row_bytes = RowBytes(codec, c.plan.geometry.head_dim);
  const auto load = tensor == Tensor::kK ? c.kernels.tiles.load_k : c.kernels.tiles.load_v;
  for (std::size_t t = 0; t < count; ++t) {
    float scale;
    load(head.format, head.block_of(first + t), (first + t) % kBlockTokens,
         static_cast<std::uint8_t*>(codes) + t * row_bytes, &scale);
    if (codec.scale == ScaleKind::kToken) scales[t] = scale;
  }
  return {};
}

Status Cache::ImportRows(std::size_t layer, std::size_t count, const void* const* k_codes,
                         const float* const* k_scales, const void* const* v_codes,
                         const float* const* v_scales) {
  CacheImpl& c = *impl_;
  if (Status s = CheckLayer(c, layer); !s.ok()) return s;
  if (Status s = CheckRoom(c, layer, count); !s.ok()) return s;
  for (std::size_t h = 0; h < c.plan.geometry.kv_heads; ++h) {
    const HeadStream& head = c.head(layer, h);
    const auto import = [&](Tensor tensor, StoreRow store, const void* codes,
                            const float* const* scales) {
      const HeadCodec& codec = c.plan.codec(layer, h, tensor);
      StoreRows(head, store, c.tokens[layer], count,
                {static_cast<const std::uint8_t*>(codes), RowBytes(codec, c.plan.geometry.head_dim),
                 codec.scale == ScaleKind::kToken ? scales[h] : nullptr});
    };
    import(Tensor::kK, c.kernels.tiles.store_k, k_codes[h], k_scales);
    import(Tensor::kV, c.kernels.tiles.store_v, v_codes[h], v_scales);
  }
  c.tokens[layer] += count;
  return {};
}

const Plan& Cache::plan() const { return impl_->plan; }
std::size_t Cache::capacity() const { return impl_->capacity; }
std::size_t Cache::tokens(std::size_t layer) const {
  return layer < impl_->tokens.size() ? impl_->tokens[layer] : 0;
}
std::size_t Cache::bytes() const { return impl_->bytes; }
std::uint64_t Cache::saturated() const { return impl_->saturated.load(std::memory_order_relaxed); }
const char* Cache::target() const { return impl_->kernels.target; }

}  // namespace kvmix
