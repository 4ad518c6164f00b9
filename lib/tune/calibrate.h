// The numbers of codecs, learnt from dumps.
#ifndef KVMIX_LIB_TUNE_CALIBRATE_H_
#define KVMIX_LIB_TUNE_CALIBRATE_H_

#include <cstddef>
#include <memory>
#include <vector>

#include "kvmix/codec.h"
#include "kvmix/dump.h"

namespace kvmix::internal {

// One KV head's K or V in all dumps. The codecs that come from it share its vectors.
class HeadCalibration {
 public:
  HeadCalibration(const std::vector<const Dump*>& dumps, std::size_t layer, std::size_t kv_head,
                  Tensor tensor);

  // Mean: of each channel, over all tokens. Factor: the square root of each channel's range,
  // max |x - mean|, over the geometric mean of these roots: large channels get smaller by as much
  // as small ones get larger. Head scale: the one that covers every token.
  HeadCodec Codec(const CodecKind& kind);

 private:
  template <class Visit>
  void ForNumbers(const Visit& visit) const;  // visit(channel, number), token by token
  std::vector<float> Mean() const;
  std::vector<float> Factor(const std::vector<float>& mean) const;  // empty: not centred
  std::shared_ptr<const CodecVectors> Vectors(bool centre, bool fold);

  std::vector<RowsView> rows_;                         // of each dump
  std::shared_ptr<const CodecVectors> vectors_[2][2];  // [centre][fold]
};

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_TUNE_CALIBRATE_H_
