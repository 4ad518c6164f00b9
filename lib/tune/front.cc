// The Pareto front of bytes and the worst query head's NMSE.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "lib/tune/menu.h"

namespace kvmix::tune {
namespace {

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

}  // namespace

ParetoPoint Describe(const Picks& picks, const Model& model, std::size_t fp16_bytes) {
  ParetoPoint point{Saved(Total(picks, &Pair::bytes), fp16_bytes), Predict(picks, model),
                    Total(picks, &Pair::decode_ns)};
  for (const Pair& p : picks) {
    for (const CandidateError* candidate : {p.k, p.v})
      point.fp16_tensors += candidate->codec.kind.storage == KVMIX_STORAGE_F16;
  }
  return point;
}

std::vector<ParetoPoint> Front(const Menu& menu, const Model& model, std::size_t fp16_bytes) {
  std::vector<ParetoPoint> front;
  for (const FrontLevel& l : Thin(FrontLevels(menu)))
    front.push_back(
        Describe(*Smallest(menu, [&](const Pair& p) { return p.worst_nmse <= l.worst; }), model,
                 fp16_bytes));
  std::ranges::reverse(front);
  return front;
}

}  // namespace kvmix::tune
