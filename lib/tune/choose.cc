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
  std::size_t bytes = 0;    // of the context
  double worst_nmse = 0.0;  // of the query heads that read them
  double sum_nmse = 0.0;
  double worst_loss = 0.0;  // 1 - cosine
  double decode_ns = 0.0;   // over all layers that read them
};

// What all heads have to choose from, in the table's order: a list of pairs per KV head.
using Menu = std::vector<std::vector<Pair>>;
using Picks = std::vector<Pair>;  // one per KV head

constexpr double kInf = std::numeric_limits<double>::infinity();

double Nmse(const Pair& p, std::size_t q) {
  return p.k->queries[q].nmse() + p.v->queries[q].nmse();
}
double Loss(const AttentionError& e) { return 1.0 - e.cosine(); }

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
    std::size_t queries = 0;
    for (const std::size_t reader : model.readers(layer)) queries += model.layers[reader].group();
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

// Decode time of a K codec with a V codec in all layers that read a layer's K and V, per KV head;
// nothing where one is not known.
std::optional<double> DecodeNs(const Model& model, std::size_t layer, const Wisdom& wisdom,
                               const std::string& k, const std::string& v, std::size_t context) {
  double ns = 0.0;
  for (const std::size_t reader : model.readers(layer)) {
    const HeadSpeed* speed = wisdom.Find(k, v, model.layers[reader], context);
    if (speed == nullptr) return std::nullopt;
    ns += speed->decode_ns;
  }
  return ns;
}

Result<Menu> MakeMenu(const ErrorTable& table, const Wisdom& wisdom, std::size_t context) {
  Menu menu(table.heads.size() / 2);
  for (std::size_t i = 0; i < menu.size(); ++i) {
    const std::size_t layer = table.heads[i * 2].layer;
    const LayerShape& shape = table.model.layers[layer];
    for (const CandidateError& k : table.heads[i * 2].candidates) {
      for (const CandidateError& v : table.heads[i * 2 + 1].candidates) {
        const std::string k_name = SpeedName(k.codec.kind), v_name = SpeedName(v.codec.kind);
        const std::optional<double> ns =
            DecodeNs(table.model, layer, wisdom, k_name, v_name, context);
        if (!ns)
          return Error(ErrorCode::kNotFound,
                       "no speed is known of K {} with V {} in layer {} ({}), context {}", k_name,
                       v_name, layer, ToString(Model(std::vector{shape})), context);
        Pair p{.k = &k, .v = &v, .decode_ns = *ns};
        const std::size_t tokens = table.model.tokens_held(layer, context);
        p.bytes = tokens * (BytesPerToken(k.codec.kind, shape.k_dim) +
                            BytesPerToken(v.codec.kind, shape.v_dim)) +
                  std::min(tokens, table.exact_first) * (shape.k_dim + shape.v_dim) * sizeof(Half);
        for (std::size_t q = 0; q < k.queries.size(); ++q) {
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

// The most bytes that save at least the fraction `budget`.
std::size_t BytesWithin(double budget, std::size_t fp16_bytes) {
  auto bytes = static_cast<std::size_t>((1.0 - budget) * static_cast<double>(fp16_bytes)) + 1;
  while (bytes > 0 && Saved(bytes, fp16_bytes) < budget) --bytes;
  return bytes;
}

// The picks are in the order of the layers that own K and V and of their heads; the errors in that
// of all layers and query heads.
Fidelity Predict(const Picks& picks, const Model& model) {
  std::vector<AttentionError> errors(model.query_heads_before(model.layers.size()));
  auto pick = picks.begin();
  for (std::size_t layer = 0; layer < model.layers.size(); ++layer) {
    if (!model.layers[layer].owns_kv()) continue;
    const std::vector<std::size_t> readers = model.readers(layer);
    for (std::size_t head = 0; head < model.layers[layer].kv_heads; ++head, ++pick) {
      std::size_t q = 0;
      for (const std::size_t reader : readers) {
        const std::size_t group = model.layers[reader].group(),
                          first = model.query_heads_before(reader) + head * group;
        for (std::size_t i = 0; i < group; ++i, ++q) {
          errors[first + i] = {Nmse(*pick, q), 1.0,
                               1.0 - Loss(pick->k->queries[q]) - Loss(pick->v->queries[q]), 1};
        }
      }
    }
  }
  return Summarize(errors, model);
}

ParetoPoint Describe(const Picks& picks, const Model& model, std::size_t fp16_bytes) {
  ParetoPoint point{Saved(Total(picks, &Pair::bytes), fp16_bytes), Predict(picks, model),
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

std::vector<ParetoPoint> Front(const Menu& menu, const Model& model, std::size_t fp16_bytes) {
  std::vector<ParetoPoint> front;
  for (const FrontLevel& l : Thin(FrontLevels(menu)))
    front.push_back(Describe(*Smallest(UpTo(menu, l.worst)), model, fp16_bytes));
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
  const std::size_t fp16_bytes = Fp16ContextBytes(table.model, context);
  const Result<Picks> picks = Chooser(*menu, fp16_bytes, constraints).Choose();
  if (!picks.ok()) return picks.status();

  Constraints timeless = constraints;
  timeless.max_decode_ns.reset();
  timeless.time_tolerance = 1.0;
  const Picks without_time = *Chooser(*menu, fp16_bytes, timeless).Choose();

  Choice choice;
  choice.plan.model = table.model;
  choice.plan.exact_first = table.exact_first;
  for (std::size_t i = 0; i < picks->size(); ++i) {
    const Pair& p = (*picks)[i];
    choice.plan.codecs.push_back(p.k->codec);
    choice.plan.codecs.push_back(p.v->codec);
    choice.decided_by_time += (p.k != without_time[i].k) + (p.v != without_time[i].v);
  }
  choice.predicted = Predict(*picks, table.model);
  choice.decode_ns = Total(*picks, &Pair::decode_ns);
  for (std::size_t i = 0; i < table.heads.size(); i += 2) {
    const std::optional<double> ns =
        DecodeNs(table.model, table.heads[i].layer, wisdom, "f16", "f16", context);
    choice.fp16_decode_ns = ns ? choice.fp16_decode_ns + *ns : 0.0;
    if (!ns) break;
  }
  choice.front = Front(*menu, table.model, fp16_bytes);
  Provenance& provenance = choice.plan.provenance;
  provenance.model = table.model_name;
  provenance.calibration = fmt::format("{}", fmt::join(table.dumps, ", "));
  provenance.calibration_tokens = table.tokens;
  provenance.longest_prompt = table.longest_prompt;
  provenance.on_calibration = choice.predicted;
  return choice;
}

}  // namespace kvmix
