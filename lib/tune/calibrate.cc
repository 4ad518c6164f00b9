#include "lib/tune/calibrate.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "lib/files/file.h"
#include "lib/tune/shaping.h"

namespace kvmix::tune {

using internal::Error;

namespace {

// A channel that hardly moves would else get a factor that lets it alone decide every scale.
constexpr float kLargestRatio = 64.0f;

}  // namespace

Status CheckCalibrated(const CodecKind& kind) {
  if (kind.scale != KVMIX_SCALE_HEAD || !(kind.fold || kind.hadamard)) return {};
  return Error(ErrorCode::kInvalidArgument,
               "candidate {}: expected a scale per head without fold and rotation, or a scale per "
               "token: calibration knows the range of each channel alone",
               ToString(kind));
}

std::vector<float> HeadCalibration::Mean() const {
  std::vector<float> mean;
  for (const double x : statistics_.sum)
    mean.push_back(static_cast<float>(x / static_cast<double>(statistics_.tokens)));
  return mean;
}

std::vector<float> HeadCalibration::Range(const std::vector<float>& mean) const {
  std::vector<float> range;
  for (std::size_t c = 0; c < statistics_.sum.size(); ++c) {
    const float middle = mean.empty() ? 0.0f : mean[c];
    range.push_back(std::max(statistics_.max[c] - middle, middle - statistics_.min[c]));
  }
  return range;
}

std::vector<float> HeadCalibration::Factor(const std::vector<float>& mean) const {
  std::vector<float> range = Range(mean);
  const float largest = *std::ranges::max_element(range);
  if (!(largest > 0.0f)) return std::vector<float>(range.size(), 1.0f);
  double sum_log = 0.0;
  for (float& x : range) {
    x = std::sqrt(std::max(x, largest / (kLargestRatio * kLargestRatio)));
    sum_log += std::log(double{x});
  }
  const double middle = std::exp(sum_log / static_cast<double>(range.size()));
  for (float& x : range) x = static_cast<float>(x / middle);
  return range;
}

std::shared_ptr<const CodecVectors> HeadCalibration::Vectors(const CodecKind& kind) {
  std::shared_ptr<const CodecVectors>& vectors =
      vectors_[kind.own_centre ? 2 : kind.centre][kind.fold][kind.shape ? 1 + kind.hadamard : 0];
  if (vectors != nullptr || !(kind.centre || kind.fold || kind.shape)) return vectors;
  CodecVectors numbers;
  if (kind.centre) numbers.mean = Mean();
  // An own centre takes off about what the mean would.
  if (kind.fold) numbers.factor = Factor(kind.own_centre ? Mean() : numbers.mean);
  if (kind.shape) {
    numbers.shaping = ShapingMatrix(statistics_.query_moment, numbers.factor, kind.hadamard,
                                    statistics_.sum.size());
  }
  return vectors = std::make_shared<const CodecVectors>(std::move(numbers));
}

HeadCodec HeadCalibration::Codec(const CodecKind& kind) {
  HeadCodec codec{kind, 0.0f, Vectors(kind)};
  if (kind.scale != KVMIX_SCALE_HEAD) return codec;
  const std::vector<float> mean(codec.mean().begin(), codec.mean().end());
  // As HeadScale() has it, and 1 where there are only zeros: any scale stores them.
  const float largest = std::ranges::max(Range(mean));
  codec.head_scale = largest < 0x1p-100f ? 1.0f : largest / 127.0f;
  return codec;
}

}  // namespace kvmix::tune
