// Attention over a Cache: out = softmax(scale * q K^T) V, causal, without ever writing K or V back
// dequantized.
#ifndef KVMIX_ATTENTION_H_
#define KVMIX_ATTENTION_H_

#include <cstddef>
#include <cstdint>
#include <memory>

#include "kvmix/cache.h"
#include "kvmix/export.h"
#include "kvmix/rows.h"
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

struct AttendOptions {
  float attention_scale = 0.0f;  // > 0; 0: 1 / sqrt(head_dim)
  std::size_t sliding_window =
      0;                  // a query sees at most this many last tokens, itself included; 0: all
  float soft_cap = 0.0f;  // s -> soft_cap * tanh(s / soft_cap) (Gemma 2); 0: none
  const float* sinks = nullptr;  // [query_heads] logits that take weight but have no V (gpt-oss)
  Residence residence = Residence::kAuto;
};

// Query i of n sees all but the last n - 1 - i tokens of the layer: append K and V of the prompt
// (or of the new token) first, then attend. q: [queries, query_heads, head_dim]. out: the same
// shape in C order, f32; it may not overlap q. A query that sees no token (more queries than
// tokens) gets zeros; a query row with NaN or Inf gets NaN. num_threads: OpenMP threads, 0 for as
// many as this process may use. The result does not depend on it.
//
// The arithmetic: int8 heads multiply exact codes by 15-bit or wider fixed-point q and softmax
// weights, fp16 heads are f32 throughout. The output is within NMSE 1e-6 of a double-precision
// attention over the same codes.
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
// Threads: one thread, and jobs, never touch OpenMP. OpenMP's threads do not survive a fork(): in
// the child of a fork every call runs on one thread, whatever num_threads says.
KVMIX_API Status Attend(const Cache& cache, std::size_t layer, const RowsView& q, float* out,
                        const AttendOptions& options = {}, int num_threads = 1);

// The same, part by part, for an engine with a thread pool of its own (no OpenMP inside):
//   AttendJob job;                                   // keep it: its memory is reused
//   job.Start(cache, layer, q, out, options);
//   for each p in [0, job.parts()): on any thread, in any order, each once: job.RunPart(p);
// When all calls have returned, `out` is complete. Neighbouring parts read neighbouring memory:
// give a thread a run of them.
class KVMIX_API AttendJob {
 public:
  AttendJob();
  AttendJob(AttendJob&&) noexcept;
  AttendJob& operator=(AttendJob&&) noexcept;
  ~AttendJob();

  Status Start(const Cache& cache, std::size_t layer, const RowsView& q, float* out,
               const AttendOptions& options = {});
  std::size_t parts() const;
  void RunPart(std::size_t part);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvmix

#endif  // KVMIX_ATTENTION_H_
