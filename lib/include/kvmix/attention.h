// Attention over a Cache: out = softmax(scale * q K^T) V, causal, without ever writing K or V back
// dequantized.
#ifndef KVMIX_ATTENTION_H_
#define KVMIX_ATTENTION_H_

#include <cstddef>
#include <span>

#include "kvmix/cache.h"
#include "kvmix/rows.h"
#include "kvmix/runner.h"
#include "kvmix/status.h"

namespace kvmix {

// Attend's sight is a query's view of a layer: causality, window, scale, soft cap, sinks
// (kvmix/kvmix.h, kvmix_sight). Ask for the layer's own, change it, and hand it in:
//   Sight sight = cache.sight(layer);
//   sight.causal = false;
//   Attend(cache, layer, q, out, sight);
// Its `residence` is a hint: the place of the layer's tiles when the call begins. Tiles from memory
// are read in one order with the next block asked for ahead. Measured on Granite Rapids: that costs
// 5 % where they lie in L2, and without it a decode from memory takes a third longer.
// A number for every query and cell, as engines have it: 0 is seen, -inf is not, any other is added
// to the score (below -4e29, such as the least f32, it hides as -inf does). It stands beside
// causality and window: with cells in any order, switch those off. queries: those of q. cells: at
// most the capacity; a cell from there on is not seen. slopes: [query_heads] factors > 0 of the
// numbers (ALiBi), or null for 1.
struct MaskView : kvmix_mask {
  MaskView() : kvmix_mask{} {}  // no mask
  MaskView(const void* numbers, Dtype type, std::size_t n, std::size_t n_cells,
           std::ptrdiff_t by_query, const float* by_head = nullptr)
      : kvmix_mask{numbers, type, n, n_cells, by_query, by_head} {}
};

// One sequence's part of a call. sums: [queries, query_heads], or null.
struct AttendRequest : kvmix_attend_request {
  AttendRequest(const Cache* over, const RowsView& queries, const OutView& to,
                float* sums = nullptr, const MaskView& numbers = {},
                const std::int64_t* at = nullptr)
      : kvmix_attend_request{sizeof(AttendRequest),
                             over != nullptr ? over->get() : nullptr,
                             queries,
                             to,
                             sums,
                             numbers,
                             at} {}
};

// Query i of n stands at token p = tokens - n + i of the layer: append K and V of the prompt (or of
// the new token) first, then attend. The query sees the tokens [0, p], with a window only the last
// `window` of them; without `causal` all tokens after p as well. If p < bidirectional_prefix, it
// also sees all tokens [0, bidirectional_prefix), whatever the window is (PrefixLM, Gemma 3's
// images). A mask hides some of these tokens.
//
// The layer must hold a whole prefix before a query in it is asked: append the prefix first. (A
// layer whose window is shorter than the prefix keeps all of it only if one call appends it.) Later
// chunks of the prompt are appended and attended over as without a prefix.
//
// A layer with a window keeps the tokens that the queries of the last Append see, and those of
// PoolOptions::rollback. A query that would see a token that has left with the window is an error:
// attend over each chunk before you append the next one. Tokens that Forget or Shift dropped are
// not seen, and that is no error.
//
// q: [queries, query_heads, k_dim]. out: [queries, query_heads, v_dim]; it may not overlap q. A
// query that sees no token gets zeros; a query row with NaN or Inf gets NaN. runner: a number of
// OpenMP's threads, or any other (kvmix/runner.h). The result does not depend on it.
//
// log_sum_exp: the natural logarithm of what the row's weights sum to, a sink's included; -inf
// where it sees nothing. With it outputs over two caches can be merged (MergeOutputs).
//
// A batch: one call for many caches of one pool, of unlike lengths, decode and prefill mixed.
// Sequences that share pages from their first token on read these once for all; this changes the
// order of sums, and with it the last bits. An error names the request, and nothing is written.
//
// Errors: a layer without K and V; q of another shape; a mask of another shape, with NaN or +inf,
// or that sees forgotten tokens or cells that the layer does not have; a query that sees tokens
// which the layer's window has let go, through its own window or a longer one of the call; a query
// in a prefix that the layer does not hold whole; a query in a stretch whose exact rows are gone.
// The last three are kInvalidArgument and name the query and the tokens.
//
// Exact newest tokens (Plan::exact_newest): a query sees its own stretch exactly. The rows of a
// stretch that is encoded are kept for that until its layer has been attended over and written
// again, but of appends that no attention follows only the last 2048 tokens. The stretch before the
// newest one is kept, too, so that Truncate can take back tokens at no loss. So attend over each
// chunk before you append the next one.
//
// The arithmetic: int8 heads multiply exact codes by 15-bit or wider fixed-point q and softmax
// weights, fp16 heads are f32 throughout. The output is within NMSE 1e-6 of a double-precision
// attention over the same codes. Operands of 8 bits (kvmix/codec.h) add about 5e-5.
//
// Limits of that bound:
// - A q row with one channel a hundred times the others reaches 1.3e-6.
// - V with one scale for the whole head: where most weight lies on a sink whose V is near zero, the
//   error grows. Weights are fixed-point numbers against the largest weight times scale in 256
//   tokens, and one scale for all tokens hides that the sink's V is small. Give V a scale per
//   token.
//
// Memory: a thread allocates on its first call, and when a call is larger than all before it on
// that thread; it keeps that memory until it ends.
//
// Threads: neighbouring parts of a decode read neighbouring memory, and Runner::threads says into
// how many runs of them one sequence's decode is cut.
inline Status Attend(std::span<const AttendRequest> requests, std::size_t layer, const Sight* sight,
                     const Runner& runner = Runner::Here()) {
  if (Status s = runner.Check(); !s.ok()) return s;
  internal::CallError error;
  return error.Of(
      kvmix_attend(requests.data(), requests.size(), layer, sight, runner.get(), error));
}
inline Status Attend(std::span<const AttendRequest> requests, std::size_t layer, const Sight& sight,
                     const Runner& runner = Runner::Here()) {
  return Attend(requests, layer, &sight, runner);
}
// Without a sight: the layer's own.
inline Status Attend(std::span<const AttendRequest> requests, std::size_t layer,
                     const Runner& runner = Runner::Here()) {
  return Attend(requests, layer, nullptr, runner);
}
inline Status Attend(const Cache& cache, std::size_t layer, const RowsView& q, const OutView& out,
                     const Sight& sight, const Runner& runner = Runner::Here()) {
  const AttendRequest request(&cache, q, out);
  return Attend({&request, 1}, layer, &sight, runner);
}
inline Status Attend(const Cache& cache, std::size_t layer, const RowsView& q, const OutView& out,
                     const Runner& runner = Runner::Here()) {
  const AttendRequest request(&cache, q, out);
  return Attend({&request, 1}, layer, nullptr, runner);
}

// Two outputs of the same queries over disjoint tokens become the output over all of them: out and
// log_sum_exp are merged with the others. rows of dim numbers.
inline void MergeOutputs(float* out, float* log_sum_exp, const float* other_out,
                         const float* other_log_sum_exp, std::size_t rows, std::size_t dim) {
  internal::CallError error;
  const Status s = error.Of(
      kvmix_merge_outputs(out, log_sum_exp, other_out, other_log_sum_exp, rows, dim, error));
  if (!s.ok()) internal::WrongResult(s);
}

}  // namespace kvmix

#endif  // KVMIX_ATTENTION_H_
