// A Pool: a plan compiled for a target, the layout of its pages, and their memory; and how a cache
// gets pages, shares them and gives them back.
#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include <fmt/format.h>

#include "lib/cache/cache_impl.h"
#include "lib/cache/round.h"
#include "lib/cache/sight.h"
#include "lib/files/machine.h"

namespace kvmix::internal {

using kernels::kBlockTokens;

namespace {

// A jump from page to page costs a decode that reads from memory about 140 ns (a miss of the TLB,
// and one of the caches that nobody can ask for ahead). So beyond the first pages a page holds as
// many neighbouring blocks of a head as make this many bytes: the jumps then cost 1 to 2 %.
constexpr std::size_t kRunBytes = std::size_t{128} << 10;
constexpr std::size_t kOneBlockPages = 4;
// What the tables of one layer of a cache may take: this, or a fraction of the pool.
constexpr std::size_t kMostTableBytes = std::size_t{16} << 20, kMostTableFraction = 64;

// The codecs of a layer's K or V.
CompiledHeads Compile(const Plan& plan, std::size_t layer, Tensor tensor,
                      const kernels::Kernels& kernels) {
  const LayerShape& shape = plan.model.layers[layer];
  std::vector<const HeadCodec*> codecs;
  for (std::size_t h = 0; h < shape.kv_heads; ++h) codecs.push_back(&plan.codec(layer, h, tensor));
  return CompiledHeads(codecs, shape.dim(tensor), kernels);
}

bool SameTile(const kernels::TileFormat& a, const kernels::TileFormat& b) {
  return a.row.storage == b.row.storage && a.row.scale == b.row.scale && a.row.dim == b.row.dim;
}

// Pages of one can be those of the other: what was a number there is one here.
bool SamePages(const PoolLayer& a, const PoolLayer& b) {
  return a.run_log2 == b.run_log2 && a.exact_bytes() == b.exact_bytes() &&
         std::ranges::equal(a.formats, b.formats,
                            [](const kernels::BlockFormat& x, const kernels::BlockFormat& y) {
                              return SameTile(x.k, y.k) && SameTile(x.v, y.v) &&
                                     x.stretch == y.stretch;
                            });
}

}  // namespace

std::size_t PoolLayer::PageOf(std::size_t block) const {
  return block < kOneBlockPages ? block : kOneBlockPages + ((block - kOneBlockPages) >> run_log2);
}

std::size_t PoolLayer::KindOf(std::size_t page) const {
  return page < kOneBlockPages ? one_block_kind : run_kind;
}

std::size_t PoolLayer::FirstBlock(std::size_t page) const {
  return page < kOneBlockPages ? page : kOneBlockPages + ((page - kOneBlockPages) << run_log2);
}

Result<std::shared_ptr<PoolImpl>> MakePool(const Plan& plan, const PoolSettings& settings) {
  const Result<const kernels::Kernels*> kernels = KernelsFor(settings.target);
  if (!kernels.ok()) return kernels.status();
  auto pool = std::make_shared<PoolImpl>();
  pool->plan = plan;
  pool->kernels = *kernels;
  pool->memory =
      settings.beside != nullptr
          ? settings.beside
          : std::make_shared<PageMemory>(settings.bytes != 0 ? settings.bytes : MemoryBytes());

  std::size_t largest = 0;
  for (std::size_t i = 0; i < plan.model.layers.size(); ++i) {
    const LayerShape& shape = plan.model.layers[i];
    if (!shape.owns_kv()) {
      pool->layers.push_back({.shape = shape});
      continue;
    }
    PoolLayer layer{.shape = shape,
                    .k = Compile(plan, i, KVMIX_K, **kernels),
                    .v = Compile(plan, i, KVMIX_V, **kernels)};
    layer.stretch = plan.exact_newest;
    if (plan.exact_first != 0 || plan.exact_newest != 0) {
      const HeadCodec f16;
      const std::vector<const HeadCodec*> all(shape.kv_heads, &f16);
      layer.exact_k = CompiledHeads(all, shape.k_dim, **kernels);
      layer.exact_v = CompiledHeads(all, shape.v_dim, **kernels);
    }
    std::size_t bytes = 0;
    for (std::size_t h = 0; h < shape.kv_heads; ++h) {
      kernels::BlockFormat format{.k = {layer.k[h].format()}, .v = {layer.v[h].format()}};
      format.stretch = layer.k[h].own_centre() ? plan.exact_newest : 0;
      (*kernels)->tiles.lay_out(format);
      layer.head_bytes.push_back(bytes);
      bytes += format.block_bytes;
      largest = std::max(largest, format.block_bytes);
      layer.formats.push_back(format);
    }
    const std::size_t held = plan.model.tokens_held(i, SIZE_MAX);
    layer.window = held == SIZE_MAX ? 0 : held;
    if (layer.window != 0) {  // lets blocks go one by one
      layer.kept = layer.window + settings.rollback;
    } else {
      layer.run_log2 =
          std::min<std::size_t>(2, std::bit_width((kRunBytes * shape.kv_heads - 1) / bytes));
    }
    const auto like = std::ranges::find_if(pool->layers, [&](const PoolLayer& other) {
      return other.shape.owns_kv() && SamePages(other, layer);
    });
    if (like != pool->layers.end()) {
      layer.one_block_kind = like->one_block_kind;
      layer.run_kind = like->run_kind;
      layer.exact_kind = like->exact_kind;
    } else {
      layer.one_block_kind = pool->memory->AddKind(bytes);
      layer.run_kind = layer.run_log2 == 0 ? layer.one_block_kind
                                           : pool->memory->AddKind(bytes << layer.run_log2);
      if (layer.stretch != 0) layer.exact_kind = pool->memory->AddKind(layer.exact_bytes());
    }
    pool->layers.push_back(std::move(layer));
  }
  pool->zeros = std::make_unique<std::uint8_t[]>(largest + 64);
  return pool;
}

std::size_t BytesForTokens(const PoolImpl& pool, std::size_t tokens) {
  std::size_t sum = 0;
  for (const PoolLayer& layer : pool.layers) {
    if (!layer.shape.owns_kv()) continue;
    const std::size_t held = layer.kept != 0 ? std::min(tokens, layer.kept + kBlockTokens) : tokens;
    const std::size_t blocks = CeilDiv(held, kBlockTokens);
    const std::size_t block = pool.memory->page_bytes(layer.one_block_kind);
    if (blocks > (SIZE_MAX - sum) / block) return SIZE_MAX;
    sum += blocks * block;
    // The stretch that fills, and the one before it.
    sum += std::min<std::size_t>(2, CeilDiv(held, std::max<std::size_t>(1, layer.stretch))) *
           layer.exact_bytes();
  }
  return sum;
}

namespace {

// The table of blocks follows the page: all heads' pointers into it, or to zeros.
void PointTo(const PoolImpl& pool, const PoolLayer& shape, CacheLayer& layer, std::size_t page) {
  const std::size_t first = shape.FirstBlock(page), blocks = shape.BlocksOf(page);
  for (std::size_t h = 0; h < shape.formats.size(); ++h) {
    std::uint8_t** table = layer.blocks.data() + h * layer.block_stride + first;
    for (std::size_t b = 0; b < blocks; ++b) {
      table[b] = layer.pages[page] == nullptr
                     ? pool.zeros.get()
                     : layer.pages[page]->memory + blocks * shape.head_bytes[h] +
                           b * shape.formats[h].block_bytes;
    }
  }
}

// Room for `pages` pages in the tables.
void Grow(const PoolImpl& pool, const PoolLayer& shape, CacheLayer& layer, std::size_t pages) {
  if (pages <= layer.pages.size()) return;
  layer.pages.resize(std::max(pages, 2 * layer.pages.size()));
  layer.block_stride = shape.FirstBlock(layer.pages.size());
  layer.blocks.resize(shape.formats.size() * layer.block_stride);
  for (std::size_t p = 0; p < layer.pages.size(); ++p) PointTo(pool, shape, layer, p);
}

// Copies the blocks of a page that hold tokens.
void CopyPage(const PoolLayer& shape, const CacheLayer& layer, std::size_t page, Page& to) {
  const std::size_t first = shape.FirstBlock(page), blocks = shape.BlocksOf(page);
  const std::size_t end = CeilDiv(layer.tokens, kBlockTokens);
  if (end <= first) return;
  for (std::size_t h = 0; h < shape.formats.size(); ++h) {
    const std::size_t at = blocks * shape.head_bytes[h];
    std::memcpy(to.memory + at, layer.pages[page]->memory + at,
                std::min(blocks, end - first) * shape.formats[h].block_bytes);
  }
}

// Pages of what a layer with a window keeps.
std::size_t Cycle(const PoolLayer& shape) { return CeilDiv(shape.kept, kBlockTokens); }

// Whether tokens up to `end`, in the place of those a cycle before, overwrite any that is seen.
bool OverwritesSeen(const PoolLayer& shape, const CacheLayer& layer, std::size_t end) {
  return end > layer.forgotten + Cycle(shape) * kBlockTokens;
}

void SetPage(CacheImpl& c, std::size_t layer, std::size_t page, Page* to) {
  CacheLayer& at = c.layers[layer];
  const PoolLayer& shape = c.pool->layers[layer];
  if (at.again != SIZE_MAX && (page == at.again || page + Cycle(shape) == at.again)) {
    at.again = SIZE_MAX;  // the other one keeps the memory
  } else if (at.pages[page] != nullptr) {
    c.pool->memory->Release(at.pages[page]);
  }
  at.pages[page] = to;
  PointTo(*c.pool, shape, at, page);
}

}  // namespace

Status NoPage(const CacheImpl& c, std::size_t layer, std::size_t first, std::size_t count) {
  return {ErrorCode::kPoolFull,
          fmt::format("layer {}: no page for tokens {} + {}: {} of the pool's {} bytes are used",
                      layer, first, count, c.pool->memory->used(), c.pool->memory->most())};
}

bool IsWritable(const CacheImpl& c, std::size_t layer, std::size_t first, std::size_t count) {
  if (count == 0) return true;
  const PoolLayer& shape = c.pool->layers[layer];
  const CacheLayer& at = c.layers[layer];
  const std::vector<Page*>& pages = at.pages;
  const std::size_t last = shape.PageOf((first + count - 1) / kBlockTokens);
  if (last >= pages.size()) return false;
  for (std::size_t p = shape.PageOf(first / kBlockTokens); p <= last; ++p) {
    if (!IsOwn(pages[p])) return false;
    if (p == at.again && OverwritesSeen(shape, at, first + count)) return false;
  }
  return true;
}

Status MakeWritable(CacheImpl& c, std::size_t layer, std::size_t first, std::size_t count) {
  if (count == 0) return {};  // there is no last cell
  const PoolLayer& shape = c.pool->layers[layer];
  CacheLayer& at = c.layers[layer];
  at.exact.resize(shape.shape.kv_heads *
                  ExactRows::HeadBytes(shape.shape, c.pool->plan.exact_first));
  const std::size_t first_page = shape.PageOf(first / kBlockTokens);
  const std::size_t last_page = shape.PageOf((first + count - 1) / kBlockTokens);
  // A cell far from all others would need tables larger than memory.
  const std::size_t most_blocks =
      std::max(kMostTableBytes, c.pool->memory->most() / kMostTableFraction) /
      ((shape.formats.size() + 1) * sizeof(void*));
  if ((first + count - 1) / kBlockTokens >= most_blocks) {
    return {ErrorCode::kOutOfMemory,
            fmt::format("layer {}: no tables for tokens {} + {}: those of a pool of {} bytes end "
                        "at {}",
                        layer, first, count, c.pool->memory->most(), most_blocks * kBlockTokens)};
  }
  Grow(*c.pool, shape, at, last_page + 1);
  const bool overwrites = OverwritesSeen(shape, at, first + count);
  if (shape.kept != 0 && first_page == last_page && first_page >= Cycle(shape) && !overwrites &&
      at.again == SIZE_MAX && at.pages[first_page] == nullptr &&
      IsOwn(at.pages[first_page - Cycle(shape)])) {
    at.again = first_page;
    at.pages[first_page] = at.pages[first_page - Cycle(shape)];
    PointTo(*c.pool, shape, at, first_page);
    return {};
  }
  PageList fresh{*c.pool->memory};
  for (std::size_t p = first_page; p <= last_page; ++p) {
    if (IsOwn(at.pages[p]) && !(p == at.again && overwrites)) continue;
    Page* const page = c.pool->memory->Get(shape.KindOf(p));
    if (page == nullptr) return NoPage(c, layer, first, count);
    page->place = p;
    page->next = std::exchange(fresh.first, page);
  }
  while (fresh.first != nullptr) {
    Page* const page = std::exchange(fresh.first, fresh.first->next);
    if (at.pages[page->place] != nullptr) CopyPage(shape, at, page->place, *page);
    SetPage(c, layer, page->place, page);
  }
  return {};
}

void DropUnused(CacheImpl& c, std::size_t layer) {
  const PoolLayer& shape = c.pool->layers[layer];
  CacheLayer& at = c.layers[layer];
  for (std::size_t p = at.pages.size(); p-- > 0;) {
    const std::size_t end = std::min(at.tokens, shape.FirstBlock(p + 1) * kBlockTokens);
    const bool past = end <= at.forgotten;
    const bool beyond = shape.FirstBlock(p) * kBlockTokens >= at.tokens;
    if (at.pages[p] != nullptr && (past || beyond)) SetPage(c, layer, p, nullptr);
  }
  if (shape.stretch == 0) return;
  CutStretches(c, layer, at.tokens);
  ForgetStretches(c, layer, at.forgotten);
}

void ForgetPast(CacheImpl& c, std::size_t layer, std::size_t next) {
  CacheLayer& at = c.layers[layer];
  const std::size_t first = FirstSeen(next, c.pool->layers[layer].kept);
  const std::size_t before = at.forgotten;
  if (first <= before) return;
  at.forgotten = std::max(before, std::min(at.tokens, first));
  if (at.forgotten / kBlockTokens != before / kBlockTokens) DropUnused(c, layer);
}

CacheImpl::~CacheImpl() {
  for (CacheLayer& layer : layers) layer.ForPages([&](Page* page) { pool->memory->Release(page); });
}

}  // namespace kvmix::internal
