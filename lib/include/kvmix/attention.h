// Attention over a Cache: out = softmax(scale * q K^T) V, causal, without ever writing K or V back
// dequantized.
#ifndef KVMIX_ATTENTION_H_
#define KVMIX_ATTENTION_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "kvmix/cache.h"
#include "kvmix/export.h"
#include "kvmix/rows.h"
#include "kvmix/runner.h"
#include "kvmix/status.h"

namespace kvmix {

// Where a layer's tiles lie when a call begins. It changes the speed, never the result: tiles from
// memory are read in one order with the next block asked for ahead. Measured on Granite Rapids:
// that costs 5 % where they lie in L2, and without it a decode from memory takes a third longer.
enum class Residence : std::uint8_t {
  kAuto,    // one query: kMemory, for a model's other layers pass through the caches between two
            // steps. More queries: by the layer's bytes against L2.
  kL2,      // in this core's L2 cache
  kMemory,  // in memory, or in a cache that is shared
};

// What 0 and null leave to the model's layer (kvmix/model.h).
struct AttendOptions {
  float attention_scale = 0.0f;    // > 0
  std::size_t sliding_window = 0;  // a query sees at most this many last tokens, itself included
  float soft_cap = 0.0f;           // s -> soft_cap * tanh(s / soft_cap) (Gemma 2)
  const float* sinks = nullptr;    // [query_heads] logits that take weight but have no V (gpt-oss)
  bool causal = true;              // false: a query also sees the tokens after it
  std::size_t bidirectional_prefix = 0;  // these first tokens see each other both ways; 0: none
  Residence residence = Residence::kAuto;
};

// A number for every query and cell, as engines have it: 0 is seen, -inf is not, any other is added
// to the score (below -4e29, such as the least f32, it hides as -inf does). It stands beside
// causality and window: with cells in any order, switch those off.
struct MaskView {
  const void* data = nullptr;  // query i, cell c: element i * stride + c; null: no mask
  Dtype dtype = KVMIX_F16;
  std::size_t queries = 0;  // those of q
  std::size_t cells = 0;    // at most the capacity; a cell from here on is not seen
  std::ptrdiff_t stride = 0;
  const float* slopes = nullptr;  // [query_heads] factors > 0 of the numbers (ALiBi); null: 1
};

// One sequence's part of a call.
struct AttendRequest {
  const Cache* cache = nullptr;
  RowsView q;
  float* out = nullptr;
  float* log_sum_exp = nullptr;  // [queries, query_heads], or null
  MaskView mask = {};
};

// Query i of n stands at token p = tokens - n + i of the layer: append K and V of the prompt (or of
// the new token) first, then attend. The query sees the tokens [0, p], with a window only the last
// sliding_window of them; without `causal` all tokens after p as well. If p < bidirectional_prefix,
// it also sees all tokens [0, bidirectional_prefix), whatever the window is (PrefixLM, Gemma 3's
// images). A mask hides some of these tokens.
//
// The layer must hold a whole prefix before a query in it is asked: append the prefix first. (A
// layer whose window is shorter than the prefix keeps all of it only if one call appends it.) Later
// chunks of the prompt are appended and attended over as without a prefix.
//
// A layer with a window keeps the tokens that the queries of the last Append see, and those of
// CacheOptions::rollback. A query that would see a token that has left with the window is an error:
// attend over each chunk before you append the next one. Tokens that Forget or Shift dropped are
// not seen, and that is no error.
//
// q: [queries, query_heads, k_dim]. out: [queries, query_heads, v_dim] in C order, f32; it may not
// overlap q. A query that sees no token gets zeros; a query row with NaN or Inf gets NaN. runner: a
// number of OpenMP's threads, or any other (kvmix/runner.h). The result does not depend on it.
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
// in a prefix that the layer does not hold whole. The last two are kInvalidArgument and name the
// query and the tokens.
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
KVMIX_API Status Attend(const Cache& cache, std::size_t layer, const RowsView& q, float* out,
                        const AttendOptions& options = {}, const Runner& runner = Runner::Here());
KVMIX_API Status Attend(std::span<const AttendRequest> requests, std::size_t layer,
                        const AttendOptions& options = {}, const Runner& runner = Runner::Here());

// Two outputs of the same queries over disjoint tokens become that over all of them: out, lse <-
// merged with the others. rows of dim numbers.
KVMIX_API void MergeOutputs(float* out, float* log_sum_exp, const float* other_out,
                            const float* other_log_sum_exp, std::size_t rows, std::size_t dim);

}  // namespace kvmix

#endif  // KVMIX_ATTENTION_H_
