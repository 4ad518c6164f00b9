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
#include "lib/files/file.h"
#include "lib/tune/knapsack.h"

namespace kvmix {

using internal::Error;

namespace {

// A K codec with a V codec, for one KV head.
struct Pair {
  const CandidateError* k = nullptr;
  const CandidateError* v = nullptr;
  std::size_t bytes = 0;    // per token
  double worst_nmse = 0.0;  // of the group's query heads
  double sum_nmse = 0.0;
  double worst_loss = 0.0;  // 1 - cosine
  double decode_ns = 0.0;
};

// What all heads have to choose from, in the table's order: [layers * kv_heads] lists of pairs.
using Menu = std::vector<std::vector<Pair>>;
using Picks = std::vector<Pair>;  // one per KV head

constexpr double kInf = std::numeric_limits<double>::infinity();

double Nmse(const Pair& p, std::size_t q) {
  return p.k->queries[q].nmse() + p.v->queries[q].nmse();
}
double Loss(const AttentionError& e) { return 1.0 - e.cosine(); }

Status CheckTable(const ErrorTable& table) {
  const Geometry& g = table.geometry;
  if (Status s = CheckGeometry(g); !s.ok()) return s;
  if (table.heads.size() != g.layers * g.kv_heads * 2)
    return Error(ErrorCode::kMismatch,
                 "the error table has {} K and V heads, {} needs {}: layers are missing",
                 table.heads.size(), ToString(g), g.layers * g.kv_heads * 2);
  for (std::size_t i = 0; i < table.heads.size(); ++i) {
    const HeadErrors& h = table.heads[i];
    const bool in_place = h.layer == i / 2 / g.kv_heads && h.kv_head == i / 2 % g.kv_heads &&
                          h.tensor == static_cast<Tensor>(i % 2);
    const bool whole = std::ranges::all_of(
        h.candidates, [&](const auto& c) { return c.queries.size() == g.group(); });
    if (!in_place || !whole || h.candidates.empty())
      return Error(ErrorCode::kMismatch, "the error table is not whole at layer {}, KV head {}",
                   h.layer, h.kv_head);
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
  for (const auto& [name, value, low, high] : ranges) {
    if (!(value >= low && value <= high))
      return Error(ErrorCode::kInvalidArgument, "{} {}: expected a number from {} to {}", name,
                   value, low, high);
  }
  return {};
}

Result<Menu> MakeMenu(const ErrorTable& table, const Wisdom& wisdom, std::size_t context) {
  const Geometry& g = table.geometry;
  Menu menu(g.layers * g.kv_heads);
  for (std::size_t i = 0; i < menu.size(); ++i) {
    for (const CandidateError& k : table.heads[i * 2].candidates) {
      for (const CandidateError& v : table.heads[i * 2 + 1].candidates) {
        const std::string k_name = SpeedName(k.codec.kind), v_name = SpeedName(v.codec.kind);
        const HeadSpeed* speed = wisdom.Find(k_name, v_name, g.group(), g.head_dim, context);
        if (speed == nullptr)
          return Error(ErrorCode::kNotFound,
                       "no speed is known of K {} with V {} at head_dim {}, group {}, context {}",
                       k_name, v_name, g.head_dim, g.group(), context);
        Pair p{.k = &k, .v = &v, .decode_ns = speed->decode_ns};
        p.bytes = BytesPerToken(k.codec.kind, g.head_dim) + BytesPerToken(v.codec.kind, g.head_dim);
        for (std::size_t q = 0; q < g.group(); ++q) {
          p.worst_nmse = std::max(p.worst_nmse, Nmse(p, q));
          p.sum_nmse += Nmse(p, q);
          p.worst_loss = std::max(p.worst_loss, Loss(k.queries[q]) + Loss(v.queries[q]));
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
    std::ranges::copy_if(menu[i], std::back_inserter(left[i]), allowed);
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
    picks.push_back(*std::ranges::min_element(
        pairs, {}, [](const Pair& p) { return std::tuple(p.bytes, p.sum_nmse, p.decode_ns); }));
  }
  return picks;
}

// The picks within `bytes` of the least total cost; nothing if no picks are.
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

// The least of the menu's values of `member` at which `possible` holds. It must hold at every value
// above one at which it holds.
std::optional<double> Least(const Menu& menu, double Pair::*member,
                            const std::function<bool(double)>& possible) {
  std::vector<double> values;
  for (const std::vector<Pair>& pairs : menu)
    for (const Pair& p : pairs) values.push_back(p.*member);
  std::ranges::sort(values);
  const auto at = std::ranges::partition_point(values, std::not_fn(possible));
  if (at == values.end()) return std::nullopt;
  return *at;
}

bool Fits(const std::optional<Picks>& picks, std::size_t bytes) {
  return picks && Total(*picks, &Pair::bytes) <= bytes;
}

double Saved(std::size_t bytes, std::size_t fp16_bytes) {
  return 1.0 - static_cast<double>(bytes) / static_cast<double>(fp16_bytes);
}

// The most bytes per token that save at least the fraction `budget`.
std::size_t BytesWithin(double budget, std::size_t fp16_bytes) {
  auto bytes = static_cast<std::size_t>((1.0 - budget) * static_cast<double>(fp16_bytes)) + 1;
  while (bytes > 0 && Saved(bytes, fp16_bytes) < budget) --bytes;
  return bytes;
}

Fidelity Predict(const Picks& picks, const Geometry& g) {
  std::vector<AttentionError> errors;
  for (const Pair& p : picks) {
    for (std::size_t q = 0; q < g.group(); ++q)
      errors.push_back({Nmse(p, q), 1.0, 1.0 - Loss(p.k->queries[q]) - Loss(p.v->queries[q]), 1});
  }
  return Summarize(errors, g);
}

ParetoPoint Describe(const Picks& picks, const Geometry& g) {
  ParetoPoint point{Saved(Total(picks, &Pair::bytes), Fp16BytesPerToken(g)), Predict(picks, g),
                    Total(picks, &Pair::decode_ns)};
  for (const Pair& p : picks) {
    for (const CandidateError* candidate : {p.k, p.v})
      point.fp16_tensors += candidate->codec.kind.storage == Storage::kF16;
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
  const FrontLevel &first = levels.front(), &last = levels.back();
  const double floor = std::max(1e-12, first.worst == 0.0 ? levels[1].worst : first.worst);
  const auto height = [&](double worst) { return std::log(std::max(worst, floor)); };
  const double width = static_cast<double>(first.bytes - last.bytes);
  const double rise = std::max(height(last.worst) - height(first.worst), 1e-12);
  std::vector<FrontLevel> thin;
  std::size_t last_slot = 0;
  for (const FrontLevel& l : levels) {
    const double way = (static_cast<double>(first.bytes - l.bytes) / width +
                        (height(l.worst) - height(first.worst)) / rise) /
                       2.0;  // 0 to 1
    const auto slot = static_cast<std::size_t>(way * static_cast<double>(kFrontPoints - 1));
    if (thin.empty() || slot > last_slot) {
      thin.push_back(l);
    } else if (&l == &last) {
      thin.back() = l;
    }
    last_slot = slot;
  }
  return thin;
}

// The levels of the worst error at which the smallest plan gets smaller, by rising worst error.
std::vector<FrontLevel> FrontLevels(const Menu& menu) {
  std::vector<std::tuple<double, std::size_t, std::size_t>> pairs;  // worst error, head, bytes
  for (std::size_t i = 0; i < menu.size(); ++i)
    for (const Pair& p : menu[i]) pairs.emplace_back(p.worst_nmse, i, p.bytes);
  std::ranges::sort(pairs);
  std::vector<std::size_t> smallest(menu.size(), 0);  // 0: no pair of this head is allowed yet
  std::size_t heads = 0, bytes = 0;
  std::vector<FrontLevel> levels;
  for (std::size_t i = 0; i < pairs.size(); ++i) {
    const auto& [worst, head, pair_bytes] = pairs[i];
    if (smallest[head] == 0 || pair_bytes < smallest[head]) {
      heads += smallest[head] == 0;
      bytes += pair_bytes - smallest[head];
      smallest[head] = pair_bytes;
    }
    const bool level_ends = i + 1 == pairs.size() || std::get<0>(pairs[i + 1]) > worst;
    if (level_ends && heads == menu.size() && (levels.empty() || bytes < levels.back().bytes))
      levels.push_back({worst, bytes});
  }
  return levels;
}

std::vector<ParetoPoint> Front(const Menu& menu, const Geometry& g) {
  std::vector<ParetoPoint> front;
  for (const FrontLevel& l : Thin(FrontLevels(menu)))
    front.push_back(Describe(*Smallest(UpTo(menu, l.worst)), g));
  std::ranges::reverse(front);
  return front;
}

class Chooser {
 public:
  Chooser(const Menu& menu, std::size_t fp16_bytes, const Constraints& constraints)
      : menu_(menu), constraints_(constraints), fp16_bytes_(fp16_bytes) {}

  Result<Picks> Choose() {
    if (Status s = Restrict(); !s.ok()) return s;
    const std::optional<double> worst =
        Least(menu_, &Pair::worst_nmse, [&](double level) { return HoldsAt(level); });
    if (!worst)
      return Error(ErrorCode::kInfeasible,
                   "decode within {:.4g} ms a token: the fastest plan that holds the other limits "
                   "takes {:.4g} ms",
                   *constraints_.max_decode_ns / 1e6, Nanoseconds(*Fastest(menu_)) / 1e6);
    menu_ = UpTo(menu_, *worst * constraints_.worst_tolerance);
    const Picks picks = *Priced(0.0);
    const double sum_nmse = Total(picks, &Pair::sum_nmse);
    if (!InTime(picks)) return WithinTime(sum_nmse);
    if (constraints_.time_tolerance == 1.0) return picks;
    const double spare_ns = Nanoseconds(picks) - FastestNs();
    if (spare_ns <= 0.0) return picks;
    return *Priced((constraints_.time_tolerance - 1.0) * sum_nmse / spare_ns);
  }

 private:
  // Turns the constraints into a menu and a number of bytes.
  Status Restrict() {
    const double budget = constraints_.budget.value_or(0.0);
    const std::optional<Picks> smallest = Smallest(menu_);
    if (!smallest)
      return Error(ErrorCode::kInfeasible,
                   "the error table has a head without any codec of finite error");
    bytes_ = BytesWithin(budget, fp16_bytes_);
    if (!Fits(smallest, bytes_))
      return Error(ErrorCode::kInfeasible,
                   "budget {}: the most that these codecs can save is {:.4f} of the fp16 bytes",
                   budget, SavedBy(*smallest));
    if (!constraints_.min_cosine) return {};
    const Menu accurate = AtLeast(*constraints_.min_cosine);
    const std::optional<Picks> smallest_accurate = Smallest(accurate);
    if (!smallest_accurate)
      return Error(ErrorCode::kInfeasible, "cosine {}: the best that these codecs reach is {:.6f}",
                   *constraints_.min_cosine, BestCosine(std::numeric_limits<std::size_t>::max()));
    if (!Fits(smallest_accurate, bytes_))
      return Error(ErrorCode::kInfeasible,
                   "budget {} with cosine {}: with this budget the worst head reaches {:.6f}, with "
                   "this cosine {:.4f} of the bytes can be saved",
                   budget, *constraints_.min_cosine, BestCosine(bytes_),
                   SavedBy(*smallest_accurate));
    menu_ = accurate;
    if (!constraints_.budget) bytes_ = Total(*smallest_accurate, &Pair::bytes);
    return {};
  }

  Menu AtLeast(double cosine) const {
    return Filter(menu_, [=](const Pair& p) { return 1.0 - p.worst_loss >= cosine; });
  }
  double BestCosine(std::size_t bytes) const {
    const auto loss = Least(menu_, &Pair::worst_loss, [&](double level) {
      return Fits(Smallest(AtLeast(1.0 - level)), bytes);
    });
    return loss ? 1.0 - *loss : 0.0;
  }
  double SavedBy(const Picks& picks) const {
    return Saved(Total(picks, &Pair::bytes), fp16_bytes_);
  }

  static double Nanoseconds(const Picks& picks) { return Total(picks, &Pair::decode_ns); }
  bool InTime(const Picks& picks) const {
    return !constraints_.max_decode_ns || Nanoseconds(picks) <= *constraints_.max_decode_ns;
  }
  // Some plan within bytes and time has no head above `worst`.
  bool HoldsAt(double worst) const {
    const Menu menu = UpTo(menu_, worst);
    return Fits(Smallest(menu), bytes_) && (!constraints_.max_decode_ns || InTime(*Fastest(menu)));
  }
  // Within the bytes.
  std::optional<Picks> Fastest(const Menu& menu) const {
    return Solve(menu, bytes_, [](const Pair& p) { return p.decode_ns; });
  }

  // A bound from below: every head's fastest pair, whatever its bytes.
  double FastestNs() const {
    double ns = 0.0;
    for (const std::vector<Pair>& pairs : menu_)
      ns += std::ranges::min(pairs, {}, &Pair::decode_ns).decode_ns;
    return ns;
  }

  std::optional<Picks> Priced(double price) const {
    return Solve(menu_, bytes_, [=](const Pair& p) { return p.sum_nmse + price * p.decode_ns; });
  }

  // The least price of a nanosecond that brings the plan within max_decode_ns, bisected over 18
  // decades.
  Picks WithinTime(double sum_nmse) const {
    Picks within = *Fastest(menu_);  // in time: step 1 saw to it
    const double unit = std::max(sum_nmse, 1e-12) / *constraints_.max_decode_ns;
    double low = -9.0, high = 9.0;
    for (int i = 0; i < 24; ++i) {
      const double middle = (low + high) / 2.0;
      const Picks picks = *Priced(unit * std::pow(10.0, middle));
      if (InTime(picks)) within = picks;
      (InTime(picks) ? high : low) = middle;
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
  const Geometry& g = table.geometry;
  const std::size_t fp16_bytes = Fp16BytesPerToken(g);
  const Result<Picks> picks = Chooser(*menu, fp16_bytes, constraints).Choose();
  if (!picks.ok()) return picks.status();

  Constraints timeless = constraints;
  timeless.max_decode_ns.reset();
  timeless.time_tolerance = 1.0;
  const Picks without_time = *Chooser(*menu, fp16_bytes, timeless).Choose();

  Choice choice;
  choice.plan.geometry = g;
  for (std::size_t i = 0; i < picks->size(); ++i) {
    const Pair& p = (*picks)[i];
    choice.plan.codecs.push_back(p.k->codec);
    choice.plan.codecs.push_back(p.v->codec);
    choice.decided_by_time += (p.k != without_time[i].k) + (p.v != without_time[i].v);
  }
  choice.predicted = Predict(*picks, g);
  choice.decode_ns = Total(*picks, &Pair::decode_ns);
  if (const HeadSpeed* fp16 = wisdom.Find("f16", "f16", g.group(), g.head_dim, context))
    choice.fp16_decode_ns = fp16->decode_ns * static_cast<double>(picks->size());
  choice.front = Front(*menu, g);
  Provenance& provenance = choice.plan.provenance;
  provenance.model = table.model;
  provenance.calibration = fmt::format("{}", fmt::join(table.dumps, ", "));
  provenance.calibration_tokens = table.tokens;
  provenance.longest_prompt = table.longest_prompt;
  provenance.on_calibration = choice.predicted;
  return choice;
}

}  // namespace kvmix
