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
#include "kvmix/model.h"
#include "tests/attend_options.h"

namespace kvmix::reference {

// q: [queries, query_heads, k_dim], k: [tokens, kv_heads, k_dim], v: [tokens, kv_heads, v_dim];
// returns [queries, query_heads, v_dim]. Query i of n sees all but the last n - 1 - i tokens; one
// that sees none gets zeros. What the options leave at 0 is the layer's. Real: float or double.
template <typename Real>
std::vector<double> Attention(const LayerShape& layer, const std::vector<float>& q,
                              const std::vector<Real>& k, const std::vector<Real>& v,
                              const AttendOptions& options = {}) {
  const std::size_t queries = q.size() / (layer.query_heads * layer.k_dim),
                    tokens = k.size() / (layer.kv_heads * layer.k_dim);
  const double scale = options.attention_scale != 0.0f ? double{options.attention_scale}
                       : layer.attention_scale != 0.0f
                           ? double{layer.attention_scale}
                           : 1.0 / std::sqrt(static_cast<double>(layer.k_dim));
  const std::size_t window = options.sliding_window != 0 ? options.sliding_window : layer.window;
  const float cap = options.soft_cap != 0.0f ? options.soft_cap : layer.soft_cap;
  const float* sinks = options.sinks != nullptr ? options.sinks
                       : layer.sinks.empty()    ? nullptr
                                                : layer.sinks.data();
  std::vector<double> out(queries * layer.query_heads * layer.v_dim, 0.0), scores(tokens);
  for (std::size_t i = 0; i < queries; ++i) {
    if (tokens + i + 1 <= queries) continue;  // sees nothing
    const std::size_t end = tokens + i + 1 - queries;
    const std::size_t begin = window != 0 && end > window ? end - window : 0;
    for (std::size_t h = 0; h < layer.query_heads; ++h) {
      const float* qr = &q[(i * layer.query_heads + h) * layer.k_dim];
      const auto row = [&](const std::vector<Real>& x, std::size_t t, std::size_t dim) {
        return &x[(t * layer.kv_heads + h / layer.group()) * dim];
      };
      double max = sinks ? sinks[h] : -std::numeric_limits<double>::infinity();
      for (std::size_t t = begin; t < end; ++t) {
        double s = 0.0;
        for (std::size_t c = 0; c < layer.k_dim; ++c)
          s += static_cast<double>(qr[c]) * row(k, t, layer.k_dim)[c];
        s *= scale;
        if (cap > 0.0f) s = cap * std::tanh(s / cap);
        scores[t] = s;
        max = std::max(max, s);
      }
      double sum = sinks ? std::exp(sinks[h] - max) : 0.0;
      for (std::size_t t = begin; t < end; ++t) sum += scores[t] = std::exp(scores[t] - max);
      double* o = &out[(i * layer.query_heads + h) * layer.v_dim];
      for (std::size_t t = begin; t < end; ++t)
        for (std::size_t c = 0; c < layer.v_dim; ++c)
          o[c] += scores[t] / sum * row(v, t, layer.v_dim)[c];
    }
  }
  return out;
}

}  // namespace kvmix::reference

#endif  // KVMIX_TESTS_REFERENCE_ATTENTION_H_
