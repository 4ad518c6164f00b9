// The whole way from dumps to a plan: the steps, the plan held against the truth, the holdouts.
#include "kvmix/tune/tune.h"

#include <algorithm>
#include <map>
#include <utility>

#include "lib/files/file.h"
#include "lib/tune/layers.h"
#include "lib/tune/menu.h"
#include "lib/tune/parts.h"

namespace kvmix::tune {

using internal::Error;

namespace {

constexpr double kSpeedSeconds = 0.5;  // for the speeds of one shape of layers
constexpr std::size_t kRepairs = 3;    // how often the plan is chosen again

// Stretches of a prompt that tells something, and the part of f16's bytes that exact tokens may
// take where nobody asks for them: one in so many.
constexpr std::size_t kStretches = 8, kShare = 50;

const std::string kOnCalibration = "measuring the plan on the calibration";

Status Report(const TuneOptions& o, const std::string& step, std::size_t done, std::size_t total) {
  return o.progress && !o.progress(step, done, total) ? Cancelled() : Status();
}

MeasureOptions For(const std::string& step, const TuneOptions& o) {
  MeasureOptions how{o.runner, o.target, {}, o.exact_first.value_or(0), o.exact_newest.value_or(0)};
  if (o.progress) {
    how.progress = [&o, step](std::size_t done, std::size_t total) {
      return o.progress(step, done, total);
    };
  }
  return how;
}

// Everything that can be refused before minutes of work.
Status CheckOptions(const TuneOptions& o) {
  if (!o.constraints.budget && !o.constraints.min_cosine) {
    return Error(ErrorCode::kInvalidArgument,
                 "constraints: expected a budget or a min_cosine to aim at, found neither");
  }
  if (Status s = CheckConstraints(o.constraints); !s.ok()) return s;
  return Candidates(o.candidates).status();
}

// The holdouts' identities, in their order.
Result<std::vector<DumpId>> CheckHoldouts(const std::vector<const Dump*>& holdouts,
                                          const Model& expected, const TuneOptions& o) {
  std::vector<DumpId> ids;
  for (const Dump* dump : holdouts) {
    const std::string& path = dump->path();
    if (!dump->has_q()) {
      return Error(ErrorCode::kInvalidArgument, "{}: has no Q, which attention errors need", path);
    }
    if (dump->tokens() == 0) return Error(ErrorCode::kInvalidArgument, "{}: has no tokens", path);
    if (dump->model() != expected) {
      return Error(ErrorCode::kMismatch, "{}: expected {}, found {}", path, ToString(expected),
                   ToString(dump->model()));
    }
    Result<DumpId> id = Identify(*dump, {.runner = o.runner});
    if (!id.ok()) return id.status();
    const auto twice = std::ranges::find(ids, id->hash, &DumpId::hash);
    if (twice != ids.end()) {
      return GivenTwice(*holdouts[static_cast<std::size_t>(twice - ids.begin())], *dump);
    }
    ids.push_back(std::move(*id));
  }
  return ids;
}

// The dumps sorted by hash, as the measurement has them.
Result<std::vector<const Dump*>> Sorted(const std::vector<const Dump*>& dumps, const Measurement& m,
                                        const TuneOptions& o) {
  std::map<std::string, const Dump*> by_hash;
  for (const Dump* dump : dumps) {
    const Result<DumpId> id = Identify(*dump, {.runner = o.runner});
    if (!id.ok()) return id.status();
    if (std::ranges::find(m.dumps, id->hash, &DumpId::hash) == m.dumps.end()) {
      return Error(ErrorCode::kMismatch,
                   "{}: expected one of the dumps that were measured, {}, found another",
                   dump->path(), Names(m.dumps));
    }
    if (!by_hash.emplace(id->hash, dump).second) {
      return Error(ErrorCode::kInvalidArgument, "{}: expected each dump once", dump->path());
    }
  }
  if (!by_hash.empty() && by_hash.size() != m.dumps.size()) {
    return Error(ErrorCode::kMismatch,
                 "expected every dump that was measured, {}, or none, found {} of {}",
                 Names(m.dumps), by_hash.size(), m.dumps.size());
  }
  std::vector<const Dump*> sorted;
  for (const auto& [hash, dump] : by_hash) sorted.push_back(dump);
  return sorted;
}

Result<Wisdom> Speeds(const Measurement& m, const TuneOptions& o) {
  Wisdom wisdom = ThisMachine();
  if (!o.wisdom.empty()) {
    Result<Wisdom> known = LoadWisdom(o.wisdom);
    if (!known.ok() && known.status().code() != ErrorCode::kNotFound) return known.status();
    if (known.ok()) wisdom = std::move(*known);
  }
  const std::size_t before = wisdom.speeds.size();
  const std::vector<LayerShape>& layers = m.model.layers;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    Status s = Report(o, "timing the kernels", i, layers.size());
    if (s.ok() && layers[i].has_kv()) {
      s = MeasureHeadSpeeds(m.candidates.k, m.candidates.v, layers[i], o.context, kSpeedSeconds,
                            &wisdom);
    }
    if (!s.ok()) return s;
  }
  if (!o.wisdom.empty() && wisdom.speeds.size() > before) {
    if (Status s = SaveWisdom(wisdom, o.wisdom); !s.ok()) return s;
  }
  return wisdom;
}

// The errors of the plan as a whole over several dumps.
Result<std::vector<AttentionError>> MeasureWhole(const std::vector<const Dump*>& dumps,
                                                 const Plan& plan, const TuneOptions& o,
                                                 const std::string& step) {
  if (Status s = Report(o, step, 0, 1); !s.ok()) return s;
  std::vector<AttentionError> total(plan.model.query_heads_before(plan.model.layers.size()));
  for (const Dump* dump : dumps) {
    const auto errors = MeasurePlan(*dump, plan, For(step, o));
    if (!errors.ok()) return errors.status();
    for (std::size_t i = 0; i < total.size(); ++i) total[i] += (*errors)[i];
  }
  return total;
}

// Chooses; with dumps of the calibration, until no query head is much worse than predicted.
Status ChooseByTruth(const std::vector<const Dump*>& calibration, const TuneOptions& o, Tuned* t) {
  for (;;) {
    Result<Choice> choice = Choose(t->table, t->wisdom, o.context, t->constraints);
    if (!choice.ok()) return choice.status();
    t->choice = std::move(*choice);
    if (calibration.empty()) return {};
    Plan& plan = t->choice.plan;
    const auto truth = MeasureWhole(calibration, plan, o, kOnCalibration);
    if (!truth.ok()) return truth.status();
    t->calibration = Summarize(*truth, plan.model);
    plan.provenance.on_calibration = *t->calibration;
    t->worse_than_predicted.push_back(RaiseToTruth(plan, *truth, kWorseThanPredicted, &t->table));
    if (t->worse_than_predicted.back() == 0 || t->worse_than_predicted.size() > kRepairs) return {};
  }
}

Status MeasureHoldouts(const std::vector<const Dump*>& holdouts, const std::vector<DumpId>& ids,
                       const Measurement& m, const TuneOptions& o, Tuned* t) {
  Plan& plan = t->choice.plan;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const DumpId& id = ids[i];
    const auto errors = MeasureWhole({holdouts[i]}, plan, o, "measuring the plan on " + id.name);
    if (!errors.ok()) return errors.status();
    const bool is_calibration = std::ranges::find(m.dumps, id.hash, &DumpId::hash) != m.dumps.end();
    t->holdouts.push_back({id.name, id.tokens, id.longest_prompt, Summarize(*errors, plan.model),
                           is_calibration, IsFarBeyond(plan, id.longest_prompt)});
  }
  if (const Holdout* worst = WorstHoldout(*t)) {
    plan.provenance.holdout = worst->name;
    plan.provenance.holdout_tokens = worst->tokens;
    plan.provenance.on_holdout = worst->found;
  }
  return {};
}

