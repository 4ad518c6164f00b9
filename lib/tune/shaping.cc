#include "lib/tune/shaping.h"

#include <cmath>
#include <utility>

namespace kvmix::tune {
namespace {

constexpr double kFloor = 0.03;  // of the diagonal's mean

// x <- R(x), as kernels/transform.h has it.
void Rotate(std::span<double> x) {
  const std::size_t block = x.size() & (~x.size() + 1);
  for (std::size_t h = 1; h < block; h *= 2) {
    for (std::size_t i = 0; i < x.size(); ++i) {
      if ((i & h) != 0) continue;
      const double a = x[i], b = x[i + h];
      x[i] = a + b;
      x[i + h] = a - b;
    }
  }
  for (double& v : x) v /= std::sqrt(static_cast<double>(block));
}

// rows <- every row times F R.
void Prepare(std::vector<double>& rows, std::span<const float> factor, bool hadamard,
             std::size_t dim) {
  for (std::size_t r = 0; r < dim; ++r) {
    const std::span<double> row = std::span(rows).subspan(r * dim, dim);
    for (std::size_t c = 0; c < factor.size(); ++c) row[c] *= double{factor[c]};
    if (hadamard) Rotate(row);
  }
}

void Transpose(std::vector<double>& m, std::size_t dim) {
  for (std::size_t r = 0; r < dim; ++r) {
    for (std::size_t c = 0; c < r; ++c) std::swap(m[r * dim + c], m[c * dim + r]);
  }
}

}  // namespace

std::vector<float> ShapingMatrix(std::span<const double> moment, std::span<const float> factor,
                                 bool hadamard, std::size_t dim) {
  std::vector<double> h(moment.begin(), moment.end());  // R F (sum of q q^T) F R
  Prepare(h, factor, hadamard, dim);
  Transpose(h, dim);
  Prepare(h, factor, hadamard, dim);
  double trace = 0.0;
  for (std::size_t i = 0; i < dim; ++i) trace += h[i * dim + i];

  std::vector<float> matrix(dim * dim, 0.0f);
  std::vector<double> l(dim * dim, 0.0), d(dim);
  for (std::size_t i = 0; i < dim; ++i) {
    l[i * dim + i] = 1.0;
    for (std::size_t j = 0; j <= i; ++j) {
      double rest = h[i * dim + j] + (i == j ? kFloor * trace / static_cast<double>(dim) : 0.0);
      for (std::size_t k = 0; k < j; ++k) rest -= l[i * dim + k] * d[k] * l[j * dim + k];
      if (i == j) {
        d[i] = rest;
      } else if (trace > 0.0) {
        l[i * dim + j] = rest / d[j];
      }
      matrix[i * dim + j] = static_cast<float>(l[i * dim + j]);
    }
  }
  return matrix;
}

}  // namespace kvmix::tune
