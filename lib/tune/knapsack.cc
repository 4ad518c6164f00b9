#include "lib/tune/knapsack.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <tuple>
#include <utility>

namespace kvmix::tune {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

struct Step {
  std::size_t bytes;
  double cost;
  std::size_t option;
};
using Steps = std::vector<Step>;  // of a group, by rising bytes and falling cost

// From one step of a group's lower convex hull to the next.
struct Increment {
  std::size_t group, from, to;
  double slope;  // cost saved per byte
};

// A partial choice: the groups tried so far as its parents say, the others at their base step.
struct State {
  std::size_t bytes;
  double cost;
  std::uint32_t parent, step;
};

// The options that are not dominated.
Steps Undominated(const std::vector<KnapsackOption>& options) {
  std::vector<std::size_t> order(options.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::stable_sort(
      order, {}, [&](std::size_t i) { return std::pair(options[i].bytes, options[i].cost); });
  Steps steps;
  for (const std::size_t i : order)
    if (steps.empty() || options[i].cost < steps.back().cost)
      steps.push_back({options[i].bytes, options[i].cost, i});
  return steps;
}

double Slope(const Step& from, const Step& to) {
  return (from.cost - to.cost) / static_cast<double>(to.bytes - from.bytes);
}

// The lower convex hull's increments, of falling slope.
void AddIncrements(const Steps& steps, std::size_t group, std::vector<Increment>* all) {
  std::vector<std::size_t> hull;
  for (std::size_t i = 0; i < steps.size(); ++i) {
    while (hull.size() > 1 && Slope(steps[hull.back()], steps[i]) >=
                                  Slope(steps[hull[hull.size() - 2]], steps[hull.back()]))
      hull.pop_back();
    hull.push_back(i);
  }
  for (std::size_t i = 1; i < hull.size(); ++i)
    all->push_back({group, hull[i - 1], hull[i], Slope(steps[hull[i - 1]], steps[hull[i]])});
}

class Solver {
 public:
  Solver(const std::vector<std::vector<KnapsackOption>>& groups, std::size_t budget, double enough)
      : budget_(budget), enough_(enough) {
    groups_.reserve(groups.size());
    for (const auto& options : groups) groups_.push_back(Undominated(options));
    best_.assign(groups.size(), 0);
    for (const Steps& steps : groups_) best_bytes_ += steps[0].bytes;
  }

  std::vector<std::size_t> Solve(std::size_t most_states) {
    Relax();
    if (price_ > 0.0) Improve(most_states);
    std::vector<std::size_t> choice;
    for (std::size_t g = 0; g < groups_.size(); ++g) choice.push_back(groups_[g][best_[g]].option);
    return choice;
  }

 private:
  // The linear relaxation: the steepest increments as long as they fit. The first that does not
  // sets the price; those after it that still fit make the first choice better.
  void Relax() {
    std::vector<Increment> increments;
    for (std::size_t g = 0; g < groups_.size(); ++g) AddIncrements(groups_[g], g, &increments);
    std::ranges::stable_sort(increments, std::greater(), &Increment::slope);
    for (const Increment& i : increments) {
      const std::size_t bytes = groups_[i.group][i.to].bytes - groups_[i.group][i.from].bytes;
      if (bytes > budget_ - best_bytes_) {
        if (price_ == 0.0) {
          price_ = i.slope;
          base_ = best_;
        }
      } else if (best_[i.group] == i.from) {
        best_[i.group] = i.to;
        best_bytes_ += bytes;
      }
    }
    for (std::size_t g = 0; g < groups_.size(); ++g) best_cost_ += groups_[g][best_[g]].cost;
  }

  double Bound(std::size_t bytes, double cost) const {
    return cost + price_ * (static_cast<double>(bytes) - static_cast<double>(budget_));
  }

  // Nothing of this bound is better than what is there, or good enough.
  bool IsNoUse(double bound) const {
    return bound >= best_cost_ || best_cost_ <= enough_ || (enough_ > -kInf && bound > enough_);
  }

  // The amount by which a step raises the bound.
  double Raise(std::size_t g, std::size_t step) const {
    const Step &to = groups_[g][step], &from = groups_[g][base_[g]];
    return to.cost - from.cost +
           price_ * (static_cast<double>(to.bytes) - static_cast<double>(from.bytes));
  }

  // The groups by the least amount that another step raises the bound.
  std::vector<std::pair<double, std::size_t>> ByRaise() const {
    std::vector<std::pair<double, std::size_t>> order;
    for (std::size_t g = 0; g < groups_.size(); ++g) {
      double least = kInf;
      for (std::size_t i = 0; i < groups_[g].size(); ++i)
        if (i != base_[g]) least = std::min(least, Raise(g, i));
      order.emplace_back(least, g);
    }
    std::ranges::sort(order);
    return order;
  }

  void Improve(std::size_t most_states) {
    State base{0, 0.0, 0, 0};
    for (std::size_t g = 0; g < groups_.size(); ++g) {
      base.bytes += groups_[g][base_[g]].bytes;
      base.cost += groups_[g][base_[g]].cost;
    }
    const double least_bound = Bound(base.bytes, base.cost);
    std::vector<std::vector<State>> tried = {{base}};
    std::vector<std::size_t> order;
    std::size_t states = 1;
    for (const auto& [raise, g] : ByRaise()) {
      if (IsNoUse(least_bound + raise)) break;  // nor are all groups after it
      order.push_back(g);
      std::vector<State> next;
      for (std::uint32_t step = 0; step < groups_[g].size(); ++step) {
        if (step != base_[g] && IsNoUse(least_bound + Raise(g, step))) continue;
        Extend(tried.back(), g, step, &next);
        if (states + next.size() > most_states) return Trace(tried, order);
      }
      KeepUndominated(&next);
      states += next.size();
      tried.push_back(std::move(next));
      for (std::uint32_t i = 0; i < tried.back().size(); ++i) {
        const State& s = tried.back()[i];
        if (s.bytes > budget_ || s.cost >= best_cost_) continue;
        best_cost_ = s.cost;
        best_state_ = {tried.size() - 1, i};
      }
    }
    Trace(tried, order);
  }

  // The states with `step` in the place of the group's base, where they may lead to a better one.
  void Extend(const std::vector<State>& states, std::size_t g, std::uint32_t step,
              std::vector<State>* next) const {
    const Step &to = groups_[g][step], &from = groups_[g][base_[g]];
    for (std::uint32_t i = 0; i < states.size(); ++i) {
      const State s{states[i].bytes - from.bytes + to.bytes, states[i].cost + (to.cost - from.cost),
                    i, step};
      if (!IsNoUse(Bound(s.bytes, s.cost))) next->push_back(s);
    }
  }

  static void KeepUndominated(std::vector<State>* states) {
    std::ranges::sort(*states, {},
                      [](const State& s) { return std::tuple(s.bytes, s.cost, s.step, s.parent); });
    double least = kInf;
    std::erase_if(*states, [&](const State& s) {
      if (s.cost >= least) return true;
      least = s.cost;
      return false;
    });
  }

  // Takes over the best state, if one was better than what Relax() found.
  void Trace(const std::vector<std::vector<State>>& tried, const std::vector<std::size_t>& order) {
    auto [level, at] = best_state_;
    if (level == 0) return;
    best_ = base_;
    for (; level > 0; --level) {
      const State& s = tried[level][at];
      best_[order[level - 1]] = s.step;
      at = s.parent;
    }
  }

  std::vector<Steps> groups_;
  std::size_t budget_;
  double enough_;
  double price_ = 0.0;                    // of a byte; 0: the cheapest options all fit
  std::vector<std::size_t> base_, best_;  // a step per group
  std::size_t best_bytes_ = 0;
  double best_cost_ = 0.0;
  std::pair<std::size_t, std::uint32_t> best_state_ = {0, 0};  // level, place in it; 0: best_
};

}  // namespace

std::optional<std::vector<std::size_t>> SolveKnapsack(
    const std::vector<std::vector<KnapsackOption>>& groups, std::size_t budget_bytes, double enough,
    std::size_t most_states) {
  std::size_t smallest = 0;
  for (const std::vector<KnapsackOption>& options : groups) {
    if (options.empty()) return std::nullopt;
    smallest += std::ranges::min(options, {}, &KnapsackOption::bytes).bytes;
  }
  if (smallest > budget_bytes) return std::nullopt;
  return Solver(groups, budget_bytes, enough).Solve(most_states);
}

}  // namespace kvmix::tune
