// The errors of every candidate on every head, and of whole plans, through the library's own cache
// and attention.
#include <algorithm>
#include <atomic>
#include <functional>
#include <iterator>
#include <mutex>
#include <tuple>
#include <utility>

#include <fmt/format.h>

#include "kvmix/attention.h"
#include "kvmix/cache.h"
#include "kvmix/tune.h"
#include "lib/cache/parallel.h"
#include "lib/files/file.h"
#include "lib/tune/calibrate.h"
#include "lib/tune/statistics.h"

namespace kvmix {

using internal::Error;

namespace {

// [query_heads] errors of a layer's outputs, [tokens, query_heads, v_dim]. Row after row with
// all heads, as they lie in memory; in chunks that do not depend on the threads, so that neither do
// the sums.
std::vector<AttentionError> CompareLayer(const std::vector<float>& exact,
                                         const std::vector<float>& approximate,
                                         const LayerShape& shape, const MeasureOptions& options) {
  constexpr std::size_t kChunk = 256;  // tokens
  const std::size_t heads = shape.query_heads, stride = heads * shape.v_dim,
                    tokens = exact.size() / stride, chunks = (tokens + kChunk - 1) / kChunk;
  std::vector<AttentionError> parts(chunks * heads);
  const int threads = internal::ThreadsFor(options.num_threads, chunks);
  internal::RunParts(chunks, threads, 1, [&](std::size_t chunk) {
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

// Calls work(layer, threads for it) for every layer, once its numbers are known to be finite, and
// returns the first layer's error. Layers run side by side, which costs the least waiting, as long
// as the outputs that they hold stay small; else one after the other with all threads.
constexpr std::size_t kOutputBytes = std::size_t{1} << 30;

Status ForLayers(std::size_t first, std::size_t last, const std::vector<const Dump*>& dumps,
                 const MeasureOptions& options,
                 const std::function<Status(std::size_t, const MeasureOptions&)>& work) {
  if (Status s = internal::CheckThreads(options.num_threads); !s.ok()) return s;
  const std::size_t layers = last - first;
  std::size_t layer_bytes = 1;  // of an exact and an approximate output
  for (const Dump* dump : dumps) {
    for (const LayerShape& shape : dump->model().layers) {
      layer_bytes = std::max(layer_bytes,
                             2 * sizeof(float) * dump->tokens() * shape.query_heads * shape.v_dim);
    }
  }
  const std::size_t most = std::max<std::size_t>(1, std::min(kOutputBytes / layer_bytes, layers));
  const int side_by_side = internal::ThreadsFor(options.num_threads, most);
  MeasureOptions within = options;
  if (side_by_side > 1) within.num_threads = 1;
  std::vector<Status> results(layers);
  std::mutex progress_mutex;
  std::size_t done = 0;
  std::atomic<bool> failed = false;
  internal::RunParts(layers, side_by_side, 1, [&](std::size_t i) {
    if (failed) return;
    for (const Dump* dump : dumps) {
      if (results[i].ok()) results[i] = dump->CheckFinite(first + i);
    }
    if (results[i].ok()) results[i] = work(first + i, within);
    for (const Dump* dump : dumps) dump->Release(first + i);
    if (!results[i].ok()) failed = true;
    const std::lock_guard lock(progress_mutex);
    if (options.progress) options.progress(++done, layers);
  });
  const auto bad = std::ranges::find_if_not(results, &Status::ok);
  return bad == results.end() ? Status() : *bad;
}

Status CheckDumps(const std::vector<const Dump*>& dumps) {
  if (dumps.empty()) return Error(ErrorCode::kInvalidArgument, "measuring needs at least one dump");
  const Dump& first = *dumps[0];
  for (const Dump* dump : dumps) {
    if (!dump->has_q())
      return Error(ErrorCode::kInvalidArgument, "{}: has no Q, which attention errors need",
                   dump->path());
    if (dump->model() != first.model())
      return Error(ErrorCode::kMismatch, "{}: {}, but {} has {}", dump->path(),
                   ToString(dump->model()), first.path(), ToString(first.model()));
  }
  return {};
}

// The entries of one layer, [kv_heads][K, V], candidates calibrated, errors still empty.
Status StartLayer(const std::vector<const Dump*>& dumps, const CandidateKinds& candidates,
                  std::size_t layer, std::vector<HeadErrors>* heads) {
  const Model& model = dumps[0]->model();
  std::size_t queries = 0;
  for (const std::size_t reader : model.readers(layer)) queries += model.layers[reader].group();
  for (std::size_t i = 0; i < model.layers[layer].kv_heads * 2; ++i) {
    const Tensor tensor = static_cast<Tensor>(i % 2);
    HeadErrors& head = heads->emplace_back(HeadErrors{layer, i / 2, tensor, 0.0, {}});
    HeadStatistics statistics;
    for (const Dump* dump : dumps) statistics += internal::Statistics(*dump, layer, i / 2, tensor);
    internal::HeadCalibration calibration(statistics);
    for (const CodecKind& kind : tensor == Tensor::kK ? candidates.k : candidates.v) {
      if (!Fits(kind, dumps[0]->head(layer, i / 2, tensor).head_dim)) continue;
      CandidateError& candidate = head.candidates.emplace_back();
      candidate.codec = calibration.Codec(kind);
      candidate.queries.resize(queries);
      for (const Dump* dump : dumps) {
        const auto values = EncodingError(dump->head(layer, i / 2, tensor), candidate.codec);
        if (!values.ok()) return values.status();
        candidate.values += *values;
      }
      head.max_abs = candidate.values.max_abs;
    }
  }
  return {};
}

// Adds one dump's attention errors in one reading layer to a layer's entries, after those of
// `first` query heads of other readers. Heads do not see each other, so one attention serves a
// candidate of all of them.
Status AddAttentionErrors(const Dump& dump, std::size_t reader, std::size_t first,
                          const MeasureOptions& options, std::vector<HeadErrors>* heads) {
  const LayerShape& shape = dump.model().layers[reader];
  const std::vector<HeadCodec> exact_codecs(shape.kv_heads * 2);
  std::vector<float> exact, approximate;
  if (Status s = AttendDump(dump, reader, exact_codecs, options, &exact); !s.ok()) return s;
  for (std::size_t tensor = 0; tensor < 2; ++tensor) {
    for (std::size_t i = 0; i < (*heads)[tensor].candidates.size(); ++i) {
      const bool is_exact = (*heads)[tensor].candidates[i].codec.kind == CodecKind();
      if (!is_exact) {
        std::vector<HeadCodec> codecs = exact_codecs;
        for (std::size_t h = 0; h < shape.kv_heads; ++h)
          codecs[h * 2 + tensor] = (*heads)[h * 2 + tensor].candidates[i].codec;
        if (Status s = AttendDump(dump, reader, codecs, options, &approximate); !s.ok()) return s;
      }
      const std::vector<AttentionError> errors =
          CompareLayer(exact, is_exact ? exact : approximate, shape, options);
      for (std::size_t q = 0; q < shape.query_heads; ++q) {
        HeadErrors& head = (*heads)[q / shape.group() * 2 + tensor];
        head.candidates[i].queries[first + q % shape.group()] += errors[q];
      }
    }
  }
  return {};
}

}  // namespace

Status AttendDump(const Dump& dump, std::size_t layer, const std::vector<HeadCodec>& codecs,
                  const MeasureOptions& options, std::vector<float>* out,
                  std::uint64_t* saturated) {
  if (!dump.has_q())
    return Error(ErrorCode::kInvalidArgument, "{}: has no Q, which attention needs", dump.path());
  LayerShape shape = dump.model().layers[layer];
  shape.kv_layer.reset();  // its rows are those of that layer
  const Model one_layer(std::vector{shape});
  const std::vector<std::size_t>& prompts = dump.prompt_tokens();
  const Plan plan{one_layer, codecs, {}, options.exact_first};
  Result<Cache> cache =
      Cache::Create(one_layer, plan, std::ranges::max(prompts), {.target = options.target});
  if (!cache.ok()) return cache.status();
  const std::size_t out_row = shape.query_heads * shape.v_dim;
  out->resize(dump.tokens() * out_row);
  std::size_t first = 0;
  for (const std::size_t tokens : prompts) {
    Status s = cache->Truncate(0);
    if (s.ok())
      s = cache->Append(0, dump.k(layer).Tokens(first, tokens), dump.v(layer).Tokens(first, tokens),
                        options.num_threads);
    if (s.ok())
      s = Attend(*cache, 0, dump.q(layer).Tokens(first, tokens), out->data() + first * out_row, {},
                 options.num_threads);
    if (!s.ok()) return s;
    first += tokens;
  }
  if (saturated != nullptr) *saturated += cache->saturated();
  return {};
}

Result<std::vector<AttentionError>> MeasurePlan(const Dump& dump, const Plan& plan,
                                                const MeasureOptions& options) {
  if (Status s = CheckPlan(plan); !s.ok()) return s;
  const Model& model = dump.model();
  if (plan.model != model && plan.model != Stored(model))
    return Error(ErrorCode::kMismatch, "{}: plan: expected {}, found {}", dump.path(),
                 ToString(model), ToString(plan.model));
  const std::size_t layers = model.layers.size();
  std::vector<AttentionError> errors(model.query_heads_before(layers));
  const auto measure = [&](std::size_t layer, MeasureOptions within) {
    const LayerShape& shape = model.layers[layer];
    if (!shape.has_kv()) return Status();
    within.exact_first = plan.exact_first;
    const HeadCodec* first = &plan.codec(layer, 0, Tensor::kK);
    const std::vector<HeadCodec> codecs(first, first + shape.kv_heads * 2),
        exact_codecs(codecs.size());
    std::vector<float> exact, approximate;
    Status s = AttendDump(dump, layer, exact_codecs, within, &exact);
    if (s.ok()) s = AttendDump(dump, layer, codecs, within, &approximate);
    if (!s.ok()) return s;
    std::ranges::copy(
        CompareLayer(exact, approximate, shape, within),
        errors.begin() + static_cast<std::ptrdiff_t>(model.query_heads_before(layer)));
    return s;
  };
  if (Status s = ForLayers(0, layers, {&dump}, options, measure); !s.ok()) return s;
  return errors;
}

Result<CandidateKinds> Candidates(const std::string& name) {
  const CodecKind f16, head{Storage::kI8, Scale::kHead}, token{Storage::kI8, Scale::kToken};
  if (name == "seed") return CandidateKinds{{f16, head, token}, {f16, head, token}};
  if (name != "int8" && name != "all")
    return Error(ErrorCode::kInvalidArgument, "candidates '{}': expected seed, int8 or all", name);
  CandidateKinds kinds{{f16}, {f16}};
  const auto add = [](std::vector<CodecKind>* to, Storage storage, std::vector<Scale> scales,
                      const std::vector<CodecKind>& steps) {
    for (CodecKind kind : steps) {
      kind.storage = storage;
      for (const Scale scale : scales) {
        kind.scale = scale;
        to->push_back(kind);
      }
    }
  };
  const std::vector<Scale> both = {Scale::kToken, Scale::kTokenBF16}, bf16 = {Scale::kTokenBF16};
  add(&kinds.k, Storage::kI8, both, {{}, {.centre = true}});
  add(&kinds.v, Storage::kI8, both, {{}});
  if (name == "int8") return kinds;
  const CodecKind rotated{.hadamard = true}, centred{.centre = true, .hadamard = true},
      folded{.centre = true, .fold = true, .hadamard = true},
      shaped{.centre = true, .fold = true, .hadamard = true, .shape = true};
  add(&kinds.k, Storage::kI8, both,
      {rotated, centred, {.centre = true, .fold = true}, folded, shaped});
  add(&kinds.v, Storage::kI8, both, {rotated});
  for (const Storage storage : {Storage::kI6, Storage::kI4, Storage::kI3}) {
    add(&kinds.k, storage, bf16, {rotated, centred, folded, shaped});
    add(&kinds.v, storage, bf16, {rotated});
  }
  return kinds;
}

Result<ErrorSums> EncodingError(const RowsView& rows, const HeadCodec& codec) {
  const Result<RowCodec> row_codec = RowCodec::Create(codec, rows.head_dim);
  if (!row_codec.ok()) return row_codec.status();
  std::vector<std::uint8_t> codes(rows.tokens * row_codec->row_bytes());
  std::vector<float> scales(rows.tokens);
  row_codec->Encode(rows, codes.data(), scales.data());
  return row_codec->Errors(rows, codes.data(), scales.data());
}

Result<ErrorTable> Measure(const std::vector<const Dump*>& dumps, const CandidateKinds& candidates,
                           std::size_t first_layer, std::size_t last_layer,
                           const MeasureOptions& options) {
  if (Status s = CheckDumps(dumps); !s.ok()) return s;
  if (candidates.k.empty() || candidates.v.empty())
    return Error(ErrorCode::kInvalidArgument, "measuring needs at least one candidate codec");
  for (const std::vector<CodecKind>* kinds : {&candidates.k, &candidates.v}) {
    for (const CodecKind& kind : *kinds)
      if (Status s = internal::CheckCalibrated(kind); !s.ok()) return s;
  }
  ErrorTable table;
  table.model = dumps[0]->model();
  table.exact_first = options.exact_first;
  table.model_name = dumps[0]->model_name();
  if (first_layer > last_layer || last_layer > table.model.layers.size())
    return Error(ErrorCode::kInvalidArgument, "layers {} to {}: {} has layers 0 to {}", first_layer,
                 last_layer, dumps[0]->path(), table.model.layers.size());
  for (const Dump* dump : dumps) {
    table.dumps.push_back(internal::FileName(dump->path()));
    table.tokens += dump->tokens();
    table.longest_prompt = std::max(table.longest_prompt, std::ranges::max(dump->prompt_tokens()));
  }
  std::vector<std::vector<HeadErrors>> layers(last_layer - first_layer);
  const auto measure = [&](std::size_t layer, const MeasureOptions& within) {
    if (!table.model.layers[layer].owns_kv()) return Status();
    std::vector<HeadErrors>& heads = layers[layer - first_layer];
    Status s = StartLayer(dumps, candidates, layer, &heads);
    std::size_t first = 0;
    for (const std::size_t reader : table.model.readers(layer)) {
      for (const Dump* dump : dumps) {
        if (s.ok() && reader != layer) s = dump->CheckFinite(reader);
        if (s.ok()) s = AddAttentionErrors(*dump, reader, first, within, &heads);
        if (reader != layer) dump->Release(reader);
      }
      first += table.model.layers[reader].group();
    }
    return s;
  };
  if (Status s = ForLayers(first_layer, last_layer, dumps, options, measure); !s.ok()) return s;
  for (std::vector<HeadErrors>& heads : layers)
    std::ranges::move(heads, std::back_inserter(table.heads));
  return table;
}

Result<ErrorTable> Merge(const ErrorTable& a, const ErrorTable& b) {
  const auto origin = [](const ErrorTable& t) {
    return std::vector<std::pair<const char*, std::string>>{
        {"layers", ToString(t.model)},
        {"model", t.model_name},
        {"dumps", fmt::format("{}", fmt::join(t.dumps, ","))},
        {"exact first tokens", fmt::format("{}", t.exact_first)},
        {"tokens", fmt::format("{}", t.tokens)},
        {"longest prompt", fmt::format("{}", t.longest_prompt)}};
  };
  const auto of_a = origin(a), of_b = origin(b);
  for (std::size_t i = 0; i < of_a.size(); ++i) {
    if (of_a[i] != of_b[i])
      return Error(ErrorCode::kMismatch, "error tables cannot be merged: {} '{}' against '{}'",
                   of_a[i].first, of_a[i].second, of_b[i].second);
  }
  const auto place = [](const HeadErrors& h) { return std::tuple(h.layer, h.kv_head, h.tensor); };
  ErrorTable merged = a;
  merged.heads.clear();
  std::ranges::merge(a.heads, b.heads, std::back_inserter(merged.heads), {}, place, place);
  const auto twice = std::ranges::adjacent_find(merged.heads, {}, place);
  if (twice != merged.heads.end())
    return Error(ErrorCode::kMismatch, "error tables cannot be merged: layer {} is in both",
                 twice->layer);
  return merged;
}

}  // namespace kvmix
