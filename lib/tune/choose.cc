// One codec for every head: the menu of pairs, three exact steps, the Pareto front.
#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "kvmix/tune.h"
#include "lib/tune/knapsack.h"

namespace kvmix {
namespace {

// A K codec with a V codec, for one KV head.
struct Pair {
  std::size_t k = 0, v = 0;  // candidate indices
  std::size_t bytes = 0;     // per token
  double worst_nmse = 0.0;   // of the group's query heads
  double sum_nmse = 0.0;
  double worst_loss = 0.0;  // 1 - cosine
  double decode_ns = 0.0;
};

// What all heads have to choose from, in the table's order: [layers * kv_heads] lists of pairs.
using Menu = std::vector<std::vector<Pair>>;
using Picks = std::vector<Pair>;  // one per KV head

constexpr double kInf = std::numeric_limits<double>::infinity();

double Loss(const AttentionError& e) { return 1.0 - e.cosine(); }

Status CheckTable(const ErrorTable& table) {
  const Geometry& g = table.geometry;
  if (Status s = CheckGeometry(g); !s.ok()) return s;
  if (table.heads.size() != g.layers * g.kv_heads * 2)
    return {ErrorCode::kMismatch,
            fmt::format("the error table has {} K and V heads, {} needs {}: layers are missing",
                        table.heads.size(), ToString(g), g.layers * g.kv_heads * 2)};
  for (std::size_t i = 0; i < table.heads.size(); ++i) {
    const HeadErrors& h = table.heads[i];
    const bool in_place = h.layer == i / 2 / g.kv_heads && h.kv_head == i / 2 % g.kv_heads &&
                          h.tensor == static_cast<Tensor>(i % 2);
    if (!in_place || h.candidates.empty() ||
        std::any_of(h.candidates.begin(), h.candidates.end(),
                    [&](const auto& c) { return c.queries.size() != g.group(); }))
      return {
          ErrorCode::kMismatch,
          fmt::format("the error table is not whole at layer {}, KV head {}", h.layer, h.kv_head)};
  }
  return {};
}

Status CheckConstraints(const Constraints& c) {
  const std::tuple<const char*, double, double, double> ranges[] = {
      {"budget", c.budget.value_or(0.0), 0.0, 1.0},
      {"min_cosine", c.min_cosine.value_or(0.0), -1.0, 1.0},
      {"max_decode_ns", c.max_decode_ns.value_or(0.0), 0.0, kInf},
      {"worst_tolerance", c.worst_tolerance, 1.0, kInf},
      {"time_tolerance", c.time_tolerance, 1.0, kInf}};
  for (const auto& [name, value, low, high] : ranges)
    if (!(value >= low && value <= high))
      return {ErrorCode::kInvalidArgument,
              fmt::format("{} {}: expected a number from {} to {}", name, value, low, high)};
  return {};
}

Result<Menu> MakeMenu(const ErrorTable& table, const Wisdom& wisdom, std::size_t context) {
  const Geometry& g = table.geometry;
  Menu menu(g.layers * g.kv_heads);
  for (std::size_t i = 0; i < menu.size(); ++i) {
    const HeadErrors& k_head = table.heads[i * 2];
    const HeadErrors& v_head = table.heads[i * 2 + 1];
    for (std::size_t k = 0; k < k_head.candidates.size(); ++k) {
      for (std::size_t v = 0; v < v_head.candidates.size(); ++v) {
        const CandidateError& kc = k_head.candidates[k];
        const CandidateError& vc = v_head.candidates[v];
        const HeadSpeed* speed = wisdom.Find(SpeedName(kc.codec.kind), SpeedName(vc.codec.kind),
                                             g.group(), g.head_dim, context);
        if (!speed)
          return Status(
              ErrorCode::kNotFound,
              fmt::format(
                  "no speed is known of K {} with V {} at head_dim {}, group {}, context {}",
                  SpeedName(kc.codec.kind), SpeedName(vc.codec.kind), g.head_dim, g.group(),
                  context));
        Pair p{k,
               v,
               BytesPerToken(kc.codec.kind, g.head_dim) + BytesPerToken(vc.codec.kind, g.head_dim),
               0.0,
               0.0,
               0.0,
               speed->decode_ns};
        for (std::size_t q = 0; q < g.group(); ++q) {
          const double nmse = kc.queries[q].nmse() + vc.queries[q].nmse();
          p.worst_nmse = std::max(p.worst_nmse, nmse);
          p.sum_nmse += nmse;
          p.worst_loss = std::max(p.worst_loss, Loss(kc.queries[q]) + Loss(vc.queries[q]));
        }
        if (std::isfinite(p.sum_nmse)) menu[i].push_back(p);
      }
    }
  }
  return menu;
}

// What is left when every head keeps the pairs that `allowed` lets through.
Menu Filter(const Menu& menu, const std::function<bool(const Pair&)>& allowed) {
  Menu left(menu.size());
  for (std::size_t i = 0; i < menu.size(); ++i)
    std::copy_if(menu[i].begin(), menu[i].end(), std::back_inserter(left[i]), allowed);
  return left;
}

Menu UpTo(const Menu& menu, double worst_nmse) {
  return Filter(menu, [=](const Pair& p) { return p.worst_nmse <= worst_nmse; });
}

// Every head's smallest pair (of those the one of least sum, then time); nothing if a head has
// none.
std::optional<Picks> Smallest(const Menu& menu) {
  Picks picks;
  for (const std::vector<Pair>& pairs : menu) {
    if (pairs.empty()) return std::nullopt;
    picks.push_back(*std::min_element(pairs.begin(), pairs.end(), [](const Pair& a, const Pair& b) {
      return std::tie(a.bytes, a.sum_nmse, a.decode_ns) <
             std::tie(b.bytes, b.sum_nmse, b.decode_ns);
    }));
  }
  return picks;
}

// The picks within `bytes` of the least total cost.
std::optional<Picks> Solve(const Menu& menu, std::size_t bytes,
                           const std::function<double(const Pair&)>& cost) {
  std::vector<std::vector<internal::KnapsackOption>> groups(menu.size());
  for (std::size_t i = 0; i < menu.size(); ++i)
    for (const Pair& p : menu[i]) groups[i].push_back({p.bytes, cost(p)});
  const auto choice = internal::SolveKnapsack(groups, bytes);
  if (!choice) return std::nullopt;
  Picks picks;
  for (std::size_t i = 0; i < menu.size(); ++i) picks.push_back(menu[i][(*choice)[i]]);
  return picks;
}

template <class T>
T Total(const Picks& picks, T Pair::*member) {
  T total{};
  for (const Pair& p : picks) total += p.*member;
  return total;
}

std::vector<double> Levels(const Menu& menu, double Pair::*member) {
  std::vector<double> levels;
  for (const std::vector<Pair>& pairs : menu)
    for (const Pair& p : pairs) levels.push_back(p.*member);
  std::sort(levels.begin(), levels.end());
  levels.erase(std::unique(levels.begin(), levels.end()), levels.end());
  return levels;
}

// The least level at which `possible` holds: it holds at every level above one at which it holds.
std::optional<double> LeastLevel(const std::vector<double>& levels,
                                 const std::function<bool(double)>& possible) {
  const auto at = std::partition_point(levels.begin(), levels.end(),
                                       [&](double level) { return !possible(level); });
  if (at == levels.end()) return std::nullopt;
  return *at;
}

bool Fits(const std::optional<Picks>& picks, std::size_t bytes) {
  return picks && Total(*picks, &Pair::bytes) <= bytes;
}

// The most bytes per token that save at least the fraction `budget`, as SavedFraction computes it.
std::size_t BytesWithin(double budget, std::size_t fp16_bytes) {
  const auto saves = [&](std::size_t bytes) {
    return 1.0 - static_cast<double>(bytes) / static_cast<double>(fp16_bytes) >= budget;
  };
  std::size_t bytes =
      static_cast<std::size_t>((1.0 - budget) * static_cast<double>(fp16_bytes)) + 1;
  while (bytes > 0 && !saves(bytes)) --bytes;
  return bytes;
}

Fidelity Predict(const ErrorTable& table, const Picks& picks) {
  const Geometry& g = table.geometry;
  std::vector<AttentionError> errors;
  for (std::size_t i = 0; i < picks.size(); ++i) {
    for (std::size_t q = 0; q < g.group(); ++q) {
      const AttentionError& k = table.heads[i * 2].candidates[picks[i].k].queries[q];
      const AttentionError& v = table.heads[i * 2 + 1].candidates[picks[i].v].queries[q];
      errors.push_back({k.nmse() + v.nmse(), 1.0, 1.0 - Loss(k) - Loss(v), 1});
    }
  }
  return Summarize(errors, g);
}

ParetoPoint Describe(const ErrorTable& table, const Picks& picks) {
  ParetoPoint point;
  point.saved_fraction = 1.0 - static_cast<double>(Total(picks, &Pair::bytes)) /
                                   static_cast<double>(Fp16BytesPerToken(table.geometry));
  point.predicted = Predict(table, picks);
  point.decode_ns = Total(picks, &Pair::decode_ns);
  for (std::size_t i = 0; i < picks.size(); ++i) {
    point.fp16_tensors +=
        table.heads[i * 2].candidates[picks[i].k].codec.kind.storage == Storage::kF16;
    point.fp16_tensors +=
        table.heads[i * 2 + 1].candidates[picks[i].v].codec.kind.storage == Storage::kF16;
  }
  return point;
}

// At most kFrontPoints of the front's levels of the worst NMSE, evenly spaced along the curve
// (saved fraction, log of the worst).
constexpr std::size_t kFrontPoints = 64;

struct FrontLevel {
  double worst;
  std::size_t bytes;
};

std::vector<FrontLevel> Thin(const std::vector<FrontLevel>& levels) {
  if (levels.size() <= kFrontPoints) return levels;
  const double floor =
      std::max(1e-12, levels.front().worst == 0.0 ? levels[1].worst : levels[0].worst);
  const auto height = [&](double worst) { return std::log(std::max(worst, floor)); };
  const double width = static_cast<double>(levels.front().bytes - levels.back().bytes);
  const double rise = std::max(height(levels.back().worst) - height(levels.front().worst), 1e-12);
  std::vector<FrontLevel> thin;
  std::size_t last_slot = 0;
  for (const FrontLevel& l : levels) {
    const double way = (static_cast<double>(levels.front().bytes - l.bytes) / width +
                        (height(l.worst) - height(levels.front().worst)) / rise) /
                       2.0;  // 0 to 1
    const std::size_t slot = static_cast<std::size_t>(way * static_cast<double>(kFrontPoints - 1));
    if (thin.empty() || slot > last_slot) {
      thin.push_back(l);
    } else if (&l == &levels.back()) {
      thin.back() = l;
    }
    last_slot = slot;
  }
  return thin;
}

// The levels of the worst error at which the smallest plan gets smaller, by rising worst error.
std::vector<FrontLevel> FrontLevels(const Menu& menu) {
  std::vector<std::pair<const Pair*, std::size_t>> pairs;  // and its head
  for (std::size_t i = 0; i < menu.size(); ++i)
    for (const Pair& p : menu[i]) pairs.emplace_back(&p, i);
  std::sort(pairs.begin(), pairs.end(),
            [](const auto& a, const auto& b) { return a.first->worst_nmse < b.first->worst_nmse; });
  std::vector<std::size_t> smallest(menu.size(), 0);  // 0: no pair of this head is allowed yet
  std::size_t heads = 0, bytes = 0;
  std::vector<FrontLevel> levels;
  for (std::size_t i = 0; i < pairs.size(); ++i) {
    const auto [pair, head] = pairs[i];
    if (smallest[head] == 0) {
      ++heads;
      bytes += smallest[head] = pair->bytes;
    } else if (pair->bytes < smallest[head]) {
      bytes -= smallest[head] - pair->bytes;
      smallest[head] = pair->bytes;
    }
    const bool level_ends =
        i + 1 == pairs.size() || pairs[i + 1].first->worst_nmse > pair->worst_nmse;
    if (level_ends && heads == menu.size() && (levels.empty() || bytes < levels.back().bytes))
      levels.push_back({pair->worst_nmse, bytes});
  }
  return levels;
}

std::vector<ParetoPoint> Front(const ErrorTable& table, const Menu& menu) {
  std::vector<ParetoPoint> front;
  for (const FrontLevel& l : Thin(FrontLevels(menu)))
    front.push_back(Describe(table, *Smallest(UpTo(menu, l.worst))));
  std::reverse(front.begin(), front.end());
  return front;
}

class Chooser {
 public:
  Chooser(const ErrorTable& table, const Menu& menu, const Constraints& constraints)
      : menu_(menu), constraints_(constraints), fp16_bytes_(Fp16BytesPerToken(table.geometry)) {}

