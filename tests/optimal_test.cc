// The choice against brute force on thousands of small random models: layers with windows, layers
// that read another's K and V, ties, limits that no plan holds.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <random>
#include <regex>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "kvmix/tune/steps.h"

namespace kvmix::tune {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr std::size_t kContext = 300;

class Instance {
 public:
  explicit Instance(std::uint32_t seed) : random_(seed), ties_(seed % 2 == 0) {
    MakeModel();
    for (std::size_t layer = 0; layer < table.model.layers.size(); ++layer) {
      const LayerShape& shape = table.model.layers[layer];
      AddSpeeds(shape);
      for (std::size_t i = 0; shape.owns_kv() && i < 2 * shape.kv_heads; ++i)
        table.heads.push_back(MakeHead(layer, i / 2, static_cast<Tensor>(i % 2)));
    }
  }

  std::size_t Pick(std::size_t below) { return random_() % below; }

  ErrorTable table;
  Wisdom wisdom;

 private:
  void MakeModel() {
    const std::size_t own = 1 + Pick(2);
    std::vector<LayerShape>& layers = table.model.layers;
    for (std::size_t i = 0; i < own; ++i) {
      LayerShape layer{.kv_heads = own == 1 ? 1 + Pick(2) : 1};
      layer.query_heads = layer.kv_heads * (1 + Pick(3));
      layer.k_dim = 8 * (1 + Pick(3));
      layer.v_dim = 8 * (1 + Pick(3));
      if (Pick(2) == 0) layer.window = 1 + Pick(400);
      layers.push_back(layer);
    }
    if (Pick(3) != 0) return;
    const std::size_t read = Pick(own);
    LayerShape reader = layers[read];
    reader.kv_layer = read;
    reader.window = Pick(2) == 0 ? 0 : 1 + Pick(400);
    layers.push_back(reader);
  }

  HeadErrors MakeHead(std::size_t layer, std::size_t kv_head, Tensor tensor) {
    HeadErrors head{layer, kv_head, tensor, 1.0, {}};
    std::vector<std::string> names = kNames;
    std::ranges::shuffle(names, random_);
    names.resize(2 + Pick(4));
    std::size_t queries = 0;
    for (const std::size_t reader : table.model.readers(layer))
      queries += table.model.layers[reader].group();
    for (const std::string& name : names) {
      head.candidates.push_back({{ParseCodecKind(name).value()}, {}, {}});
      for (std::size_t q = 0; q < queries; ++q)
        head.candidates.back().queries.push_back({Error(), 1.0, 1.0 - Error(), 1});
    }
    return head;
  }

  // Whole multiples of a power of two, so that sums are exact and ties are ties; or any numbers.
  double Error() {
    return ties_ ? static_cast<double>(Pick(4)) / 4096.0
                 : std::exp(-4.0 - static_cast<double>(random_()) / 4e8);
  }

  void AddSpeeds(const LayerShape& layer) {
    for (const std::string& k : kNames)
      for (const std::string& v : kNames)
        if (wisdom.Find(k, v, layer, kContext) == nullptr)
          wisdom.speeds.push_back({k, v, layer.group(), layer.k_dim, layer.v_dim,
                                   layer.seen(kContext), 10.0 + static_cast<double>(Pick(20))});
  }

