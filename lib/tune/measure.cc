// The errors of every candidate on every head, and of whole plans, through the library's own cache
// and attention.
#include <algorithm>
#include <functional>
#include <iterator>
#include <map>
#include <mutex>
#include <numeric>
#include <utility>

#include <fmt/format.h>

#include "kvmix/attention.h"
#include "kvmix/cache.h"
#include "kvmix/tune/steps.h"
#include "lib/files/file.h"
#include "lib/tune/calibrate.h"
#include "lib/tune/layers.h"
#include "lib/tune/parts.h"

namespace kvmix::tune {

using internal::Error;

namespace {

// f32 rows less the mean of their own stretch, as an own centre takes it off.
std::vector<float> Uncentred(const RowsView& rows, std::size_t stretch) {
  const std::size_t dim = rows.head_dim;
  std::vector<float> x(rows.tokens * dim);
  for (std::size_t first = 0, n; first < rows.tokens; first += n) {
    n = std::min(stretch, rows.tokens - first);
    for (std::size_t c = 0; c < dim; ++c) {
      double mean = 0.0;
      for (std::size_t t = first; t < first + n; ++t) mean += rows.At(t, 0, c);
      mean /= static_cast<double>(n);
      for (std::size_t t = first; t < first + n; ++t)
        x[t * dim + c] = static_cast<float>(rows.At(t, 0, c) - mean);
    }
  }
  return x;
}

// Errors of the values themselves: rows of one head encoded and decoded again.
Result<ErrorSums> ValueErrors(const RowsView& rows, const HeadCodec& codec) {
  const Result<RowCodec> row_codec = RowCodec::Create(codec, rows.head_dim);
  if (!row_codec.ok()) return row_codec.status();
  std::vector<std::uint8_t> codes(rows.tokens * row_codec->row_bytes());
  std::vector<float> scales(rows.tokens);
  row_codec->Encode(rows, codes.data(), scales.data());
  return row_codec->Errors(rows, codes.data(), scales.data());
}

// One dump's entries of one layer, [kv_heads][K, V], attention errors still empty.
Result<std::vector<HeadErrors>> StartLayer(const Dump& dump, std::size_t layer,
                                           const std::vector<std::vector<HeadCodec>>& codecs,
                                           std::size_t stretch) {
  const Model& model = dump.model();
  const std::size_t queries = model.queries(layer, 0).size();
  const Result<DumpLayer> rows = dump.Load(layer);
  if (!rows.ok()) return rows.status();
  std::vector<HeadErrors> heads;
  for (std::size_t i = 0; i < codecs.size(); ++i) {
    const Tensor tensor = static_cast<Tensor>(i % 2);
    HeadErrors& head = heads.emplace_back(HeadErrors{layer, i / 2, tensor, 0.0, {}});
    const RowsView x = rows->head(i / 2, tensor);
    const auto exact = ValueErrors(x, {});
    if (!exact.ok()) return exact.status();
    head.max_abs = exact->max_abs;
    std::vector<float> uncentred;  // for codecs with an own centre: a row alone has no stretch
    if (tensor == KVMIX_K && stretch != 0) uncentred = Uncentred(x, stretch);
    for (const HeadCodec& codec : codecs[i]) {
      HeadCodec alone = codec;
      alone.kind.own_centre = false;
      auto values = ValueErrors(
          codec.kind.own_centre ? RowsView::F32(uncentred.data(), x.tokens, 1, x.head_dim) : x,
          alone);
      if (!values.ok()) return values.status();
      values->max_abs = head.max_abs;
      head.candidates.push_back({codec, std::vector<AttentionError>(queries), *values});
    }
  }
  return heads;
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
          CompareLayer(exact, is_exact ? exact : approximate, shape, options.runner);
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
  const Result<DumpLayer> rows = dump.Load(layer);
  if (!rows.ok()) return rows.status();
  LayerShape shape = dump.model().layers[layer];
  shape.kv_layer.reset();  // its rows are those of that layer
  const Model one_layer(std::vector{shape});
  const std::vector<std::size_t>& prompts = dump.prompt_tokens();
  const Plan plan{one_layer, codecs, {}, options.exact_first, options.exact_newest};
  Result<Cache> cache = Cache::Create(plan, std::ranges::max(prompts), {.target = options.target});
  if (!cache.ok()) return cache.status();
  const std::size_t out_row = shape.query_heads * shape.v_dim;
  out->resize(dump.tokens() * out_row);
  std::size_t first = 0;
  for (const std::size_t tokens : prompts) {
    Status s = cache->Truncate(0);
    if (s.ok())
      s = cache->Append(0, rows->k.Tokens(first, tokens), rows->v.Tokens(first, tokens),
                        options.runner);
    if (s.ok())
      s = Attend(*cache, 0, rows->q.Tokens(first, tokens), out->data() + first * out_row,
                 options.runner);
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
    within.exact_newest = plan.exact_newest;
    const HeadCodec* first = &plan.codec(layer, 0, KVMIX_K);
    const std::vector<HeadCodec> codecs(first, first + shape.kv_heads * 2),
        exact_codecs(codecs.size());
    std::vector<float> exact, approximate;
    Status s = AttendDump(dump, layer, exact_codecs, within, &exact);
    if (s.ok()) s = AttendDump(dump, layer, codecs, within, &approximate);
    if (!s.ok()) return s;
    std::ranges::copy(
        CompareLayer(exact, approximate, shape, within.runner),
        errors.begin() + static_cast<std::ptrdiff_t>(model.query_heads_before(layer)));
    return s;
  };
  std::vector<std::size_t> all(layers);
  std::iota(all.begin(), all.end(), std::size_t{0});
  if (Status s = ForLayers(all, {&dump}, options, measure); !s.ok()) return s;
  return errors;
}

Result<CandidateKinds> Candidates(const std::string& name) {
  const CodecKind f16, head{KVMIX_STORAGE_I8, KVMIX_SCALE_HEAD},
      token{KVMIX_STORAGE_I8, KVMIX_SCALE_TOKEN};
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
  const std::vector<Scale> both = {KVMIX_SCALE_TOKEN, KVMIX_SCALE_TOKEN_BF16},
                           bf16 = {KVMIX_SCALE_TOKEN_BF16};
  add(&kinds.k, KVMIX_STORAGE_I8, both, {{}, {.centre = true}});
  add(&kinds.v, KVMIX_STORAGE_I8, both, {{}});
  if (name == "int8") return kinds;
  const CodecKind rotated{.hadamard = true}, centred{.centre = true, .hadamard = true},
      folded{.centre = true, .fold = true, .hadamard = true},
      shaped{.centre = true, .fold = true, .hadamard = true, .shape = true};
  add(&kinds.k, KVMIX_STORAGE_I8, both,
      {rotated, centred, {.centre = true, .fold = true}, folded, shaped});
  add(&kinds.v, KVMIX_STORAGE_I8, both, {rotated});
  const auto narrow = [](CodecKind kind) {
    kind.operands = KVMIX_OPERANDS_8;
    return kind;
  };
  add(&kinds.k, KVMIX_STORAGE_I8, bf16, {narrow(centred), narrow(folded), narrow(shaped)});
  add(&kinds.v, KVMIX_STORAGE_I8, bf16, {narrow(rotated)});
  for (const Storage storage : {KVMIX_STORAGE_I6, KVMIX_STORAGE_I4, KVMIX_STORAGE_I3}) {
    add(&kinds.k, storage, bf16, {rotated, centred, folded, shaped});
    add(&kinds.v, storage, bf16, {rotated});
  }
  return kinds;
}

namespace {

// The same numbers that the calibration saw, in these layers and in those that read them: the dump
// by the calibration's name for it.
Result<const DumpId*> Recognize(const Dump& dump, const Calibration& calibration,
                                const std::vector<std::size_t>& layers,
                                const MeasureOptions& options) {
  std::vector<std::size_t> needed;
  for (const std::size_t layer : layers)
    std::ranges::copy(dump.model().readers(layer), std::back_inserter(needed));
  const auto hashes = LayerHashes(dump, needed, options.runner);
  if (!hashes.ok()) return hashes.status();
  std::vector<const DumpId*> alike;
  std::string why = "that was not";
  for (const DumpId& id : calibration.dumps) {
    std::size_t same = 0;
    while (same < needed.size() && id.layers[needed[same]] == (*hashes)[same]) ++same;
    if (same == needed.size() && id.tokens == dump.tokens()) alike.push_back(&id);
    if (same < needed.size() && id.name == internal::FileName(dump.path()))
      why = fmt::format("with other numbers in layer {}", needed[same]);
  }
  if (alike.size() > 1) {  // they differ elsewhere
    const Result<DumpId> whole = Identify(dump, options);
    if (!whole.ok()) return whole.status();
    std::erase_if(alike, [&](const DumpId* id) { return id->hash != whole->hash; });
  }
  if (!alike.empty()) return alike[0];
  return Error(ErrorCode::kMismatch, "{}: expected a dump that was calibrated on, {}, found one {}",
               dump.path(), Names(calibration.dumps), why);
}

// What the candidates are on a layer, [kv_heads][K, V].
std::vector<std::vector<HeadCodec>> Codecs(const std::vector<HeadStatistics>& statistics,
                                           const CandidateKinds& candidates,
                                           const LayerShape& shape) {
  std::vector<std::vector<HeadCodec>> codecs;
  for (const HeadStatistics& head : statistics) {
    const Tensor t = static_cast<Tensor>(codecs.size() % 2);
    std::vector<HeadCodec>& of_head = codecs.emplace_back();
    HeadCalibration calibration(head);
    for (const CodecKind& kind : KindsFor(candidates, shape, t))
      of_head.push_back(calibration.Codec(kind));
  }
  return codecs;
}

}  // namespace

Result<Measurement> StartMeasurement(const Calibration& calibration,
                                     const CandidateKinds& candidates,
                                     const MeasureOptions& options) {
  if (candidates.k.empty() || candidates.v.empty())
    return Error(ErrorCode::kInvalidArgument, "measuring needs at least one candidate codec");
  for (const std::vector<CodecKind>* kinds : {&candidates.k, &candidates.v}) {
    for (const CodecKind& kind : *kinds)
      if (Status s = CheckCalibrated(kind); !s.ok()) return s;
  }
  for (const DumpId& id : calibration.dumps) {
    if (options.exact_newest == 0 || id.longest_prompt > options.exact_newest) continue;
    return Error(
        ErrorCode::kInvalidArgument,
        "exact_newest {}: expected prompts longer than that, of which codes are seen, found "
        "at most {} tokens in {}",
        options.exact_newest, id.longest_prompt, id.name);
  }
  Measurement m{.model = calibration.model,
                .dumps = calibration.dumps,
                .candidates = candidates,
                .exact_first = options.exact_first,
                .exact_newest = options.exact_newest};
  for (CodecKind& kind : m.candidates.k) {  // its own centre is nearer, and does not age
    if (options.exact_newest != 0 && kind.centre) {
      kind.centre = false;
      kind.own_centre = true;
    }
  }
  const Wisdom here = ThisMachine(options.target);
  m.target = here.target;
  m.library_version = here.version;
  return m;
}

Status Measure(const std::vector<const Dump*>& dumps, const Calibration& calibration,
               std::size_t first_layer, std::size_t last_layer, const MeasureOptions& options,
               Measurement* measurement, const std::function<Status()>& finished) {
  if (Status s = CheckDumps(dumps); !s.ok()) return s;
  const Model& model = calibration.model;
  if (dumps[0]->model() != model)
    return Error(ErrorCode::kMismatch, "{}: {}, but what was calibrated has {}", dumps[0]->path(),
                 ToString(dumps[0]->model()), ToString(model));
  const auto layers = OwnLayers(*dumps[0], first_layer, last_layer);
  if (!layers.ok()) return layers.status();
  if (Status s = CheckWhole(calibration.pieces, *layers, calibration.dumps); !s.ok())
    return Error(s.code(), "the calibration lacks {}", s.message());
  std::vector<const DumpId*> ids;
  for (const Dump* dump : dumps) {
    const auto id = Recognize(*dump, calibration, *layers, options);
    if (!id.ok()) return id.status();
    if (const auto twice = std::ranges::find(ids, *id); twice != ids.end())
      return GivenTwice(*dumps[static_cast<std::size_t>(twice - ids.begin())], *dump);
    ids.push_back(*id);
  }
  const auto is_done = [&](std::size_t layer, const DumpId* id) {
    const auto piece = measurement->pieces.find(layer);
    return piece != measurement->pieces.end() && piece->second.contains(id->hash);
  };
  std::vector<std::size_t> left;
  for (const std::size_t layer : *layers) {
    const auto known = measurement->statistics.find(layer);
    if (known != measurement->statistics.end() &&
        known->second != Sum(calibration.pieces.at(layer)))
      return OtherCalibration(layer);
    if (!std::ranges::all_of(ids, [&](const DumpId* id) { return is_done(layer, id); }))
      left.push_back(layer);
  }
  std::mutex mutex;  // of *measurement
  const auto measure = [&](std::size_t layer, const MeasureOptions& within) {
    std::vector<HeadStatistics> statistics = Sum(calibration.pieces.at(layer));
    const auto codecs = Codecs(statistics, measurement->candidates, model.layers[layer]);
    std::map<std::string, std::vector<HeadErrors>> found;  // by the dump's hash
    for (std::size_t d = 0; d < dumps.size(); ++d) {
      Result<std::vector<HeadErrors>> heads =
          StartLayer(*dumps[d], layer, codecs, within.exact_newest);
      if (!heads.ok()) return heads.status();
      std::size_t first = 0;
      for (const std::size_t reader : model.readers(layer)) {
        const Result<DumpLayer> held = dumps[d]->Load(reader);  // for all candidates
        if (!held.ok()) return held.status();
        Status s = AddAttentionErrors(*dumps[d], reader, first, within, &*heads);
        if (!s.ok()) return s;
        first += model.layers[reader].group();
      }
      found.emplace(ids[d]->hash, std::move(*heads));
    }
    const std::lock_guard lock(mutex);
    measurement->statistics[layer] = std::move(statistics);
    measurement->pieces[layer].merge(found);
    return finished ? finished() : Status();
  };
  MeasureOptions how = options;
  how.exact_first = measurement->exact_first;
  how.exact_newest = measurement->exact_newest;
  return ForLayers(left, dumps, how, measure);
}

namespace {

// Of the layers that were measured, on all dumps.
ErrorTable TableOf(const Measurement& m) {
  ErrorTable table;
  table.model = m.model;
  table.exact_first = m.exact_first;
  table.exact_newest = m.exact_newest;
  table.model_name = m.dumps[0].model_name;
  for (const DumpId& id : m.dumps) {
    table.dumps.push_back(id.name);
    table.tokens += id.tokens;
    table.longest_prompt = std::max(table.longest_prompt, id.longest_prompt);
  }
  std::ranges::sort(table.dumps);
  for (const auto& [layer, dumps] : m.pieces) {
    const auto codecs = Codecs(m.statistics.at(layer), m.candidates, m.model.layers[layer]);
    std::vector<HeadErrors> heads = dumps.begin()->second;
    for (std::size_t i = 0; i < heads.size(); ++i) {
      for (std::size_t c = 0; c < codecs[i].size(); ++c) {
        CandidateError& sum = heads[i].candidates[c];
        sum.codec = codecs[i][c];
        for (auto dump = std::next(dumps.begin()); dump != dumps.end(); ++dump) {
          const HeadErrors& more = dump->second[i];
          heads[i].max_abs = std::max(heads[i].max_abs, more.max_abs);
          sum.values += more.candidates[c].values;
          for (std::size_t q = 0; q < sum.queries.size(); ++q)
            sum.queries[q] += more.candidates[c].queries[q];
        }
      }
    }
    std::ranges::move(heads, std::back_inserter(table.heads));
  }
  return table;
}

}  // namespace

Status CheckWhole(const Measurement& measurement) {
  std::vector<std::size_t> own;
  for (std::size_t layer = 0; layer < measurement.model.layers.size(); ++layer) {
    if (measurement.model.layers[layer].owns_kv()) own.push_back(layer);
  }
  const Status s = CheckWhole(measurement.pieces, own, measurement.dumps);
  return s.ok() ? s : Error(s.code(), "the measurement lacks {}", s.message());
}

Result<ErrorTable> Table(const Measurement& measurement) {
  if (Status s = CheckWhole(measurement); !s.ok()) return s;
  return TableOf(measurement);
}

Result<ErrorTable> Measure(const std::vector<const Dump*>& dumps, const CandidateKinds& candidates,
                           std::size_t first_layer, std::size_t last_layer,
                           const MeasureOptions& options) {
  MeasureOptions quietly = options;
  quietly.progress = nullptr;
  const Result<Calibration> calibration = Calibrate(dumps, first_layer, last_layer, quietly);
  if (!calibration.ok()) return calibration.status();
  Result<Measurement> m = StartMeasurement(*calibration, candidates, options);
  if (!m.ok()) return m.status();
  if (Status s = Measure(dumps, *calibration, first_layer, last_layer, options, &*m); !s.ok())
    return s;
  return TableOf(*m);
}

}  // namespace kvmix::tune