  Result<Picks> Choose() {
    if (Status s = Restrict(); !s.ok()) return s;
    const std::optional<double> worst =
        LeastLevel(Levels(menu_, &Pair::worst_nmse), [&](double level) { return HoldsAt(level); });
    if (!worst) return TooSlow();
    menu_ = UpTo(menu_, *worst * constraints_.worst_tolerance);
    const Picks picks = *Priced(0.0);
    if (constraints_.max_decode_ns && Total(picks, &Pair::decode_ns) > *constraints_.max_decode_ns)
      return WithinTime(Total(picks, &Pair::sum_nmse));
    if (constraints_.time_tolerance == 1.0) return picks;
    const double spare_ns = Total(picks, &Pair::decode_ns) - FastestNs();
    if (spare_ns <= 0.0) return picks;
    return *Priced((constraints_.time_tolerance - 1.0) * Total(picks, &Pair::sum_nmse) / spare_ns);
  }

 private:
  // Turns the constraints into a menu and a number of bytes.
  Status Restrict() {
    const std::optional<Picks> smallest = Smallest(menu_);
    if (!smallest)
      return {ErrorCode::kInfeasible,
              "the error table has a head without any codec of finite error"};
    bytes_ = BytesWithin(constraints_.budget.value_or(0.0), fp16_bytes_);
    if (!Fits(smallest, bytes_))
      return {
          ErrorCode::kInfeasible,
          fmt::format("budget {}: the most that these codecs can save is {:.4f} of the fp16 bytes",
                      constraints_.budget.value_or(0.0), Saved(*smallest))};
    if (!constraints_.min_cosine) return {};
    const Menu accurate = AtLeast(*constraints_.min_cosine);
    const std::optional<Picks> smallest_accurate = Smallest(accurate);
    if (!smallest_accurate)
      return {ErrorCode::kInfeasible,
              fmt::format("cosine {}: the best that these codecs reach is {:.6f}",
                          *constraints_.min_cosine,
                          BestCosine(std::numeric_limits<std::size_t>::max()))};
    if (!Fits(smallest_accurate, bytes_))
      return {ErrorCode::kInfeasible,
              fmt::format("budget {} with cosine {}: with this budget the worst head reaches "
                          "{:.6f}, with this cosine {:.4f} of the bytes can be saved",
                          constraints_.budget.value_or(0.0), *constraints_.min_cosine,
                          BestCosine(bytes_), Saved(*smallest_accurate))};
    menu_ = accurate;
    if (!constraints_.budget) bytes_ = Total(*smallest_accurate, &Pair::bytes);
    return {};
  }

