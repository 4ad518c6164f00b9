// The calls of attention, and outputs that are merged. (What a call does: attend_call.h.)
#include "kvmix/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "lib/cache/attend_call.h"
#include "lib/cache/parallel.h"

namespace kvmix {

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

}  // namespace

struct AttendJob::Impl : internal::AttendCall {};

AttendJob::AttendJob() : impl_(std::make_unique<Impl>()) {}
AttendJob::AttendJob(AttendJob&&) noexcept = default;
AttendJob& AttendJob::operator=(AttendJob&&) noexcept = default;
AttendJob::~AttendJob() = default;

Status AttendJob::Start(const Cache& cache, std::size_t layer, const RowsView& q, float* out,
                        const AttendOptions& options) {
  const AttendRequest request{&cache, q, out};
  return impl_->Start({&request, 1}, layer, options);
}
Status AttendJob::Start(std::span<const AttendRequest> requests, std::size_t layer,
                        const AttendOptions& options) {
  return impl_->Start(requests, layer, options);
}
std::size_t AttendJob::parts() const { return impl_->schedule.parts.size(); }
void AttendJob::RunPart(std::size_t part) { impl_->RunPart(part); }

Status Attend(const Cache& cache, std::size_t layer, const RowsView& q, float* out,
              const AttendOptions& options, int num_threads) {
  const AttendRequest request{&cache, q, out};
  return Attend({&request, 1}, layer, options, num_threads);
}

Status Attend(std::span<const AttendRequest> requests, std::size_t layer,
              const AttendOptions& options, int num_threads) {
  if (Status s = internal::CheckThreads(num_threads); !s.ok()) return s;
  thread_local AttendJob own_job;
  AttendJob& job = own_job;  // this thread's, for all threads of the loop
  if (Status s = job.Start(requests, layer, options); !s.ok()) return s;
  const std::size_t parts = job.parts();
  const int threads = internal::ThreadsFor(num_threads, parts);
  // One sequence's decode: one run of neighbouring parts each, so that what is asked for past a
  // part's end is not wasted. Prefill: later queries cost more. Batches: sequences are unlike.
  std::size_t chunk = 1;
  if (requests.size() == 1 && requests[0].q.tokens == 1) {
    chunk = (parts + static_cast<std::size_t>(threads) - 1) / static_cast<std::size_t>(threads);
  }
  internal::RunParts(parts, threads, chunk, [&](std::size_t p) { job.RunPart(p); });
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
