// Causal attention in double precision, one row at a time, straight from the formula: what every
// attention kernel is held against.
#ifndef KVMIX_TESTS_REFERENCE_ATTENTION_H_
#define KVMIX_TESTS_REFERENCE_ATTENTION_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "kvmix/attention.h"
#include "kvmix/plan.h"

namespace kvmix::reference {

// q: [queries, query_heads, head_dim], k and v: [tokens, kv_heads, head_dim]; returns [queries,
// query_heads, head_dim]. Query i of n sees all but the last n - 1 - i tokens; one that sees none
// gets zeros. Real: float or double.
template <typename Real>
std::vector<double> Attention(const Geometry& g, const std::vector<float>& q,
                              const std::vector<Real>& k, const std::vector<Real>& v,
                              const AttendOptions& options = {}) {
  const std::size_t d = g.head_dim;
  const std::size_t queries = q.size() / (g.query_heads * d), tokens = k.size() / (g.kv_heads * d);
  const double scale = options.attention_scale != 0.0f ? options.attention_scale
                                                       : 1.0 / std::sqrt(static_cast<double>(d));
  std::vector<double> out(q.size(), 0.0), scores(tokens);
  for (std::size_t i = 0; i < queries; ++i) {
    if (tokens + i + 1 <= queries) continue;  // sees nothing
    const std::size_t end = tokens + i + 1 - queries;
    const std::size_t begin = options.sliding_window != 0 && end > options.sliding_window
                                  ? end - options.sliding_window
                                  : 0;
    for (std::size_t h = 0; h < g.query_heads; ++h) {
      const float* qr = &q[(i * g.query_heads + h) * d];
      const auto row = [&](const std::vector<Real>& x, std::size_t t) {
        return &x[(t * g.kv_heads + h / g.group()) * d];
      };
      double max = options.sinks ? options.sinks[h] : -std::numeric_limits<double>::infinity();
      for (std::size_t t = begin; t < end; ++t) {
        double s = 0.0;
        for (std::size_t c = 0; c < d; ++c) s += static_cast<double>(qr[c]) * row(k, t)[c];
        s *= scale;
        if (options.soft_cap > 0.0f) s = options.soft_cap * std::tanh(s / options.soft_cap);
        scores[t] = s;
        max = std::max(max, s);
      }
      double sum = options.sinks ? std::exp(options.sinks[h] - max) : 0.0;
      for (std::size_t t = begin; t < end; ++t) sum += scores[t] = std::exp(scores[t] - max);
      double* o = &out[(i * g.query_heads + h) * d];
      for (std::size_t t = begin; t < end; ++t)
        for (std::size_t c = 0; c < d; ++c) o[c] += scores[t] / sum * row(v, t)[c];
    }
  }
  return out;
}

}  // namespace kvmix::reference

#endif  // KVMIX_TESTS_REFERENCE_ATTENTION_H_
