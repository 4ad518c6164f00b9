#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <functional>
#include <iterator>
#include <limits>
#include <utility>

#include <fmt/format.h>

#include "kvmix/attention.h"
#include "kvmix/cache.h"
#include "kvmix/tune.h"
#include "machine.h"

namespace kvmix {
namespace {

constexpr std::size_t kLanes =
    8;  // independent sums, so that the compiler can use vectors without reordering a sum

double Sum(const std::array<double, kLanes>& lanes) {
  double sum = 0.0;
  for (double x : lanes) sum += x;
  return sum;
}

bool IsF16(const CodecKind& kind) { return kind.storage == Storage::kF16; }

std::string FileName(const std::string& path) {
  const std::size_t end = path.find_last_not_of('/');
  const std::size_t slash = path.find_last_of('/', end);
  return path.substr(slash + 1, end - slash);  // npos + 1 is 0
}

// [query_heads] errors of a layer's outputs, [tokens, query_heads, head_dim]. Row after row with
// all heads, as they lie in memory; in chunks that do not depend on the threads, so that neither do
// the sums.
std::vector<AttentionError> CompareLayer(const std::vector<float>& exact,
                                         const std::vector<float>& approximate, const Geometry& g,
                                         int num_threads) {
  constexpr std::size_t kChunk = 256;  // tokens
  const std::size_t stride = g.query_heads * g.head_dim, tokens = exact.size() / stride,
                    chunks = (tokens + kChunk - 1) / kChunk;
  std::vector<AttentionError> parts(chunks * g.query_heads);
#pragma omp parallel for num_threads(num_threads)
  for (std::size_t chunk = 0; chunk < chunks; ++chunk) {
    for (std::size_t t = chunk * kChunk; t < std::min(tokens, (chunk + 1) * kChunk); ++t) {
      for (std::size_t h = 0; h < g.query_heads; ++h) {
        const std::size_t at = t * stride + h * g.head_dim;
        parts[chunk * g.query_heads + h] +=
            CompareOutputs(&exact[at], &approximate[at], 1, stride, g.head_dim);
      }
    }
  }
  std::vector<AttentionError> errors(g.query_heads);
  for (std::size_t i = 0; i < parts.size(); ++i) errors[i % g.query_heads] += parts[i];
  return errors;
}

// Calls work(layer, threads for it) for every layer and returns the first layer's error. Layers run
// side by side, which costs the least waiting, as long as the outputs that they hold stay small;
// else one after the other with all threads.
constexpr std::size_t kOutputBytes = std::size_t{1} << 30;

Status ForLayers(std::size_t first, std::size_t last, const std::vector<const Dump*>& dumps,
                 int num_threads, const Progress& progress,
                 const std::function<Status(std::size_t, int)>& work) {
  const int threads = internal::Threads(num_threads);
  std::size_t layer_bytes = 1;  // of an exact and an approximate output
  for (const Dump* dump : dumps)
    layer_bytes =
        std::max(layer_bytes, 2 * sizeof(float) * dump->tokens() * dump->geometry().query_heads *
                                  dump->geometry().head_dim);
  const int side_by_side = static_cast<int>(
      std::clamp<std::size_t>(kOutputBytes / layer_bytes, 1, static_cast<std::size_t>(threads)));
  std::vector<Status> results(last - first);
  std::size_t done = 0;
  std::atomic<bool> failed = false;
#pragma omp parallel for num_threads(side_by_side) schedule(dynamic)
  for (std::size_t layer = first; layer < last; ++layer) {
    if (failed) continue;
    results[layer - first] = work(layer, side_by_side == 1 ? threads : 1);
    for (const Dump* dump : dumps) dump->Release(layer);
    if (!results[layer - first].ok()) failed = true;
#pragma omp critical(kvmix_progress)
    if (progress) progress(++done, last - first);
  }
  for (Status& s : results)
    if (!s.ok()) return std::move(s);
  return {};
}

Status CheckDumps(const std::vector<const Dump*>& dumps) {
  if (dumps.empty()) return {ErrorCode::kInvalidArgument, "measuring needs at least one dump"};
  for (const Dump* dump : dumps) {
    if (!dump->has_q())
      return {ErrorCode::kInvalidArgument,
              fmt::format("{}: has no Q, which attention errors need", dump->path())};
    if (dump->tokens() == 0)
      return {ErrorCode::kInvalidArgument, fmt::format("{}: has no tokens", dump->path())};
    if (dump->geometry() != dumps[0]->geometry())
      return {ErrorCode::kMismatch,
              fmt::format("{}: {}, but {} has {}", dump->path(), ToString(dump->geometry()),
                          dumps[0]->path(), ToString(dumps[0]->geometry()))};
    if (dump->attention_scale() != dumps[0]->attention_scale())
      return {ErrorCode::kMismatch,
              fmt::format("{}: attention scale {}, but {} has {}", dump->path(),
                          dump->attention_scale(), dumps[0]->path(), dumps[0]->attention_scale())};
  }
  return {};
}

// Mean per channel of one head over the tokens of all dumps.
std::vector<float> ChannelMeans(const std::vector<const Dump*>& dumps, std::size_t layer,
                                std::size_t kv_head, Tensor tensor) {
  std::vector<double> sum(dumps[0]->geometry().head_dim, 0.0);
  std::size_t tokens = 0;
  for (const Dump* dump : dumps) {
    const HalfRows rows = dump->head(layer, kv_head, tensor);
    for (std::size_t t = 0; t < rows.tokens; ++t)
      for (std::size_t c = 0; c < rows.head_dim; ++c) sum[c] += HalfToFloat(rows.row(t)[c]);
    tokens += rows.tokens;
  }
  std::vector<float> mean(sum.size());
  for (std::size_t c = 0; c < sum.size(); ++c)
    mean[c] = static_cast<float>(sum[c] / static_cast<double>(tokens));
  return mean;
}

HeadCodec Calibrate(const CodecKind& kind, const std::vector<const Dump*>& dumps, std::size_t layer,
                    std::size_t kv_head, Tensor tensor) {
  HeadCodec codec;
  codec.storage = kind.storage;
  codec.scale = kind.scale;
  codec.scale_type = kind.scale_type;
  if (kind.centred) codec.mean = ChannelMeans(dumps, layer, kv_head, tensor);
  if (kind.scale == ScaleKind::kHead) {
    for (const Dump* dump : dumps)
      codec.head_scale =
          std::max(codec.head_scale, GlobalScale(dump->head(layer, kv_head, tensor),
                                                 kind.centred ? codec.mean.data() : nullptr));
    if (codec.head_scale == 0.0f)
      codec.head_scale = 1.0f;  // nothing but zeros was seen: any scale stores them
  }
  return codec;
}

// The entries of one layer, [kv_heads][K, V], candidates calibrated, errors still empty.
std::vector<HeadErrors> StartLayer(const std::vector<const Dump*>& dumps,
                                   const std::vector<CodecKind>& candidates, std::size_t layer) {
  std::vector<HeadErrors> heads;
  const Geometry& g = dumps[0]->geometry();
  for (std::size_t h = 0; h < g.kv_heads; ++h) {
    for (const Tensor tensor : {Tensor::kK, Tensor::kV}) {
      HeadErrors head{layer, h, tensor, 0.0, {}};
      for (const CodecKind& kind : candidates) {
        if (tensor == Tensor::kV && kind.centred) continue;
        CandidateError candidate{
            Calibrate(kind, dumps, layer, h, tensor), std::vector<AttentionError>(g.group()), {}};
        for (const Dump* dump : dumps)
          candidate.values += EncodingError(dump->head(layer, h, tensor), candidate.codec);
        head.max_abs = candidate.values.max_abs;
        head.candidates.push_back(std::move(candidate));
      }
      heads.push_back(std::move(head));
    }
  }
  return heads;
}

// Adds one dump's attention errors to a layer's entries. Heads do not see each other, so one
// attention serves a candidate of all of them.
Status AddAttentionErrors(const Dump& dump, std::size_t layer, int num_threads,
                          std::vector<HeadErrors>* heads) {
  const Geometry& g = dump.geometry();
  const std::vector<HeadCodec> exact_codecs(g.kv_heads * 2);
  std::vector<float> exact, approximate;
  if (Status s = AttendDump(dump, layer, exact_codecs, num_threads, &exact); !s.ok()) return s;
  for (std::size_t tensor = 0; tensor < 2; ++tensor) {
    for (std::size_t i = 0; i < (*heads)[tensor].candidates.size(); ++i) {
      const bool is_exact = IsF16(KindOf((*heads)[tensor].candidates[i].codec));
      if (!is_exact) {
        std::vector<HeadCodec> codecs = exact_codecs;
        for (std::size_t h = 0; h < g.kv_heads; ++h)
          codecs[h * 2 + tensor] = (*heads)[h * 2 + tensor].candidates[i].codec;
        if (Status s = AttendDump(dump, layer, codecs, num_threads, &approximate); !s.ok())
          return s;
      }
      const std::vector<AttentionError> errors =
          CompareLayer(exact, is_exact ? exact : approximate, g, num_threads);
      for (std::size_t q = 0; q < g.query_heads; ++q)
        (*heads)[q / g.group() * 2 + tensor].candidates[i].queries[q % g.group()] += errors[q];
    }
  }
  return {};
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

Fidelity Summarize(const std::vector<AttentionError>& errors, const Geometry& geometry) {
  Fidelity f;
  if (errors.empty()) return f;
  double sum_nmse = 0.0, sum_cosine = 0.0;
  f.worst_cosine = std::numeric_limits<double>::infinity();
  for (std::size_t i = 0; i < errors.size(); ++i) {
    const double cosine = errors[i].cosine();
    sum_nmse += errors[i].nmse();
    sum_cosine += cosine;
    f.worst_nmse = std::max(f.worst_nmse, errors[i].nmse());
    if (cosine < f.worst_cosine) {
      f.worst_cosine = cosine;
      f.worst_layer = i / geometry.query_heads;
      f.worst_query_head = i % geometry.query_heads;
    }
  }
  f.mean_nmse = sum_nmse / static_cast<double>(errors.size());
  f.mean_cosine = sum_cosine / static_cast<double>(errors.size());
  return f;
}

Status AttendDump(const Dump& dump, std::size_t layer, const std::vector<HeadCodec>& codecs,
                  int num_threads, std::vector<float>* out, std::uint64_t* saturated) {
  if (!dump.has_q())
    return {ErrorCode::kInvalidArgument,
            fmt::format("{}: has no Q, which attention needs", dump.path())};
  Geometry one_layer = dump.geometry();
  one_layer.layers = 1;
  const std::size_t kv_row = one_layer.kv_heads * one_layer.head_dim,
                    q_row = one_layer.query_heads * one_layer.head_dim;
  const std::vector<std::size_t>& prompts = dump.prompt_tokens();
  const std::size_t longest =
      prompts.empty() ? 0 : *std::max_element(prompts.begin(), prompts.end());
  Result<Cache> cache = Cache::Create(one_layer, Plan{one_layer, codecs, {}}, longest);
  if (!cache.ok()) return cache.status();
  AttendOptions options;
  options.attention_scale = dump.attention_scale();
  options.num_threads = num_threads;
  out->resize(dump.tokens() * q_row);
  std::size_t first = 0;
  for (const std::size_t tokens : prompts) {
    if (Status s = cache->Truncate(0); !s.ok()) return s;
    if (Status s = cache->Append(0, dump.k(layer) + first * kv_row, dump.v(layer) + first * kv_row,
                                 tokens);
        !s.ok())
      return s;
    if (Status s = Attend(*cache, 0, dump.q(layer) + first * q_row, tokens,
                          out->data() + first * q_row, options);
        !s.ok())
      return s;
    first += tokens;
  }
  if (saturated) *saturated += cache->saturated();
  return {};
}

Result<std::vector<AttentionError>> MeasurePlan(const Dump& dump, const Plan& plan, int num_threads,
                                                const Progress& progress) {
  if (Status s = CheckPlan(plan); !s.ok()) return s;
  if (Status s = CheckGeometryMatches(plan, dump.geometry()); !s.ok())
    return Status(s.code(), fmt::format("{}: {}", dump.path(), s.message()));
  const Geometry& g = plan.geometry;
  std::vector<AttentionError> errors(g.layers * g.query_heads);
  const auto measure = [&](std::size_t layer, int threads) -> Status {
    if (Status s = dump.CheckFinite(layer); !s.ok()) return s;
    std::vector<float> exact, approximate;
    const HeadCodec* first = &plan.codec(layer, 0, Tensor::kK);
    if (Status s = AttendDump(dump, layer, std::vector<HeadCodec>(g.kv_heads * 2), threads, &exact);
        !s.ok())
      return s;
    if (Status s = AttendDump(dump, layer, std::vector<HeadCodec>(first, first + g.kv_heads * 2),
                              threads, &approximate);
        !s.ok())
      return s;
    std::ranges::copy(CompareLayer(exact, approximate, g, threads),
                      errors.begin() + static_cast<std::ptrdiff_t>(layer * g.query_heads));
    return {};
  };
  if (Status s = ForLayers(0, g.layers, {&dump}, num_threads, progress, measure); !s.ok()) return s;
  return errors;
}

Result<std::vector<CodecKind>> Candidates(const std::string& name) {
  const CodecKind f16, token{Storage::kI8, ScaleKind::kToken, ScaleType::kF32, false},
      token_bf16{Storage::kI8, ScaleKind::kToken, ScaleType::kBF16, false};
  const auto centred = [](CodecKind kind) {
    kind.centred = true;
    return kind;
  };
  if (name == "seed")
    return std::vector<CodecKind>{
        f16, {Storage::kI8, ScaleKind::kHead, ScaleType::kF32, false}, token};
  if (name == "int8")
    return std::vector<CodecKind>{f16, token, token_bf16, centred(token), centred(token_bf16)};
  return Status(ErrorCode::kInvalidArgument,
                fmt::format("candidates '{}': expected seed or int8", name));
}

ErrorSums EncodingError(const HalfRows& rows, const HeadCodec& codec) {
  if (codec.storage == Storage::kF16) {  // exact: only the largest value is left to find
    ErrorSums sums{rows.tokens * rows.head_dim, 0.0, 0.0, 0.0};
    for (std::size_t t = 0; t < rows.tokens; ++t)
      for (std::size_t c = 0; c < rows.head_dim; ++c)
        sums.max_abs = std::max(sums.max_abs, std::fabs(double{HalfToFloat(rows.row(t)[c])}));
    return sums;
  }
  const float* mean = codec.centred() ? codec.mean.data() : nullptr;
  std::vector<std::int8_t> codes(rows.tokens * rows.head_dim);
  if (codec.scale == ScaleKind::kHead) {
    QuantizeGlobal(rows, mean, codec.head_scale, codes.data());
    return QuantizationError(rows, codes.data(), &codec.head_scale, 0, mean);
  }
  std::vector<float> scales(rows.tokens);
  QuantizePerToken(rows, mean, codec.scale_type, codes.data(), scales.data());
  return QuantizationError(rows, codes.data(), scales.data(), 1, mean);
}

Result<ErrorTable> Measure(const std::vector<const Dump*>& dumps,
                           const std::vector<CodecKind>& candidates, std::size_t first_layer,
                           std::size_t last_layer, int num_threads, const Progress& progress) {
  if (Status s = CheckDumps(dumps); !s.ok()) return s;
  if (candidates.empty())
    return Status(ErrorCode::kInvalidArgument, "measuring needs at least one candidate codec");
  ErrorTable table;
  table.geometry = dumps[0]->geometry();
  table.attention_scale = dumps[0]->attention_scale();
  table.model = dumps[0]->model();
  if (first_layer > last_layer || last_layer > table.geometry.layers)
    return Status(ErrorCode::kInvalidArgument,
                  fmt::format("layers {} to {}: {} has layers 0 to {}", first_layer, last_layer,
                              dumps[0]->path(), table.geometry.layers));
  for (const Dump* dump : dumps) {
    table.dumps.push_back(FileName(dump->path()));
    table.tokens += dump->tokens();
    for (const std::size_t tokens : dump->prompt_tokens())
      table.longest_prompt = std::max(table.longest_prompt, tokens);
  }
  std::vector<std::vector<HeadErrors>> layers(last_layer - first_layer);
  const auto measure = [&](std::size_t layer, int threads) -> Status {
    for (const Dump* dump : dumps)
      if (Status s = dump->CheckFinite(layer); !s.ok()) return s;
    std::vector<HeadErrors>& heads = layers[layer - first_layer];
    heads = StartLayer(dumps, candidates, layer);
    for (const Dump* dump : dumps)
      if (Status s = AddAttentionErrors(*dump, layer, threads, &heads); !s.ok()) return s;
    return {};
  };
  if (Status s = ForLayers(first_layer, last_layer, dumps, num_threads, progress, measure); !s.ok())
    return s;
  for (std::vector<HeadErrors>& heads : layers)
    table.heads.insert(table.heads.end(), std::make_move_iterator(heads.begin()),
                       std::make_move_iterator(heads.end()));
  return table;
}

Result<ErrorTable> Merge(const ErrorTable& a, const ErrorTable& b) {
  const auto differ = [](const std::string& what, const auto& x, const auto& y) {
    return Status(ErrorCode::kMismatch,
                  fmt::format("error tables cannot be merged: {} '{}' against '{}'", what, x, y));
  };
  if (a.geometry != b.geometry)
    return differ("geometry", ToString(a.geometry), ToString(b.geometry));
  if (a.model != b.model) return differ("model", a.model, b.model);
  if (a.dumps != b.dumps)
    return differ("dumps", fmt::format("{}", fmt::join(a.dumps, ",")),
                  fmt::format("{}", fmt::join(b.dumps, ",")));
  if (a.tokens != b.tokens) return differ("tokens", a.tokens, b.tokens);
  if (a.longest_prompt != b.longest_prompt)
    return differ("longest prompt", a.longest_prompt, b.longest_prompt);
  if (a.attention_scale != b.attention_scale)
    return differ("attention scale", a.attention_scale, b.attention_scale);
  const auto key = [](const HeadErrors& h) {
    return std::array<std::size_t, 3>{h.layer, h.kv_head, static_cast<std::size_t>(h.tensor)};
  };
  ErrorTable merged = a;
  merged.heads.clear();
  std::merge(a.heads.begin(), a.heads.end(), b.heads.begin(), b.heads.end(),
             std::back_inserter(merged.heads),
             [&](const HeadErrors& x, const HeadErrors& y) { return key(x) < key(y); });
  for (std::size_t i = 1; i < merged.heads.size(); ++i)
    if (key(merged.heads[i]) == key(merged.heads[i - 1]))
      return Status(
          ErrorCode::kMismatch,
          fmt::format("error tables cannot be merged: layer {} is in both", merged.heads[i].layer));
  return merged;
}

}  // namespace kvmix