// From a measurement to the plan. `ids` are the holdouts'.
Result<Tuned> Finish(const Measurement& m, const std::vector<const Dump*>& dumps,
                     const std::vector<const Dump*>& holdouts, const std::vector<DumpId>& ids,
                     TuneOptions o) {
  o.target = m.target;
  Result<ErrorTable> table = Table(m);
  if (!table.ok()) return table.status();
  const auto calibration = Sorted(dumps, m, o);
  if (!calibration.ok()) return calibration.status();
  Result<Wisdom> wisdom = Speeds(m, o);
  if (!wisdom.ok()) return wisdom.status();
  Tuned tuned{.table = std::move(*table),
              .wisdom = std::move(*wisdom),
              .candidates = m.candidate_set,
              .context = o.context,
              .constraints = o.constraints};
  if (o.wisdom.empty()) tuned.constraints.time_tolerance = 1.0;
  Status s = ChooseByTruth(*calibration, o, &tuned);
  if (s.ok()) s = MeasureHoldouts(holdouts, ids, m, o, &tuned);
  if (!s.ok()) return s;
  return tuned;
}

// Adds what `path` holds already, if there is such a file.
Status Resume(const std::string& path, Measurement* measurement) {
  const Result<Measurement> known = LoadMeasurement(path);
  if (known.status().code() == ErrorCode::kNotFound) return {};
  if (!known.ok()) return known.status();
  Result<Measurement> both = Merge(*measurement, *known);
  if (!both.ok()) {
    return Error(both.status().code(), "{}: {}; name another file to begin anew", path,
                 both.status().message());
  }
  *measurement = std::move(*both);
  return {};
}

}  // namespace