  inline static const std::vector<std::string> kNames = {"f16", "i8-token", "i8-token-bf16",
                                                         "i4-token", "i4-token-bf16"};
  std::mt19937 random_;
  bool ties_;
};

struct Figures {
  double worst = 0.0, sum = 0.0, loss = 0.0, ns = 0.0, saved = 0.0;
};

// choice: the candidate of every K and V.
Figures FiguresOf(const Instance& instance, const std::vector<std::size_t>& choice) {
  const ErrorTable& table = instance.table;
  Figures f;
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < choice.size(); i += 2) {
    const CandidateError &k = table.heads[i].candidates[choice[i]],
                         &v = table.heads[i + 1].candidates[choice[i + 1]];
    const std::size_t layer = table.heads[i].layer;
    const LayerShape& shape = table.model.layers[layer];
    bytes += table.model.tokens_held(layer, kContext) *
             (BytesPerToken(k.codec.kind, shape.k_dim) + BytesPerToken(v.codec.kind, shape.v_dim));
    for (const std::size_t reader : table.model.readers(layer))
      f.ns += instance.wisdom
                  .Find(ToString(k.codec.kind), ToString(v.codec.kind), table.model.layers[reader],
                        kContext)
                  ->decode_ns;
    for (std::size_t q = 0; q < k.queries.size(); ++q) {
      const double nmse = k.queries[q].nmse() + v.queries[q].nmse();
      f.worst = std::max(f.worst, nmse);
      f.sum += nmse;
      f.loss = std::max(f.loss, (1.0 - k.queries[q].cosine()) + (1.0 - v.queries[q].cosine()));
    }
  }
  f.saved = 1.0 - static_cast<double>(bytes) /
                      static_cast<double>(Fp16ContextBytes(table.model, kContext));
  return f;
}

std::vector<Figures> AllPlans(const Instance& instance) {
  std::vector<Figures> plans;
  std::vector<std::size_t> choice(instance.table.heads.size(), 0);
  for (;;) {
    plans.push_back(FiguresOf(instance, choice));
    std::size_t i = 0;
    while (i < choice.size() && ++choice[i] == instance.table.heads[i].candidates.size())
      choice[i++] = 0;
    if (i == choice.size()) return plans;
  }
}

std::vector<std::size_t> Places(const Instance& instance, const Plan& plan) {
  std::vector<std::size_t> places;
  for (std::size_t i = 0; i < plan.codecs.size(); ++i) {
    const auto& candidates = instance.table.heads[i].candidates;
    const auto at = std::ranges::find(candidates, plan.codecs[i], &CandidateError::codec);
    places.push_back(static_cast<std::size_t>(at - candidates.begin()));
  }
  return places;
}

template <class Holds>
double Least(const std::vector<Figures>& plans, double Figures::*member, Holds holds) {
  double least = kInf;
  for (const Figures& f : plans)
    if (holds(f)) least = std::min(least, f.*member);
  return least;
}

bool Holds(const Figures& f, const Constraints& c) {
  return f.saved >= c.budget.value_or(0.0) && 1.0 - f.loss >= c.min_cosine.value_or(-kInf) &&
         f.ns <= c.max_decode_ns.value_or(kInf);
}

double Most(const std::vector<Figures>& plans, double Figures::*member, const Constraints& limits) {
  double most = -kInf;
  for (const Figures& f : plans)
    if (Holds(f, limits)) most = std::max(most, f.*member);
  return most;
}

// The number after `words` in a message, or NaN.
double NumberAfter(const std::string& message, const std::string& words) {
  std::smatch found;
  return std::regex_search(message, found, std::regex(words + " ([0-9.]+)"))
             ? std::stod(found[1])
             : std::numeric_limits<double>::quiet_NaN();
}

// Limits that some plan of the instance just holds, or goes just beyond; each given or not.
Constraints RandomLimits(Instance* instance, const std::vector<Figures>& plans) {
  const auto plan = [&] { return plans[instance->Pick(plans.size())]; };
  Constraints limits;
  limits.time_tolerance = 1.0;
  if (instance->Pick(4) != 0) limits.budget = std::clamp(plan().saved, 0.0, 1.0);
  if (instance->Pick(3) == 0) limits.min_cosine = 1.0 - plan().loss;
  if (instance->Pick(4) == 0) limits.max_decode_ns = plan().ns;
  return limits;
}

