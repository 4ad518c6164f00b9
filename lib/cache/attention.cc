// Splits attention into parts (KV head x queries x span of tokens), runs a part through the
// kernels, and merges spans.
#include "kvmix/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include <fmt/format.h>

#include "lib/cache/cache_impl.h"
#include "lib/cache/parallel.h"
#include "lib/files/machine.h"

namespace kvmix {
namespace {

using internal::CacheImpl;
using internal::CacheLayer;
using kernels::kBlockTokens;

// A part has at most about this many rows: its q, weights and output stay in L2 beside a block of K
// and V.
constexpr std::size_t kRowsPerPart = 64;
// Where KV heads and queries alone give fewer parts than this, the context is cut into spans as
// well, so that one KV head keeps many threads busy; but no shorter than kShortestSpan tokens, or
// merging would cost more than a few percent. It depends on the shape alone, never on the number of
// threads, and so does the result.
constexpr std::size_t kPartsWanted = 32;
constexpr std::size_t kShortestSpan = 1024;

constexpr float kLn2 = 0.6931471805599453f;

std::size_t CeilDiv(std::size_t a, std::size_t b) { return a / b + (a % b != 0); }
std::size_t RoundUp(std::size_t n, std::size_t to) { return CeilDiv(n, to) * to; }

std::size_t L2Bytes() {
  static const std::size_t bytes = internal::Caches().l2;
  return bytes;
}

// Grows, never shrinks; contents are not kept.
class Scratch {
 public:
  std::uint8_t* Get(std::size_t bytes) {
    if (bytes + 64 > memory_.size()) memory_.resize(bytes + 64);
    return memory_.data() + (64 - reinterpret_cast<std::uintptr_t>(memory_.data()) % 64);
  }

 private:
  std::vector<std::uint8_t> memory_;
};

// What one span yields for a part's rows; see kernels::AttendTask.
struct Partial {
  float* out;  // [rows, padded]
  float* max;
  float* sum;
};

}  // namespace

struct AttendJob::Impl {
  const CacheImpl* cache = nullptr;
  const CacheLayer* layer = nullptr;
  RowsView q;
  float* out = nullptr;
  AttendOptions options;

  std::size_t queries_per_part = 1;
  std::size_t query_parts = 0;
  std::size_t span = 0;           // tokens
  std::size_t spans = 1;          // of each (KV head, query part)
  std::size_t padded = 0;         // floats of an output row
  bool from_memory = false;       // rather than from L2
  std::size_t partial_bytes = 0;  // of one part
  Scratch partials;               // [parts], only if spans > 1
  std::uint8_t* partial_memory = nullptr;
  std::vector<std::atomic<std::uint32_t>> done;  // spans done, [kv_heads][query_parts]

  const Geometry& geometry() const { return cache->plan.geometry; }
  std::size_t parts() const { return geometry().kv_heads * query_parts * spans; }

