// One codec for every head: the menu of pairs, three exact steps, the Pareto front.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "kvmix/tune/steps.h"
#include "lib/files/file.h"
#include "lib/tune/explain.h"
#include "lib/tune/menu.h"

namespace kvmix::tune {

using internal::Error;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

Status CheckTable(const ErrorTable& table) {
  const Model& model = table.model;
  if (Status s = CheckModel(model); !s.ok()) return s;
  const std::size_t expected = 2 * model.kv_heads_before(model.layers.size());
  if (table.heads.size() != expected)
    return Error(ErrorCode::kMismatch,
                 "the error table has {} K and V heads, {} needs {}: layers are missing",
                 table.heads.size(), ToString(model), expected);
  auto head = table.heads.begin();
  for (std::size_t layer = 0; layer < model.layers.size(); ++layer) {
    if (!model.layers[layer].owns_kv()) continue;
    const std::size_t queries = model.queries(layer, 0).size();
    for (std::size_t i = 0; i < 2 * model.layers[layer].kv_heads; ++i, ++head) {
      const bool in_place = head->layer == layer && head->kv_head == i / 2 &&
                            head->tensor == static_cast<Tensor>(i % 2);
      const bool whole = std::ranges::all_of(
          head->candidates, [&](const auto& c) { return c.queries.size() == queries; });
      if (!in_place || !whole || head->candidates.empty())
        return Error(ErrorCode::kMismatch, "the error table is not whole at layer {}, KV head {}",
                     head->layer, head->kv_head);
    }
  }
  return {};
}

// The most bytes that save at least the fraction `budget`.
std::size_t BytesWithin(double budget, std::size_t fp16_bytes) {
  auto bytes = static_cast<std::size_t>((1.0 - budget) * static_cast<double>(fp16_bytes)) + 1;
  while (bytes > 0 && Saved(bytes, fp16_bytes) < budget) --bytes;
  return bytes;
}

bool Fits(const std::optional<Picks>& picks, std::size_t bytes) {
  return picks && Total(*picks, &Pair::bytes) <= bytes;
}

double Sum(const Picks& picks) { return Total(picks, &Pair::sum_nmse); }
double Nanoseconds(const Picks& picks) { return Total(picks, &Pair::decode_ns); }

// Numbers that messages name, each such that a plan reaches it as it is printed.
double RoundedDown(double x, double digits) {
  const double scale = std::pow(10.0, digits);
  const double rounded = std::floor(x * scale) / scale;
  return rounded <= x ? rounded : rounded - 1.0 / scale;
}
std::string CosineText(double cosine) { return fmt::format("{:.6f}", RoundedDown(cosine, 6.0)); }
std::string SavedText(double saved) { return fmt::format("{:.4f}", RoundedDown(saved, 4.0)); }

class Chooser {
 public:
  Chooser(const Menu& menu, std::size_t fp16_bytes, const Constraints& constraints)
      : menu_(menu), constraints_(constraints), fp16_bytes_(fp16_bytes) {}

  Result<Picks> Choose() {
    if (Status s = FindBytes(); !s.ok()) return s;
    const std::optional<double> worst =
        Least(menu_, &Pair::worst_nmse, [&](double level) { return HoldsAt(level); });
    if (!worst) return TooSlow();
    worst_limit_ = *worst * constraints_.worst_tolerance;
    const Picks picks = *Priced(0.0);
    if (!InTime(picks)) return WithinTime(picks);
    if (constraints_.time_tolerance == 1.0) return picks;
    const double spare_ns = Nanoseconds(picks) - FastestNs(Allows(worst_limit_));
    if (spare_ns <= 0.0) return picks;
    return *Priced((constraints_.time_tolerance - 1.0) * Sum(picks) / spare_ns);
  }

  // What the picks of Choose() were held to.
  Verdict Limits(const Picks& picks) const {
    const double least_sum = LeastTotal(&Pair::sum_nmse, Allows(worst_limit_));
    return {worst_limit_, constraints_.min_cosine.value_or(-kInf),
            Sum(picks) > least_sum * (1.0 + 1e-12)};
  }

 private:
  // What the limits of accuracy let through.
  Allowed Allows(double worst_nmse) const {
    return [worst_nmse, cosine = constraints_.min_cosine.value_or(-kInf)](const Pair& p) {
      return p.worst_nmse <= worst_nmse && 1.0 - p.worst_loss >= cosine;
    };
  }
  std::optional<Picks> SmallestOfCosine(double cosine) const {
    return Smallest(menu_, [=](const Pair& p) { return 1.0 - p.worst_loss >= cosine; });
  }
  double SavedBy(const Picks& picks) const {
    return Saved(Total(picks, &Pair::bytes), fp16_bytes_);
  }