TEST(Choose, IsTheBestOfAllPlans) {
  std::size_t chosen = 0, infeasible = 0;
  for (std::uint32_t seed = 0; seed < 5000; ++seed) {
    Instance instance(seed);
    const std::vector<Figures> plans = AllPlans(instance);
    for (int round = 0; round < 4; ++round) {
      Constraints limits = RandomLimits(&instance, plans);
      limits.worst_tolerance = round % 2 == 0 ? 1.0 : 1.25;
      const auto choice = Choose(instance.table, instance.wisdom, kContext, limits);
      if (std::ranges::none_of(plans, [&](const Figures& f) { return Holds(f, limits); })) {
        ASSERT_EQ(choice.status().code(), ErrorCode::kInfeasible) << "seed " << seed;
        ++infeasible;
        continue;
      }
      ASSERT_TRUE(choice.ok()) << "seed " << seed << ": " << choice.status().message();
      ++chosen;
      const Figures f = FiguresOf(instance, Places(instance, choice->plan));
      EXPECT_DOUBLE_EQ(f.saved, SavedFraction(choice->plan, kContext));
      ASSERT_TRUE(Holds(f, limits)) << "seed " << seed;
      if (!limits.budget && limits.min_cosine) {  // then as much is saved as they let
        const double most = Most(plans, &Figures::saved, limits);
        ASSERT_EQ(f.saved, most) << "seed " << seed;
        limits.budget = most;
      }
      const double worst =
          Least(plans, &Figures::worst, [&](const Figures& p) { return Holds(p, limits); });
      ASSERT_LE(f.worst, worst * limits.worst_tolerance) << "seed " << seed;
      if (limits.max_decode_ns) continue;  // the sum is then nearly the least
      const double sum = Least(plans, &Figures::sum, [&](const Figures& p) {
        return Holds(p, limits) && p.worst <= worst * limits.worst_tolerance;
      });
      ASSERT_NEAR(f.sum, sum, sum * 1e-12) << "seed " << seed;
    }
  }
  EXPECT_GT(chosen, 15000u);
  EXPECT_GT(infeasible, 400u);
}

// What every reason claims, looked up in the table.
TEST(Choose, ReasonsHold) {
  std::map<Limit, std::size_t> seen;
  for (std::uint32_t seed = 0; seed < 3000; ++seed) {
    Instance instance(seed);
    const std::vector<Figures> plans = AllPlans(instance);
    Constraints limits = RandomLimits(&instance, plans);
    if (seed % 3 == 0) limits.time_tolerance = 1.5;
    const auto choice = Choose(instance.table, instance.wisdom, kContext, limits);
    if (!choice.ok()) continue;
    const std::vector<std::size_t> chosen = Places(instance, choice->plan);
    const Figures now = FiguresOf(instance, chosen);
    ASSERT_EQ(choice->reasons.size(), chosen.size());
    for (std::size_t i = 0; i < chosen.size(); ++i) {
      const HeadErrors& head = instance.table.heads[i];
      const Reason& reason = choice->reasons[i];
      const std::size_t dim = instance.table.model.layers[head.layer].dim(head.tensor);
      const auto bytes = [&](std::size_t candidate) {
        return BytesPerToken(head.candidates[candidate].codec.kind, dim);
      };
      const auto with = [&](std::size_t candidate) {
        std::vector<std::size_t> other = chosen;
        other[i] = candidate;
        return FiguresOf(instance, other);
      };
      ++seen[reason.limit];
      if (!reason.smaller) {
        EXPECT_EQ(reason.limit, Limit::kNone);
        for (std::size_t c = 0; c < head.candidates.size(); ++c)
          EXPECT_GE(bytes(c), bytes(chosen[i]));
        continue;
      }
      ASSERT_LT(bytes(*reason.smaller), bytes(chosen[i]));
      const Figures smaller = with(*reason.smaller);
      const double added = smaller.sum - now.sum;
      EXPECT_NEAR(reason.sum_nmse_added, added, 1e-12);
      // No candidate of that size, nor one between it and the chosen, does better.
      for (std::size_t c = 0; c < head.candidates.size(); ++c) {
        if (bytes(c) >= bytes(chosen[i])) continue;
        EXPECT_LE(bytes(c), bytes(*reason.smaller));
        if (bytes(c) == bytes(*reason.smaller) && reason.limit == Limit::kWorst) {
          EXPECT_GT(with(c).worst, choice->worst_limit);
        }
      }
      const bool holds = smaller.worst <= choice->worst_limit &&
                         1.0 - smaller.loss >= limits.min_cosine.value_or(-kInf);
      const double least_sum = Least(plans, &Figures::sum, [&](const Figures& f) {
        return f.worst <= choice->worst_limit && 1.0 - f.loss >= limits.min_cosine.value_or(-kInf);
      });
      switch (reason.limit) {
        case Limit::kNone:
          ADD_FAILURE() << "a smaller candidate, and no limit";
          break;
        case Limit::kWorst:
          EXPECT_GT(smaller.worst, choice->worst_limit);
          break;
        case Limit::kCosine:
          EXPECT_LE(smaller.worst, choice->worst_limit);
          EXPECT_LT(1.0 - smaller.loss, *limits.min_cosine);
          break;
        case Limit::kTime:
          EXPECT_TRUE(holds);
          EXPECT_TRUE(limits.max_decode_ns || limits.time_tolerance > 1.0);
          break;
        case Limit::kSum:
          EXPECT_TRUE(holds);
          EXPECT_GT(added, 0.0);
          EXPECT_LT(least_sum, now.sum);
          break;
        case Limit::kBudget:
          EXPECT_TRUE(holds);
          EXPECT_GT(added, 0.0);
          EXPECT_NEAR(least_sum, now.sum, 1e-12);
          break;
      }
    }
  }
  for (const Limit limit :
       {Limit::kNone, Limit::kWorst, Limit::kCosine, Limit::kTime, Limit::kSum, Limit::kBudget})
    EXPECT_GT(seen[limit], 20u) << static_cast<int>(limit);
}

