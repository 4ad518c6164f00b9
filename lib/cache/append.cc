// Rows -> canonical rows -> tiles, in parts: one KV head's K and V over a run of tokens each.
#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "lib/cache/cache_impl.h"
#include "lib/cache/own.h"

namespace kvmix::internal {

using kernels::kBlockTokens;

namespace {

// Rows that are encoded at a time, on the stack.
constexpr std::size_t kRowsAtATime = 16;
// Numbers (of K, and about as many of V) up to which a request is one part, and a call stays on its
// thread: less work than to wake another thread.
constexpr std::size_t kOnePart = 32768;
// Tokens of encoded stretches whose exact rows are kept through appends that no attention follows.
constexpr std::size_t kMostKept = 2048;

// Canonical rows on the stack.
struct Coded {
  alignas(64) std::uint8_t rows[kRowsAtATime * kMaxHeadDim * sizeof(Half)];
  float scales[kRowsAtATime];
};

// The layer of a cache that rows go into.
struct To {
  CacheImpl* cache;
  std::size_t layer;

  const PoolLayer& shape() const { return cache->pool->layers[layer]; }
  CacheLayer& held() const { return cache->layers[layer]; }
};

// Tokens [first, first + count) of x, one head, into cells from `cell` on. Returns the clamped
// values.
std::uint64_t StoreTokens(const To& to, Tensor tensor, std::size_t head, const kvmix_rows& x,
                          std::size_t first, std::size_t count, std::size_t cell) {
  if (count == 0) return 0;  // x may have no data
  KeepExact(*to.cache, to.layer, tensor, head, cell, TokenRows(x, head, first, count));
  if (to.shape().stretch != 0) {
    return StoreExact(*to.cache, to.layer, tensor, head, x, first, count, cell);
  }
  Coded coded;
  std::uint64_t clamped = 0;
  for (std::size_t t = 0; t < count; t += kRowsAtATime) {
    const std::size_t n = std::min(kRowsAtATime, count - t);
    clamped += to.shape().heads(tensor)[head].Encode(TokenRows(x, head, first + t, n), coded.rows,
                                                     coded.scales);
    StoreRows(*to.cache, to.layer, tensor, head, cell + t, n, coded.rows, coded.scales);
  }
  return clamped;
}

// One token of x, all heads: those that are alike are encoded together.
std::uint64_t StoreToken(const To& to, Tensor tensor, const kvmix_rows& x, std::size_t token,
                         std::size_t cell) {
  Coded coded;
  const CompiledHeads& heads = to.shape().heads(tensor);
  std::uint64_t clamped = 0;
  for (std::size_t h = 0; h < heads.size();) {
    const std::size_t n = std::min(heads.alike(h), kRowsAtATime), row_bytes = heads[h].row_bytes();
    clamped += heads[h].EncodeHeads(HeadRows(x, token, h, n), coded.rows, coded.scales);
    for (std::size_t i = 0; i < n; ++i, ++h) {
      StoreRows(*to.cache, to.layer, tensor, h, cell, 1, coded.rows + i * row_bytes,
                coded.scales + i);
    }
  }
  if (cell >= to.cache->pool->plan.exact_first) return clamped;
  for (std::size_t h = 0; h < heads.size(); ++h) {
    KeepExact(*to.cache, to.layer, tensor, h, cell, TokenRows(x, h, token, 1));
  }
  return clamped;
}

// `count` tokens of K and V from `first` on into cells from `cell` on.
std::uint64_t StoreRun(const To& to, const kvmix_rows& k, const kvmix_rows& v, std::size_t first,
                       std::size_t count, std::size_t cell) {
  if (count == 1 && to.shape().stretch == 0) {
    return StoreToken(to, KVMIX_K, k, first, cell) + StoreToken(to, KVMIX_V, v, first, cell);
  }
  std::uint64_t clamped = 0;
  for (std::size_t h = 0; h < k.heads; ++h) {
    clamped += StoreTokens(to, KVMIX_K, h, k, first, count, cell) +
               StoreTokens(to, KVMIX_V, h, v, first, count, cell);
  }
  return clamped;
}

void Count(CacheImpl& c, std::uint64_t clamped) {
  if (clamped != 0) c.saturated.fetch_add(clamped, std::memory_order_relaxed);
}

// The rows are those of a layer of the cache that can be written.
Status CheckFit(const CacheImpl& c, std::size_t layer, const kvmix_rows& k, const kvmix_rows& v) {
  if (layer < c.layers.size()) {  // a decode step has no time for more than one Status
    const LayerShape& shape = c.pool->layers[layer].shape;
    if (shape.owns_kv() && k.tokens == v.tokens && ArePlain(k, shape.kv_heads, shape.k_dim) &&
        ArePlain(v, shape.kv_heads, shape.v_dim)) {
      return {};
    }
  }
  if (Status s = CheckOwnLayer(c, layer); !s.ok()) return s;
  const LayerShape& shape = c.pool->layers[layer].shape;
  if (Status s = CheckRows(k, "K", shape.kv_heads, shape.k_dim); !s.ok()) return s;
  if (Status s = CheckRows(v, "V", shape.kv_heads, shape.v_dim); !s.ok()) return s;
  if (k.tokens == v.tokens) return {};
  return {ErrorCode::kMismatch,
          fmt::format("V: expected {} tokens, as K has, found {}", k.tokens, v.tokens)};
}

void Release(CacheImpl& c, std::size_t layer, std::size_t most) {
  if (c.pool->layers[layer].stretch != 0) ReleaseStretches(c, layer, most);
}

// Makes sure that cells [first, first + count) have pages of their own, for codes and exact rows.
Status MakeReady(CacheImpl& c, std::size_t layer, std::size_t first, std::size_t count) {
  if (!IsWritable(c, layer, first, count)) {
    if (Status s = MakeWritable(c, layer, first, count); !s.ok()) return s;
  }
  if (c.pool->layers[layer].stretch == 0) return {};
  return OpenStretches(c, layer, first, count);
}

// Checks an append, and makes the cells after the layer's tokens ready for it.
Status Prepare(CacheImpl& c, std::size_t layer, const kvmix_rows& k, const kvmix_rows& v) {
  if (Status s = CheckFit(c, layer, k, v); !s.ok()) return s;
  const std::size_t held = c.layers[layer].tokens;
  if (k.tokens > c.capacity - held) return CheckRoom(c, layer, k.tokens);
  ForgetPast(c, layer, held);
  Release(c, layer, kMostKept);
  const Status s = MakeReady(c, layer, held, k.tokens);
  if (!s.ok()) DropUnused(c, layer);
  return s;
}

// Before rows are written.
void Mark(const To& to, std::size_t cell, std::size_t count) {
  if (to.shape().stretch != 0) MarkStretches(*to.cache, to.layer, cell, count);
}

Status CheckNamedOnce(std::span<const AppendPart> requests) {
  if (requests.size() < 2) return {};
  std::vector<std::pair<const CacheImpl*, std::size_t>> named;
  for (const AppendPart& r : requests) named.emplace_back(r.cache, named.size());
  std::ranges::sort(named);
  const auto same = [](const auto& a, const auto& b) { return a.first == b.first; };
  const auto twice = std::ranges::adjacent_find(named, same);
  if (twice == named.end()) return {};
  return {ErrorCode::kInvalidArgument,
          fmt::format("request {} of {}: expected another cache than that of request {}",
                      std::next(twice)->second, requests.size(), twice->second)};
}

// Appends that Prepare found room for, cut into parts.
class AppendJob {
 public:
  void Clear();
  void Add(const To& to, const kvmix_rows& k, const kvmix_rows& v);
  void Run(const Runner& runner);  // all of it