  Status Start(const CacheImpl& c, std::size_t at_layer, const RowsView& queries, float* to,
               const AttendOptions& o);
  void RunPart(std::size_t part);
  const std::uint8_t* BlockAfter(std::size_t kv_head, std::size_t begin, std::size_t end) const;
  Partial PartialAt(std::uint8_t* memory, std::size_t rows) const;
  void GatherQueries(std::size_t kv_head, std::size_t first, std::size_t count, float* rows) const;
  void Merge(std::size_t kv_head, std::size_t first_query, std::size_t rows, const float* bias,
             std::uint8_t* memory) const;
};

Status AttendJob::Impl::Start(const CacheImpl& c, std::size_t at_layer, const RowsView& queries,
                              float* to, const AttendOptions& o) {
  cache = &c;
  query_parts = 0;
  const Geometry& g = geometry();
  if (Status s = internal::CheckLayer(c, at_layer); !s.ok()) return s;
  if (Status s = internal::CheckRows(queries, "Q", g.query_heads, g.head_dim); !s.ok()) return s;
  if (!std::isfinite(o.attention_scale) || o.attention_scale < 0.0f || !std::isfinite(o.soft_cap) ||
      o.soft_cap < 0.0f) {
    return {ErrorCode::kInvalidArgument,
            fmt::format("attention_scale {}, soft_cap {}: expected finite numbers, none negative",
                        o.attention_scale, o.soft_cap)};
  }
  layer = &c.layers[at_layer];
  q = queries;
  out = to;
  options = o;
  if (options.attention_scale == 0.0f) {
    options.attention_scale = 1.0f / std::sqrt(static_cast<float>(g.head_dim));
  }

  queries_per_part = std::max<std::size_t>(1, kRowsPerPart / g.group());
  query_parts = CeilDiv(q.tokens, queries_per_part);
  queries_per_part = query_parts != 0 ? CeilDiv(q.tokens, query_parts) : 1;
  // The most tokens that a part's queries see, with room for the rounding of its start to a block.
  std::size_t seen = layer->tokens;
  if (options.sliding_window != 0 && options.sliding_window < seen) {
    seen = std::min(seen, options.sliding_window + queries_per_part + kBlockTokens);
  }
  span = std::max(kShortestSpan,
                  RoundUp(CeilDiv(seen * g.kv_heads * query_parts, kPartsWanted), kBlockTokens));
  spans = std::max<std::size_t>(1, CeilDiv(seen, span));
  std::size_t bytes = 0;
  for (const kernels::BlockFormat& f : layer->formats) {
    bytes += CeilDiv(seen, kBlockTokens) * f.block_bytes;
  }
  from_memory = options.residence == Residence::kAuto ? query_parts <= 1 || bytes > L2Bytes()
                                                      : options.residence == Residence::kMemory;
  padded = cache->kernels->attend.padded_dim(layer->formats[0]);
  const std::size_t rows = queries_per_part * g.group();
  partial_bytes = RoundUp(rows * (padded + 2) * sizeof(float), 64);
  if (spans > 1) {
    partial_memory = partials.Get(parts() * partial_bytes);
    const std::size_t groups = g.kv_heads * query_parts;
    if (done.size() < groups) done = std::vector<std::atomic<std::uint32_t>>(groups);
    for (auto& d : done) d.store(0, std::memory_order_relaxed);
  }
  return {};
}

// What is read after a KV head's tokens [begin, end), end being the end of a span: the head's next
// block, or the next head's first.
const std::uint8_t* AttendJob::Impl::BlockAfter(std::size_t kv_head, std::size_t begin,
                                                std::size_t end) const {
  if (end < layer->tokens) return layer->blocks_of(kv_head)[end / kBlockTokens];
  if (layer->tokens == 0 || kv_head + 1 == layer->formats.size()) return nullptr;
  return layer->blocks_of(kv_head + 1)[begin / kBlockTokens];
}

Partial AttendJob::Impl::PartialAt(std::uint8_t* memory, std::size_t rows) const {
  float* floats = reinterpret_cast<float*>(memory);
  return {floats, floats + rows * padded, floats + rows * (padded + 1)};
}

// f32 rows [count * group, head_dim] of the query heads that share a KV head.
void AttendJob::Impl::GatherQueries(std::size_t kv_head, std::size_t first, std::size_t count,
                                    float* rows) const {
  const std::size_t group = geometry().group(), dim = geometry().head_dim;
  for (std::size_t i = 0; i < count; ++i) {
    const kernels::RowsIn heads = internal::HeadRows(q, first + i, kv_head * group, group);
    cache->kernels->encode.to_float(heads, rows + i * group * dim, dim);
  }
}

void AttendJob::Impl::RunPart(std::size_t part) {
  const Geometry& g = geometry();
  const std::size_t group_index = part / spans, span_index = part % spans;
  const std::size_t kv_head = group_index / query_parts;
  const std::size_t first_query = group_index % query_parts * queries_per_part;
  const std::size_t count = std::min(queries_per_part, q.tokens - std::min(q.tokens, first_query));
  const std::size_t rows = count * g.group();
  const kernels::BlockFormat& format = layer->formats[kv_head];

  thread_local Scratch scratch;
  const std::size_t q_bytes = RoundUp(rows * g.head_dim * sizeof(float), 64),
                    operand_bytes = cache->kernels->attend.operand_bytes(format, rows);
  const std::size_t bias_bytes = RoundUp(rows * sizeof(float), 64);
  std::uint8_t* memory = scratch.Get(q_bytes + operand_bytes + bias_bytes + partial_bytes);
  float* queries = reinterpret_cast<float*>(memory);
  float* bias = reinterpret_cast<float*>(memory + q_bytes + operand_bytes);
  std::uint8_t* partial_at = spans > 1 ? partial_memory + part * partial_bytes
                                       : memory + q_bytes + operand_bytes + bias_bytes;
  const Partial partial = PartialAt(partial_at, rows);

  // Only a soft cap and sinks see what the codes of a centred K leave out of the scores.
  const bool biased = options.soft_cap != 0.0f || options.sinks != nullptr;
  GatherQueries(kv_head, first_query, count, queries);
  layer->k[kv_head].PrepareQueries(queries, rows, options.attention_scale, biased ? bias : nullptr);

  const std::int64_t tokens = static_cast<std::int64_t>(layer->tokens);
  const std::int64_t first_end =
      tokens - static_cast<std::int64_t>(q.tokens) + 1 + static_cast<std::int64_t>(first_query);
  const std::int64_t last_end = first_end + static_cast<std::int64_t>(count) - 1;
  const std::int64_t window =
      static_cast<std::int64_t>(std::min(options.sliding_window, layer->tokens));
  const std::size_t begin =
      window != 0 ? static_cast<std::size_t>(std::max<std::int64_t>(0, first_end - window)) /
                        kBlockTokens * kBlockTokens
                  : 0;
  const std::size_t end = static_cast<std::size_t>(std::max<std::int64_t>(0, last_end));

  kernels::AttendTask task{};
  task.format = &format;
  task.blocks = layer->blocks_of(kv_head);
  task.first_token = begin + span_index * span;
  task.last_token = std::min(end, task.first_token + span);
  task.q = queries;
  task.rows = rows;
  task.group = g.group();
  task.first_end = first_end;
  task.window = static_cast<std::size_t>(window);
  task.scale = options.attention_scale;
  task.soft_cap = options.soft_cap;
  task.bias = biased ? bias : nullptr;
  task.stream = from_memory;
  task.after = from_memory ? BlockAfter(kv_head, begin, task.last_token) : nullptr;
  task.operand = memory + q_bytes;
  task.out = partial.out;
  task.max = partial.max;
  task.sum = partial.sum;
  cache->kernels->attend.attend(task);

  // Whoever finishes the last span merges all, always in the same order.
  if (spans == 1) {
    Merge(kv_head, first_query, rows, task.bias, partial_at);
  } else if (done[group_index].fetch_add(1, std::memory_order_acq_rel) + 1 == spans) {
    Merge(kv_head, first_query, rows, task.bias,
          partial_memory + group_index * spans * partial_bytes);
  }
}

// out = sum over spans of 2^(max_s - max) out_s / (sum over spans of 2^(max_s - max) sum_s + sink),
// and what V's codec restores.
void AttendJob::Impl::Merge(std::size_t kv_head, std::size_t first_query, std::size_t rows,
                            const float* bias, std::uint8_t* memory) const {
  const Geometry& g = geometry();
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const auto partial = [&](std::size_t s) { return PartialAt(memory + s * partial_bytes, rows); };
  for (std::size_t r = 0; r < rows; ++r) {
    const std::size_t query_head = kv_head * g.group() + r % g.group();
    float* to = out + ((first_query + r / g.group()) * g.query_heads + query_head) * g.head_dim;
    float max = -kInf;
    bool nan = false;
    for (std::size_t s = 0; s < spans; ++s) {
      max = std::max(max, partial(s).max[r]);
      nan |= std::isnan(partial(s).max[r]);
    }
    if (nan || max == -kInf) {
      std::fill(to, to + g.head_dim, nan ? std::numeric_limits<float>::quiet_NaN() : 0.0f);
      continue;
    }
    // The sink's logit in units of log2, beside scores that lack `bias` (a soft cap has put it
    // back). It stays finite: a sink that takes all leaves 0, not NaN.
    float sink = -kInf;
    if (options.sinks != nullptr) {
      sink = (options.sinks[query_head] - (options.soft_cap != 0.0f ? 0.0f : bias[r])) / kLn2;
    }
    sink = std::min(sink, std::numeric_limits<float>::max());
    max = std::max(max, sink);
    const auto weight = [&](std::size_t s) { return std::exp2(partial(s).max[r] - max); };
    float sum = 0.0f;
    for (std::size_t s = 0; s < spans; ++s) sum += weight(s) * partial(s).sum[r];
    const float total = sum + std::exp2(sink - max);
    std::fill(to, to + g.head_dim, 0.0f);
    for (std::size_t s = 0; s < spans; ++s) {
      const float share = weight(s) / total;
      const float* from = partial(s).out + r * padded;
      for (std::size_t c = 0; c < g.head_dim; ++c) to[c] += share * from[c];
    }
    layer->v[kv_head].RestoreOutput(to, sum / total);
  }
}

AttendJob::AttendJob() : impl_(std::make_unique<Impl>()) {}
AttendJob::AttendJob(AttendJob&&) noexcept = default;
AttendJob& AttendJob::operator=(AttendJob&&) noexcept = default;
AttendJob::~AttendJob() = default;

Status AttendJob::Start(const Cache& cache, std::size_t layer, const RowsView& q, float* out,
                        const AttendOptions& options) {
  return impl_->Start(*cache.impl_, layer, q, out, options);
}
std::size_t AttendJob::parts() const { return impl_->cache != nullptr ? impl_->parts() : 0; }
void AttendJob::RunPart(std::size_t part) { impl_->RunPart(part); }

Status Attend(const Cache& cache, std::size_t layer, const RowsView& q, float* out,
              const AttendOptions& options, int num_threads) {
  if (Status s = internal::CheckThreads(num_threads); !s.ok()) return s;
  thread_local AttendJob own_job;
  AttendJob& job = own_job;  // this thread's, for all threads of the loop
  if (Status s = job.Start(cache, layer, q, out, options); !s.ok()) return s;
  const std::size_t parts = job.parts();
  const int threads = internal::ThreadsFor(num_threads, parts);
  // Decode: one run of neighbouring parts each, so that what is asked for past a part's end is not
  // wasted. Prefill: later queries cost more.
  const std::size_t chunk = q.tokens == 1 ? CeilDiv(parts, static_cast<std::size_t>(threads)) : 1;
  internal::RunParts(parts, threads, chunk, [&](std::size_t p) { job.RunPart(p); });
  return {};
}

}  // namespace kvmix
