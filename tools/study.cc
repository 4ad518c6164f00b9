#include "study.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>

#include "console.h"
#include "lib/files/parse_number.h"

namespace kvmix::tools {
namespace {

constexpr const char* kStudyHeads = "0:0,0:1,1:1,2:0,2:1,8:0";

// A head's rows as the codec stores them, the very codes of a cache. [tokens, head_dim]
std::vector<double> Decoded(const RowsView& rows, const HeadCodec& codec) {
  const RowCodec row_codec = Require(RowCodec::Create(codec, rows.head_dim));
  std::vector<std::uint8_t> codes(rows.tokens * row_codec.row_bytes());
  std::vector<float> scales(rows.tokens), decoded(rows.tokens * rows.head_dim);
  row_codec.Encode(rows, codes.data(), scales.data());
  row_codec.Decode(codes.data(), scales.data(), rows.tokens, decoded.data(), rows.head_dim);
  return {decoded.begin(), decoded.end()};
}

double Dot(const double* a, const double* b, std::size_t n) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (std::size_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// The output of one query row, scaled, of a layer's head over the last tokens of k and v that it
// sees.
std::vector<double> AttendRow(const LayerShape& shape, std::size_t head,
                              const std::vector<double>& q, const double* k, const double* v,
                              std::size_t tokens) {
  const std::size_t first = tokens - shape.seen(tokens);
  std::vector<double> weights, out(shape.v_dim, 0.0);
  double max = shape.sinks.empty() ? -std::numeric_limits<double>::infinity() : shape.sinks[head];
  for (std::size_t t = first; t < tokens; ++t) {
    double score = Dot(q.data(), k + t * shape.k_dim, shape.k_dim);
    if (shape.soft_cap != 0.0f) score = shape.soft_cap * std::tanh(score / shape.soft_cap);
    weights.push_back(score);
    max = std::max(max, score);
  }
  double sum = shape.sinks.empty() ? 0.0 : std::exp(shape.sinks[head] - max);
  for (std::size_t t = first; t < tokens; ++t) {
    const double weight = std::exp(weights[t - first] - max);
    sum += weight;
    for (std::size_t c = 0; c < shape.v_dim; ++c) out[c] += weight * v[t * shape.v_dim + c];
  }
  for (double& x : out) x /= sum;
  return out;
}

}  // namespace

bool IsStudyModel(const Model& model) {
  const std::optional<Geometry> g = model.geometry();
  return g && g->layers == 24 && g->kv_heads == 2 && g->head_dim == 64;
}

Plan StrategyPlan(const Model& model, int strategy, const std::string& fp16_heads) {
  const HeadCodec per_head{{KVMIX_STORAGE_I8, KVMIX_SCALE_HEAD}, 1.0f},
      per_token{{KVMIX_STORAGE_I8, KVMIX_SCALE_TOKEN}};
  Plan plan = UniformPlan(model, strategy == 2 ? per_token : per_head,
                          strategy == 1 ? per_head : per_token);
  if (strategy == 3 && fp16_heads.empty() && !IsStudyModel(model))
    Refuse(
        "strategy 3 on {} needs --fp16-heads (its K heads to keep in fp16) or --plan: the study's "
        "six heads are those of 24 layers x 2 KV heads x 64",
        ToString(model));
  std::istringstream items(fp16_heads.empty() ? kStudyHeads : fp16_heads);
  for (std::string item; fp16_heads != "none" && std::getline(items, item, ',');) {
    std::istringstream numbers(item);
    std::string layer_text, head_text;
    std::getline(std::getline(numbers, layer_text, ':'), head_text);
    const auto layer = internal::ParseNumber<std::size_t>(layer_text),
               head = internal::ParseNumber<std::size_t>(head_text);
    if (!layer || !head) Refuse("--fp16-heads: expected layer:head, as in 0:1, found '{}'", item);
    if (strategy != 3) continue;
    if (*layer >= model.layers.size() || *head >= model.layers[*layer].kv_heads)
      Refuse("--fp16-heads: no head {}:{} in {}", *layer, *head, ToString(model));
    plan.codec(*layer, *head, KVMIX_K) = {};
  }
  return plan;
}

void SetHeadScales(const tune::Dump& dump, Plan* plan) {
  const std::vector<LayerShape>& layers = plan->model.layers;
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    if (!layers[layer].owns_kv()) continue;
    const tune::DumpLayer loaded = Require(dump.Load(layer));
    for (std::size_t head = 0; head < layers[layer].kv_heads; ++head) {
      for (const Tensor t : {KVMIX_K, KVMIX_V}) {
        HeadCodec& codec = plan->codec(layer, head, t);
        if (codec.kind.scale != KVMIX_SCALE_HEAD) continue;
        const float scale = HeadScale(loaded.head(head, t), codec);
        codec.head_scale = scale > 0.0f ? scale : 1.0f;  // nothing but zeros: any scale stores them
      }
    }
  }
}

ErrorSums TruncationError(const RowsView& rows, const HeadCodec& codec) {
  ErrorSums sums;
  for (std::size_t t = 0; t < rows.tokens; ++t) {
    float max = 0.0f;
    for (std::size_t c = 0; c < rows.head_dim; ++c)
      max = std::max(max, std::fabs(rows.At(t, 0, c)));
    const float inv_scale = codec.kind.scale == KVMIX_SCALE_HEAD ? 1.0f / codec.head_scale
                            : max > 0.0f                         ? 127.0f / max
                                                                 : 1.0f;
    for (std::size_t c = 0; c < rows.head_dim; ++c) {
      const float x = rows.At(t, 0, c);
      const float code = std::clamp(std::trunc(x * inv_scale), -127.0f, 127.0f);
      const double error = double{code / inv_scale} - x;
      sums += {1, error * error, std::fabs(error), std::fabs(double{x})};
    }
  }
  return sums;
}

std::vector<float> AttendExactly(const tune::Dump& dump, std::size_t layer, const HeadCodec* codecs,
                                 const Runner& runner) {
  const LayerShape& shape = dump.model().layers[layer];
  const tune::DumpLayer loaded = Require(dump.Load(layer));
  std::vector<std::vector<double>> decoded;  // [kv_heads][K, V]
  for (std::size_t head = 0; head < shape.kv_heads; ++head)
    for (const Tensor t : {KVMIX_K, KVMIX_V})
      decoded.push_back(Decoded(loaded.head(head, t), *codecs++));
  std::vector<std::size_t> first;  // of every token: its prompt's first one
  for (const std::size_t tokens : dump.prompt_tokens())
    first.insert(first.end(), tokens, first.size());
  std::vector<float> out(dump.tokens() * shape.query_heads * shape.v_dim);
  constexpr std::size_t kRows = 16;  // of a part
  const std::size_t tokens = dump.tokens(), rows = shape.query_heads * tokens;
  runner.Run((rows + kRows - 1) / kRows, [&](std::size_t part) {
    for (std::size_t i = part * kRows; i < std::min(rows, (part + 1) * kRows); ++i) {
      const std::size_t h = i / tokens, t = i % tokens;
      std::vector<double> q(shape.k_dim);
      for (std::size_t c = 0; c < q.size(); ++c)
        q[c] = double{shape.scale()} * loaded.q.At(t, h, c);
      const std::vector<double>* kv = &decoded[h / shape.group() * 2];
      const std::vector<double> row = AttendRow(shape, h, q, &kv[0][first[t] * shape.k_dim],
                                                &kv[1][first[t] * shape.v_dim], t - first[t] + 1);
      std::ranges::copy(row, &out[(t * shape.query_heads + h) * shape.v_dim]);
    }
  });
  return out;
}

}  // namespace kvmix::tools
