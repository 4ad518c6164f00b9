// What the choice chooses from: for every KV head the pairs of a K codec and a V codec that may be
// of use.
#ifndef KVMIX_LIB_TUNE_MENU_H_
#define KVMIX_LIB_TUNE_MENU_H_

#include <algorithm>
#include <cstddef>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "kvmix/tune/steps.h"

namespace kvmix::tune {

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

// A list of pairs per KV head, in the table's order. Lists by rising bytes, of the same bytes by
// rising sum_nmse.
using Menu = std::vector<std::vector<Pair>>;
using Picks = std::vector<Pair>;  // one per KV head

// The errors of a query head: K's and V's added up.
double Nmse(const Pair& p, std::size_t query);
double Loss(const Pair& p, std::size_t query);  // 1 - cosine

// Decode time of a K codec with a V codec (SpeedName) in all layers that read a layer's K and V,
// per KV head; nothing where one is not known.
std::optional<double> DecodeNs(const Model& model, std::size_t layer, const Wisdom& wisdom,
                               const std::string& k, const std::string& v, std::size_t context);

// Of all pairs of a head those of finite error that no other pair beats: in bytes, worst_nmse,
// sum_nmse, worst_loss and decode_ns at once. The table must be whole. Memory: what is left, and
// the pairs of one head.
Result<Menu> MakeMenu(const ErrorTable& table, const Wisdom& wisdom, std::size_t context);

// Every number is in its range.
Status CheckConstraints(const Constraints& constraints);

using Allowed = std::function<bool(const Pair&)>;

// Every head's smallest pair of those allowed, of equals the one of least sum; nothing if a head
// has none.
std::optional<Picks> Smallest(const Menu& menu, const Allowed& allowed);

// Of the pairs allowed the picks of the least total cost whose sizes add up to no more than `room`;
// nothing if there are none. A total cost of `enough` is as good as the least.
std::optional<Picks> Solve(const Menu& menu, std::size_t room,
                           const std::function<std::size_t(const Pair&)>& size,
                           const std::function<double(const Pair&)>& cost, const Allowed& allowed,
                           double enough = -std::numeric_limits<double>::infinity());

// The least of the menu's values of `member` at which `possible` holds. It must hold at every value
// above one at which it holds.
std::optional<double> Least(const Menu& menu, double Pair::*member,
                            const std::function<bool(double)>& possible);

template <class T>
T Total(const Picks& picks, T Pair::*member) {
  T total{};
  for (const Pair& p : picks) total += p.*member;
  return total;
}

double Saved(std::size_t bytes, std::size_t fp16_bytes);
// The errors of a plan of these picks, K's and V's added up.
Fidelity Predict(const Picks& picks, const Model& model);

ParetoPoint Describe(const Picks& picks, const Model& model, std::size_t fp16_bytes);

// At most 64 points of the Pareto front of bytes and worst NMSE, by falling saved fraction.
std::vector<ParetoPoint> Front(const Menu& menu, const Model& model, std::size_t fp16_bytes);

}  // namespace kvmix::tune

#endif  // KVMIX_LIB_TUNE_MENU_H_
