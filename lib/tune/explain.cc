// Why heads have the codecs that they have.
#include "lib/tune/explain.h"

#include <algorithm>
#include <tuple>

namespace kvmix::tune {
namespace {

// The NMSE and 1 - cosine of the query heads that read a K and a V.
struct Damage {
  double worst = 0.0, sum = 0.0, loss = 0.0;
};

Damage DamageOf(const CandidateError& k, const CandidateError& v) {
  const Pair pair{.k = &k, .v = &v};
  Damage damage;
  for (std::size_t q = 0; q < k.queries.size(); ++q) {
    damage.worst = std::max(damage.worst, Nmse(pair, q));
    damage.sum += Nmse(pair, q);
    damage.loss = std::max(damage.loss, Loss(pair, q));
  }
  return damage;
}

}  // namespace

Reason Explain(const HeadErrors& head, std::size_t dim, const Pair& pick, const Pair& timeless,
               const Verdict& verdict) {
  const bool is_k = head.tensor == KVMIX_K;
  const auto bytes = [&](const CandidateError& c) { return BytesPerToken(c.codec.kind, dim); };
  const auto damage = [&](const CandidateError& c) {
    return is_k ? DamageOf(c, *pick.v) : DamageOf(*pick.k, c);
  };
  const auto limit = [&](const Damage& d) {
    return d.worst > verdict.worst_limit       ? Limit::kWorst
           : 1.0 - d.loss < verdict.min_cosine ? Limit::kCosine
                                               : Limit::kNone;
  };
  const CandidateError& chosen = is_k ? *pick.k : *pick.v;
  const Damage now = damage(chosen);
  Reason reason;
  reason.worst_nmse = now.worst;

  std::size_t smaller_bytes = 0;
  for (const CandidateError& c : head.candidates)
    if (bytes(c) < bytes(chosen)) smaller_bytes = std::max(smaller_bytes, bytes(c));
  Damage best;
  const auto rank = [&](const Damage& d) {
    return limit(d) == Limit::kNone ? std::tuple(false, d.sum) : std::tuple(true, d.worst);
  };
  for (std::size_t i = 0; i < head.candidates.size(); ++i) {
    if (smaller_bytes == 0 || bytes(head.candidates[i]) != smaller_bytes) continue;
    const Damage d = damage(head.candidates[i]);
    if (reason.smaller && rank(d) >= rank(best)) continue;
    best = d;
    reason.smaller = i;
  }
  if (!reason.smaller) return reason;
  reason.smaller_worst_nmse = best.worst;
  reason.sum_nmse_added = best.sum - now.sum;
  reason.limit = limit(best);
  if (reason.limit != Limit::kNone) return reason;
  const bool timeless_as_small = bytes(is_k ? *timeless.k : *timeless.v) <= smaller_bytes;
  reason.limit = timeless_as_small || reason.sum_nmse_added <= 0.0 ? Limit::kTime
                 : verdict.bytes_bind                              ? Limit::kSum
                                                                   : Limit::kBudget;
  return reason;
}

}  // namespace kvmix::tune
