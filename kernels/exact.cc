// Some rows by some tokens: too few for tiles, so products are sums over a vector's lanes.
#include "kernels/exact.h"

#include <algorithm>
#include <cmath>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/exact.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "kernels/rows-inl.h"
#include "kernels/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {
namespace {

float Dot(const float* HWY_RESTRICT q, const std::uint16_t* HWY_RESTRICT k, std::size_t dim) {
  VF sum = hn::Zero(DF());
  ForVectors(0, dim, [&](auto io, std::size_t i) KVMIX_LAMBDA {
    sum = hn::MulAdd(io.Load(DF(), q + i), Halves::Load(io, k + i), sum);
  });
  return hn::ReduceSum(DF(), sum);
}

// to <- to * before + weight * v
void AddRow(const std::uint16_t* HWY_RESTRICT v, std::size_t dim, float weight, float before,
            float* HWY_RESTRICT to) {
  const VF w = hn::Set(DF(), weight), b = hn::Set(DF(), before);
  ForVectors(0, dim, [&](auto io, std::size_t i) KVMIX_LAMBDA {
    const VF sum = hn::MulAdd(w, Halves::Load(io, v + i), hn::Mul(b, io.Load(DF(), to + i)));
    io.Store(sum, DF(), to + i);
  });
}

void Attend(const ExactTask& t) {
  for (std::size_t r = 0; r < t.rows; ++r) {
    float max = -std::numeric_limits<float>::infinity(), sum = 0.0f;
    float* const out = t.out + r * t.v_dim;
    for (std::size_t c = 0; c < t.v_dim; ++c) out[c] = 0.0f;
    for (std::size_t token = 0; token < t.tokens; ++token) {
      const float added = t.added[r * t.tokens + token];
      if (added == -std::numeric_limits<float>::infinity()) continue;
      float s = t.scale * Dot(t.q + r * t.k_dim, t.k + token * t.k_dim, t.k_dim);
      if (t.soft_cap != 0.0f) s = t.soft_cap * std::tanh(s / t.soft_cap);
      s = std::isfinite(s) ? std::clamp((s + added) * kLog2E, -0x1p127f, 0x1p127f)
                           : std::numeric_limits<float>::quiet_NaN();
      const float now = std::isnan(s) ? s : HWY_MAX(max, s);
      const float before = std::exp2(max - now), weight = std::exp2(s - now);
      AddRow(t.v + token * t.v_dim, t.v_dim, weight, before, out);
      sum = sum * before + weight;
      max = now;
    }
    t.max[r] = max;
    t.sum[r] = sum;
  }
}

}  // namespace

ExactKernels ExactTable() { return {&Attend}; }

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvmix::kernels {
HWY_EXPORT(ExactTable);
ExactKernels ExactKernelsFor(std::int64_t target) { return KVMIX_CALL_FOR(target, ExactTable)(); }
}  // namespace kvmix::kernels
#endif  // HWY_ONCE
