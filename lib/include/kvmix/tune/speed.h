// How fast attention runs on this machine, and the record ("wisdom") that saves measuring again.
// Wisdom belongs to a CPU, a target and a library version, and never to a plan.
#ifndef KVMIX_TUNE_SPEED_H_
#define KVMIX_TUNE_SPEED_H_

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "kvmix/codec.h"
#include "kvmix/export.h"
#include "kvmix/model.h"
#include "kvmix/status.h"

namespace kvmix::tune {

// What times tell apart: storage and scale. The steps before and after the codes are a few percent.
KVMIX_API std::string SpeedName(const CodecKind& kind);

// Decode time of one KV head (its whole GQA group of query heads) that sees `context` tokens, in
// nanoseconds, 1 thread.
struct HeadSpeed {
  std::string k_codec;  // SpeedName: "i8-token"
  std::string v_codec;
  std::size_t group = 0;
  std::size_t k_dim = 0;
  std::size_t v_dim = 0;
  std::size_t context = 0;
  double decode_ns = 0.0;
};

struct KVMIX_API Wisdom {
  std::string cpu;      // its name, as the OS gives it
  std::string target;   // "AVX2"
  std::string version;  // of the library
  std::vector<HeadSpeed> speeds;

  // Of a head of a layer, over what its window lets through of a context. Null if not measured.
  const HeadSpeed* Find(const std::string& k_codec, const std::string& v_codec,
                        const LayerShape& layer, std::size_t context) const;
};

// An empty record for this machine, this library and a target, "" for the best.
KVMIX_API Wisdom ThisMachine(std::string_view target = {});
// JSON. A record of another CPU or library version, or of another target than the one asked for (""
// is the best), is a kMismatch that names both; one in the form of an older kvmix is a kVersion.
KVMIX_API Status SaveWisdom(const Wisdom& wisdom, const std::string& path);
KVMIX_API Result<Wisdom> LoadWisdom(const std::string& path, std::string_view target = {});

// Measures every pair of `k` and `v` kinds, as storage and scale alone, that `wisdom` does not hold
// yet for this layer, and adds it. On wisdom's target; the tiles are read as those of a model are,
// from memory.
KVMIX_API Status MeasureHeadSpeeds(const std::vector<CodecKind>& k, const std::vector<CodecKind>& v,
                                   const LayerShape& layer, std::size_t context, double seconds,
                                   Wisdom* wisdom);

}  // namespace kvmix::tune

#endif  // KVMIX_TUNE_SPEED_H_