  // How many bytes the plan may take, by budget and min_cosine.
  Status FindBytes() {
    const std::optional<Picks> smallest = SmallestOfCosine(-kInf);
    if (!smallest)
      return Error(ErrorCode::kInfeasible,
                   "the error table has a head without any codec of finite error");
    bytes_ = BytesWithin(constraints_.budget.value_or(0.0), fp16_bytes_);
    const std::optional<Picks> accurate = SmallestOfCosine(constraints_.min_cosine.value_or(-kInf));
    if (!Fits(smallest, bytes_) || !Fits(accurate, bytes_)) return TooMuch(*smallest, accurate);
    if (constraints_.budget || !constraints_.min_cosine) return {};
    std::optional<Picks> most_saved = accurate;
    if (!InTime(*accurate)) most_saved = SmallestInTime(Allows(kInf));
    if (most_saved) bytes_ = Total(*most_saved, &Pair::bytes);
    return {};
  }

  // No plan holds budget and min_cosine: says what each alone lets reach.
  Status TooMuch(const Picks& smallest, const std::optional<Picks>& accurate) const {
    std::vector<std::string> limits, best;
    if (constraints_.budget) {
      limits.push_back(fmt::format("budget {}", *constraints_.budget));
      if (!Fits(smallest, bytes_))
        best.push_back(fmt::format("the most that these codecs can save is {} of the fp16 bytes",
                                   SavedText(SavedBy(smallest))));
      else
        best.push_back(fmt::format("within this budget the worst head reaches {} at best",
                                   CosineText(BestCosine([&](const Allowed& allowed) {
                                     return Fits(Smallest(menu_, allowed), bytes_);
                                   }))));
    }
    if (constraints_.min_cosine) {
      limits.push_back(fmt::format("cosine {}", *constraints_.min_cosine));
      best.push_back(accurate ? fmt::format("with this cosine {} of the bytes can be saved at most",
                                            SavedText(SavedBy(*accurate)))
                              : fmt::format("the best that these codecs reach is {}",
                                            CosineText(BestCosine([&](const Allowed& allowed) {
                                              return Smallest(menu_, allowed).has_value();
                                            }))));
    }
    return Error(ErrorCode::kInfeasible, "{}: {}", fmt::join(limits, " with "),
                 fmt::join(best, ", "));
  }

  // No plan holds max_decode_ns and the other limits: the same.
  Status TooSlow() const {
    const double limit = *constraints_.max_decode_ns,
                 fastest = FastestNs([](auto&) { return true; });
    std::string text = fmt::format(
        "decode within {:.4g} ms a token: the fastest plan that holds the other limits "
        "takes {:.4g} ms",
        limit / 1e6, Nanoseconds(*Fastest(Allows(kInf))) / 1e6);
    if (fastest > limit) {
      text += fmt::format(", the fastest of all {:.4g} ms", fastest / 1e6);
    } else {
      const std::optional<Picks> smallest = SmallestInTime([](auto&) { return true; });
      if (constraints_.budget && smallest)
        text += fmt::format(", within this time {} of the bytes can be saved at most",
                            SavedText(SavedBy(*smallest)));
      if (constraints_.min_cosine)
        text += fmt::format(", within this time the worst head reaches {} at best",
                            CosineText(BestCosine([&](const Allowed& allowed) {
                              return Smallest(menu_, allowed) && FastestNs(allowed) <= limit;
                            })));
    }
    return {ErrorCode::kInfeasible, text};
  }

  // The best cosine of the worst head at which the pairs allowed make a plan that `possible` takes.
  double BestCosine(const std::function<bool(const Allowed&)>& possible) const {
    const auto loss = Least(menu_, &Pair::worst_loss, [&](double level) {
      return possible([=](const Pair& p) { return p.worst_loss <= level; });
    });
    return loss ? 1.0 - *loss : 0.0;
  }

  bool InTime(const Picks& picks) const {
    return !constraints_.max_decode_ns || Nanoseconds(picks) <= *constraints_.max_decode_ns;
  }
  // Some plan within bytes and time has no head above `worst`.
  bool HoldsAt(double worst) const {
    const Allowed allowed = Allows(worst);
    return Fits(Smallest(menu_, allowed), bytes_) &&
           (!constraints_.max_decode_ns || InTime(*Fastest(allowed, *constraints_.max_decode_ns)));
  }

  // A bound from below: every head's least of those allowed, whatever its bytes.
  double LeastTotal(double Pair::*member, const Allowed& allowed) const {
    double total = 0.0;
    for (const std::vector<Pair>& pairs : menu_) {
      double least = kInf;
      for (const Pair& p : pairs)
        if (allowed(p)) least = std::min(least, p.*member);
      total += least;
    }
    return total;
  }
  double FastestNs(const Allowed& allowed) const { return LeastTotal(&Pair::decode_ns, allowed); }

