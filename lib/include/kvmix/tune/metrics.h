// How far an attention output is from another: the errors that the tuner sums up and people read.
#ifndef KVMIX_TUNE_METRICS_H_
#define KVMIX_TUNE_METRICS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kvmix/export.h"
#include "kvmix/plan.h"
#include "kvmix/runner.h"

namespace kvmix::tune {

// Attention outputs of one query head against those of exact K and V, as sums over token rows:
// additive over prompts and dumps.
//   NMSE = sum_squared_error / sum_squared_output      cosine = sum_cosine / rows
struct KVMIX_API AttentionError {
  double sum_squared_error = 0.0;
  double sum_squared_output = 0.0;
  double sum_cosine = 0.0;  // a row that is zero in both has cosine 1, in one of them 0
  std::uint64_t rows = 0;

  double nmse() const;
  double cosine() const;
  AttentionError& operator+=(const AttentionError& o);
};

// Compares rows [rows, head_dim] (each `stride` floats apart) of one query head.
KVMIX_API AttentionError CompareOutputs(const float* exact, const float* approximate,
                                        std::size_t rows, std::size_t stride, std::size_t head_dim);

// The same of a layer's outputs, [tokens, query_heads, v_dim]: [query_heads]. The sums do not
// depend on the runner.
KVMIX_API std::vector<AttentionError> CompareLayer(const std::vector<float>& exact,
                                                   const std::vector<float>& approximate,
                                                   const LayerShape& shape,
                                                   const Runner& runner = 0);

// The worst and the mean of all query heads. errors: [layers with K and V][query_heads].
KVMIX_API Fidelity Summarize(const std::vector<AttentionError>& errors, const Model& model);

}  // namespace kvmix::tune

#endif  // KVMIX_TUNE_METRICS_H_
