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

#include "lib/cache_impl.h"
#include "lib/machine.h"

namespace kvmix {
namespace {

using internal::CacheImpl;
using internal::HeadStream;
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
  std::size_t layer = 0;
  const Half* q_half = nullptr;
  const float* q_float = nullptr;
  std::size_t queries = 0;
  float* out = nullptr;
  AttendOptions options;

  std::size_t tokens = 0;
  std::size_t queries_per_part = 1;
  std::size_t query_parts = 0;
  std::size_t span = 0;   // tokens
  std::size_t spans = 1;  // of each (KV head, query part)
  std::size_t padded = 0;
  bool streams = false;           // L2 does not hold what this call reads
  std::size_t partial_bytes = 0;  // of one part
  Scratch partials;               // [parts], only if spans > 1
  std::uint8_t* partial_memory = nullptr;
  std::vector<std::atomic<std::uint32_t>> done;  // spans done, [kv_heads][query_parts]

  const Geometry& geometry() const { return cache->plan.geometry; }
  std::size_t parts() const { return geometry().kv_heads * query_parts * spans; }

  Status Start(const Cache& c, std::size_t at_layer, std::size_t n, float* to,
               const AttendOptions& o);
  void RunPart(std::size_t part);
  Partial PartialAt(std::uint8_t* memory, std::size_t rows) const;
  void GatherQueries(std::size_t kv_head, std::size_t first, std::size_t count, float* rows) const;
  void Merge(std::size_t kv_head, std::size_t first_query, std::size_t rows, const float* bias,
             std::uint8_t* memory) const;
};

Status AttendJob::Impl::Start(const Cache& c, std::size_t at_layer, std::size_t n, float* to,
                              const AttendOptions& o) {
  cache = &c.impl();
  query_parts = 0;
  const Geometry& g = geometry();
  if (at_layer >= g.layers)
    return {ErrorCode::kInvalidArgument,
            fmt::format("layer {} of a cache of {} layers", at_layer, g.layers)};
  if (!std::isfinite(o.attention_scale) || o.attention_scale < 0.0f || !std::isfinite(o.soft_cap) ||
      o.soft_cap < 0.0f || o.num_threads < 0) {
    return {ErrorCode::kInvalidArgument, fmt::format("attention_scale {}, soft_cap {}, num_threads "
                                                     "{}: finite numbers, none negative, expected",
                                                     o.attention_scale, o.soft_cap, o.num_threads)};
  }
  layer = at_layer;
  queries = n;
  out = to;
  options = o;
  if (options.attention_scale == 0.0f)
    options.attention_scale = 1.0f / std::sqrt(static_cast<float>(g.head_dim));
  tokens = cache->tokens[layer];

  queries_per_part = std::max<std::size_t>(1, kRowsPerPart / g.group());
  query_parts = CeilDiv(queries, queries_per_part);
  queries_per_part = query_parts != 0 ? CeilDiv(queries, query_parts) : 1;
  // The most tokens that a part's queries see, with room for the rounding of its start to a block.
  std::size_t seen = tokens;
  if (options.sliding_window != 0 && options.sliding_window < tokens)
    seen = std::min(tokens, options.sliding_window + queries_per_part + kBlockTokens);
  span = std::max(kShortestSpan,
                  RoundUp(CeilDiv(seen * g.kv_heads * query_parts, kPartsWanted), kBlockTokens));
  spans = std::max<std::size_t>(1, CeilDiv(seen, span));
  std::size_t bytes = 0;
  for (std::size_t h = 0; h < g.kv_heads; ++h)
    bytes += CeilDiv(seen, kBlockTokens) * cache->head(layer, h).format.block_bytes;
  // Before a decode step comes back to this layer, the others have passed through the caches; many
  // queries read a layer many times.
  streams = bytes * (query_parts > 1 ? 1 : g.layers) > L2Bytes();
  padded = cache->kernels.attend.padded_dim(cache->head(layer, 0).format);
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

Partial AttendJob::Impl::PartialAt(std::uint8_t* memory, std::size_t rows) const {
  float* floats = reinterpret_cast<float*>(memory);
  return {floats, floats + rows * padded, floats + rows * (padded + 1)};
}

// f32 rows [count * group, head_dim] of the query heads that share a KV head.
void AttendJob::Impl::GatherQueries(std::size_t kv_head, std::size_t first, std::size_t count,
                                    float* rows) const {
  const Geometry& g = geometry();
  const std::size_t floats = g.group() * g.head_dim;
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t at = ((first + i) * g.query_heads + kv_head * g.group()) * g.head_dim;
    if (q_half != nullptr) {
      cache->kernels.quantize.to_float(q_half + at, floats, rows + i * floats);
    } else {
      std::memcpy(rows + i * floats, q_float + at, floats * sizeof(float));
    }
  }
}

void AttendJob::Impl::RunPart(std::size_t part) {
  const Geometry& g = geometry();
  const std::size_t group_index = part / spans, span_index = part % spans;
  const std::size_t kv_head = group_index / query_parts;
  const std::size_t first_query = group_index % query_parts * queries_per_part;
  const std::size_t count = std::min(queries_per_part, queries - std::min(queries, first_query));
  const std::size_t rows = count * g.group();
  const HeadStream& head = cache->head(layer, kv_head);
  const HeadCodec& k_codec = cache->plan.codec(layer, kv_head, Tensor::kK);

  thread_local Scratch scratch;
  const std::size_t q_bytes = RoundUp(rows * g.head_dim * sizeof(float), 64),
                    operand_bytes = cache->kernels.attend.operand_bytes(head.format, rows);
  const std::size_t bias_bytes = RoundUp(rows * sizeof(float), 64);
  std::uint8_t* memory = scratch.Get(q_bytes + operand_bytes + bias_bytes + partial_bytes);
  float* q = reinterpret_cast<float*>(memory);
  float* bias = reinterpret_cast<float*>(memory + q_bytes + operand_bytes);
  std::uint8_t* partial_at = spans > 1 ? partial_memory + part * partial_bytes
                                       : memory + q_bytes + operand_bytes + bias_bytes;
  const Partial partial = PartialAt(partial_at, rows);

  GatherQueries(kv_head, first_query, count, q);
  // Where K is centred, the scores lack scale * q . mean: the same number for all keys of a row, so
  // only a soft cap and sinks see it.
  const bool biased = k_codec.centred() && (options.soft_cap != 0.0f || options.sinks != nullptr);
  for (std::size_t r = 0; r < rows; ++r) {
    bias[r] = 0.0f;
    for (std::size_t i = 0; biased && i < g.head_dim; ++i)
      bias[r] += options.attention_scale * q[r * g.head_dim + i] * k_codec.mean[i];
  }

  const std::int64_t first_end = static_cast<std::int64_t>(tokens) -
                                 static_cast<std::int64_t>(queries) + 1 +
                                 static_cast<std::int64_t>(first_query);
  const std::int64_t last_end = first_end + static_cast<std::int64_t>(count) - 1;
  const std::int64_t window = static_cast<std::int64_t>(std::min(options.sliding_window, tokens));
  const std::size_t begin =
      window != 0 ? static_cast<std::size_t>(std::max<std::int64_t>(0, first_end - window)) /
                        kBlockTokens * kBlockTokens
                  : 0;
  const std::size_t end = static_cast<std::size_t>(std::max<std::int64_t>(0, last_end));

  kernels::AttendTask task{};
  task.format = &head.format;
  task.blocks = head.blocks;
  task.first_token = begin + span_index * span;
  task.last_token = std::min(end, task.first_token + span);
  task.q = q;
  task.rows = rows;
  task.group = g.group();
  task.first_end = first_end;
  task.window = static_cast<std::size_t>(window);
  task.scale = options.attention_scale;
  task.soft_cap = options.soft_cap;
  task.bias = bias;
  task.stream = streams;
  task.operand = memory + q_bytes;
  task.out = partial.out;
  task.max = partial.max;
  task.sum = partial.sum;
  cache->kernels.attend.attend(task);

  // Whoever finishes the last span merges all, always in the same order.
  if (spans == 1) {
    Merge(kv_head, first_query, rows, bias, partial_at);
  } else if (done[group_index].fetch_add(1, std::memory_order_acq_rel) + 1 == spans) {
    Merge(kv_head, first_query, rows, bias, partial_memory + group_index * spans * partial_bytes);
  }
}

// out = sum over spans of 2^(max_s - max) out_s / (sum over spans of 2^(max_s - max) sum_s + sink),
// + the mean of V.
void AttendJob::Impl::Merge(std::size_t kv_head, std::size_t first_query, std::size_t rows,
                            const float* bias, std::uint8_t* memory) const {
  const Geometry& g = geometry();
  const std::vector<float>& v_mean = cache->plan.codec(layer, kv_head, Tensor::kV).mean;
  const auto partial = [&](std::size_t s) { return PartialAt(memory + s * partial_bytes, rows); };
  for (std::size_t r = 0; r < rows; ++r) {
    const std::size_t query_head = kv_head * g.group() + r % g.group();
    float* to = out + ((first_query + r / g.group()) * g.query_heads + query_head) * g.head_dim;
    float max = -std::numeric_limits<float>::infinity();
    bool nan = false;
    for (std::size_t s = 0; s < spans; ++s) {
      max = std::max(max, partial(s).max[r]);
      nan |= std::isnan(partial(s).max[r]);
    }
    if (nan || max == -std::numeric_limits<float>::infinity()) {
      std::fill(to, to + g.head_dim, nan ? std::numeric_limits<float>::quiet_NaN() : 0.0f);
      continue;
    }
    // A sink's logit beside scores that lack `bias` (a soft cap has put it back already), in units
    // of log2, in which the largest floats overflow: they stay finite, so that a sink that takes
    // all leaves 0 rather than NaN.
    float sink = -std::numeric_limits<float>::infinity();
    if (options.sinks != nullptr)
      sink = (options.sinks[query_head] - (options.soft_cap != 0.0f ? 0.0f : bias[r])) / kLn2;
    sink = std::min(sink, std::numeric_limits<float>::max());
    max = std::max(max, sink);
    float sum = 0.0f;
    for (std::size_t s = 0; s < spans; ++s) {
      float& weight = partial(s).max[r];  // from here on
      weight = std::exp2(weight - max);
      sum += weight * partial(s).sum[r];
    }
    const float total = sum + std::exp2(sink - max);
    std::fill(to, to + g.head_dim, 0.0f);
    for (std::size_t s = 0; s < spans; ++s) {
      const float weight = partial(s).max[r] / total;
      const float* from = partial(s).out + r * padded;
      for (std::size_t c = 0; c < g.head_dim; ++c) to[c] += weight * from[c];
    }
    for (std::size_t c = 0; c < v_mean.size(); ++c) to[c] += sum / total * v_mean[c];
  }
}

AttendJob::AttendJob() : impl_(std::make_unique<Impl>()) {}
AttendJob::AttendJob(AttendJob&&) noexcept = default;
AttendJob& AttendJob::operator=(AttendJob&&) noexcept = default;
AttendJob::~AttendJob() = default;

Status AttendJob::Start(const Cache& cache, std::size_t layer, const Half* q, std::size_t queries,
                        float* out, const AttendOptions& options) {
  impl_->q_half = q;
  impl_->q_float = nullptr;
  return impl_->Start(cache, layer, queries, out, options);
}

Status AttendJob::Start(const Cache& cache, std::size_t layer, const float* q, std::size_t queries,
                        float* out, const AttendOptions& options) {
  impl_->q_half = nullptr;
  impl_->q_float = q;
  return impl_->Start(cache, layer, queries, out, options);
}

std::size_t AttendJob::parts() const { return impl_->cache != nullptr ? impl_->parts() : 0; }
void AttendJob::RunPart(std::size_t part) { impl_->RunPart(part); }

namespace {

template <typename T>
Status AttendWithOpenMP(const Cache& cache, std::size_t layer, const T* q, std::size_t queries,
                        float* out, const AttendOptions& options) {
  thread_local AttendJob job;
  if (Status s = job.Start(cache, layer, q, queries, out, options); !s.ok()) return s;
  AttendJob* const shared = &job;
  const int parts = static_cast<int>(job.parts());
  const int threads = std::min(internal::Threads(options.num_threads), parts);
  if (threads <= 1) {
    for (int p = 0; p < parts; ++p) shared->RunPart(static_cast<std::size_t>(p));
    return {};
  }
  // Decode: one run of neighbouring parts each, so that a prefetch past a part's end is not wasted.
  // Prefill: later queries cost more.
  const int chunk = queries == 1 ? (parts + threads - 1) / threads : 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic, chunk)
  for (int p = 0; p < parts; ++p) shared->RunPart(static_cast<std::size_t>(p));
  return {};
}

}  // namespace

Status Attend(const Cache& cache, std::size_t layer, const Half* q, std::size_t queries, float* out,
              const AttendOptions& options) {
  return AttendWithOpenMP(cache, layer, q, queries, out, options);
}
Status Attend(const Cache& cache, std::size_t layer, const float* q, std::size_t queries,
              float* out, const AttendOptions& options) {
  return AttendWithOpenMP(cache, layer, q, queries, out, options);
}

}  // namespace kvmix
