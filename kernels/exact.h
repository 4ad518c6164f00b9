// Attention over a few tokens that are kept as f16 rows beside a cache: f32 throughout.
#ifndef KVMIX_KERNELS_EXACT_H_
#define KVMIX_KERNELS_EXACT_H_

#include <cstddef>
#include <cstdint>

namespace kvmix::kernels {

struct ExactTask {
  // Finite halves.
  const std::uint16_t* k;  // [tokens, k_dim]
  const std::uint16_t* v;  // [tokens, v_dim]
  // [tokens]: what the halves of a token are multiplied with, powers of two; null: 1.
  const float* k_scale;
  const float* v_scale;
  std::size_t tokens, k_dim, v_dim;

  const float* q;  // [rows, k_dim], as the model has it
  std::size_t rows;
  float scale;     // attention_scale
  float soft_cap;  // 0: none
  // [rows, tokens], added to the scores after the soft cap; -inf: not seen.
  const float* added;

  // In and out: what a row has over the tokens of earlier calls (none yet: max -inf, sum 0, out
  // zeros), then over these tokens as well. As AttendTask's: max in units of log2, NaN if a score
  // is not finite; sum of 2^(s - max); out the sum of 2^(s - max) * v. A row gets the same bits
  // whatever the other rows are.
  float* out;  // [rows, v_dim]
  float* max;
  float* sum;
};

struct ExactKernels {
  void (*attend)(const ExactTask& task);
};

ExactKernels ExactKernelsFor(std::int64_t target);

}  // namespace kvmix::kernels

#endif  // KVMIX_KERNELS_EXACT_H_
