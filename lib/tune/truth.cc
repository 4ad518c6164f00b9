// What a plan as a whole tells of the table that it was chosen from.
#include <algorithm>
#include <cstddef>
#include <iterator>
#include <vector>

#include "kvmix/tune.h"
#include "lib/files/check.h"

namespace kvmix {
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
    const CandidateError &k_taken = Taken(k, plan.codecs[i]),
                         &v_taken = Taken(v, plan.codecs[i + 1]);
    double ratio = 1.0;
    std::size_t q = 0;
    for (const std::size_t reader : model.readers(k.layer)) {
      const std::size_t group = model.layers[reader].group(),
                        first = model.query_heads_before(reader) + k.kv_head * group;
      for (std::size_t h = first; h < first + group; ++h, ++q) {
        const double predicted = k_taken.queries[q].nmse() + v_taken.queries[q].nmse();
        if (!(truth[h].nmse() > factor * predicted) || predicted == 0.0) continue;
        ratio = std::max(ratio, truth[h].nmse() / predicted);
        ++raised;
      }
    }
    if (ratio == 1.0) continue;
    Raise(ratio, &k);
    Raise(ratio, &v);
  }
  return raised;
}

}  // namespace kvmix
