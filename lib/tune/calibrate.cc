#include "lib/tune/calibrate.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "kvmix/quantize.h"

namespace kvmix::internal {
namespace {

// A channel that hardly moves would else get a factor that lets it alone decide every scale.
constexpr float kLargestRatio = 64.0f;

}  // namespace

HeadCalibration::HeadCalibration(const std::vector<const Dump*>& dumps, std::size_t layer,
                                 std::size_t kv_head, Tensor tensor) {
  for (const Dump* dump : dumps) rows_.push_back(dump->head(layer, kv_head, tensor));
}

template <class Visit>
void HeadCalibration::ForNumbers(const Visit& visit) const {
  for (const RowsView& rows : rows_) {
    for (std::size_t t = 0; t < rows.tokens; ++t) {
      for (std::size_t c = 0; c < rows.head_dim; ++c) visit(c, rows.At(t, 0, c));
    }
  }
}

std::vector<float> HeadCalibration::Mean() const {
  std::vector<double> sum(rows_[0].head_dim, 0.0);
  ForNumbers([&](std::size_t c, float x) { sum[c] += x; });
  double tokens = 0.0;
  for (const RowsView& rows : rows_) tokens += static_cast<double>(rows.tokens);
  std::vector<float> mean;
  for (const double x : sum) mean.push_back(static_cast<float>(x / tokens));
  return mean;
}

std::vector<float> HeadCalibration::Factor(const std::vector<float>& mean) const {
  std::vector<float> range(rows_[0].head_dim, 0.0f);
  ForNumbers([&](std::size_t c, float x) {
    range[c] = std::max(range[c], std::fabs(x - (mean.empty() ? 0.0f : mean[c])));
  });
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

std::shared_ptr<const CodecVectors> HeadCalibration::Vectors(bool centre, bool fold) {
  std::shared_ptr<const CodecVectors>& vectors = vectors_[centre][fold];
  if (vectors != nullptr || !(centre || fold)) return vectors;
  CodecVectors numbers;
  if (centre) numbers.mean = fold ? Vectors(true, false)->mean : Mean();
  if (fold) numbers.factor = Factor(numbers.mean);
  return vectors = std::make_shared<const CodecVectors>(std::move(numbers));
}

HeadCodec HeadCalibration::Codec(const CodecKind& kind) {
  HeadCodec codec{kind, 0.0f, Vectors(kind.centre, kind.fold)};
  if (kind.scale != Scale::kHead) return codec;
  for (const RowsView& rows : rows_) {
    codec.head_scale = std::max(codec.head_scale, HeadScale(rows, codec));
  }
  if (codec.head_scale == 0.0f) codec.head_scale = 1.0f;  // only zeros: any scale stores them
  return codec;
}

}  // namespace kvmix::internal
