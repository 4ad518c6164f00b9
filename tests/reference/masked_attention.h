// Attention with all that decides who sees whom (causality or not, a window, a bidirectional
// prefix, a mask, forgotten tokens), in double precision, with the logarithm of every row's sum.
#ifndef KVMIX_TESTS_REFERENCE_MASKED_ATTENTION_H_
#define KVMIX_TESTS_REFERENCE_MASKED_ATTENTION_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "kvmix/attention.h"
#include "kvmix/model.h"
#include "tests/attend_options.h"

namespace kvmix::reference {

// A mask's numbers, [queries][cells]; cells from there on are not seen. Empty: no mask.
struct MaskNumbers {
  std::vector<float> numbers = {};
  std::size_t cells = 0;
  std::vector<float> slopes = {};  // [query_heads], or empty
};

struct Attended {
  std::vector<double> out;          // [queries, query_heads, head_dim]
  std::vector<double> log_sum_exp;  // [queries, query_heads]
};

// q: [queries, query_heads, head_dim], k and v: [tokens, kv_heads, head_dim].
inline Attended MaskedAttention(const Geometry& g, const std::vector<float>& q,
                                const std::vector<double>& k, const std::vector<double>& v,
                                const AttendOptions& options, const MaskNumbers& mask = {},
                                std::size_t forgotten = 0) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const std::size_t d = g.head_dim;
  const std::size_t queries = q.size() / (g.query_heads * d), tokens = k.size() / (g.kv_heads * d);
  const double scale = options.attention_scale != 0.0f ? options.attention_scale
                                                       : 1.0 / std::sqrt(static_cast<double>(d));
  Attended result{std::vector<double>(q.size()), {}};
  std::vector<double> scores(tokens);
  for (std::size_t i = 0; i < queries * g.query_heads; ++i) {
    const std::size_t query = i / g.query_heads, h = i % g.query_heads;
    const auto by_place = [&](std::size_t t) {
      const std::size_t place = t + queries;  // a query stands at tokens + query
      const bool in_prefix =
          tokens + query >= queries && tokens + query < queries + options.bidirectional_prefix;
      if (in_prefix && t < options.bidirectional_prefix) {
        return true;
      }
      if (options.causal && place > tokens + query) return false;
      return options.sliding_window == 0 ||
             static_cast<double>(place) + static_cast<double>(options.sliding_window) >
                 static_cast<double>(tokens + query);
    };
    const auto sees = [&](std::size_t t) {
      if (t < forgotten || !by_place(t)) return false;
      return mask.numbers.empty() ||
             (t < mask.cells && mask.numbers[query * mask.cells + t] != -kInfinity);
    };
    double max = options.sinks != nullptr ? options.sinks[h] : -kInfinity;
    for (std::size_t t = 0; t < tokens; ++t) {
      scores[t] = -kInfinity;
      if (!sees(t)) continue;
      double s = 0.0;
      for (std::size_t c = 0; c < d; ++c) {
        s += static_cast<double>(q[i * d + c]) * k[(t * g.kv_heads + h / g.group()) * d + c];
      }
      s *= scale;
      if (options.soft_cap > 0.0f) s = options.soft_cap * std::tanh(s / options.soft_cap);
      if (!mask.numbers.empty()) {
        const double slope = mask.slopes.empty() ? 1.0 : mask.slopes[h];
        s += slope * mask.numbers[query * mask.cells + t];
      }
      scores[t] = s;
      max = std::max(max, s);
    }
    double sum = options.sinks != nullptr ? std::exp(options.sinks[h] - max) : 0.0;
    for (std::size_t t = 0; t < tokens; ++t) {
      if (scores[t] != -kInfinity) sum += scores[t] = std::exp(scores[t] - max);
    }
    result.log_sum_exp.push_back(max == -kInfinity ? max : max + std::log(sum));
    for (std::size_t t = 0; t < tokens; ++t) {
      if (scores[t] == -kInfinity) continue;
      for (std::size_t c = 0; c < d; ++c) {
        result.out[i * d + c] += scores[t] / sum * v[(t * g.kv_heads + h / g.group()) * d + c];
      }
    }
  }
  return result;
}

}  // namespace kvmix::reference

#endif  // KVMIX_TESTS_REFERENCE_MASKED_ATTENTION_H_
