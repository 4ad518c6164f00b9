// Rows -> canonical rows -> tiles, in parts: one KV head's K and V over a run of tokens each.
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <memory>

#include "kvmix/cache.h"
#include "lib/cache/cache_impl.h"
#include "lib/cache/parallel.h"

namespace kvmix {

using internal::CacheImpl;
using internal::CacheLayer;
using internal::CompiledCodec;
using internal::CompiledHeads;
using kernels::kBlockTokens;

namespace {

// Rows that are encoded at a time, on the stack.
constexpr std::size_t kRowsAtATime = 16;
// Numbers (of K, and as many of V) up to which everything is one part: less than a thread's wake-up
// takes.
constexpr std::size_t kOnePart = 32768;

// Canonical rows on the stack.
struct Coded {
  alignas(64) std::uint8_t rows[kRowsAtATime * kMaxHeadDim * sizeof(Half)];
  float scales[kRowsAtATime];
};

// Some of one tensor's canonical rows of a KV head, of tokens from `token` on.
void Store(const CacheImpl& c, const CacheLayer& layer, Tensor tensor, std::size_t head,
           std::size_t token, std::size_t count, const std::uint8_t* rows, const float* scales) {
  const CompiledCodec& codec = layer.heads(tensor)[head];
  const auto store = tensor == Tensor::kK ? c.kernels->tiles.store_k : c.kernels->tiles.store_v;
  store(layer.formats[head], layer.blocks_of(head), token, count, rows, codec.row_bytes(),
        codec.stores_scales() ? scales : nullptr);
}

// Tokens [first, first + count) of x, one head; stored from `token` on. Returns the clamped values.
std::uint64_t AppendTokens(const CacheImpl& c, const CacheLayer& layer, Tensor tensor,
                           std::size_t head, const RowsView& x, std::size_t first,
                           std::size_t count, std::size_t token) {
  Coded coded;
  std::uint64_t clamped = 0;
  for (std::size_t t = 0; t < count; t += kRowsAtATime) {
    const std::size_t n = std::min(kRowsAtATime, count - t);
    clamped += layer.heads(tensor)[head].Encode(internal::TokenRows(x, head, first + t, n),
                                                coded.rows, coded.scales);
    Store(c, layer, tensor, head, token + t, n, coded.rows, coded.scales);
  }
  return clamped;
}

// One token of x, all heads: those that are alike are encoded together.
std::uint64_t AppendToken(const CacheImpl& c, const CacheLayer& layer, Tensor tensor,
                          const RowsView& x, std::size_t token) {
  Coded coded;
  const CompiledHeads& heads = layer.heads(tensor);
  std::uint64_t clamped = 0;
  for (std::size_t h = 0; h < heads.size();) {
    const std::size_t n = std::min(heads.alike(h), kRowsAtATime), row_bytes = heads[h].row_bytes();
    clamped += heads[h].EncodeHeads(internal::HeadRows(x, 0, h, n), coded.rows, coded.scales);
    for (std::size_t i = 0; i < n; ++i, ++h) {
      Store(c, layer, tensor, h, token, 1, coded.rows + i * row_bytes, coded.scales + i);
    }
  }
  return clamped;
}

// All of K and V after the `held` tokens of a layer.
std::uint64_t AppendAll(const CacheImpl& c, const CacheLayer& layer, const RowsView& k,
                        const RowsView& v, std::size_t held) {
  if (k.tokens == 1) {
    return AppendToken(c, layer, Tensor::kK, k, held) + AppendToken(c, layer, Tensor::kV, v, held);
  }
  std::uint64_t clamped = 0;
  for (std::size_t h = 0; h < k.heads; ++h) {
    clamped += AppendTokens(c, layer, Tensor::kK, h, k, 0, k.tokens, held) +
               AppendTokens(c, layer, Tensor::kV, h, v, 0, k.tokens, held);
  }
  return clamped;
}

void Count(CacheImpl& c, std::uint64_t clamped) {
  if (clamped != 0) c.saturated.fetch_add(clamped, std::memory_order_relaxed);
}

// What prevents an append, for one that Fits() refuses.
Status Refusal(const CacheImpl& c, std::size_t layer, const RowsView& k, const RowsView& v) {
  const Geometry& g = c.plan.geometry;
  if (Status s = internal::CheckLayer(c, layer); !s.ok()) return s;
  if (Status s = internal::CheckRows(k, "K", g.kv_heads, g.head_dim); !s.ok()) return s;
  if (Status s = internal::CheckRows(v, "V", g.kv_heads, g.head_dim); !s.ok()) return s;
  if (k.tokens != v.tokens) {
    return {ErrorCode::kMismatch,
            fmt::format("V: expected {} tokens, as K has, found {}", k.tokens, v.tokens)};
  }
  return internal::CheckRoom(c, layer, k.tokens);
}

// A decode step has no time for five Status objects.
bool Fits(const CacheImpl& c, std::size_t layer, const RowsView& k, const RowsView& v) {
  const Geometry& g = c.plan.geometry;
  return layer < c.layers.size() && k.heads == g.kv_heads && v.heads == g.kv_heads &&
         k.head_dim == g.head_dim && v.head_dim == g.head_dim && k.tokens == v.tokens &&
         k.tokens <= c.capacity - c.layers[layer].tokens;
}

bool IsOnePart(const RowsView& k) { return k.tokens * k.heads * k.head_dim <= kOnePart; }

}  // namespace

struct AppendJob::Impl {
  CacheImpl* cache = nullptr;
  std::size_t layer = 0;
  RowsView k, v;
  std::size_t held = 0;  // tokens before
  std::size_t runs = 0;  // of blocks; a part is a (KV head, run), or all if there is one part
  std::size_t parts = 0;
  std::atomic<std::size_t> left{0};

