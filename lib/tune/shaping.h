// The matrix of the step +shape, learnt from queries. What it is for: kernels/shape-inl.h.
#ifndef KVMIX_LIB_TUNE_SHAPING_H_
#define KVMIX_LIB_TUNE_SHAPING_H_

#include <cstddef>
#include <span>
#include <vector>

namespace kvmix::tune {

// L of H = L D L^T, [dim][dim], unit lower triangular. H is the mean of q' q'^T, q' = R(factor * q)
// (factor may be empty), and 3 % of its diagonal's mean on its diagonal, so that a direction in
// which no query of the calibration looked still costs something. moment: [dim][dim], the sum of
// q q^T; of zeros, L is the unit matrix.
std::vector<float> ShapingMatrix(std::span<const double> moment, std::span<const float> factor,
                                 bool hadamard, std::size_t dim);

}  // namespace kvmix::tune

#endif  // KVMIX_LIB_TUNE_SHAPING_H_
