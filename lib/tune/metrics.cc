// Sums of squares and cosines of outputs, in double.
#include "kvmix/tune/metrics.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

namespace kvmix::tune {
namespace {

// Independent sums, so that the compiler can use vectors without reordering a sum.
constexpr std::size_t kLanes = 8;

double Sum(const std::array<double, kLanes>& lanes) {
  return std::accumulate(lanes.begin(), lanes.end(), 0.0);
}

}  // namespace

double AttentionError::nmse() const {
  if (sum_squared_error == 0.0) return 0.0;
  return sum_squared_output > 0.0 ? sum_squared_error / sum_squared_output
                                  : std::numeric_limits<double>::infinity();
}

double AttentionError::cosine() const {
  return rows == 0 ? 1.0 : sum_cosine / static_cast<double>(rows);
}

AttentionError& AttentionError::operator+=(const AttentionError& o) {
  sum_squared_error += o.sum_squared_error;
  sum_squared_output += o.sum_squared_output;
  sum_cosine += o.sum_cosine;
  rows += o.rows;
  return *this;
}

AttentionError CompareOutputs(const float* exact, const float* approximate, std::size_t rows,
                              std::size_t stride, std::size_t head_dim) {
  AttentionError error;
  error.rows = rows;
  for (std::size_t r = 0; r < rows; ++r) {
    const float* x = exact + r * stride;
    const float* y = approximate + r * stride;
    std::array<double, kLanes> xx{}, yy{}, xy{}, dd{};
    const auto add = [&](std::size_t lane, std::size_t c) {
      const double a = x[c], b = y[c];
      xx[lane] += a * a;
      yy[lane] += b * b;
      xy[lane] += a * b;
      dd[lane] += (a - b) * (a - b);
    };
    std::size_t c = 0;
    for (; c + kLanes <= head_dim; c += kLanes)
      for (std::size_t lane = 0; lane < kLanes; ++lane) add(lane, c + lane);
    for (; c < head_dim; ++c) add(c % kLanes, c);
    const double norm_x = Sum(xx), norm_y = Sum(yy), difference = Sum(dd);
    error.sum_squared_error += difference;
    error.sum_squared_output += norm_x;
    if (difference == 0.0) {
      error.sum_cosine += 1.0;  // exactly, also for zero rows
    } else if (norm_x > 0.0 && norm_y > 0.0) {
      error.sum_cosine += std::clamp(Sum(xy) / std::sqrt(norm_x * norm_y), -1.0, 1.0);
    }
  }
  return error;
}

// Row after row with all heads, as they lie in memory; in chunks that do not depend on the threads,
// so that neither do the sums.
std::vector<AttentionError> CompareLayer(const std::vector<float>& exact,
                                         const std::vector<float>& approximate,
                                         const LayerShape& shape, const Runner& runner) {
  constexpr std::size_t kChunk = 256;  // tokens
  const std::size_t heads = shape.query_heads, stride = heads * shape.v_dim,
                    tokens = exact.size() / stride, chunks = (tokens + kChunk - 1) / kChunk;
  std::vector<AttentionError> parts(chunks * heads);
  runner.Run(chunks, [&](std::size_t chunk) {
    for (std::size_t t = chunk * kChunk; t < std::min(tokens, (chunk + 1) * kChunk); ++t) {
      for (std::size_t h = 0; h < heads; ++h) {
        const std::size_t at = t * stride + h * shape.v_dim;
        parts[chunk * heads + h] +=
            CompareOutputs(&exact[at], &approximate[at], 1, stride, shape.v_dim);
      }
    }
  });
  std::vector<AttentionError> errors(heads);
  for (std::size_t i = 0; i < parts.size(); ++i) errors[i % heads] += parts[i];
  return errors;
}

Fidelity Summarize(const std::vector<AttentionError>& errors, const Model& model) {
  Fidelity f;
  if (errors.empty()) return f;
  double sum_nmse = 0.0, sum_cosine = 0.0;
  f.worst_cosine = std::numeric_limits<double>::infinity();
  std::size_t worst = 0;
  for (std::size_t i = 0; i < errors.size(); ++i) {
    const double cosine = errors[i].cosine();
    sum_nmse += errors[i].nmse();
    sum_cosine += cosine;
    f.worst_nmse = std::max(f.worst_nmse, errors[i].nmse());
    if (cosine < f.worst_cosine) {
      f.worst_cosine = cosine;
      worst = i;
    }
  }
  while (model.query_heads_before(f.worst_layer + 1) <= worst) ++f.worst_layer;
  f.worst_query_head = worst - model.query_heads_before(f.worst_layer);
  f.mean_nmse = sum_nmse / static_cast<double>(errors.size());
  f.mean_cosine = sum_cosine / static_cast<double>(errors.size());
  return f;
}

}  // namespace kvmix::tune