Result<Measurement> MeasureInto(const std::string& path, const std::vector<const Dump*>& dumps,
                                const Calibration& calibration, const std::string& candidates,
                                std::size_t first_layer, std::size_t last_layer,
                                const MeasureOptions& options) {
  const Result<CandidateKinds> kinds = Candidates(candidates);
  if (!kinds.ok()) return kinds.status();
  Result<Measurement> m = StartMeasurement(calibration, *kinds, options);
  if (!m.ok()) return m;
  m->candidate_set = candidates;
  const auto save = [&] { return path.empty() ? Status() : SavePart(*m, path); };
  Status s = path.empty() ? Status() : Resume(path, &*m);
  if (s.ok()) s = Measure(dumps, calibration, first_layer, last_layer, options, &*m, save);
  if (s.ok()) s = save();
  if (!s.ok()) return s;
  return m;
}

TuneOptions Settled(TuneOptions options, const std::vector<const Dump*>& dumps) {
  std::size_t longest = 0;
  for (const Dump* dump : dumps)
    longest = std::max(longest, std::ranges::max(dump->prompt_tokens()));
  const Plan usual = DefaultPlan(dumps[0]->model());
  std::size_t stretch = usual.exact_newest;
  while (stretch > longest / kStretches) stretch /= 2;
  if (stretch < KVMIX_SHORTEST_STRETCH || options.candidates != "all") stretch = 0;
  Plan plan = UniformPlan(usual.model, {}, {});
  const std::size_t f16 = ContextBytes(plan, options.context);
  plan.exact_first = stretch != 0 ? usual.exact_first : 0;
  plan.exact_newest = stretch;
  if ((ContextBytes(plan, options.context) - f16) * kShare > f16) {
    plan.exact_first = plan.exact_newest = 0;
  }
  if (!options.exact_first) options.exact_first = plan.exact_first;
  if (!options.exact_newest) options.exact_newest = plan.exact_newest;
  return options;
}

const Holdout* WorstHoldout(const Tuned& tuned) {
  const auto worst = std::ranges::min_element(
      tuned.holdouts, {}, [](const Holdout& h) { return h.found.worst_cosine; });
  return worst == tuned.holdouts.end() ? nullptr : &*worst;
}

Result<Tuned> Tune(const std::vector<const Dump*>& dumps, const std::vector<const Dump*>& holdouts,
                   const TuneOptions& asked) {
  Status s = CheckOptions(asked);
  if (s.ok()) s = CheckDumps(dumps);
  if (!s.ok()) return s;
  const Model& model = dumps[0]->model();
  const TuneOptions options = Settled(asked, dumps);
  const auto ids = CheckHoldouts(holdouts, model, options);
  if (!ids.ok()) return ids.status();
  const std::string calibrating = "calibrating", measuring = "measuring every head and codec";
  if (s = Report(options, calibrating, 0, 1); !s.ok()) return s;
  const auto calibration = Calibrate(dumps, 0, model.layers.size(), For(calibrating, options));
  if (!calibration.ok()) return calibration.status();
  if (s = Report(options, measuring, 0, 1); !s.ok()) return s;
  const auto m = MeasureInto(options.work, dumps, *calibration, options.candidates, 0,
                             model.layers.size(), For(measuring, options));
  if (!m.ok()) return m.status();
  return Finish(*m, dumps, holdouts, *ids, options);
}

Result<Tuned> Tune(const Measurement& measurement, const std::vector<const Dump*>& dumps,
                   const std::vector<const Dump*>& holdouts, const TuneOptions& options) {
  if (Status s = CheckOptions(options); !s.ok()) return s;
  const auto ids = CheckHoldouts(holdouts, measurement.model, options);
  if (!ids.ok()) return ids.status();
  return Finish(measurement, dumps, holdouts, *ids, options);
}

}  // namespace kvmix::tune
