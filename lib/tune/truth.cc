// Corrects a table of errors by the errors of a plan as a whole.
#include <algorithm>
#include <cstddef>
#include <vector>

#include "kvmix/tune/steps.h"
#include "lib/files/check.h"
#include "lib/tune/menu.h"

namespace kvmix::tune {
namespace {

// The candidate that the plan took.
const CandidateError& Taken(const HeadErrors& head, const HeadCodec& codec) {
  const auto same = [&](const CandidateError& c) { return c.codec.kind == codec.kind; };
  const auto taken = std::ranges::find_if(head.candidates, same);
  KVMIX_CHECK(taken != head.candidates.end(), ==, true);
  return *taken;
}

void Raise(double by, HeadErrors* head) {
  for (CandidateError& candidate : head->candidates) {
    for (AttentionError& e : candidate.queries) {
      const double rows = static_cast<double>(e.rows);
      e.sum_squared_error *= by;
      e.sum_cosine = rows - by * (rows - e.sum_cosine);
    }
  }
}

}  // namespace

std::size_t RaiseToTruth(const Plan& plan, const std::vector<AttentionError>& truth, double factor,
                         ErrorTable* table) {
  const Model& model = table->model;
  std::size_t raised = 0;
  for (std::size_t i = 0; i < table->heads.size(); i += 2) {
    HeadErrors &k = table->heads[i], &v = table->heads[i + 1];
    const Pair taken{.k = &Taken(k, plan.codecs[i]), .v = &Taken(v, plan.codecs[i + 1])};
    double ratio = 1.0;
    std::size_t q = 0;
    for (const std::size_t place : model.queries(k.layer, k.kv_head)) {
      const double predicted = Nmse(taken, q++), found = truth[place].nmse();
      if (!(found > factor * predicted) || predicted == 0.0) continue;
      ratio = std::max(ratio, found / predicted);
      ++raised;
    }
    if (ratio == 1.0) continue;
    Raise(ratio, &k);
    Raise(ratio, &v);
  }
  return raised;
}

}  // namespace kvmix::tune
