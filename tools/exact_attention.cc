// Decodes every KV head's rows to doubles (exported from a cache, so that they are the kernels' own
// codes), then takes query heads and prompts in parallel, one query row at a time: scores, softmax,
// weighted sum.
#include "exact_attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "kvmix/cache.h"
#include "kvmix/quantize.h"
#include "lib/files/machine.h"

namespace kvmix::tools {
namespace {

constexpr std::size_t kLanes = 8;  // independent sums, which the compiler may keep in vectors

using Rows = std::vector<double>;  // [tokens, head_dim]

Result<Rows> DecodedRows(const Cache& cache, std::size_t head, Tensor t) {
  const std::size_t tokens = cache.tokens(0), dim = cache.geometry().head_dim;
  const Result<RowCodec> codec = RowCodec::Create(cache.plan().codec(0, head, t), dim);
  if (!codec.ok()) return codec.status();
  std::vector<std::uint8_t> codes(tokens * codec->row_bytes());
  std::vector<float> scales(tokens), decoded(tokens * dim);
  if (Status s = cache.ExportRows(0, head, t, 0, tokens, codes.data(), scales.data()); !s.ok()) {
    return s;
  }
  codec->Decode(codes.data(), scales.data(), tokens, decoded.data(), dim);
  return Rows(decoded.begin(), decoded.end());
}

double Dot(const double* a, const double* b, std::size_t n) {
  std::array<double, kLanes> lanes{};
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (std::size_t j = 0; j < kLanes; ++j) lanes[j] += a[i + j] * b[i + j];
  for (; i < n; ++i) lanes[i % kLanes] += a[i] * b[i];
  double sum = 0.0;
  for (double x : lanes) sum += x;
  return sum;
}

// One query row over the first `tokens` rows of k and v.
void AttendRow(const std::vector<double>& q, const double* k, const double* v, std::size_t tokens,
               std::vector<double>* scores, std::vector<double>* sums) {
  const std::size_t d = q.size();
  for (std::size_t t = 0; t < tokens; ++t) (*scores)[t] = Dot(q.data(), k + t * d, d);
  const double max =
      *std::max_element(scores->begin(), scores->begin() + static_cast<std::ptrdiff_t>(tokens));
  std::fill(sums->begin(), sums->end(), 0.0);
  double weights = 0.0;
  for (std::size_t t = 0; t < tokens; ++t) {
    const double weight = std::exp((*scores)[t] - max);
    weights += weight;
    for (std::size_t c = 0; c < d; ++c) (*sums)[c] += weight * v[t * d + c];
  }
  for (double& x : *sums) x /= weights;
}

}  // namespace

Status AttendExactly(const Dump& dump, std::size_t layer, const std::vector<HeadCodec>& codecs,
                     int num_threads, std::vector<float>* out) {
  Geometry g = dump.geometry();
  g.layers = 1;
  Result<Cache> cache = Cache::Create(g, Plan{g, codecs, {}}, dump.tokens());
  if (!cache.ok()) return cache.status();
  if (Status s = cache->Append(0, dump.k(layer), dump.v(layer)); !s.ok()) return s;
  std::vector<Rows> decoded;  // [kv_heads][K, V]
  for (std::size_t head = 0; head < g.kv_heads; ++head) {
    for (const Tensor t : {Tensor::kK, Tensor::kV}) {
      Result<Rows> rows = DecodedRows(*cache, head, t);
      if (!rows.ok()) return rows.status();
      decoded.push_back(std::move(*rows));
    }
  }
  const std::vector<std::size_t>& prompts = dump.prompt_tokens();
  std::vector<std::size_t> first(prompts.size(), 0);
  for (std::size_t p = 1; p < prompts.size(); ++p) first[p] = first[p - 1] + prompts[p - 1];
  const std::size_t d = g.head_dim, q_row = g.query_heads * d;
  out->assign(dump.tokens() * q_row, 0.0f);
  const RowsView queries = dump.q(layer);
  const int threads = internal::Threads(num_threads);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
  for (std::size_t p = 0; p < prompts.size(); ++p) {
    for (std::size_t h = 0; h < g.query_heads; ++h) {
      const double* k = decoded[h / g.group() * 2].data() + first[p] * d;
      const double* v = decoded[h / g.group() * 2 + 1].data() + first[p] * d;
      std::vector<double> q(d), scores(prompts[p]), sums(d);
      for (std::size_t i = 0; i < prompts[p]; ++i) {
        const std::size_t at = (first[p] + i) * q_row + h * d;
        for (std::size_t c = 0; c < d; ++c)
          q[c] = double{dump.attention_scale()} * queries.At(first[p] + i, h, c);
        AttendRow(q, k, v, i + 1, &scores, &sums);
        std::transform(sums.begin(), sums.end(), out->begin() + static_cast<std::ptrdiff_t>(at),
                       [](double x) { return static_cast<float>(x); });
      }
    }
  }
  return {};
}

}  // namespace kvmix::tools
