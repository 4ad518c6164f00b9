#include "lib/tune/statistics.h"

#include <algorithm>
#include <array>
#include <limits>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "lib/tune/layers.h"
#include "lib/tune/parts.h"

namespace kvmix::tune {
namespace {

// The sum of x x^T over rows x that come one after the other: in batches, so that a batch stays in
// L2 and every number of the matrix is loaded once a batch.
class Moment {
 public:
  explicit Moment(std::size_t dim)
      : dim_(dim),
        stride_((dim + kLanes - 1) / kLanes * kLanes),
        batch_(kBatch * stride_),
        sum_(dim * dim) {}

  void Add(const RowsView& rows, std::size_t token) {
    for (std::size_t c = 0; c < dim_; ++c) batch_[used_ * stride_ + c] = rows.At(token, 0, c);
    if (++used_ == kBatch) AddBatch();
  }

  // All rows that were added; both halves of the symmetric matrix.
  std::vector<double> Take() {
    AddBatch();
    for (std::size_t i = 0; i < dim_; ++i)
      for (std::size_t j = 0; j < i; ++j) sum_[j * dim_ + i] = sum_[i * dim_ + j];
    return std::move(sum_);
  }

 private:
  // Rows a batch, and independent sums for the compiler's vectors. Channels behind `dim` are zero.
  static constexpr std::size_t kBatch = 64, kLanes = 8;

  void AddBatch() {
    for (std::size_t i = 0; i < dim_; ++i) {
      for (std::size_t j = 0; j <= i; j += kLanes) {
        std::array<double, kLanes> lanes{};
        for (const double* x = batch_.data(); x != batch_.data() + used_ * stride_; x += stride_)
          for (std::size_t lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i] * x[j + lane];
        for (std::size_t lane = 0; j + lane <= i && lane < kLanes; ++lane)
          sum_[i * dim_ + j + lane] += lanes[lane];
      }
    }
    used_ = 0;
  }

  std::size_t dim_, stride_, used_ = 0;
  std::vector<double> batch_;  // [kBatch][stride_]
  std::vector<double> sum_;    // [dim][dim], the lower half
};

}  // namespace

HeadStatistics Statistics(const std::vector<DumpLayer>& readers, std::size_t kv_head,
                          Tensor tensor) {
  const RowsView rows = readers[0].head(kv_head, tensor);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  HeadStatistics s{.tokens = rows.tokens,
                   .sum = std::vector(rows.head_dim, 0.0),
                   .min = std::vector(rows.head_dim, kInfinity),
                   .max = std::vector(rows.head_dim, -kInfinity),
                   .query_moment = {}};
  for (std::size_t t = 0; t < rows.tokens; ++t) {
    for (std::size_t c = 0; c < rows.head_dim; ++c) {
      const float x = rows.At(t, 0, c);
      s.sum[c] += x;
      s.min[c] = std::min(s.min[c], x);
      s.max[c] = std::max(s.max[c], x);
    }
  }
  if (tensor == KVMIX_V || readers[0].q.data == nullptr) return s;
  Moment moment(rows.head_dim);
  for (const DumpLayer& reader : readers) {
    const std::size_t group = reader.q.heads / reader.k.heads;
    for (std::size_t q = kv_head * group; q < (kv_head + 1) * group; ++q)
      for (std::size_t t = 0; t < rows.tokens; ++t) moment.Add(reader.q.Head(q), t);
  }
  s.query_moment = moment.Take();
  return s;
}

}  // namespace kvmix::tune

namespace kvmix::tune {

Result<Calibration> Calibrate(const std::vector<const Dump*>& dumps, std::size_t first_layer,
                              std::size_t last_layer, const MeasureOptions& options) {
  if (Status s = CheckDumps(dumps); !s.ok()) return s;
  const Model& model = dumps[0]->model();
  const auto layers = OwnLayers(*dumps[0], first_layer, last_layer);
  if (!layers.ok()) return layers.status();
  Calibration calibration{.model = model};
  std::vector<std::string> hashes;  // of `dumps`
  for (const Dump* dump : dumps) {
    Result<DumpId> id = Identify(*dump, options);
    if (!id.ok()) return id.status();
    if (const auto twice = std::ranges::find(hashes, id->hash); twice != hashes.end())
      return GivenTwice(*dumps[static_cast<std::size_t>(twice - hashes.begin())], *dump);
    hashes.push_back(id->hash);
    calibration.dumps.push_back(std::move(*id));
  }
  std::ranges::sort(calibration.dumps, {}, &DumpId::hash);
  std::mutex mutex;  // of the calibration
  const auto calibrate = [&](std::size_t layer, const MeasureOptions& within) {
    for (std::size_t d = 0; d < dumps.size(); ++d) {
      std::vector<DumpLayer> readers;
      for (const std::size_t reader : model.readers(layer)) {
        Result<DumpLayer> loaded = dumps[d]->Load(reader);
        if (!loaded.ok()) return loaded.status();
        readers.push_back(std::move(*loaded));
      }
      std::vector<HeadStatistics> heads(2 * model.layers[layer].kv_heads);
      within.runner.Run(heads.size(), [&](std::size_t i) {
        heads[i] = Statistics(readers, i / 2, static_cast<Tensor>(i % 2));
      });
      const std::lock_guard lock(mutex);
      calibration.pieces[layer].emplace(hashes[d], std::move(heads));
    }
    return Status();
  };
  if (Status s = ForLayers(*layers, dumps, options, calibrate); !s.ok()) return s;
  return calibration;
}

HeadStatistics& HeadStatistics::operator+=(const HeadStatistics& o) {
  if (tokens == 0) return *this = o;
  tokens += o.tokens;
  for (std::size_t c = 0; c < sum.size(); ++c) {
    sum[c] += o.sum[c];
    min[c] = std::min(min[c], o.min[c]);
    max[c] = std::max(max[c], o.max[c]);
  }
  for (std::size_t i = 0; i < query_moment.size(); ++i) query_moment[i] += o.query_moment[i];
  return *this;
}

}  // namespace kvmix::tune