  Menu AtLeast(double cosine) const {
    return Filter(menu_, [=](const Pair& p) { return 1.0 - p.worst_loss >= cosine; });
  }
  double BestCosine(std::size_t bytes) const {
    const auto loss = LeastLevel(Levels(menu_, &Pair::worst_loss), [&](double level) {
      return Fits(Smallest(AtLeast(1.0 - level)), bytes);
    });
    return loss ? 1.0 - *loss : 0.0;
  }
  double Saved(const Picks& picks) const {
    return 1.0 - static_cast<double>(Total(picks, &Pair::bytes)) / static_cast<double>(fp16_bytes_);
  }

  // Some plan within bytes and time has no head above `worst`.
  bool HoldsAt(double worst) const {
    const Menu menu = UpTo(menu_, worst);
    if (!Fits(Smallest(menu), bytes_)) return false;
    return !constraints_.max_decode_ns ||
           Total(*FastestWithinBytes(menu), &Pair::decode_ns) <= *constraints_.max_decode_ns;
  }
  std::optional<Picks> FastestWithinBytes(const Menu& menu) const {
    return Solve(menu, bytes_, [](const Pair& p) { return p.decode_ns; });
  }
  Status TooSlow() const {
    return {ErrorCode::kInfeasible,
            fmt::format("decode within {:.4g} ms a token: the fastest plan that holds the other "
                        "limits takes {:.4g} ms",
                        *constraints_.max_decode_ns / 1e6,
                        Total(*FastestWithinBytes(menu_), &Pair::decode_ns) / 1e6)};
  }

