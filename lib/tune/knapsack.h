// The multiple-choice knapsack, exact: one option of every group, as little cost as possible,
// within a number of bytes.
#ifndef KVMIX_LIB_TUNE_KNAPSACK_H_
#define KVMIX_LIB_TUNE_KNAPSACK_H_

#include <cstddef>
#include <limits>
#include <optional>
#include <vector>

namespace kvmix::tune {

struct KnapsackOption {
  std::size_t bytes = 0;
  double cost = 0.0;  // finite
};

// The states below, at most: 100 MB.
inline constexpr std::size_t kMostKnapsackStates = std::size_t{1} << 22;

// The index of the option taken in every group; nothing if even the smallest options do not fit. Of
// a group's options that cost the same the smaller is taken, of those the first.
//
// After Pisinger, "A minimal algorithm for the multiple-choice knapsack problem" (European Journal
// of Operational Research 83, 1995). The linear relaxation gives a price of a byte, and with it
//   bound = cost + price * (bytes - budget_bytes)
// a bound from below of what any choice costs. Where every group takes the option of least
// cost + price * bytes the bound is least; another option raises it by a known amount, and is no
// use where that leads above the cost of a choice already found. The groups where something is left
// to choose are few; they are tried in the order of that amount, and of the partial choices
// ("states") only those are kept that no other one beats in both bytes and cost.
//
// Exact whatever the sizes, up to the rounding of sums of doubles. `enough`: a cost that is as good
// as the least; whether there is one is known much sooner. Tables made to be hard can ask for more
// than `most_states` states: then the best choice found so far is returned.
std::optional<std::vector<std::size_t>> SolveKnapsack(
    const std::vector<std::vector<KnapsackOption>>& groups, std::size_t budget_bytes,
    double enough = -std::numeric_limits<double>::infinity(),
    std::size_t most_states = kMostKnapsackStates);

}  // namespace kvmix::tune

#endif  // KVMIX_LIB_TUNE_KNAPSACK_H_
