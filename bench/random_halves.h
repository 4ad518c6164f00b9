// Random K, V, Q for benchmarks: normal, as real ones are by and large.
#ifndef KVMIX_BENCH_RANDOM_HALVES_H_
#define KVMIX_BENCH_RANDOM_HALVES_H_

#include <cstddef>
#include <random>
#include <vector>

#include "kvmix/half.h"

namespace kvmix::bench {

inline std::vector<Half> RandomHalves(std::size_t n) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<Half> halves(n);
  for (Half& h : halves) h = FloatToHalf(normal(random));
  return halves;
}

inline constexpr float kHeadScale = 5.0f / 127;  // as i8-head's scale it covers such data

}  // namespace kvmix::bench

#endif  // KVMIX_BENCH_RANDOM_HALVES_H_