  // A bound from below: every head's fastest pair, whatever its bytes.
  double FastestNs() const {
    double ns = 0.0;
    for (const std::vector<Pair>& pairs : menu_)
      ns += std::min_element(pairs.begin(), pairs.end(), [](const Pair& a, const Pair& b) {
              return a.decode_ns < b.decode_ns;
            })->decode_ns;
    return ns;
  }

  std::optional<Picks> Priced(double price) const {
    return Solve(menu_, bytes_, [=](const Pair& p) { return p.sum_nmse + price * p.decode_ns; });
  }

  // The least price of a nanosecond that brings the plan within max_decode_ns, bisected over 18
  // decades.
  Picks WithinTime(double sum_nmse) const {
    Picks within = *FastestWithinBytes(menu_);  // fits: step 1 saw to it
    const double unit = std::max(sum_nmse, 1e-12) / *constraints_.max_decode_ns;
    double low = -9.0, high = 9.0;
    for (int i = 0; i < 24; ++i) {
      const double middle = (low + high) / 2.0;
      Picks picks = *Priced(unit * std::pow(10.0, middle));
      const bool fits = Total(picks, &Pair::decode_ns) <= *constraints_.max_decode_ns;
      if (fits) within = std::move(picks);
      (fits ? high : low) = middle;
    }
    return within;
  }

