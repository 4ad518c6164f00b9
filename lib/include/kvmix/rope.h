// Rotary position embedding (Su et al., arXiv 2104.09864), as far as moving keys needs it.
#ifndef KVMIX_ROPE_H_
#define KVMIX_ROPE_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kvmix/kvmix.h"

namespace kvmix {

// Pair p of a key's channels is turned by the angle position * frequency[p].
struct Rope {
  enum class Pairs : std::uint8_t {
    kHalves,      // channels p and p + dims / 2 (NEOX; Hugging Face)
    kNeighbours,  // channels 2 p and 2 p + 1 (interleaved)
  };
  Pairs pairs = Pairs::kHalves;
  std::size_t dims = 0;  // the first channels of a head, which are turned; 0: all
  double theta = 10000.0;
  // [dims / 2], instead of theta^(-2 p / dims): scaled frequencies (Llama 3, YaRN, linear). A
  // factor on all of q and k changes nothing here.
  std::vector<double> frequencies = {};
};

namespace internal {

inline kvmix_rope ViewOf(const Rope& rope) {
  return {sizeof(kvmix_rope),
          rope.dims,
          rope.theta,
          rope.frequencies.data(),
          rope.frequencies.size(),
          rope.pairs == Rope::Pairs::kNeighbours};
}

}  // namespace internal
}  // namespace kvmix

#endif  // KVMIX_ROPE_H_
