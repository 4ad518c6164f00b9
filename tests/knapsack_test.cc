// The knapsack against brute force, and where brute force has no chance.
#include <algorithm>
#include <cstddef>
#include <limits>
#include <optional>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "lib/tune/knapsack.h"

namespace kvmix::tune {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

using Groups = std::vector<std::vector<KnapsackOption>>;

struct Sum {
  std::size_t bytes = 0;
  double cost = 0.0;
};

Sum Add(const Groups& groups, const std::vector<std::size_t>& choice) {
  Sum sum;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    sum.bytes += groups[g].at(choice[g]).bytes;
    sum.cost += groups[g][choice[g]].cost;
  }
  return sum;
}

std::size_t BytesOf(const Groups& groups, bool most) {
  std::size_t bytes = 0;
  for (const auto& options : groups) {
    const auto [low, high] = std::ranges::minmax(options, {}, &KnapsackOption::bytes);
    bytes += most ? high.bytes : low.bytes;
  }
  return bytes;
}

double LeastCost(const Groups& groups, std::size_t budget) {
  double best = kInf;
  std::vector<std::size_t> choice(groups.size(), 0);
  for (;;) {
    const Sum sum = Add(groups, choice);
    if (sum.bytes <= budget) best = std::min(best, sum.cost);
    std::size_t g = 0;
    while (g < groups.size() && ++choice[g] == groups[g].size()) choice[g++] = 0;
    if (g == groups.size()) return best;
  }
}

// Whole numbers, so that costs compare exactly: of a wide range, of a narrow one (many ties), and
// costs that follow the sizes, the hardest for such solvers.
Groups RandomGroups(std::mt19937* random, int kind) {
  Groups groups(1 + (*random)() % 6);
  for (auto& options : groups) {
    options.resize(1 + (*random)() % 5);
    for (KnapsackOption& o : options) {
      o.bytes = 1 + (*random)() % (kind == 0 ? 100'000 : 12);
      o.cost = kind == 2 ? 100.0 - static_cast<double>(o.bytes)
                         : static_cast<double>((*random)() % (kind == 0 ? 100'000 : 6));
    }
  }
  return groups;
}

TEST(Knapsack, AgreesWithBruteForce) {
  std::mt19937 random(7);
  for (int round = 0; round < 6000; ++round) {
    const Groups groups = RandomGroups(&random, round % 3);
    const std::size_t smallest = BytesOf(groups, false), largest = BytesOf(groups, true),
                      budget = smallest + random() % (largest - smallest + 3);
    const auto choice = SolveKnapsack(groups, budget);
    ASSERT_TRUE(choice);
    const Sum sum = Add(groups, *choice);
    ASSERT_LE(sum.bytes, budget);
    ASSERT_EQ(sum.cost, LeastCost(groups, budget)) << "round " << round;
    EXPECT_FALSE(SolveKnapsack(groups, smallest - 1));
    const double enough = sum.cost + static_cast<double>(random() % 5) - 2.0;
    const double found = Add(groups, *SolveKnapsack(groups, budget, enough)).cost;
    EXPECT_EQ(found <= enough, sum.cost <= enough) << "round " << round;
  }
}

TEST(Knapsack, NoGroupsAndNoOptions) {
  EXPECT_TRUE(SolveKnapsack({}, 0)->empty());
  EXPECT_FALSE(SolveKnapsack({{}}, 10));
  EXPECT_EQ(SolveKnapsack({{{4, 1.0}, {4, 1.0}, {3, 1.0}}}, 10)->at(0), 2u);
  EXPECT_EQ(SolveKnapsack({{{4, 1.0}, {4, 1.0}, {3, 2.0}}}, 10)->at(0), 0u);
}

// Two sizes each and one cost for all: the best is to enlarge as many of the smallest as fit.
Groups UnlikeSizes(std::size_t groups) {
  std::mt19937 random(5);
  Groups all(groups);
  for (auto& options : all) {
    const std::size_t size = 1'000'000 + random() % 1'000'000;
    options = {{2 * size, 0.0}, {size, 1.0}};
  }
  return all;
}

TEST(Knapsack, IsExactWhereSizesShareNoDivisor) {
  const Groups groups = UnlikeSizes(200);
  const std::size_t smallest = BytesOf(groups, false),
                    budget = (smallest + BytesOf(groups, true)) / 2;
  std::vector<std::size_t> sizes;
  for (const auto& options : groups) sizes.push_back(options[1].bytes);
  std::ranges::sort(sizes);
  std::size_t left = budget - smallest, enlarged = 0;
  while (sizes[enlarged] <= left) left -= sizes[enlarged++];
  const auto choice = SolveKnapsack(groups, budget);
  ASSERT_TRUE(choice);
  EXPECT_LE(Add(groups, *choice).bytes, budget);
  EXPECT_EQ(Add(groups, *choice).cost, static_cast<double>(groups.size() - enlarged));
}

// Sizes without a pattern, and a cost that follows them but for a little: hardly a state is of no
// use. With too few of them allowed the choice still fits, and is not far from the best.
TEST(Knapsack, StopsAtTheStatesAllowed) {
  std::mt19937 random(9);
  Groups groups(60);
  for (auto& options : groups)
    for (int i = 0; i < 4; ++i) {
      const std::size_t bytes = 1'000'000 + random() % 1'000'000;
      options.push_back(
          {bytes, 3e6 - static_cast<double>(bytes) + static_cast<double>(random() % 99)});
    }
  const std::size_t budget = (BytesOf(groups, false) + BytesOf(groups, true)) / 2;
  const Sum few = Add(groups, *SolveKnapsack(groups, budget, -kInf, 100)),
            many = Add(groups, *SolveKnapsack(groups, budget));
  EXPECT_LE(few.bytes, budget);
  EXPECT_LE(many.bytes, budget);
  EXPECT_GE(few.cost, many.cost);
  EXPECT_LT(few.cost, 1.01 * many.cost);
}

}  // namespace
}  // namespace kvmix::tune