  Menu menu_;
  Constraints constraints_;
  std::size_t fp16_bytes_;
  std::size_t bytes_ = 0;
};

}  // namespace

Result<Choice> Choose(const ErrorTable& table, const Wisdom& wisdom, std::size_t context,
                      const Constraints& constraints) {
  if (Status s = CheckTable(table); !s.ok()) return s;
  if (Status s = CheckConstraints(constraints); !s.ok()) return s;
  Result<Menu> menu = MakeMenu(table, wisdom, context);
  if (!menu.ok()) return menu.status();
  Result<Picks> picks = Chooser(table, *menu, constraints).Choose();
  if (!picks.ok()) return picks.status();

  Constraints timeless = constraints;
  timeless.max_decode_ns.reset();
  timeless.time_tolerance = 1.0;
  const Picks without_time = *Chooser(table, *menu, timeless).Choose();

  Choice choice;
  for (std::size_t i = 0; i < picks->size(); ++i) {
    choice.decided_by_time += (*picks)[i].k != without_time[i].k;
    choice.decided_by_time += (*picks)[i].v != without_time[i].v;
  }
  choice.plan.geometry = table.geometry;
  for (std::size_t i = 0; i < picks->size(); ++i) {
    choice.plan.codecs.push_back(table.heads[i * 2].candidates[(*picks)[i].k].codec);
    choice.plan.codecs.push_back(table.heads[i * 2 + 1].candidates[(*picks)[i].v].codec);
  }
  choice.predicted = Predict(table, *picks);
  choice.decode_ns = Total(*picks, &Pair::decode_ns);
  if (const HeadSpeed* fp16 =
          wisdom.Find("f16", "f16", table.geometry.group(), table.geometry.head_dim, context))
    choice.fp16_decode_ns = fp16->decode_ns * static_cast<double>(picks->size());
  choice.front = Front(table, *menu);
  choice.plan.provenance.model = table.model;
  choice.plan.provenance.calibration = fmt::format("{}", fmt::join(table.dumps, ", "));
  choice.plan.provenance.calibration_tokens = table.tokens;
  choice.plan.provenance.longest_prompt = table.longest_prompt;
  choice.plan.provenance.on_calibration = choice.predicted;
  return choice;
}

}  // namespace kvmix
