// From dumps to a plan, in three steps:
//   measure   dumps -> error table of some layers
//   merge     tables of other layers of the same model and dumps -> one table
//   choose    table + speeds + budget -> plan
#ifndef KVMIX_TUNE_H_
#define KVMIX_TUNE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "kvmix/dump.h"
#include "kvmix/export.h"
#include "kvmix/metrics.h"
#include "kvmix/plan.h"
#include "kvmix/quantize.h"
#include "kvmix/speed.h"
#include "kvmix/status.h"

namespace kvmix {

using Progress = std::function<void(std::size_t done, std::size_t total)>;

// How to measure. The results do not depend on the threads.
struct MeasureOptions {
  int num_threads = 0;          // OpenMP threads; 0: as many as this process may use
  std::string target = {};      // the instruction set, a name of Targets(); "": the best
  Progress progress = {};       // if given, called after each layer, by one thread at a time
  std::size_t exact_first = 0;  // as Plan::exact_first
};

// The causal attention of one layer of a dump, with its window, scale, cap and sinks, prompt by
// prompt, through a cache of `codecs` ([kv_heads][K, V]). out: [tokens, query_heads, v_dim].
// saturated, if not null, is increased by
// the values that were clamped.
KVMIX_API Status AttendDump(const Dump& dump, std::size_t layer,
                            const std::vector<HeadCodec>& codecs, const MeasureOptions& options,
                            std::vector<float>* out, std::uint64_t* saturated = nullptr);

// The errors of a whole plan, [layers with K and V][query_heads]. Windows, scales, caps and sinks
// are the dump's; the plan has the same, or none. Layers run side by side.
KVMIX_API Result<std::vector<AttentionError>> MeasurePlan(const Dump& dump, const Plan& plan,
                                                          const MeasureOptions& options = {});

// ---- measure

// The codecs that the tuner may choose from.
struct CandidateKinds {
  std::vector<CodecKind> k, v;
};
// By name:
//   seed  f16, i8-head, i8-token (the study's)
//   int8  f16, i8-token, i8-token-bf16; K also centred
//   all   f16, i8-token, i8-token-bf16; K also centred, rotated, centred and rotated, centred and
//         folded, and all three; V also rotated. (V is never centred: the V of an attention sink is
//         near zero, and centring makes its codes large.)
//   int4  all, and i4 wherever `all` has i8
KVMIX_API Result<CandidateKinds> Candidates(const std::string& name);

// Errors of the values themselves: rows of one head encoded and decoded again.
KVMIX_API Result<ErrorSums> EncodingError(const RowsView& rows, const HeadCodec& codec);

// What one candidate does to one KV head's K or V: this tensor encoded, the rest exact.
struct CandidateError {
  HeadCodec codec;                      // whole: with its scale and mean
  std::vector<AttentionError> queries;  // [layers that read the head, itself first][group]
  ErrorSums values;                     // of K or V itself
};

struct HeadErrors {
  std::size_t layer = 0;
  std::size_t kv_head = 0;
  Tensor tensor = Tensor::kK;
  double max_abs = 0.0;
  std::vector<CandidateError> candidates;  // in the order of CandidateKinds
};

struct ErrorTable {
  Model model;
  std::size_t exact_first = 0;     // of the plans that the errors are those of
  std::vector<std::string> dumps;  // names
  std::string model_name;
  std::size_t tokens = 0;
  std::size_t longest_prompt = 0;
  // Of layers that own K and V. Sorted by layer, kv head, tensor; each once.
  std::vector<HeadErrors> heads;
};

// Scales and means come from all `dumps` together (one model; their shapes must agree), errors are
// measured on them all, and by the queries of every layer that reads the head. Layers
// [first_layer, last_layer), side by side. NaN or Inf, or a dump
// without Q, is an error. Memory: a few times one layer's tensors for every layer in work; layers
// whose outputs would take more than 1 GiB together wait their turn.
KVMIX_API Result<ErrorTable> Measure(const std::vector<const Dump*>& dumps,
                                     const CandidateKinds& candidates, std::size_t first_layer,
                                     std::size_t last_layer, const MeasureOptions& options = {});

// Tables over disjoint layers of the same model and dumps; associative. A head in both is an error.
KVMIX_API Result<ErrorTable> Merge(const ErrorTable& a, const ErrorTable& b);

// ---- choose

struct Constraints {
  std::optional<double> budget;         // this fraction of the fp16 bytes is saved, or more
  std::optional<double> min_cosine;     // of the predicted worst query head
  std::optional<double> max_decode_ns;  // of one token over all layers
  // >= 1: plans whose worst heads differ by no more than this factor count as alike. (From one text
  // to another the worst head moves by more.)
  double worst_tolerance = 1.25;
  // >= 1: how much of the summed error may be given away for decode time. 1: none; the choice is
  // then the same whatever the times, but for max_decode_ns.
  double time_tolerance = 1.02;
};

// What a plan gives. On the Pareto front no plan saves as much with a smaller worst NMSE.
struct ParetoPoint {
  double saved_fraction = 0.0;
  Fidelity predicted;
  double decode_ns = 0.0;
  std::size_t fp16_tensors = 0;  // K and V of a KV head count one each
};

// What keeps a K or V from its next smaller codec: of the candidates that are smaller the largest,
// of several the best. The other of K and V stays as it is chosen.
enum class Limit : std::uint8_t {
  kNone,    // no candidate is smaller
  kWorst,   // the NMSE of a query head would be above Choice::worst_limit
  kCosine,  // or its cosine below min_cosine
  kTime,    // without decode times the choice would be as small, or its sum no larger
  kBudget,  // the sum of NMSE would be larger, and no limit asks for fewer bytes
  kSum,     // the same, and it costs less elsewhere to save the bytes that a limit asks for
};
struct Reason {
  Limit limit = Limit::kNone;
  double worst_nmse = 0.0;             // of the query heads that read the KV head, as chosen
  std::optional<std::size_t> smaller;  // place in HeadErrors::candidates
  double smaller_worst_nmse = 0.0;     // with it
  double sum_nmse_added = 0.0;         // by it, to the sum over query heads
};

struct Choice {
  Plan plan;               // provenance: model, calibration and on_calibration as predicted
  Fidelity predicted;      // errors of K and V added up
  double decode_ns = 0.0;  // one token, all layers, 1 thread
  double fp16_decode_ns = 0.0;
  std::size_t decided_by_time = 0;  // K and V of KV heads that have another codec without times
  ParetoPoint without_times;        // of the choice without them: what ignoring times costs
  double worst_limit = 0.0;         // w * worst_tolerance of the steps below
  std::vector<Reason> reasons;      // of each of the plan's codecs
  // By falling saved fraction, from the smallest plan to fp16; at most 64 points, even along the
  // curve.
  std::vector<ParetoPoint> front;
};

// One choice of K and V codec per KV head, exact (multiple-choice knapsack), in three steps:
//   1. worst: the least w such that some plan within the constraints has no query head with an NMSE
//      above w.
//   2. sum: S = the least sum of NMSE over all query heads among the plans with no head above
//      w * worst_tolerance.
//   3. time: of those plans the one that minimises sum + price * decode time. The price is
//      (time_tolerance - 1) * S over all the time that could be saved at best, so that the sum is
//      at most S * time_tolerance, and time decides where plans are about equally accurate.
// The NMSE of a query head is the sum of its K's and its V's; so is 1 - cosine.
//
// min_cosine without budget: the most bytes that can be saved, then the same. max_decode_ns: step 1
// stays exact; in step 2 time gets the least price that holds the limit (a Lagrange multiplier: a
// plan between two prices may be missed), and step 3 falls away. Infeasible: an error that says
// what each limit alone lets reach. Wisdom must hold every pair of codecs in the table, at
// `context`.
//
// Bytes and saved fractions are those of a context of `context` tokens (ContextBytes), decode times
// those of layers that see as much of it as their windows let through.
//
// 126 layers x 8 KV heads with 20 candidates each for K and V take 0.1 to 0.2 seconds on one core
// of Zen 4 and 60 MB beside the table; with 33 candidates each 0.3 seconds and 90 MB.
KVMIX_API Result<Choice> Choose(const ErrorTable& table, const Wisdom& wisdom, std::size_t context,
                                const Constraints& constraints);

}  // namespace kvmix

#endif  // KVMIX_TUNE_H_
