// A call of attention: checks it, has it cut into parts (schedule.cc), runs a part through the
// kernels, and merges the parts of a row.
#include "kvmix/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include <fmt/format.h>

#include "lib/cache/cache_impl.h"
#include "lib/cache/parallel.h"
#include "lib/cache/round.h"
#include "lib/cache/schedule.h"
#include "lib/files/machine.h"

namespace kvmix {
namespace {

using internal::Access;
using internal::CacheImpl;
using internal::CacheLayer;
using internal::Part;
using internal::PoolImpl;
using internal::PoolLayer;
using internal::RoundUp;
using internal::Unit;
using kernels::kBlockTokens;

constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
// In units of log2. A mask makes what it hides -2^100, not -inf (kernels/mask.h): a row whose
// largest score is below -4e29 sees nothing.
constexpr float kNothingSeen = -4e29f * 1.4426950408889634f;

// Sequences with more rows than this of a KV head do not share the reading of a prefix: their own
// arithmetic takes longer than memory.
constexpr std::size_t kMostSharingRows = 16;
constexpr std::size_t kFewestSharedBlocks = 2;

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

// What a part yields for its rows; see kernels::AttendTask.
struct Outputs {
  float* out;  // [rows, padded]
  float* max;
  float* sum;

  static std::size_t RowBytes(std::size_t padded) { return (padded + 2) * sizeof(float); }
  static Outputs At(std::uint8_t* memory, std::size_t rows, std::size_t padded) {
    float* const floats = reinterpret_cast<float*>(memory);
    return {floats, floats + rows * padded, floats + rows * (padded + 1)};
  }
  Outputs From(std::size_t row, std::size_t padded) const {
    return {out + row * padded, max + row, sum + row};
  }
};

Status CheckOptions(const AttendOptions& o) {
  if (std::isfinite(o.attention_scale) && o.attention_scale >= 0.0f && std::isfinite(o.soft_cap) &&
      o.soft_cap >= 0.0f) {
    return {};
  }
  return {ErrorCode::kInvalidArgument,
          fmt::format("attention_scale {}, soft_cap {}: expected finite numbers, none negative",
                      o.attention_scale, o.soft_cap)};
}

}  // namespace

struct AttendJob::Impl {
  // A request, with its mask as the kernels want it.
  struct Request {
    const CacheLayer* held;
    RowsView q;
    float* out;
    float* log_sum_exp;
    kernels::Mask mask;
    bool masked;
    RowsView numbers;  // of the mask, [queries][1][cells]
  };

  const PoolImpl* pool = nullptr;
  const PoolLayer* layer = nullptr;   // whose K and V are read
  const LayerShape* shape = nullptr;  // of the layer that was asked for
  AttendOptions options;              // with the layer's own numbers
  std::vector<Request> requests;
  std::vector<internal::Sequence> sequences;
  std::vector<kernels::MaskRange> ranges;  // of all masks
  std::vector<std::size_t> order;          // of requests, for Share
  internal::Schedule schedule;
  std::size_t exact = 0;     // the plan's exact_first
  std::size_t padded = 0;    // floats of an output row
  bool from_memory = false;  // rather than from L2
  Scratch outputs_memory;
  std::uint8_t* outputs = nullptr;
  std::vector<std::atomic<std::uint32_t>> done;  // parts done, [units]