  Status Start(CacheImpl& c, std::size_t at_layer, const RowsView& new_k, const RowsView& new_v);
  void RunPart(std::size_t part);
};

Status AppendJob::Impl::Start(CacheImpl& c, std::size_t at_layer, const RowsView& new_k,
                              const RowsView& new_v) {
  parts = 0;
  if (!Fits(c, at_layer, new_k, new_v)) return Refusal(c, at_layer, new_k, new_v);
  cache = &c;
  layer = at_layer;
  k = new_k;
  v = new_v;
  held = c.layers[layer].tokens;
  if (k.tokens == 0) return {};
  runs = (held + k.tokens - 1) / kBlockTokens - held / kBlockTokens + 1;
  parts = IsOnePart(k) ? 1 : runs * k.heads;
  left.store(parts, std::memory_order_relaxed);
  return {};
}

void AppendJob::Impl::RunPart(std::size_t part) {
  CacheLayer& at = cache->layers[layer];
  if (parts == 1) {
    Count(*cache, AppendAll(*cache, at, k, v, held));
  } else {
    const std::size_t head = part / runs, block = held / kBlockTokens + part % runs;
    const std::size_t begin = std::max(held, block * kBlockTokens);
    const std::size_t end = std::min(held + k.tokens, (block + 1) * kBlockTokens);
    for (const Tensor t : {Tensor::kK, Tensor::kV}) {
      const RowsView& x = t == Tensor::kK ? k : v;
      Count(*cache, AppendTokens(*cache, at, t, head, x, begin - held, end - begin, begin));
    }
  }
  if (left.fetch_sub(1, std::memory_order_acq_rel) == 1) at.tokens = held + k.tokens;
}

AppendJob::AppendJob() : impl_(std::make_unique<Impl>()) {}
AppendJob::AppendJob(AppendJob&&) noexcept = default;
AppendJob& AppendJob::operator=(AppendJob&&) noexcept = default;
AppendJob::~AppendJob() = default;

Status AppendJob::Start(Cache& cache, std::size_t layer, const RowsView& k, const RowsView& v) {
  return impl_->Start(*cache.impl_, layer, k, v);
}
std::size_t AppendJob::parts() const { return impl_->parts; }
void AppendJob::RunPart(std::size_t part) { impl_->RunPart(part); }

Status Cache::Append(std::size_t layer, const RowsView& k, const RowsView& v, int num_threads) {
  if (num_threads < 0) return internal::CheckThreads(num_threads);
  if (IsOnePart(k)) {  // a decode step: without the job
    if (!Fits(*impl_, layer, k, v)) return Refusal(*impl_, layer, k, v);
    CacheLayer& at = impl_->layers[layer];
    Count(*impl_, AppendAll(*impl_, at, k, v, at.tokens));
    at.tokens += k.tokens;
    return {};
  }
  thread_local AppendJob own_job;
  AppendJob& job = own_job;  // this thread's, for all threads of the loop
  if (Status s = job.Start(*this, layer, k, v); !s.ok()) return s;
  const int threads = internal::ThreadsFor(num_threads, job.parts());
  internal::RunParts(job.parts(), threads, 1, [&](std::size_t p) { job.RunPart(p); });
  return {};
}

}  // namespace kvmix
