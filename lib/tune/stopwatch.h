// The one piece of timing code: the tuner and the benchmark share it.
#ifndef KVMIX_LIB_TUNE_STOPWATCH_H_
#define KVMIX_LIB_TUNE_STOPWATCH_H_

#include <cstddef>
#include <functional>
#include <vector>

namespace kvmix::tune {

// Medians of interleaved rounds: calls every function once a round, after one round to warm up,
// until `seconds` have passed and at least `min_rounds` rounds were made; returns each one's median
// seconds. Interleaved, so that a drift of the machine hits all alike.
std::vector<double> MedianSeconds(const std::vector<std::function<void()>>& functions,
                                  double seconds, std::size_t min_rounds = 5);

}  // namespace kvmix::tune

#endif  // KVMIX_LIB_TUNE_STOPWATCH_H_
