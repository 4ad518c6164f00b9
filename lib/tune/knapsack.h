// The multiple-choice knapsack, exact: one option of every group, as little cost as possible,
// within a number of bytes.
#ifndef KVMIX_LIB_TUNE_KNAPSACK_H_
#define KVMIX_LIB_TUNE_KNAPSACK_H_

#include <cstddef>
#include <optional>
#include <vector>

namespace kvmix::internal {

struct KnapsackOption {
  std::size_t bytes = 0;
  double cost = 0.0;  // finite
};

// The index of the option taken in every group; nothing if even the smallest options do not fit. Of
// options that cost the same the smaller is taken, of those the first.
//
// Dynamic programming over the bytes above the smallest, in units of their greatest common divisor:
// time groups * units * options (after dropping dominated ones), memory one byte per group and
// unit. Where that would be more than 256 MB, units are larger and sizes rounded up to them: the
// choice still fits, but a better one may be missed.
std::optional<std::vector<std::size_t>> SolveKnapsack(
    const std::vector<std::vector<KnapsackOption>>& groups, std::size_t budget_bytes);

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_TUNE_KNAPSACK_H_
