// Checks a call of attention, finds prefixes that sequences share, and cuts the call into parts
// (schedule.cc).
#include "lib/cache/attend_call.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "lib/cache/round.h"
#include "lib/files/machine.h"

namespace kvmix::internal {
namespace {

using kernels::kBlockTokens;

// Sequences with more rows than this of a KV head do not share the reading of a prefix: their own
// arithmetic takes longer than memory.
constexpr std::size_t kMostSharingRows = 16;
constexpr std::size_t kFewestSharedBlocks = 2;

std::size_t L2Bytes() {
  static const std::size_t bytes = internal::Caches().l2;
  return bytes;
}

Status CheckSight(const kvmix_sight& s) {
  if (std::isfinite(s.scale) && s.scale > 0.0f && std::isfinite(s.soft_cap) && s.soft_cap >= 0.0f &&
      s.residence >= KVMIX_RESIDENCE_AUTO && s.residence <= KVMIX_RESIDENCE_MEMORY) {
    return {};
  }
  return {ErrorCode::kInvalidArgument,
          fmt::format("sight: expected a finite scale > 0, a finite soft_cap >= 0 and a residence "
                      "that exists, found {}, {} and {}",
                      s.scale, s.soft_cap, static_cast<int>(s.residence))};
}

// The exact rows of the stretches that queries stand in are there.
Status CheckOwnStretches(const Sequence& s) {
  std::size_t before = Sequence::kNone;
  for (std::size_t q = 0; q < s.queries; ++q) {
    const std::size_t own = s.OwnOf(q);
    if (own == before || own == Sequence::kNone) continue;
    before = own;
    const std::size_t first = own * s.stretch;
    const bool gone = first < s.tokens && first + s.stretch > s.forgotten;
    if (!gone || std::ranges::binary_search(s.stretches, own, {}, &Stretch::index)) continue;
    return {
        ErrorCode::kInvalidArgument,
        fmt::format("query {} of {} stands among the tokens {} to {}, whose exact rows are gone: "
                    "expected attention over them before the next ones were appended",
                    q, s.queries, first, first + s.stretch)};
  }
  return {};
}

}  // namespace

kvmix_sight SightOf(const LayerShape& shape) {
  kvmix_sight sight = KVMIX_INIT(kvmix_sight);
  sight.causal = 1;
  sight.window = shape.window;
  sight.scale = shape.scale();
  sight.soft_cap = shape.soft_cap;
  sight.sinks = shape.sinks.empty() ? nullptr : shape.sinks.data();
  return sight;
}

Status AttendCall::Begin(const CacheImpl& first, std::size_t asked_layer,
                         const kvmix_sight* asked) {
  schedule.parts.clear();
  requests.clear();
  sequences.clear();
  ranges.clear();
  if (Status s = CheckLayer(first, asked_layer); !s.ok()) return s;
  pool = first.pool.get();
  at_layer = asked_layer;
  layer = &pool->layers[pool->plan.model.kv_layer(at_layer)];
  shape = &pool->plan.model.layers[at_layer];
  exact = pool->plan.exact_first;
  sight = asked != nullptr ? *asked : SightOf(*shape);
  return CheckSight(sight);
}

// After the last request.
void AttendCall::Cut() {
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
}

void AttendCall::Run(const Runner& runner) {
  Cut();
  const std::size_t parts = schedule.parts.size();
  // One sequence's decode: one run of neighbouring parts each, so that what is asked for past a
  // part's end is not wasted. Prefill: later queries cost more. Batches: sequences are unlike.
  std::size_t of_run = 1;
  if (requests.size() == 1 && requests[0].q.tokens == 1) {
    of_run = std::max<std::size_t>(1, CeilDiv(parts, runner.threads()));
  }
  runner.Run(CeilDiv(parts, of_run), [&](std::size_t run) {
    const std::size_t first = run * of_run, last = std::min(parts, first + of_run);
    for (std::size_t p = first; p < last; ++p) RunPart(p);
  });
}

Status AttendCall::Add(const CacheImpl& cache, const kvmix_attend_request& asked) {
  if (cache.pool.get() != pool) {
    return {ErrorCode::kMismatch, "the caches of a batch are expected to be of one pool"};
  }
  const RowsView q(asked.q);
  if (Status s = CheckRows(q, "Q", shape->query_heads, shape->k_dim); !s.ok()) return s;
  const Result<OutRows> out = OutRows::Make(asked.out, q.tokens, shape->query_heads, shape->v_dim);
  if (!out.ok()) return out.status();
  if (Status s = out->CheckApart(q); !s.ok()) return s;
  requests.push_back({&cache.held(at_layer), q, *out, asked.log_sum_exp, {}, false, {}});
  const CacheLayer& held = *requests.back().held;
  Sequence& sequence = sequences.emplace_back();
  static_cast<Sight&>(sequence) = {.queries = asked.q.tokens,
                                   .tokens = held.tokens,
                                   .window = sight.window,
                                   .prefix = sight.bidirectional_prefix,
                                   .forgotten = held.forgotten,
                                   .dropped = held.dropped,
                                   .causal = sight.causal != 0};
  sequence.exact = std::min(exact, held.tokens);
  if (Status s = sequence.CheckPrefix(); !s.ok()) return s;
  if (asked.cells != nullptr && asked.mask.data == nullptr) {
    return {ErrorCode::kInvalidArgument,
            "cells: expected a mask beside them, which says what their queries see, found none"};
  }
  if (layer->stretch != 0) {
    held.newest.attended.set.store(true, std::memory_order_relaxed);
    sequence.stretch = layer->stretch;
    sequence.stretches = held.newest.stretches;
    sequence.cells = asked.cells;
    if (Status s = CheckOwnStretches(sequence); !s.ok()) return s;
  }
  return asked.mask.data != nullptr ? Scan(asked.mask, cache) : sequence.CheckHeld();
}

// Reads a mask: the tokens that it shows every query, block by block. They must all be held.
Status AttendCall::Scan(const kvmix_mask& m, const CacheImpl& cache) {
  Request& request = requests.back();
  if (m.queries != request.q.tokens || m.cells > cache.capacity) {
    return {ErrorCode::kMismatch,
            fmt::format("mask: expected {} queries and at most {} cells, found {} x {}",
                        request.q.tokens, cache.capacity, m.queries, m.cells)};
  }
  request.numbers = RowsView(m.data, m.dtype, m.queries, 1, m.cells, m.stride, 0);
  if (Status s = CheckRows(request.numbers, "mask", 1, m.cells); !s.ok()) return s;
  for (std::size_t h = 0; m.slopes != nullptr && h < shape->query_heads; ++h) {
    if (m.slopes[h] > 0.0f && std::isfinite(m.slopes[h])) continue;
    return {ErrorCode::kInvalidArgument,
            fmt::format("mask: expected slopes > 0, found {} for query head {}", m.slopes[h], h)};
  }
  const CacheLayer& held = *request.held;
  const std::size_t blocks = CeilDiv(m.cells, kBlockTokens);
  const std::size_t at = ranges.size();
  ranges.resize(at + blocks * m.queries);
  for (std::size_t q = 0; q < m.queries; ++q) {
    kernels::MaskRange* const seen = ranges.data() + at + q * blocks;
    if (!pool->kernels->mask.scan(request.numbers.row(q, 0), m.dtype, m.cells, seen)) {
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
  request.mask = {m.data, m.dtype, m.stride, m.cells, nullptr, blocks, m.slopes};
  request.masked = true;
  return {};
}

// Finds sequences whose first blocks are the same memory, and makes groups of them.
void AttendCall::Share() {
  const auto blocks_of = [&](std::size_t i) { return requests[i].held->blocks_of(0); };
  // The first blocks that all queries see whole.
  const auto seen_blocks = [&](std::size_t i) -> std::size_t {
    const Sequence& s = sequences[i];
    if (requests[i].masked || s.queries == 0 || s.queries * shape->group() > kMostSharingRows) {
      return 0;
    }
    const Tokens seen = s.OfAll();
    std::size_t last = seen.last;  // and as encoded
    for (std::size_t q = 0; q < s.queries; ++q) {
      s.ForExact(q, [&](const Stretch& x) { last = std::min(last, x.index * s.stretch); });
    }
    return seen.first == 0 ? last / kBlockTokens : 0;
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

bool AttendCall::IsFromMemory() const {
  if (sight.residence != KVMIX_RESIDENCE_AUTO) return sight.residence == KVMIX_RESIDENCE_MEMORY;
  std::size_t tokens = 0;
  for (const Sequence& s : sequences) {
    tokens += RoundUp(s.Most(s.queries), kBlockTokens);
  }
  std::size_t block_bytes = 0;
  for (const kernels::BlockFormat& f : layer->formats) block_bytes += f.block_bytes;
  return schedule.units.size() <= requests.size() * shape->kv_heads ||
         tokens / kBlockTokens * block_bytes > L2Bytes();
}

}  // namespace kvmix::internal
