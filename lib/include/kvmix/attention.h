// Attention over a Cache: out = softmax(scale * q K^T) V, causal, without ever writing K or V back
// dequantized.
#ifndef KVMIX_ATTENTION_H_
#define KVMIX_ATTENTION_H_

#include <cstddef>
#include <memory>

#include "kvmix/cache.h"
#include "kvmix/export.h"
#include "kvmix/half.h"
#include "kvmix/status.h"

namespace kvmix {

struct AttendOptions {
  float attention_scale = 0.0f;  // > 0; 0: 1 / sqrt(head_dim)
  std::size_t sliding_window =
      0;                  // a query sees at most this many last tokens, itself included; 0: all
  float soft_cap = 0.0f;  // s -> soft_cap * tanh(s / soft_cap) (Gemma 2); 0: none
  const float* sinks =
      nullptr;          // [query_heads] logits that take weight but have no V (gpt-oss), or null
  int num_threads = 1;  // OpenMP threads; 0: OpenMP's default, within the process's CPU quota. The
                        // result does not depend on it.
};

// Query i of n sees all but the last n - 1 - i tokens of the layer: append K and V of the prompt
// (or of the new token) first, then attend. q: [queries, query_heads, head_dim], out: the same
// shape, f32; they may not overlap; no alignment beyond their types' own. A query that sees no
// token (more queries than tokens) gets zeros; a query row with NaN or Inf gets NaN.
//
// The arithmetic: int8 heads multiply exact codes by 15-bit or wider fixed-point q and softmax
// weights, fp16 heads are f32 throughout; the output is within NMSE 1e-6 of a double-precision
// attention over the same codes. (Not so where V has one scale for the head, most weight lies on a
// sink and the sink's V is near zero: weights are fixed-point against the largest weight times
// scale of 256 tokens, and that scale does not tell. Give V a scale per token. And a q row with one
// channel a hundred times the others reaches 1.3e-6.)
//
// Allocates on a thread's first call, or when a call is larger than all before it on that thread;
// else never.
KVMIX_API Status Attend(const Cache& cache, std::size_t layer, const Half* q, std::size_t queries,
                        float* out, const AttendOptions& options = {});
KVMIX_API Status Attend(const Cache& cache, std::size_t layer, const float* q, std::size_t queries,
                        float* out, const AttendOptions& options = {});

// The same, part by part, for an engine with a thread pool of its own (no OpenMP inside):
//   AttendJob job;                                   // keep it: its memory is reused
//   job.Start(cache, layer, q, queries, out, options);
//   for each p in [0, job.parts()): on any thread, in any order, each once: job.RunPart(p);
// When all calls have returned, `out` is complete. Neighbouring parts read neighbouring memory:
// give a thread a run of them.
class KVMIX_API AttendJob {
 public:
  AttendJob();
  AttendJob(AttendJob&&) noexcept;
  AttendJob& operator=(AttendJob&&) noexcept;
  ~AttendJob();

  Status Start(const Cache& cache, std::size_t layer, const Half* q, std::size_t queries,
               float* out, const AttendOptions& options = {});
  Status Start(const Cache& cache, std::size_t layer, const float* q, std::size_t queries,
               float* out, const AttendOptions& options = {});
  std::size_t parts() const;
  void RunPart(std::size_t part);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvmix

#endif  // KVMIX_ATTENTION_H_