 private:
  struct Request {
    To to;
    kvmix_rows k, v;
    std::size_t held;   // tokens before
    std::size_t runs;   // of blocks; a part is a (KV head, run), or everything: 0
    std::size_t parts;  // of the requests up to this one
  };
  void RunPart(std::size_t part) const;

  std::vector<Request> requests_;
  std::size_t numbers_ = 0;  // of K
};

std::size_t NumbersOf(const kvmix_rows& x) { return x.tokens * x.heads * x.head_dim; }

void AppendJob::Clear() {
  requests_.clear();
  numbers_ = 0;
}

void AppendJob::Add(const To& to, const kvmix_rows& k, const kvmix_rows& v) {
  if (k.tokens == 0) return;
  const std::size_t held = to.held().tokens, numbers = NumbersOf(k);
  const std::size_t runs =
      numbers <= kOnePart ? 0 : (held + k.tokens - 1) / kBlockTokens - held / kBlockTokens + 1;
  const std::size_t before = requests_.empty() ? 0 : requests_.back().parts;
  requests_.push_back({to, k, v, held, runs, before + std::max<std::size_t>(1, runs * k.heads)});
  numbers_ += numbers;
}

void AppendJob::RunPart(std::size_t part) const {
  const auto r = std::ranges::upper_bound(requests_, part, {}, &Request::parts);
  CacheImpl& cache = *r->to.cache;
  if (r->runs == 0) return Count(cache, StoreRun(r->to, r->k, r->v, 0, r->k.tokens, r->held));
  const std::size_t own = r->k.heads * r->runs - (r->parts - part);
  const std::size_t head = own / r->runs, block = r->held / kBlockTokens + own % r->runs;
  const std::size_t begin = std::max(r->held, block * kBlockTokens);
  const std::size_t end = std::min(r->held + r->k.tokens, (block + 1) * kBlockTokens);
  for (const Tensor t : {KVMIX_K, KVMIX_V}) {
    Count(cache, StoreTokens(r->to, t, head, t == KVMIX_K ? r->k : r->v, begin - r->held,
                             end - begin, begin));
  }
}

void AppendJob::Run(const Runner& runner) {
  const std::size_t parts = requests_.empty() ? 0 : requests_.back().parts;
  for (const Request& r : requests_) Mark(r.to, r.held, r.k.tokens);
  (numbers_ <= kOnePart ? Runner::Here() : runner).Run(parts, [&](std::size_t p) { RunPart(p); });
  for (const Request& r : requests_) r.to.held().tokens += r.k.tokens;
}

}  // namespace

Status CacheImpl::Append(std::size_t layer, const kvmix_rows& k, const kvmix_rows& v,
                         const Runner& runner) {
  if (Status s = Prepare(*this, layer, k, v); !s.ok()) return s;
  const To to{this, layer};
  if (NumbersOf(k) <= kOnePart) {  // a decode step: without the job
    Mark(to, to.held().tokens, k.tokens);
    Count(*to.cache, StoreRun(to, k, v, 0, k.tokens, to.held().tokens));
    to.held().tokens += k.tokens;
    return {};
  }
  const Own<AppendJob> job;
  job->Clear();
  job->Add(to, k, v);
  job->Run(runner);
  return {};
}

Status AppendAll(std::span<const AppendPart> requests, std::size_t layer, const Runner& runner) {
  if (Status s = CheckNamedOnce(requests); !s.ok()) return s;
  const Own<AppendJob> job;
  job->Clear();
  for (std::size_t i = 0; i < requests.size(); ++i) {
    const AppendPart& r = requests[i];
    if (Status s = Prepare(*r.cache, layer, r.k, r.v); !s.ok()) {
      // Pages that the requests before this one got ready go back.
      for (const AppendPart& ready : requests.first(i)) {
        DropUnused(*ready.cache, layer);
      }
      return {s.code(), fmt::format("request {} of {}: {}", i, requests.size(), s.message())};
    }
    job->Add({r.cache, layer}, r.k, r.v);
  }
  job->Run(runner);
  return {};
}

Status CacheImpl::Store(std::size_t layer, std::span<const std::int64_t> cells, const kvmix_rows& k,
                        const kvmix_rows& v) {
  CacheImpl& c = *this;
  if (Status s = CheckFit(c, layer, k, v); !s.ok()) return s;
  if (cells.size() != k.tokens) {
    return {ErrorCode::kMismatch,
            fmt::format("cells: expected {}, one for a token, found {}", k.tokens, cells.size())};
  }
  CacheLayer& at = c.layers[layer];
  const std::int64_t first = static_cast<std::int64_t>(at.forgotten);
  for (const std::int64_t cell : cells) {
    if (cell >= first && static_cast<std::size_t>(cell) < c.capacity) continue;
    return {ErrorCode::kInvalidArgument,
            fmt::format("layer {}: expected cells from {} to below the capacity of {}, found {}",
                        layer, first, c.capacity, cell)};
  }
  // Runs of neighbouring cells.
  const auto for_runs = [&](const auto& f) {
    for (std::size_t i = 0, n; i < cells.size(); i += n) {
      for (n = 1;
           i + n < cells.size() && cells[i + n] == cells[i] + static_cast<std::int64_t>(n);) {
        ++n;
      }
      if (Status s = f(i, n, static_cast<std::size_t>(cells[i])); !s.ok()) return s;
    }
    return Status();
  };
  Release(c, layer, SIZE_MAX);
  Status s = for_runs(
      [&](std::size_t, std::size_t n, std::size_t cell) { return MakeReady(c, layer, cell, n); });
  if (!s.ok()) {
    DropUnused(c, layer);
    return s;
  }
  return for_runs([&](std::size_t i, std::size_t n, std::size_t cell) {
    // Lines of a cell far from the last one are in no cache: they come while rows are encoded.
    for (std::size_t h = 0; n == 1 && h < k.heads; ++h) {
      c.pool->kernels->tiles.prefetch(c.pool->layers[layer].formats[h], at.blocks_of(h), cell);
    }
    const To to{this, layer};
    Mark(to, cell, n);
    Count(c, StoreRun(to, k, v, i, n, cell));
    at.tokens = std::max(at.tokens, cell + n);
    return Status();
  });
}

}  // namespace kvmix::internal