  Status Start(std::span<const AttendRequest> asked, std::size_t at_layer, const AttendOptions& o);
  Status Add(const AttendRequest& asked, std::size_t at_layer);
  Status Scan(const AttendRequest& asked, const CacheImpl& cache);
  void Share();
  bool IsFromMemory() const;
  void RunPart(std::size_t part);
  const std::uint8_t* BlockAfter(std::size_t part) const;
  void Merge(const Unit& unit, const float* bias, const Outputs* own) const;
  void GatherQueries(const Unit& unit, float* rows) const;
  Outputs AttendExact(const Unit& unit, const float* bias) const;
  static float MaskNumber(const Request& request, std::size_t query, std::size_t token,
                          std::size_t query_head);
};

// The options are those of the layer where they say nothing.
Status AttendJob::Impl::Start(std::span<const AttendRequest> asked, std::size_t at_layer,
                              const AttendOptions& o) {
  schedule.parts.clear();
  requests.clear();
  sequences.clear();
  ranges.clear();
  if (asked.empty()) return {};
  const CacheImpl* const first = Access::Of(asked[0].cache);
  if (Status s = internal::CheckAlive(first); !s.ok()) return s;
  if (Status s = internal::CheckLayer(*first, at_layer); !s.ok()) return s;
  if (Status s = CheckOptions(o); !s.ok()) return s;
  pool = first->pool.get();
  layer = &pool->layers[pool->plan.model.kv_layer(at_layer)];
  shape = &pool->plan.model.layers[at_layer];
  exact = pool->plan.exact_first;
  options = o;
  if (options.attention_scale == 0.0f) options.attention_scale = shape->scale();
  if (options.sliding_window == 0) options.sliding_window = shape->window;
  if (options.soft_cap == 0.0f) options.soft_cap = shape->soft_cap;
  if (options.sinks == nullptr && !shape->sinks.empty()) options.sinks = shape->sinks.data();

  for (std::size_t i = 0; i < asked.size(); ++i) {
    Status s = Add(asked[i], at_layer);
    if (s.ok()) continue;
    if (asked.size() == 1) return s;
    return {s.code(), fmt::format("request {} of {}: {}", i, asked.size(), s.message())};
  }
  std::size_t at = 0;
  for (std::size_t i = 0; i < requests.size(); ++i) {  // now that `ranges` stays where it is
    if (!requests[i].masked) continue;
    requests[i].mask.ranges = ranges.data() + at;
    at += requests[i].mask.blocks * requests[i].q.tokens;
    sequences[i].mask = &requests[i].mask;
  }
  if (requests.size() > 1) Share();
  padded = pool->kernels->attend.padded_dim(layer->formats[0]);
  schedule.Make(sequences, shape->kv_heads, shape->group(), Outputs::RowBytes(padded));
  from_memory = IsFromMemory();
  outputs = outputs_memory.Get(schedule.memory);
  if (done.size() < schedule.units.size()) {
    done = std::vector<std::atomic<std::uint32_t>>(schedule.units.size());
  }
  for (std::size_t u = 0; u < schedule.units.size(); ++u) {
    done[u].store(0, std::memory_order_relaxed);
  }
  return {};
}

Status AttendJob::Impl::Add(const AttendRequest& asked, std::size_t at_layer) {
  const CacheImpl* const cache = Access::Of(asked.cache);
  if (Status s = internal::CheckAlive(cache); !s.ok()) return s;
  if (cache->pool.get() != pool) {
    return {ErrorCode::kMismatch, "the caches of a batch are expected to be of one pool"};
  }
  if (Status s = internal::CheckRows(asked.q, "Q", shape->query_heads, shape->k_dim); !s.ok()) {
    return s;
  }
  requests.push_back(
      {&cache->held(at_layer), asked.q, asked.out, asked.log_sum_exp, {}, false, {}});
  sequences.push_back({.queries = asked.q.tokens,
                       .tokens = requests.back().held->tokens,
                       .window = options.sliding_window,
                       .exact = std::min(exact, requests.back().held->tokens),
                       .forgotten = requests.back().held->forgotten,
                       .causal = options.causal});
  return asked.mask.data != nullptr ? Scan(asked, *cache) : Status();
}

// What every query sees by its mask, block by block.
Status AttendJob::Impl::Scan(const AttendRequest& asked, const CacheImpl& cache) {
  const MaskView& m = asked.mask;
  Request& request = requests.back();
  if (m.queries != asked.q.tokens || m.cells > cache.capacity) {
    return {ErrorCode::kMismatch,
            fmt::format("mask: expected {} queries and at most {} cells, found {} x {}",
                        asked.q.tokens, cache.capacity, m.queries, m.cells)};
  }
  for (std::size_t h = 0; m.slopes != nullptr && h < shape->query_heads; ++h) {
    if (m.slopes[h] > 0.0f && m.slopes[h] < kInf) continue;
    return {ErrorCode::kInvalidArgument,
            fmt::format("mask: expected slopes > 0, found {} for query head {}", m.slopes[h], h)};
  }
  const CacheLayer& held = *request.held;
  request.numbers = RowsView::Dense(m.data, m.dtype, m.queries, 1, m.cells);
  request.numbers.token_stride = m.stride;
  const std::size_t blocks = internal::CeilDiv(m.cells, kBlockTokens);
  const std::size_t at = ranges.size();
  ranges.resize(at + blocks * m.queries);
  for (std::size_t q = 0; q < m.queries; ++q) {
    kernels::MaskRange* const seen = ranges.data() + at + q * blocks;
    if (!pool->kernels->mask.scan(request.numbers.row(q, 0), internal::KernelDtype(m.dtype),
                                  m.cells, seen)) {
      return {ErrorCode::kInvalidArgument,
              fmt::format("mask: NaN or +inf in the row of query {}", q)};
    }
    for (std::size_t b = 0; b < blocks; ++b) {
      if (seen[b].last == 0) continue;
      if (b * kBlockTokens + seen[b].first < held.forgotten ||
          b * kBlockTokens + seen[b].last > held.tokens) {
        return {ErrorCode::kInvalidArgument,
                fmt::format("mask: query {} sees cells {} to {}; the layer has those from {} to {}",
                            q, b * kBlockTokens + seen[b].first, b * kBlockTokens + seen[b].last,
                            held.forgotten, held.tokens)};
      }
    }
  }
  request.mask = {m.data,  internal::KernelDtype(m.dtype), m.stride, m.cells, nullptr, blocks,
                  m.slopes};
  request.masked = true;
  return {};
}

// Finds sequences whose first blocks are the same memory, and makes groups of them.
void AttendJob::Impl::Share() {
  if (options.sliding_window != 0) return;
  const auto blocks_of = [&](std::size_t i) { return requests[i].held->blocks_of(0); };
  // Blocks that all queries see whole.
  const auto seen_blocks = [&](std::size_t i) {
    const internal::Sequence& s = sequences[i];
    const bool can_share = !requests[i].masked && requests[i].held->forgotten == 0 &&
                           s.queries != 0 && s.queries * shape->group() <= kMostSharingRows &&
                           s.queries <= s.tokens;
    return can_share ? (s.tokens - s.queries + 1) / kBlockTokens : 0;
  };
  order.clear();
  for (std::size_t i = 0; i < requests.size(); ++i) {
    if (seen_blocks(i) >= kFewestSharedBlocks) order.push_back(i);
  }
  std::ranges::sort(order, {}, [&](std::size_t i) {
    return std::pair(reinterpret_cast<std::uintptr_t>(blocks_of(i)[0]), i);
  });
  for (std::size_t first = 0, last; first < order.size(); first = last) {
    const std::size_t leader = order[first];
    std::size_t common = seen_blocks(leader);
    for (last = first + 1; last < order.size() && blocks_of(order[last])[0] == blocks_of(leader)[0];
         ++last) {
      const std::size_t most = std::min(common, seen_blocks(order[last]));
      common = static_cast<std::size_t>(
          std::mismatch(blocks_of(leader), blocks_of(leader) + most, blocks_of(order[last])).first -
          blocks_of(leader));
    }
    if (last == first + 1 || common < kFewestSharedBlocks) continue;
    for (std::size_t i = first; i < last; ++i) {
      sequences[order[i]].shared = common * kBlockTokens;
      sequences[order[i]].group = leader;
    }
  }
}

bool AttendJob::Impl::IsFromMemory() const {
  if (options.residence != Residence::kAuto) return options.residence == Residence::kMemory;
  std::size_t tokens = 0;
  for (const internal::Sequence& s : sequences) {
    std::size_t seen = s.tokens;
    if (s.window != 0) seen = std::min(seen, s.window + s.queries + kBlockTokens);
    tokens += RoundUp(seen, kBlockTokens);
  }
  std::size_t block_bytes = 0;
  for (const kernels::BlockFormat& f : layer->formats) block_bytes += f.block_bytes;
  return schedule.units.size() <= requests.size() * shape->kv_heads ||
         tokens / kBlockTokens * block_bytes > L2Bytes();
}

// What is read after a part's tokens.
const std::uint8_t* AttendJob::Impl::BlockAfter(std::size_t part) const {
  if (!from_memory || part + 1 >= schedule.parts.size()) return nullptr;
  const Part& next = schedule.parts[part + 1];
  if (next.first_token >= next.last_token) return nullptr;
  const Unit& unit = schedule.units[schedule.unit_of[next.first_unit]];
  return requests[unit.sequence].held->blocks_of(next.kv_head)[next.first_token / kBlockTokens];
}

void AttendJob::Impl::RunPart(std::size_t index) {
  const Part& part = schedule.parts[index];
  const std::span<const std::uint32_t> units(schedule.unit_of.data() + part.first_unit, part.units);
  const kernels::BlockFormat& format = layer->formats[part.kv_head];
  const std::size_t group = shape->group(), dim = shape->k_dim;

  thread_local Scratch scratch;
  const std::size_t q_bytes = RoundUp(part.rows * dim * sizeof(float), 64),
                    operand_bytes = pool->kernels->attend.operand_bytes(format, part.rows),
                    bias_bytes = RoundUp(part.rows * sizeof(float), 64);
  std::uint8_t* const memory =
      scratch.Get(q_bytes + operand_bytes + bias_bytes + part.rows * Outputs::RowBytes(padded));
  float* const queries = reinterpret_cast<float*>(memory);
  float* const bias = reinterpret_cast<float*>(memory + q_bytes + operand_bytes);
  const Outputs to =
      Outputs::At(part.memory == Part::kOwn ? memory + q_bytes + operand_bytes + bias_bytes
                                            : outputs + part.memory,
                  part.rows, padded);

  // f32 rows of the query heads that share a KV head.
  float* row = queries;
  bool biased = options.soft_cap != 0.0f || options.sinks != nullptr || exact != 0;
  for (const std::uint32_t u : units) {
    const Unit& unit = schedule.units[u];
    biased |= requests[unit.sequence].log_sum_exp != nullptr;
    GatherQueries(unit, row);
    row += unit.queries * group * dim;
  }
  // Only a soft cap, sinks, exact tokens and a sum see what the codes of a centred K leave out of
  // the scores.
  layer->k[part.kv_head].PrepareQueries(queries, part.rows, options.attention_scale,
                                        biased ? bias : nullptr);

  const Unit& first = schedule.units[units[0]];
  const internal::Sequence& s = sequences[first.sequence];
  const Request& request = requests[first.sequence];
  kernels::AttendTask task{};
  task.format = &format;
  task.blocks = request.held->blocks_of(part.kv_head);
  task.first_token = part.first_token;
  task.last_token = part.last_token;
  task.q = queries;
  task.rows = part.rows;
  task.group = group;
  task.first_end = static_cast<std::int64_t>(s.tokens) - static_cast<std::int64_t>(s.queries) + 1 +
                   static_cast<std::int64_t>(first.first_query);
  task.window = std::min(s.window, s.tokens);
  task.causal = s.causal && units.size() == 1;  // what many read all of them see whole
  kernels::Mask mask = request.mask;
  if (request.masked) {
    mask.values = request.numbers.row(first.first_query, 0);
    mask.ranges += first.first_query * mask.blocks;
    if (mask.slopes != nullptr) mask.slopes += part.kv_head * group;
    task.mask = &mask;
  }
  task.scale = options.attention_scale;
  task.soft_cap = options.soft_cap;
  task.bias = biased ? bias : nullptr;
  task.stream = from_memory;
  task.after = BlockAfter(index);
  task.operand = memory + q_bytes;
  task.out = to.out;
  task.max = to.max;
  task.sum = to.sum;
  pool->kernels->attend.attend(task);

  // Whoever finishes the last part of a unit merges all, always in the same order.
  std::size_t at = 0;
  for (const std::uint32_t u : units) {
    const Unit& unit = schedule.units[u];
    if (part.memory == Part::kOwn) {
      Merge(unit, task.bias, &to);
    } else if (done[u].fetch_add(1, std::memory_order_acq_rel) + 1 == unit.partials) {
      Merge(unit, biased ? bias + at : nullptr, nullptr);
    }
    at += unit.queries * group;
  }
}

// f32 rows of the query heads that share a KV head.
void AttendJob::Impl::GatherQueries(const Unit& unit, float* rows) const {
  const std::size_t group = shape->group();
  for (std::size_t i = 0; i < unit.queries; ++i, rows += group * shape->k_dim) {
    const kernels::RowsIn heads = internal::HeadRows(
        requests[unit.sequence].q, unit.first_query + i, unit.kv_head * group, group);
    pool->kernels->encode.to_float(heads, rows, shape->k_dim);
  }
}

// A unit's rows over the tokens that are kept exact. Their scores lack `bias` as those of codes do.
Outputs AttendJob::Impl::AttendExact(const Unit& unit, const float* bias) const {
  const internal::Sequence& s = sequences[unit.sequence];
  const Request& request = requests[unit.sequence];
  const std::size_t rows = unit.queries * shape->group();
  thread_local Scratch scratch;
  const std::size_t q_floats = rows * shape->k_dim, added_floats = rows * s.exact;
  std::uint8_t* const memory = scratch.Get((q_floats + added_floats) * sizeof(float) +
                                           rows * Outputs::RowBytes(shape->v_dim));
  float* const queries = reinterpret_cast<float*>(memory);
  float* const added = queries + q_floats;
  const Outputs to =
      Outputs::At(reinterpret_cast<std::uint8_t*>(added + added_floats), rows, shape->v_dim);
  GatherQueries(unit, queries);
  for (std::size_t r = 0; r < rows; ++r) {
    const std::size_t query = unit.first_query + r / shape->group();
    const std::size_t query_head = unit.kv_head * shape->group() + r % shape->group();
    const std::size_t end = s.tokens - s.queries + query + 1;  // may be huge: before token 0
    for (std::size_t t = 0; t < s.exact; ++t) {
      const bool in_causal = !s.causal || (end <= s.tokens && t < end);
      const bool in_window = s.window == 0 || end > s.tokens || t + s.window >= end;
      float number = in_causal && in_window && t >= s.forgotten ? 0.0f : -kInf;
      if (request.masked) number += MaskNumber(request, query, t, query_head);
      added[r * s.exact + t] = number - (options.soft_cap != 0.0f ? 0.0f : bias[r]);
    }
  }
  const Half* const rows_of_all = request.held->exact.data();
  const auto exact_rows = [&](Tensor t) {
    return rows_of_all + internal::ExactPlace(*pool, layer->shape, t, unit.kv_head);
  };
  pool->kernels->exact.attend({exact_rows(Tensor::kK), exact_rows(Tensor::kV), s.exact,
                               shape->k_dim, shape->v_dim, queries, rows, options.attention_scale,
                               options.soft_cap, added, to.out, to.max, to.sum});
  return to;
}

// A mask's number for one row and token, with its slope.
float AttendJob::Impl::MaskNumber(const Request& request, std::size_t query, std::size_t token,
                                  std::size_t query_head) {
  if (token >= request.numbers.head_dim) return -kInf;
  const float* const slopes = request.mask.slopes;
  return (slopes != nullptr ? slopes[query_head] : 1.0f) * request.numbers.At(query, 0, token);
}

// out = sum over parts of 2^(max_p - max) out_p / (sum over parts of 2^(max_p - max) sum_p + sink),
// and what V's codec restores. own: the outputs of a unit's only part.
void AttendJob::Impl::Merge(const Unit& unit, const float* bias, const Outputs* own) const {
  const std::size_t group = shape->group(), dim = shape->v_dim;
  const Request& request = requests[unit.sequence];
  const auto partial = [&](std::size_t p, std::size_t row) {
    if (own != nullptr) return own->From(row, padded);
    const internal::Partial& place = schedule.partials[unit.first_partial + p];
    const Part& part = schedule.parts[place.part];
    return Outputs::At(outputs + part.memory, part.rows, padded).From(place.row + row, padded);
  };
  const bool has_exact = sequences[unit.sequence].exact != 0;
  const Outputs first = has_exact ? AttendExact(unit, bias) : Outputs{};
  for (std::size_t r = 0; r < unit.queries * group; ++r) {
    const std::size_t query_head = unit.kv_head * group + r % group;
    const std::size_t row = (unit.first_query + r / group) * shape->query_heads + query_head;
    float* const to = request.out + row * dim;
    float max = has_exact ? first.max[r] : -kInf;
    bool nan = std::isnan(max);
    for (std::size_t p = 0; p < unit.partials; ++p) {
      const float own_max = *partial(p, r).max;
      max = std::max(max, own_max);
      nan |= std::isnan(own_max);
    }
    // A sink's logit, and the sum of all weights, are beside scores that lack `bias` (a soft cap
    // has put it back).
    const float lacking = bias == nullptr || options.soft_cap != 0.0f ? 0.0f : bias[r];
    // In units of log2. It stays finite: a sink that takes all leaves 0, not NaN.
    float sink = -kInf;
    if (options.sinks != nullptr) sink = (options.sinks[query_head] - lacking) / kLn2;
    sink = std::min(sink, std::numeric_limits<float>::max());
    const bool nothing = max < kNothingSeen;
    if (nan || nothing) {
      std::fill(to, to + dim, nan ? kNaN : 0.0f);
      if (request.log_sum_exp != nullptr) {
        request.log_sum_exp[row] = nan ? kNaN : sink * kLn2 + lacking;
      }
      continue;
    }
    max = std::max(max, sink);
    const auto weight = [&](std::size_t p) { return std::exp2(*partial(p, r).max - max); };
    float sum = 0.0f;
    for (std::size_t p = 0; p < unit.partials; ++p) sum += weight(p) * *partial(p, r).sum;
    const float first_weight = has_exact ? std::exp2(first.max[r] - max) : 0.0f;
    const float first_sum = has_exact ? first_weight * first.sum[r] : 0.0f;
    const float total = sum + first_sum + std::exp2(sink - max);
    std::fill(to, to + dim, 0.0f);
    for (std::size_t p = 0; p < unit.partials; ++p) {
      const float share = weight(p) / total;
      const float* const from = partial(p, r).out;
      for (std::size_t c = 0; c < dim; ++c) to[c] += share * from[c];
    }
    layer->v[unit.kv_head].RestoreOutput(to, sum / total);
    for (std::size_t c = 0; has_exact && c < dim; ++c) {
      to[c] += first_weight / total * first.out[r * dim + c];
    }
    if (request.log_sum_exp != nullptr) {
      request.log_sum_exp[row] = (max + std::log2(total)) * kLn2 + lacking;
    }
  }
}

AttendJob::AttendJob() : impl_(std::make_unique<Impl>()) {}
AttendJob::AttendJob(AttendJob&&) noexcept = default;
AttendJob& AttendJob::operator=(AttendJob&&) noexcept = default;
AttendJob::~AttendJob() = default;

Status AttendJob::Start(const Cache& cache, std::size_t layer, const RowsView& q, float* out,
                        const AttendOptions& options) {
  const AttendRequest request{&cache, q, out};
  return impl_->Start({&request, 1}, layer, options);
}
Status AttendJob::Start(std::span<const AttendRequest> requests, std::size_t layer,
                        const AttendOptions& options) {
  return impl_->Start(requests, layer, options);
}
std::size_t AttendJob::parts() const { return impl_->schedule.parts.size(); }
void AttendJob::RunPart(std::size_t part) { impl_->RunPart(part); }

Status Attend(const Cache& cache, std::size_t layer, const RowsView& q, float* out,
              const AttendOptions& options, int num_threads) {
  const AttendRequest request{&cache, q, out};
  return Attend({&request, 1}, layer, options, num_threads);
}

Status Attend(std::span<const AttendRequest> requests, std::size_t layer,
              const AttendOptions& options, int num_threads) {
  if (Status s = internal::CheckThreads(num_threads); !s.ok()) return s;
  thread_local AttendJob own_job;
  AttendJob& job = own_job;  // this thread's, for all threads of the loop
  if (Status s = job.Start(requests, layer, options); !s.ok()) return s;
  const std::size_t parts = job.parts();
  const int threads = internal::ThreadsFor(num_threads, parts);
  // One sequence's decode: one run of neighbouring parts each, so that what is asked for past a
  // part's end is not wasted. Prefill: later queries cost more. Batches: sequences are unlike.
  std::size_t chunk = 1;
  if (requests.size() == 1 && requests[0].q.tokens == 1) {
    chunk = (parts + static_cast<std::size_t>(threads) - 1) / static_cast<std::size_t>(threads);
  }
  internal::RunParts(parts, threads, chunk, [&](std::size_t p) { job.RunPart(p); });
  return {};
}

void MergeOutputs(float* out, float* log_sum_exp, const float* other_out,
                  const float* other_log_sum_exp, std::size_t rows, std::size_t dim) {
  for (std::size_t r = 0; r < rows; ++r) {
    const float a = log_sum_exp[r], b = other_log_sum_exp[r];
    if (b == -kInf) continue;  // nothing to add; not even to -inf
    const float max = std::max(a, b), own = std::exp(a - max), other = std::exp(b - max);
    const float own_share = own / (own + other), other_share = other / (own + other);
    for (std::size_t c = r * dim; c < (r + 1) * dim; ++c) {
      out[c] = own_share * out[c] + other_share * other_out[c];
    }
    log_sum_exp[r] = max + std::log(own + other);
  }
}

}  // namespace kvmix
