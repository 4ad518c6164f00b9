// Attention over a few tokens that are kept as f16 rows beside a cache: f32 throughout.
#ifndef KVMIX_KERNELS_EXACT_H_
#define KVMIX_KERNELS_EXACT_H_

#include <cstddef>
#include <cstdint>

namespace kvmix::kernels {

struct ExactTask {
  const std::uint16_t* k;  // [tokens, k_dim] halves
  const std::uint16_t* v;  // [tokens, v_dim]
  std::size_t tokens, k_dim, v_dim;

  const float* q;  // [rows, k_dim], as the model has it
  std::size_t rows;
  float scale;     // attention_scale
  float soft_cap;  // 0: none
  // [rows, tokens], added to the scores after the soft cap; -inf: not seen.
  const float* added;

  // As AttendTask's: max in units of log2, sum of 2^(s - max), out [rows, v_dim] of the same.
  float* out;
  float* max;
  float* sum;
};

struct ExactKernels {
  void (*attend)(const ExactTask& task);
};

ExactKernels ExactKernelsFor(std::int64_t target);

}  // namespace kvmix::kernels

#endif  // KVMIX_KERNELS_EXACT_H_
