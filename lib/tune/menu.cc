// Pairs of codecs and their figures, and which of them can be of use.
#include "lib/tune/menu.h"

#include <cmath>
#include <iterator>
#include <tuple>
#include <utility>

#include "lib/files/file.h"
#include "lib/tune/knapsack.h"

namespace kvmix::tune {

using internal::Error;

namespace {

double LossOf(const AttentionError& e) { return 1.0 - e.cosine(); }

// The candidates of one head's K or V, with what pairs ask for again and again.
struct Side {
  Side(const ErrorTable& table, const HeadErrors& head, std::size_t context)
      : candidates(head.candidates) {
    // A layer of this head alone, of as many tokens as it holds.
    LayerShape shape = table.model.layers[head.layer];
    shape.query_heads = shape.group();
    shape.kv_heads = 1;
    shape.window = 0;
    shape.sinks.clear();
    Plan plan = UniformPlan(Model(std::vector{shape}), {}, {});
    plan.exact_first = table.exact_first;
    plan.exact_newest = table.exact_newest;
    const std::size_t tokens = table.model.tokens_held(head.layer, context);
    for (const CandidateError& c : candidates) {
      plan.codec(0, 0, head.tensor) = c.codec;
      const kvmix_plan_size size = kvmix::internal::SizeOf(plan, tokens);
      bytes.push_back(head.tensor == KVMIX_K ? size.k_bytes : size.v_bytes);
      const std::string name = SpeedName(c.codec.kind);
      speed.push_back(static_cast<std::size_t>(std::ranges::find(names, name) - names.begin()));
      if (speed.back() == names.size()) names.push_back(name);
      for (const AttentionError& e : c.queries) {
        nmse.push_back(e.nmse());
        loss.push_back(LossOf(e));
      }
    }
  }

  const std::vector<CandidateError>& candidates;
  std::vector<std::size_t> bytes, speed;  // of the context; place in names
  std::vector<std::string> names;         // SpeedName, each once
  std::vector<double> nmse, loss;         // [candidates][queries]
};

// [names of K][names of V]
Result<std::vector<double>> PairNs(const Side& k, const Side& v, const Model& model,
                                   std::size_t layer, const Wisdom& wisdom, std::size_t context) {
  std::vector<double> all;
  for (const std::string& k_name : k.names) {
    for (const std::string& v_name : v.names) {
      const std::optional<double> ns = DecodeNs(model, layer, wisdom, k_name, v_name, context);
      if (!ns)
        return Error(ErrorCode::kNotFound,
                     "no speed is known of K {} with V {} in layer {} ({}), context {}", k_name,
                     v_name, layer, ToString(Model(std::vector{model.layers[layer]})), context);
      all.push_back(*ns);
    }
  }
  return all;
}

// All pairs of finite error.
std::vector<Pair> AllPairs(const Side& k, const Side& v, const std::vector<double>& ns) {
  std::vector<Pair> pairs;
  const std::size_t queries = k.candidates[0].queries.size();
  for (std::size_t i = 0; i < k.candidates.size(); ++i) {
    for (std::size_t j = 0; j < v.candidates.size(); ++j) {
      Pair p{.k = &k.candidates[i],
             .v = &v.candidates[j],
             .bytes = k.bytes[i] + v.bytes[j],
             .decode_ns = ns[k.speed[i] * v.names.size() + v.speed[j]]};
      for (std::size_t q = 0; q < queries; ++q) {
        const double nmse = k.nmse[i * queries + q] + v.nmse[j * queries + q];
        p.worst_nmse = std::max(p.worst_nmse, nmse);
        p.sum_nmse += nmse;
        p.worst_loss = std::max(p.worst_loss, k.loss[i * queries + q] + v.loss[j * queries + q]);
      }
      if (std::isfinite(p.sum_nmse)) pairs.push_back(p);
    }
  }
  return pairs;
}

// Of pairs that are alike the first stays. Times do not decide which of the pairs that are the best
// without times stays: the order does not look at them.
std::vector<Pair> Unbeaten(std::vector<Pair> pairs) {
  std::ranges::stable_sort(pairs, {}, [](const Pair& p) {
    return std::tuple(p.bytes, p.sum_nmse, p.worst_nmse, p.worst_loss);
  });
  std::vector<Pair> left;
  for (const Pair& p : pairs) {
    const auto beats = [&](const Pair& o) {
      return o.sum_nmse <= p.sum_nmse && o.worst_nmse <= p.worst_nmse &&
             o.worst_loss <= p.worst_loss && o.decode_ns <= p.decode_ns;
    };
    if (std::ranges::none_of(left, beats)) left.push_back(p);
  }
  return left;
}

}  // namespace

double Nmse(const Pair& p, std::size_t query) {
  return p.k->queries[query].nmse() + p.v->queries[query].nmse();
}

double Loss(const Pair& p, std::size_t query) {
  return LossOf(p.k->queries[query]) + LossOf(p.v->queries[query]);
}

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
  Menu menu;
  for (std::size_t i = 0; i < table.heads.size(); i += 2) {
    const std::size_t layer = table.heads[i].layer;
    const Side k(table, table.heads[i], context), v(table, table.heads[i + 1], context);
    const auto ns = PairNs(k, v, table.model, layer, wisdom, context);
    if (!ns.ok()) return ns.status();
    menu.push_back(Unbeaten(AllPairs(k, v, *ns)));
  }
  return menu;
}

std::optional<Picks> Smallest(const Menu& menu, const Allowed& allowed) {
  Picks picks;
  for (const std::vector<Pair>& pairs : menu) {
    const auto smallest = std::ranges::find_if(pairs, allowed);
    if (smallest == pairs.end()) return std::nullopt;
    picks.push_back(*smallest);
  }
  return picks;
}

std::optional<Picks> Solve(const Menu& menu, std::size_t room,
                           const std::function<std::size_t(const Pair&)>& size,
                           const std::function<double(const Pair&)>& cost, const Allowed& allowed,
                           double enough) {
  std::vector<std::vector<KnapsackOption>> groups(menu.size());
  std::vector<std::vector<const Pair*>> pairs(menu.size());
  for (std::size_t i = 0; i < menu.size(); ++i) {
    for (const Pair& p : menu[i]) {
      if (!allowed(p)) continue;
      groups[i].push_back({size(p), cost(p)});
      pairs[i].push_back(&p);
    }
  }
  const auto choice = SolveKnapsack(groups, room, enough);
  if (!choice) return std::nullopt;
  Picks picks;
  for (std::size_t i = 0; i < menu.size(); ++i) picks.push_back(*pairs[i][(*choice)[i]]);
  return picks;
}

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

double Saved(std::size_t bytes, std::size_t fp16_bytes) {
  return 1.0 - static_cast<double>(bytes) / static_cast<double>(fp16_bytes);
}

// The picks are in the order of the layers that own K and V and of their heads; the errors in that
// of all layers and query heads.
Fidelity Predict(const Picks& picks, const Model& model) {
  std::vector<AttentionError> errors(model.query_heads_before(model.layers.size()));
  auto pick = picks.begin();
  for (std::size_t layer = 0; layer < model.layers.size(); ++layer) {
    if (!model.layers[layer].owns_kv()) continue;
    for (std::size_t head = 0; head < model.layers[layer].kv_heads; ++head, ++pick) {
      std::size_t q = 0;
      for (const std::size_t place : model.queries(layer, head)) {
        errors[place] = {Nmse(*pick, q), 1.0, 1.0 - Loss(*pick, q), 1};
        ++q;
      }
    }
  }
  return Summarize(errors, model);
}

}  // namespace kvmix::tune
