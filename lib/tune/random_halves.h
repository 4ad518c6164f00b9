// Random K, V and Q to time kernels with: normal, as real ones are by and large.
#ifndef KVMIX_LIB_TUNE_RANDOM_HALVES_H_
#define KVMIX_LIB_TUNE_RANDOM_HALVES_H_

#include <cstddef>
#include <random>
#include <vector>

#include "kvmix/half.h"

namespace kvmix::tune {

inline std::vector<Half> RandomHalves(std::size_t n, unsigned seed = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<Half> halves(n);
  for (Half& h : halves) h = FloatToHalf(normal(random));
  return halves;
}

inline constexpr float kHeadScale = 5.0f / 127;  // as i8-head's scale it covers such data

}  // namespace kvmix::tune

#endif  // KVMIX_LIB_TUNE_RANDOM_HALVES_H_
