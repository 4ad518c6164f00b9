// The calls of attention, and outputs that are merged. (What a call does: attend_call.h.)
#include "kvmix/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "lib/cache/attend_call.h"
#include "lib/cache/own.h"
#include "lib/cache/round.h"

namespace kvmix {

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

}  // namespace

Status Attend(const Cache& cache, std::size_t layer, const RowsView& q, float* out,
              const AttendOptions& options, const Runner& runner) {
  const AttendRequest request{&cache, q, out};
  return Attend({&request, 1}, layer, options, runner);
}

Status Attend(std::span<const AttendRequest> requests, std::size_t layer,
              const AttendOptions& options, const Runner& runner) {
  if (Status s = runner.Check(); !s.ok()) return s;
  const internal::Own<internal::AttendCall> job;
  if (Status s = job->Start(requests, layer, options); !s.ok()) return s;
  const std::size_t parts = job->schedule.parts.size();
  // One sequence's decode: one run of neighbouring parts each, so that what is asked for past a
  // part's end is not wasted. Prefill: later queries cost more. Batches: sequences are unlike.
  std::size_t of_run = 1;
  if (requests.size() == 1 && requests[0].q.tokens == 1) {
    of_run = std::max<std::size_t>(1, internal::CeilDiv(parts, runner.threads()));
  }
  runner.Run(internal::CeilDiv(parts, of_run), [&](std::size_t run) {
    const std::size_t first = run * of_run, last = std::min(parts, first + of_run);
    for (std::size_t p = first; p < last; ++p) job->RunPart(p);
  });
  return {};
}

void MergeOutputs(float* out, float* log_sum_exp, const float* other_out,
                  const float* other_log_sum_exp, std::size_t rows, std::size_t dim) {
  for (std::size_t r = 0; r < rows; ++r) {
    const float a = log_sum_exp[r], b = other_log_sum_exp[r];
    if (b == -kInf) continue;  // nothing to add; not even to -inf
    const float max = std::max(a, b), own = std::exp(a - max), other = std::exp(b - max);
    const float own_share = own / (own + other), other_share = other / (own + other);
    for (std::size_t c = r * dim; c < (r + 1) * dim; ++c) {
      out[c] = own_share * out[c] + other_share * other_out[c];
    }
    log_sum_exp[r] = max + std::log(own + other);
  }
}

}  // namespace kvmix
