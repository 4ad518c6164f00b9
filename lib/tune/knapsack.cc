#include "lib/tune/knapsack.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <utility>

#include "lib/files/check.h"

namespace kvmix::internal {
namespace {

// Cells of the table below, at most: 256 MB, and a few seconds.
constexpr std::size_t kMostCells = std::size_t{1} << 28;

struct Step {
  std::size_t excess;  // bytes (later: units) above the group's smallest option
  double cost;
  std::size_t option;
};

// The options that are not dominated, by rising size and falling cost.
std::vector<Step> Undominated(const std::vector<KnapsackOption>& options) {
  std::vector<std::size_t> order(options.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::stable_sort(
      order, {}, [&](std::size_t i) { return std::pair(options[i].bytes, options[i].cost); });
  std::vector<Step> steps;
  for (const std::size_t i : order)
    if (steps.empty() || options[i].cost < steps.back().cost)
      steps.push_back({options[i].bytes - options[order[0]].bytes, options[i].cost, i});
  return steps;
}

}  // namespace

std::optional<std::vector<std::size_t>> SolveKnapsack(
    const std::vector<std::vector<KnapsackOption>>& groups, std::size_t budget_bytes) {
  std::vector<std::vector<Step>> steps;
  std::size_t smallest = 0, unit = 0;
  for (const std::vector<KnapsackOption>& options : groups) {
    if (options.empty()) return std::nullopt;
    smallest += std::ranges::min(options, {}, &KnapsackOption::bytes).bytes;
    steps.push_back(Undominated(options));
    KVMIX_CHECK(steps.back().size(), <=, std::numeric_limits<std::uint8_t>::max());
    for (const Step& s : steps.back()) unit = std::gcd(unit, s.excess);
  }
  if (smallest > budget_bytes) return std::nullopt;
  std::size_t most_excess = 0;
  for (const std::vector<Step>& s : steps) most_excess += s.back().excess;
  const std::size_t most_units = kMostCells / std::max<std::size_t>(groups.size(), 1);
  unit = std::max({unit, std::size_t{1},
                   (std::min(budget_bytes - smallest, most_excess) + most_units - 1) / most_units});
  most_excess = 0;
  for (std::vector<Step>& s : steps) {
    for (Step& step : s) step.excess = (step.excess + unit - 1) / unit;
    most_excess += s.back().excess;
  }
  const std::size_t units = std::min((budget_bytes - smallest) / unit, most_excess);

  // best[w]: least cost of the groups so far within w units. taken[g][w]: the step of group g in
  // that solution.
  std::vector<double> best(units + 1, 0.0), next(units + 1);
  std::vector<std::vector<std::uint8_t>> taken(groups.size(),
                                               std::vector<std::uint8_t>(units + 1, 0));
  for (std::size_t g = 0; g < groups.size(); ++g) {
    for (std::size_t w = 0; w <= units; ++w) next[w] = best[w] + steps[g][0].cost;
    for (std::size_t i = 1; i < steps[g].size(); ++i) {
      for (std::size_t w = steps[g][i].excess; w <= units; ++w) {
        const double cost = best[w - steps[g][i].excess] + steps[g][i].cost;
        if (cost < next[w]) {
          next[w] = cost;
          taken[g][w] = static_cast<std::uint8_t>(i);
        }
      }
    }
    std::swap(best, next);
  }

  std::vector<std::size_t> choice(groups.size());
  std::size_t w = units;
  for (std::size_t g = groups.size(); g-- > 0;) {
    const Step& s = steps[g][taken[g][w]];
    choice[g] = s.option;
    w -= s.excess;
  }
  return choice;
}

}  // namespace kvmix::internal
