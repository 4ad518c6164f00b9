// The numbers of codecs, learnt from dumps.
#ifndef KVMIX_LIB_TUNE_CALIBRATE_H_
#define KVMIX_LIB_TUNE_CALIBRATE_H_

#include <memory>
#include <vector>

#include "kvmix/codec.h"
#include "kvmix/status.h"
#include "kvmix/tune/steps.h"

namespace kvmix::tune {

// Refuses what HeadCalibration cannot make: a scale per head needs each channel's range alone,
// which a fold and a rotation mix.
Status CheckCalibrated(const CodecKind& kind);

// One KV head's K or V. The codecs that come from it share its vectors.
class HeadCalibration {
 public:
  // `statistics` of at least one token must outlive this.
  explicit HeadCalibration(const HeadStatistics& statistics) : statistics_(statistics) {}

  // Mean: of each channel, over all tokens. Factor: the square root of each channel's range,
  // max |x - mean|, over the geometric mean of these roots: large channels get smaller by as much
  // as small ones get larger. Head scale: the one that covers every token. Shaping (of K): from the
  // queries' second moment.
  HeadCodec Codec(const CodecKind& kind);

 private:
  std::vector<float> Mean() const;
  // Of each channel max |x - mean|; an empty mean is none.
  std::vector<float> Range(const std::vector<float>& mean) const;
  std::vector<float> Factor(const std::vector<float>& mean) const;
  std::shared_ptr<const CodecVectors> Vectors(const CodecKind& kind);

  const HeadStatistics& statistics_;
  // [no centre, a centre, an own one][fold][unshaped, shaped, shaped and rotated]
  std::shared_ptr<const CodecVectors> vectors_[3][2][3];
};

}  // namespace kvmix::tune

#endif  // KVMIX_LIB_TUNE_CALIBRATE_H_