// Numbers that an error names are such that a plan reaches them, and none goes a digit beyond.
TEST(Choose, ErrorsNameTheBestOfEachLimitAlone) {
  std::size_t pairs = 0, timed = 0;
  for (std::uint32_t seed = 0; seed < 8000; ++seed) {
    Instance instance(seed);
    const std::vector<Figures> plans = AllPlans(instance);
    Constraints limits = RandomLimits(&instance, plans);
    if (!limits.max_decode_ns) {
      limits.budget = std::clamp(plans[instance.Pick(plans.size())].saved, 0.0, 1.0);
      limits.min_cosine = 1.0 - plans[instance.Pick(plans.size())].loss;
    }
    const auto choice = Choose(instance.table, instance.wisdom, kContext, limits);
    if (choice.ok()) continue;
    const std::string& message = choice.status().message();
    Constraints budget, cosine, time;
    budget.budget = limits.budget;
    cosine.min_cosine = limits.min_cosine;
    time.max_decode_ns = limits.max_decode_ns;
    if (message.starts_with("decode within")) {
      if (!limits.budget) continue;
      ++timed;
      EXPECT_NEAR(NumberAfter(message, "within this time"), Most(plans, &Figures::saved, time),
                  1e-4)
          << message;
      continue;
    }
    ++pairs;
    ASSERT_TRUE(limits.budget && limits.min_cosine) << message;  // each alone can be held
    const double saved = NumberAfter(message, "with this cosine"),
                 most_saved = Most(plans, &Figures::saved, cosine),
                 worst = NumberAfter(message, "the worst head reaches"),
                 best_worst = 1.0 - Least(plans, &Figures::loss,
                                          [&](const Figures&f) { return Holds(f, budget); });
    EXPECT_LE(saved, most_saved) << message;
    EXPECT_GT(saved, most_saved - 1.0001e-4) << message;
    EXPECT_LE(worst, best_worst) << message;
    EXPECT_GT(worst, best_worst - 1.0001e-6) << message;
  }
  EXPECT_GT(pairs, 200u);
  EXPECT_GT(timed, 10u);
}

}  // namespace
}  // namespace kvmix::tune
