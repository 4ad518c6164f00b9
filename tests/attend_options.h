// A layer's sight with some of its numbers changed, in few words: 0 and null leave the layer's own.
#ifndef KVMIX_TESTS_ATTEND_OPTIONS_H_
#define KVMIX_TESTS_ATTEND_OPTIONS_H_

#include <cstddef>
#include <span>
#include <utility>

#include "kvmix/attention.h"

namespace kvmix {

struct AttendOptions {
  float attention_scale = 0.0f;
  std::size_t sliding_window = 0;
  float soft_cap = 0.0f;
  const float* sinks = nullptr;
  bool causal = true;
  std::size_t bidirectional_prefix = 0;
  Residence residence = KVMIX_RESIDENCE_AUTO;

  Sight Of(const kvmix_cache* cache, std::size_t layer) const {
    Sight sight = KVMIX_INIT(kvmix_sight);
    (void)kvmix_cache_sight(cache, layer, &sight, nullptr);
    if (attention_scale != 0.0f) sight.scale = attention_scale;
    if (sliding_window != 0) sight.window = sliding_window;
    if (soft_cap != 0.0f) sight.soft_cap = soft_cap;
    if (sinks != nullptr) sight.sinks = sinks;
    sight.causal = causal;
    sight.bidirectional_prefix = bidirectional_prefix;
    sight.residence = residence;
    return sight;
  }
};

inline Status Attend(std::span<const AttendRequest> requests, std::size_t layer,
                     const AttendOptions& options, const Runner& runner = Runner::Here()) {
  const kvmix_cache* const first = requests.empty() ? nullptr : requests[0].cache;
  return Attend(requests, layer, options.Of(first, layer), runner);
}
inline Status Attend(const Cache& cache, std::size_t layer, const RowsView& q, const OutView& out,
                     const AttendOptions& options, const Runner& runner = Runner::Here()) {
  return Attend(cache, layer, q, out, options.Of(cache.get(), layer), runner);
}

// Ends a cache's life before its scope does; every call refuses it afterwards.
inline void Release(Cache& cache) { const Cache gone = std::move(cache); }

}  // namespace kvmix

#endif  // KVMIX_TESTS_ATTEND_OPTIONS_H_