  // Of all plans within max_decode_ns, with times rounded up to sixteenths of a nanosecond.
  std::optional<Picks> SmallestInTime(const Allowed& allowed) const {
    constexpr double kTicks = 16.0;
    return Solve(
        menu_, static_cast<std::size_t>(std::min(*constraints_.max_decode_ns * kTicks, 1e18)),
        [](const Pair& p) { return static_cast<std::size_t>(std::ceil(p.decode_ns * kTicks)); },
        [](const Pair& p) { return static_cast<double>(p.bytes); }, allowed);
  }

  std::optional<Picks> WithinBytes(const std::function<double(const Pair&)>& cost,
                                   const Allowed& allowed, double enough = -kInf) const {
    return Solve(
        menu_, bytes_, [](const Pair& p) { return p.bytes; }, cost, allowed, enough);
  }
  std::optional<Picks> Fastest(const Allowed& allowed, double fast_enough = -kInf) const {
    return WithinBytes([](const Pair& p) { return p.decode_ns; }, allowed, fast_enough);
  }
  std::optional<Picks> Priced(double price) const {
    return WithinBytes([=](const Pair& p) { return p.sum_nmse + price * p.decode_ns; },
                       Allows(worst_limit_));
  }

  // The plan in time at the least price of a nanosecond that brings one: between a plan that is too
  // slow and one in time the price at which both cost the same, as long as a third costs less
  // there.
  Picks WithinTime(Picks slow) const {
    Picks within = *Fastest(Allows(worst_limit_), *constraints_.max_decode_ns);  // step 1 saw to it
    for (;;) {
      const double price = (Sum(within) - Sum(slow)) / (Nanoseconds(slow) - Nanoseconds(within));
      const auto cost = [&](const Picks& picks) { return Sum(picks) + price * Nanoseconds(picks); };
      const Picks next = *Priced(price);
      if (!(cost(next) < cost(within) * (1.0 - 1e-12))) return within;
      (InTime(next) ? within : slow) = next;
    }
  }

  const Menu& menu_;
  Constraints constraints_;
  std::size_t fp16_bytes_;
  std::size_t bytes_ = 0;
  double worst_limit_ = 0.0;
};

}  // namespace

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

Result<Choice> Choose(const ErrorTable& table, const Wisdom& wisdom, std::size_t context,
                      const Constraints& constraints) {
  if (Status s = CheckTable(table); !s.ok()) return s;
  if (Status s = CheckConstraints(constraints); !s.ok()) return s;
  Result<Menu> menu = MakeMenu(table, wisdom, context);
  if (!menu.ok()) return menu.status();
  const std::size_t fp16_bytes = Fp16ContextBytes(table.model, context);
  Chooser chooser(*menu, fp16_bytes, constraints);
  const Result<Picks> picks = chooser.Choose();
  if (!picks.ok()) return picks.status();

  Constraints timeless = constraints;
  timeless.max_decode_ns.reset();
  timeless.time_tolerance = 1.0;
  const Picks without_time = *Chooser(*menu, fp16_bytes, timeless).Choose();

  const Verdict limits = chooser.Limits(*picks);
  Choice choice;
  choice.worst_limit = limits.worst_limit;
  choice.plan.model = table.model;
  choice.plan.exact_first = table.exact_first;
  choice.plan.exact_newest = table.exact_newest;
  for (std::size_t i = 0; i < picks->size(); ++i) {
    const Pair& p = (*picks)[i];
    choice.plan.codecs.push_back(p.k->codec);
    choice.plan.codecs.push_back(p.v->codec);
    choice.decided_by_time += (p.k != without_time[i].k) + (p.v != without_time[i].v);
    for (const HeadErrors* head : {&table.heads[2 * i], &table.heads[2 * i + 1]})
      choice.reasons.push_back(Explain(*head, table.model.layers[head->layer].dim(head->tensor), p,
                                       without_time[i], limits));
  }
  choice.predicted = Predict(*picks, table.model);
  choice.decode_ns = Total(*picks, &Pair::decode_ns);
  for (std::size_t i = 0; i < table.heads.size(); i += 2) {
    const std::optional<double> ns =
        DecodeNs(table.model, table.heads[i].layer, wisdom, "f16", "f16", context);
    choice.fp16_decode_ns = ns ? choice.fp16_decode_ns + *ns : 0.0;
    if (!ns) break;
  }
  choice.without_times = Describe(without_time, table.model, fp16_bytes);
  choice.front = Front(*menu, table.model, fp16_bytes);
  Provenance& provenance = choice.plan.provenance;
  provenance.model = table.model_name;
  provenance.calibration = fmt::format("{}", fmt::join(table.dumps, ", "));
  provenance.calibration_tokens = table.tokens;
  provenance.longest_prompt = table.longest_prompt;
  provenance.on_calibration = choice.predicted;
  return choice;
}

}  // namespace kvmix::tune
