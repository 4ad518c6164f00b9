// How fast attention runs on this machine: the one piece of timing code that the tuner and the
// benchmark share, and the record
// ("wisdom") that saves measuring again. Wisdom belongs to a CPU, a target and a library version,
// and never to a plan.
#ifndef KVMIX_SPEED_H_
#define KVMIX_SPEED_H_

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "kvmix/export.h"
#include "kvmix/plan.h"
#include "kvmix/status.h"

namespace kvmix {

// Decode time of one KV head (its whole GQA group of query heads) over `context` tokens, in
// nanoseconds, 1 thread.
struct HeadSpeed {
  std::string k_codec;  // CodecName without "+centre"
  std::string v_codec;
  std::size_t group = 0;
  std::size_t head_dim = 0;
  std::size_t context = 0;
  double decode_ns = 0.0;
};

struct KVMIX_API Wisdom {
  std::string cpu;      // its name, as the OS gives it
  std::string target;   // "AVX2"
  std::string version;  // of the library
  std::vector<HeadSpeed> speeds;

  // Null if not measured.
  const HeadSpeed* Find(const std::string& k_codec, const std::string& v_codec, std::size_t group,
                        std::size_t head_dim, std::size_t context) const;
};

// An empty record for this machine, this library and the target that runs here.
KVMIX_API Wisdom ThisMachine();
// JSON. A record of another CPU, target or library version is a kMismatch that names both; one in
// the form of an older kvmix is a kVersion.
KVMIX_API Status SaveWisdom(const Wisdom& wisdom, const std::string& path);
KVMIX_API Result<Wisdom> LoadWisdom(const std::string& path);

// Medians of interleaved rounds: calls every function once a round, after one round to warm up,
// until `seconds` have passed and at least `min_rounds` rounds were made; returns each one's median
// seconds. Interleaved, so that a drift of the machine hits all alike.
KVMIX_API std::vector<double> MedianSeconds(const std::vector<std::function<void()>>& functions,
                                            double seconds, std::size_t min_rounds = 5);

// Measures every pair of `k` and `v` kinds that `wisdom` does not hold yet, and adds it.
KVMIX_API Status MeasureHeadSpeeds(const std::vector<CodecKind>& k, const std::vector<CodecKind>& v,
                                   std::size_t group, std::size_t head_dim, std::size_t context,
                                   double seconds, Wisdom* wisdom);

}  // namespace kvmix

#endif  // KVMIX_SPEED_H_
