// The choice against brute force: every combination of codecs of small random tables.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <ctime>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "kvmix/tune/steps.h"

namespace kvmix::tune {
namespace {

HeadCodec Codec(const CodecKind& kind, std::size_t head_dim) {
  CodecVectors vectors{std::vector<float>(kind.centre ? head_dim : 0, 0.5f),
                       std::vector<float>(kind.fold ? head_dim : 0, 2.0f),
                       std::vector<float>(kind.shape ? head_dim * head_dim : 0, 0.0f)};
  for (std::size_t c = 0; kind.shape && c < head_dim; ++c) vectors.shaping[c * (head_dim + 1)] = 1;
  return {kind, kind.scale == KVMIX_SCALE_HEAD ? 0.1f : 0.0f,
          std::make_shared<const CodecVectors>(std::move(vectors))};
}

// Errors drawn at random, over three orders of magnitude; fp16 is exact.
ErrorTable RandomTable(const Geometry& g, const CandidateKinds& kinds, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> log_error(-6.0, -3.0);
  ErrorTable table;
  table.model = g;
  table.model_name = "random";
  table.dumps = {"a", "b"};
  for (std::size_t i = 0; i < g.layers * g.kv_heads * 2; ++i) {
    HeadErrors head{i / 2 / g.kv_heads, i / 2 % g.kv_heads, static_cast<Tensor>(i % 2), 1.0, {}};
    for (const CodecKind& kind : i % 2 == 0 ? kinds.k : kinds.v) {
      CandidateError c{Codec(kind, g.head_dim), {}, {}};
      for (std::size_t q = 0; q < g.group(); ++q) {
        const double nmse =
            kind.storage == KVMIX_STORAGE_F16 ? 0.0 : std::pow(10.0, log_error(random));
        c.queries.push_back({nmse * 2.0, 2.0, (1.0 - nmse / 2.0) * 10.0, 10});
      }
      head.candidates.push_back(c);
    }
    table.heads.push_back(head);
  }
  return table;
}

ErrorTable RandomTable(const Geometry& g, const std::string& candidates, std::uint32_t seed) {
  return RandomTable(g, *Candidates(candidates), seed);
}

// int8 takes half of fp16's time, a tenth more for each stored scale; i4 a little less.
Wisdom Speeds(const Geometry& g, std::size_t context) {
  const std::vector<std::pair<std::string, double>> codecs = {
      {"f16", 100.0},          {"i8-head", 50.0},       {"i8-token", 60.0},
      {"i8-token-bf16", 55.0}, {"i4-token", 48.0},      {"i4-token-bf16", 45.0},
      {"i6-token-bf16", 52.0}, {"i3-token-bf16", 49.0}, {"i8x8-token-bf16", 50.0}};
  Wisdom wisdom;
  for (const auto& [k, k_ns] : codecs)
    for (const auto& [v, v_ns] : codecs)
      wisdom.speeds.push_back({k, v, g.group(), g.head_dim, g.head_dim, context, k_ns + v_ns});
  return wisdom;
}

struct Figures {
  double worst = 0.0, sum = 0.0, loss = 0.0, ns = 0.0, saved = 0.0;
};

Figures FiguresOf(const ErrorTable& table, const std::vector<std::size_t>& picks,
                  const Wisdom& wisdom, std::size_t context) {
  const Geometry g = table.model.geometry().value();
  Figures f;
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < picks.size(); i += 2) {
    const CandidateError& k = table.heads[i].candidates[picks[i]];
    const CandidateError& v = table.heads[i + 1].candidates[picks[i + 1]];
    bytes += BytesPerToken(k.codec.kind, g.head_dim) + BytesPerToken(v.codec.kind, g.head_dim);
    const auto name = [](const HeadCodec& c) {
      return ToString(c.kind).substr(0, ToString(c.kind).find('+'));
    };
    f.ns += wisdom.Find(name(k.codec), name(v.codec), table.model.layers[0], context)->decode_ns;
    for (std::size_t q = 0; q < g.group(); ++q) {
      const double nmse = k.queries[q].nmse() + v.queries[q].nmse();
      f.worst = std::max(f.worst, nmse);
      f.sum += nmse;
      f.loss = std::max(f.loss, 2.0 - k.queries[q].cosine() - v.queries[q].cosine());
    }
  }
  f.saved = 1.0 - static_cast<double>(bytes) / static_cast<double>(Fp16BytesPerToken(g));
  return f;
}

std::vector<Figures> AllPlans(const ErrorTable& table, const Wisdom& wisdom, std::size_t context) {
  std::vector<Figures> plans;
  std::vector<std::size_t> picks(table.heads.size(), 0);
  for (;;) {
    plans.push_back(FiguresOf(table, picks, wisdom, context));
    std::size_t i = 0;
    while (i < picks.size() && ++picks[i] == table.heads[i].candidates.size()) picks[i++] = 0;
    if (i == picks.size()) return plans;
  }
}

Figures FiguresOf(const ErrorTable& table, const Choice& choice, const Wisdom& wisdom,
                  std::size_t context) {
  std::vector<std::size_t> picks;
  for (std::size_t i = 0; i < table.heads.size(); ++i) {
    const auto& candidates = table.heads[i].candidates;
    picks.push_back(static_cast<std::size_t>(
        std::find_if(candidates.begin(), candidates.end(),
                     [&](const auto& c) { return c.codec == choice.plan.codecs[i]; }) -
        candidates.begin()));
  }
  return FiguresOf(table, picks, wisdom, context);
}

constexpr double kInf = std::numeric_limits<double>::infinity();

template <class Allowed>
double Least(const std::vector<Figures>& plans, double Figures::*member, Allowed allowed) {
  double least = kInf;
  for (const Figures& f : plans)
    if (allowed(f)) least = std::min(least, f.*member);
  return least;
}

const Geometry kSmall{2, 2, 4, 16};     // 3^8 = 6561 plans of the seed's codecs
const Geometry kOneLayer{1, 2, 4, 64};  // (13 * 5)^2 = 4225 plans of all codecs
constexpr std::size_t kContext = 1024;

TEST(Choose, WorstThenSumThenTimeAgreeWithBruteForce) {
  for (std::uint32_t seed = 0; seed < 28; ++seed) {
    const ErrorTable table =
        seed < 20 ? RandomTable(kSmall, "seed", seed) : RandomTable(kOneLayer, "all", seed);
    const Wisdom wisdom = Speeds(table.model.geometry().value(), kContext);
    const std::vector<Figures> plans = AllPlans(table, wisdom, kContext);
    for (const double budget : {0.05, 0.2, 0.3, 0.4, 0.45, 0.5}) {
      if (budget == 0.5 && seed >= 20) continue;  // scales take bytes as well
      Constraints constraints;
      constraints.budget = budget;
      const auto choice = Choose(table, wisdom, kContext, constraints);
      ASSERT_TRUE(choice.ok()) << choice.status().message();
      const Figures chosen = FiguresOf(table, *choice, wisdom, kContext);
      const double t = constraints.time_tolerance;
      const double worst =
          Least(plans, &Figures::worst, [&](const Figures& f) { return f.saved >= budget; });
      const auto accurate = [&](const Figures& f) {
        return f.saved >= budget && f.worst <= worst * constraints.worst_tolerance;
      };
      const double sum = Least(plans, &Figures::sum, accurate);
      EXPECT_GE(chosen.saved, budget);
      EXPECT_LE(chosen.worst, worst * constraints.worst_tolerance);
      EXPECT_LE(chosen.sum, sum * t * (1 + 1e-12));
      // Step 3: no plan has a smaller sum + price * time, with the price as the header says it.
      double ns_of_least_sum = kInf;
      for (const Figures& f : plans)
        if (accurate(f) && f.sum <= sum * (1 + 1e-12))
          ns_of_least_sum = std::min(ns_of_least_sum, f.ns);
      const double spare_ns = ns_of_least_sum - Least(plans, &Figures::ns, [&](const Figures& f) {
                                return f.worst <= worst * constraints.worst_tolerance;
                              });
      const double price = spare_ns > 0.0 ? (t - 1.0) * sum / spare_ns : 0.0;
      double least_priced = kInf;
      for (const Figures& f : plans)
        if (accurate(f)) least_priced = std::min(least_priced, f.sum + price * f.ns);
      EXPECT_NEAR(chosen.sum + price * chosen.ns, least_priced, least_priced * 1e-9);
      EXPECT_LE(chosen.ns, ns_of_least_sum * (1 + 1e-12));
      Constraints exact = constraints;
      exact.worst_tolerance = 1.0;
      EXPECT_EQ(FiguresOf(table, *Choose(table, wisdom, kContext, exact), wisdom, kContext).worst,
                worst);
      EXPECT_NEAR(choice->predicted.worst_nmse, chosen.worst, 1e-15);
      EXPECT_NEAR(choice->predicted.worst_cosine, 1.0 - chosen.loss, 1e-12);
      EXPECT_NEAR(choice->decode_ns, chosen.ns, 1e-9);
    }
  }
}

TEST(Choose, TakesTheFasterOfPlansThatAreAlikeInAccuracy) {
  ErrorTable table = RandomTable(kSmall, "int8", 1);
  for (HeadErrors& head : table.heads)
    for (CandidateError& c : head.candidates)
      for (AttentionError& e : c.queries)
        e = {c.codec.kind.storage == KVMIX_STORAGE_F16 ? 0.0
             : c.codec.kind.scale == KVMIX_SCALE_TOKEN ? 1e-4
                                                       : 1.001e-4,
             1.0, 1.0, 1};
  Constraints constraints;
  constraints.budget = 0.3;
  const auto all_bf16 = [](const Choice& c) {
    return std::all_of(c.plan.codecs.begin(), c.plan.codecs.end(), [](const HeadCodec& h) {
      return h.kind.storage == KVMIX_STORAGE_F16 || h.kind.scale == KVMIX_SCALE_TOKEN_BF16;
    });
  };
  EXPECT_TRUE(all_bf16(*Choose(table, Speeds(kSmall, kContext), kContext, constraints)));
  constraints.time_tolerance = 1.0;
  EXPECT_FALSE(all_bf16(*Choose(table, Speeds(kSmall, kContext), kContext, constraints)));
}

// Wisdom of a CPU that is slow where one of K and V is i4 and the other is not, and heads of which
// i4 costs each about as much: which ones have it hardly matters to accuracy, and much to time.
TEST(Choose, SaysWhatIgnoringTimesCosts) {
  ErrorTable table = RandomTable({8, 2, 8, 64}, "all", 3);
  std::mt19937 random(3);
  for (HeadErrors& head : table.heads) {
    const double factor = 1.0 + static_cast<double>(random() % 100) / 1e4;
    std::erase_if(head.candidates, [](const CandidateError& c) {
      return c.codec.kind.storage == KVMIX_STORAGE_I6 || c.codec.kind.storage == KVMIX_STORAGE_I3;
    });
    for (CandidateError& c : head.candidates) {
      const Storage storage = c.codec.kind.storage;
      const double nmse = storage == KVMIX_STORAGE_F16  ? 0.0
                          : storage == KVMIX_STORAGE_I8 ? 1e-5
                          : storage == KVMIX_STORAGE_I4 ? 1e-3
                                                        : 1.0;  // out of the question
      for (AttentionError& e : c.queries) e = {nmse * factor, 1.0, 1.0 - nmse, 1};
    }
  }
  Wisdom wisdom = Speeds(table.model.geometry().value(), kContext);
  for (HeadSpeed& s : wisdom.speeds)
    if (s.k_codec.starts_with("i4") != s.v_codec.starts_with("i4")) s.decode_ns *= 1.5;
  Constraints constraints, timeless;
  constraints.budget = timeless.budget = 0.6;
  constraints.worst_tolerance = timeless.worst_tolerance = 2.5;  // K and V both i4, or one
  timeless.time_tolerance = 1.0;
  const Choice with = *Choose(table, wisdom, kContext, constraints),
               without = *Choose(table, wisdom, kContext, timeless);
  EXPECT_GT(with.decided_by_time, 0u);
  EXPECT_EQ(with.without_times.decode_ns, without.decode_ns);
  EXPECT_EQ(with.without_times.predicted.mean_nmse, without.predicted.mean_nmse);
  EXPECT_EQ(with.without_times.saved_fraction, SavedFraction(without.plan, kContext));
  EXPECT_LT(with.decode_ns, 0.85 * without.decode_ns);
  EXPECT_LE(with.predicted.mean_nmse,
            constraints.time_tolerance * without.predicted.mean_nmse * (1.0 + 1e-12));
}

// Other times for the same codecs, as of another run or machine.
Wisdom OtherSpeeds(Wisdom wisdom, std::uint32_t seed) {
  std::mt19937 random(seed);
  for (HeadSpeed& s : wisdom.speeds) s.decode_ns = 50.0 + static_cast<double>(random() % 100);
  return wisdom;
}

TEST(Choose, WithoutTimeToleranceIsTheSameWhateverTheTimes) {
  const Wisdom wisdom = Speeds(kSmall, kContext);
  std::size_t moved = 0, decided = 0;
  for (std::uint32_t seed = 0; seed < 20; ++seed) {
    const ErrorTable table = RandomTable(kSmall, "int8", seed);
    Constraints constraints;
    constraints.budget = 0.4;
    Constraints timeless = constraints;
    timeless.time_tolerance = 1.0;
    const Choice without = *Choose(table, wisdom, kContext, timeless);
    EXPECT_EQ(without.decided_by_time, 0u);
    for (std::uint32_t other = 0; other < 5; ++other) {
      const Wisdom speeds = OtherSpeeds(wisdom, other);
      EXPECT_EQ(Choose(table, speeds, kContext, timeless)->plan.codecs, without.plan.codecs);
      const Choice with = *Choose(table, speeds, kContext, constraints);
      std::size_t differ = 0;
      for (std::size_t i = 0; i < with.plan.codecs.size(); ++i)
        differ += with.plan.codecs[i] != without.plan.codecs[i];
      EXPECT_EQ(with.decided_by_time, differ);
      decided += differ;
      moved += with.plan.codecs != Choose(table, wisdom, kContext, constraints)->plan.codecs;
    }
  }
  EXPECT_GT(decided, 0u);  // times do decide where they may
  EXPECT_GT(moved, 0u);
}

TEST(Choose, CountsWhatALimitOfTimeDecides) {
  const ErrorTable table = RandomTable(kSmall, "seed", 2);
  Constraints constraints;
  constraints.budget = 0.2;
  constraints.time_tolerance = 1.0;
  const Choice free = *Choose(table, Speeds(kSmall, kContext), kContext, constraints);
  constraints.max_decode_ns = free.decode_ns;
  EXPECT_EQ(Choose(table, Speeds(kSmall, kContext), kContext, constraints)->decided_by_time, 0u);
  constraints.max_decode_ns = free.decode_ns - 1.0;
  EXPECT_GT(Choose(table, Speeds(kSmall, kContext), kContext, constraints)->decided_by_time, 0u);
}

TEST(Choose, RefusesNumbersThatAreNone) {
  const ErrorTable table = RandomTable(kSmall, "seed", 1);
  const auto message = [&](const auto& set) {
    Constraints constraints;
    set(constraints);
    const auto choice = Choose(table, Speeds(kSmall, kContext), kContext, constraints);
    EXPECT_EQ(choice.status().code(), ErrorCode::kInvalidArgument);
    return choice.status().message();
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_EQ(message([](Constraints& c) { c.budget = -1.0; }),
            "budget -1: expected a number from 0 to 1");
  EXPECT_EQ(message([](Constraints& c) { c.min_cosine = 1.5; }),
            "min_cosine 1.5: expected a number from -1 to 1");
  EXPECT_EQ(message([=](Constraints& c) { c.max_decode_ns = nan; }),
            "max_decode_ns nan: expected a number from 0 to inf");
  EXPECT_EQ(message([](Constraints& c) { c.worst_tolerance = 0.5; }),
            "worst_tolerance 0.5: expected a number from 1 to inf");
  EXPECT_EQ(message([](Constraints& c) { c.time_tolerance = 0.9; }),
            "time_tolerance 0.9: expected a number from 1 to inf");
}

TEST(Choose, MinCosine) {
  const Wisdom wisdom = Speeds(kSmall, kContext);
  for (std::uint32_t seed = 0; seed < 20; ++seed) {
    const ErrorTable table = RandomTable(kSmall, "seed", seed);
    const std::vector<Figures> plans = AllPlans(table, wisdom, kContext);
    for (const double cosine : {0.9999, 0.99998, 0.999995}) {
      Constraints constraints;
      constraints.min_cosine = cosine;
      const auto choice = Choose(table, wisdom, kContext, constraints);
      ASSERT_TRUE(choice.ok());
      double most_saved = 0.0;
      for (const Figures& f : plans)
        if (1.0 - f.loss >= cosine) most_saved = std::max(most_saved, f.saved);
      const Figures chosen = FiguresOf(table, *choice, wisdom, kContext);
      EXPECT_EQ(chosen.saved, most_saved);
      EXPECT_GE(1.0 - chosen.loss, cosine - 1e-15);
    }
  }
}

TEST(Choose, MaxDecodeTime) {
  const Wisdom wisdom = Speeds(kSmall, kContext);
  for (std::uint32_t seed = 0; seed < 20; ++seed) {
    const ErrorTable table = RandomTable(kSmall, "seed", seed);
    const std::vector<Figures> plans = AllPlans(table, wisdom, kContext);
    Constraints constraints;
    constraints.budget = 0.2;
    for (const double ns : {430.0, 500.0, 600.0, 700.0}) {
      constraints.max_decode_ns = ns;
      const auto choice = Choose(table, wisdom, kContext, constraints);
      ASSERT_TRUE(choice.ok()) << choice.status().message();
      const auto holds = [&](const Figures& f) { return f.saved >= 0.2 && f.ns <= ns; };
      const double worst = Least(plans, &Figures::worst, holds);
      const Figures chosen = FiguresOf(table, *choice, wisdom, kContext);
      EXPECT_LE(chosen.ns, ns);
      EXPECT_LE(chosen.worst, worst * constraints.worst_tolerance);
    }
    constraints.max_decode_ns = 399.0;
    const auto choice = Choose(table, wisdom, kContext, constraints);
    ASSERT_FALSE(choice.ok());
    EXPECT_EQ(choice.status().code(), ErrorCode::kInfeasible);
    EXPECT_NE(choice.status().message().find("within 0.000399 ms a token: the fastest plan that "
                                             "holds the other limits takes 0.0004 ms"),
              std::string::npos)
        << choice.status().message();
  }
}

TEST(Choose, FrontIsWhatBruteForceFinds) {
  const Wisdom wisdom = Speeds(kSmall, kContext);
  const ErrorTable table = RandomTable(kSmall, "seed", 3);
  const std::vector<Figures> plans = AllPlans(table, wisdom, kContext);
  Constraints constraints;
  constraints.budget = 0.4;
  const Choice choice = *Choose(table, wisdom, kContext, constraints);
  ASSERT_GE(choice.front.size(), 3u);
  EXPECT_LE(choice.front.size(), 64u);
  EXPECT_NEAR(choice.front.front().saved_fraction, 0.5, 1e-12);
  EXPECT_EQ(choice.front.back().predicted.worst_nmse, 0.0);
  for (std::size_t i = 0; i < choice.front.size(); ++i) {
    const ParetoPoint& p = choice.front[i];
    if (i) {
      EXPECT_LT(p.saved_fraction, choice.front[i - 1].saved_fraction);
      EXPECT_LT(p.predicted.worst_nmse, choice.front[i - 1].predicted.worst_nmse);
    }
    const double least = Least(plans, &Figures::worst, [&](const Figures& f) {
      return f.saved >= p.saved_fraction - 1e-12;
    });
    EXPECT_NEAR(p.predicted.worst_nmse, least, 1e-12);
  }
}

TEST(Choose, InfeasibleSaysWhatIsPossible) {
  const ErrorTable table = RandomTable(kSmall, "seed", 1);
  const Wisdom wisdom = Speeds(kSmall, kContext);
  const auto message = [&](std::optional<double> budget, std::optional<double> cosine) {
    Constraints constraints;
    constraints.budget = budget;
    constraints.min_cosine = cosine;
    const auto choice = Choose(table, wisdom, kContext, constraints);
    EXPECT_FALSE(choice.ok());
    EXPECT_EQ(choice.status().code(), ErrorCode::kInfeasible);
    return choice.status().message();
  };
  EXPECT_NE(message(0.8, {}).find("0.5000"), std::string::npos) << message(0.8, {});
  EXPECT_NE(message(0.45, 0.9999999).find("worst head reaches 0.99"), std::string::npos)
      << message(0.45, 0.9999999);
}

// Two layers that see a window, one of them read by a third that sees all.
TEST(Choose, UnlikeLayersCountWhatAContextTakes) {
  const LayerShape local{.kv_heads = 1, .query_heads = 2, .k_dim = 16, .v_dim = 16, .window = 64};
  Model model({local, local, {.kv_heads = 1, .query_heads = 1, .k_dim = 48, .v_dim = 32}, {}});
  LayerShape shared = local;
  shared.window = 200;
  shared.query_heads = 3;
  shared.kv_layer = 1;
  model.layers.push_back(shared);
  ASSERT_TRUE(CheckModel(model).ok());
  const CandidateKinds kinds = *Candidates("seed");
  Wisdom wisdom;
  std::mt19937 random(3);
  std::uniform_real_distribution<double> log_error(-6.0, -3.0), ns(50.0, 150.0);
  for (const LayerShape& layer : model.layers) {
    for (const CodecKind& k : kinds.k) {
      for (const CodecKind& v : kinds.v) {
        if (layer.has_kv() && wisdom.Find(SpeedName(k), SpeedName(v), layer, kContext) == nullptr)
          wisdom.speeds.push_back({SpeedName(k), SpeedName(v), layer.group(), layer.k_dim,
                                   layer.v_dim, layer.seen(kContext), ns(random)});
      }
    }
  }
  EXPECT_EQ(wisdom.speeds.size(), 3u * 9u);
  ErrorTable table;
  table.model = model;
  for (std::size_t i = 0; i < 6; ++i) {
    const std::size_t layer = i / 2, queries = std::vector<std::size_t>{2, 5, 1}[layer];
    HeadErrors head{layer, 0, static_cast<Tensor>(i % 2), 1.0, {}};
    for (const CodecKind& kind : kinds.k) {
      CandidateError c{Codec(kind, 0), {}, {}};
      for (std::size_t q = 0; q < queries; ++q)
        c.queries.push_back(
            {kind.storage == KVMIX_STORAGE_F16 ? 0.0 : std::pow(10.0, log_error(random)), 1.0, 1.0,
             1});
      head.candidates.push_back(c);
    }
    table.heads.push_back(head);
  }
  for (const double budget : {0.1, 0.3, 0.45}) {
    Constraints constraints;
    constraints.budget = budget;
    constraints.time_tolerance = 1.0;
    const auto choice = Choose(table, wisdom, kContext, constraints);
    ASSERT_TRUE(choice.ok()) << choice.status().message();
    EXPECT_GE(SavedFraction(choice->plan, kContext), budget);
    // All plans, 3^6.
    double least = kInf;
    double of_choice = 0.0, ns_of_choice = 0.0;
    for (std::size_t number = 0; number < 729; ++number) {
      Plan plan{model, {}, {}};
      double worst = 0.0, time = 0.0;
      for (std::size_t i = 0, rest = number; i < 6; ++i, rest /= 3)
        plan.codecs.push_back(table.heads[i].candidates[rest % 3].codec);
      for (std::size_t i = 0, rest = number; i < 6; i += 2, rest /= 9) {
        const auto &k = table.heads[i].candidates[rest % 3],
                   &v = table.heads[i + 1].candidates[rest / 3 % 3];
        for (std::size_t q = 0; q < k.queries.size(); ++q)
          worst = std::max(worst, k.queries[q].nmse() + v.queries[q].nmse());
        for (const std::size_t reader : model.readers(i / 2))
          time += wisdom
                      .Find(SpeedName(k.codec.kind), SpeedName(v.codec.kind), model.layers[reader],
                            kContext)
                      ->decode_ns;
      }
      if (plan.codecs == choice->plan.codecs) {
        of_choice = worst;
        ns_of_choice = time;
      }
      if (SavedFraction(plan, kContext) >= budget) least = std::min(least, worst);
    }
    EXPECT_LE(of_choice, least * constraints.worst_tolerance);
    EXPECT_DOUBLE_EQ(choice->predicted.worst_nmse, of_choice);
    EXPECT_DOUBLE_EQ(choice->decode_ns, ns_of_choice);
    EXPECT_GT(choice->fp16_decode_ns, 0.0);
    EXPECT_EQ(
        choice->front.front().saved_fraction,
        SavedFraction(UniformPlan(model, Codec(kinds.k[1], 0), Codec(kinds.k[1], 0)), kContext));
  }
  table.heads[2].candidates[0].queries.pop_back();  // a query of layer 4
  EXPECT_EQ(Choose(table, wisdom, kContext, {}).status().code(), ErrorCode::kMismatch);
}

TEST(Choose, RefusesTablesThatAreNotWhole) {
  ErrorTable table = RandomTable(kSmall, "seed", 1);
  Constraints constraints;
  constraints.budget = 0.4;
  EXPECT_EQ(Choose(table, Wisdom{}, kContext, constraints).status().code(), ErrorCode::kNotFound);
  table.heads.pop_back();
  EXPECT_EQ(Choose(table, Speeds(kSmall, kContext), kContext, constraints).status().code(),
            ErrorCode::kMismatch);
}

// 20 candidates each for K and V, in both storages with any steps.
ErrorTable LargeTable() {
  CandidateKinds kinds{{{}}, {}};
  for (std::size_t i = 0; kinds.k.size() < 20; ++i)
    kinds.k.push_back({.storage = i < 10 ? KVMIX_STORAGE_I8 : KVMIX_STORAGE_I4,
                       .scale = i % 2 == 0 ? KVMIX_SCALE_TOKEN : KVMIX_SCALE_TOKEN_BF16,
                       .centre = i / 2 % 5 % 2 == 1,
                       .fold = i / 2 % 5 == 4,
                       .hadamard = i / 2 % 5 / 2 == 1});
  kinds.v = kinds.k;
  return RandomTable({126, 8, 128, 128}, kinds, 5);
}

#if !defined(__has_feature)
#define __has_feature(x) 0
#endif
#if defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__) && !__has_feature(address_sanitizer)
constexpr bool kFullSpeed = true;
#else
constexpr bool kFullSpeed = false;
#endif

TEST(Choose, LargeModelsTakeLessThanASecond) {
  const ErrorTable table = LargeTable();
  const Wisdom wisdom = Speeds(table.model.geometry().value(), kContext);
  for (const double budget : {0.1, 0.45, 0.49, 0.62, 0.7}) {
    Constraints constraints;
    constraints.budget = budget;
    const std::clock_t start = std::clock();
    const auto choice = Choose(table, wisdom, kContext, constraints);
    const std::clock_t taken = std::clock() - start;
    EXPECT_TRUE(taken < CLOCKS_PER_SEC || !kFullSpeed) << taken;
    ASSERT_TRUE(choice.ok());
    EXPECT_GE(SavedFraction(choice->plan), budget);
    EXPECT_LE(choice->front.size(), 64u);
    EXPECT_GE(choice->front.size(), 30u);
    constraints.max_decode_ns = choice->decode_ns * 0.999;
    const auto faster = Choose(table, wisdom, kContext, constraints);
    ASSERT_TRUE(faster.ok()) << faster.status().message();
    EXPECT_LE(faster->decode_ns, constraints.max_decode_ns);
    EXPECT_GE(SavedFraction(faster->plan), budget);
  }
}

// A plan that turns out as predicted leaves the table as it is; a head that does not is held for as
// bad as it was, with all its candidates, and another plan is chosen.
TEST(RaiseToTruth, RaisesTheHeadsThatAreWorseThanPredicted) {
  const Geometry g{3, 2, 4, 16};
  const ErrorTable table = RandomTable(g, "int8", 5);
  const Wisdom wisdom = Speeds(g, 100);
  Constraints constraints;
  constraints.budget = 0.4;
  const Choice choice = Choose(table, wisdom, 100, constraints).value();
  std::vector<AttentionError> truth;
  const auto nmse = [&](const ErrorTable& t, std::size_t i, std::size_t q) {
    for (const CandidateError& c : t.heads[i].candidates)
      if (c.codec.kind == choice.plan.codecs[i].kind) return c.queries[q].nmse();
    return 1.0;
  };
  for (std::size_t i = 0; i < table.heads.size(); i += 2) {
    for (std::size_t q = 0; q < 2; ++q) {
      const double predicted = nmse(table, i, q) + nmse(table, i + 1, q);
      truth.push_back({1.4 * predicted, 1.0, 1.0, 1});
    }
  }
  ErrorTable raised = table;
  EXPECT_EQ(RaiseToTruth(choice.plan, truth, 1.5, &raised), 0u);
  const auto same = [&](std::size_t i) {
    for (std::size_t c = 0; c < table.heads[i].candidates.size(); ++c) {
      for (std::size_t q = 0; q < 2; ++q) {
        if (raised.heads[i].candidates[c].queries[q].nmse() !=
            table.heads[i].candidates[c].queries[q].nmse())
          return false;
      }
    }
    return true;
  };
  for (std::size_t i = 0; i < table.heads.size(); ++i) EXPECT_TRUE(same(i));

  // Layer 1, KV head 1, its second query head.
  const std::size_t head = 6, query = 7;
  truth[query].sum_squared_error *= 100.0;
  EXPECT_EQ(RaiseToTruth(choice.plan, truth, 1.5, &raised), 1u);
  for (std::size_t i = 0; i < table.heads.size(); ++i)
    EXPECT_EQ(same(i), i != head && i != head + 1) << i;
  EXPECT_NEAR(nmse(raised, head, 1) + nmse(raised, head + 1, 1), truth[query].nmse(), 1e-12);
  const AttentionError &was = table.heads[head].candidates[1].queries[0],
                       &is = raised.heads[head].candidates[1].queries[0];
  EXPECT_NEAR((1.0 - is.cosine()) / (1.0 - was.cosine()), 140.0, 1e-6);
  EXPECT_EQ(raised.heads[head].candidates[0].queries[0].nmse(), 0.0);  // f16 stays exact
  const Choice again = Choose(raised, wisdom, 100, constraints).value();
  EXPECT_NE(again.plan.codecs, choice.plan.codecs);
}

}  // namespace
}  // namespace kvmix::tune
