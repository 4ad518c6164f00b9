// From dumps to a plan, in four steps, each of which can be done in parts and elsewhere:
//   Calibrate   dumps -> statistics of some layers, which the codecs' numbers are made from
//   Measure     dumps + statistics -> errors of every candidate in some layers
//   Merge       parts of either kind, of other layers and dumps -> one
//   Choose      errors + speeds + budget -> plan
// What comes out does not depend on how the work was split (by layers, by dumps), on the order of
// parts or dumps, nor on threads: what is known of each dump stays apart up to the end, where sums
// run over the dumps by their hash. (Instruction sets do round differently.)
#ifndef KVMIX_TUNE_STEPS_H_
#define KVMIX_TUNE_STEPS_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kvmix/export.h"
#include "kvmix/plan.h"
#include "kvmix/quantize.h"
#include "kvmix/runner.h"
#include "kvmix/status.h"
#include "kvmix/tune/dump.h"
#include "kvmix/tune/metrics.h"
#include "kvmix/tune/speed.h"

namespace kvmix::tune {

// Returns false to stop the work, which then ends with kCancelled.
using Progress = std::function<bool(std::size_t done, std::size_t total)>;

// How to measure. The results do not depend on the threads.
struct MeasureOptions {
  Runner runner = 0;            // OpenMP's threads: as many as this process may use
  std::string target = {};      // the instruction set, a name of Targets(); "": the best
  Progress progress = {};       // if given, called after each layer, by one thread at a time
  std::size_t exact_first = 0;  // as in Plan
  std::size_t exact_newest = 0;
};

// The causal attention of one layer of a dump, with its window, scale, cap and sinks, prompt by
// prompt, through a cache of `codecs` ([kv_heads][K, V]). out: [tokens, query_heads, v_dim].
// saturated, if not null, is increased by the number of values that were clamped.
KVMIX_API Status AttendDump(const Dump& dump, std::size_t layer,
                            const std::vector<HeadCodec>& codecs, const MeasureOptions& options,
                            std::vector<float>* out, std::uint64_t* saturated = nullptr);

// The errors of a whole plan, [layers with K and V][query_heads]. Windows, scales, caps and sinks
// are the dump's; the plan has the same, or none. Layers run side by side.
KVMIX_API Result<std::vector<AttentionError>> MeasurePlan(const Dump& dump, const Plan& plan,
                                                          const MeasureOptions& options = {});

// ---- parts of the work

// A dump by what is in it. Hashes are XXH3 (64 bits), as 16 hexadecimal digits.
struct DumpId {
  std::string hash = {};  // of the model's name, the prompts' lengths, the shapes and `layers`
  std::string name = {};  // of its file
  std::string model_name = {};
  std::size_t tokens = 0;
  std::size_t longest_prompt = 0;
  std::vector<std::string> layers = {};  // of each layer's own K, V and Q, as they lie in the file

  bool operator==(const DumpId&) const = default;
};

// Reads all of the dump.
KVMIX_API Result<DumpId> Identify(const Dump& dump, const MeasureOptions& options = {});

// By layer that owns K and V, then by the hash of the dump.
template <class T>
using Pieces = std::map<std::size_t, std::map<std::string, T>>;

// A layer of the dump of this hash.
using Place = std::pair<std::string, std::size_t>;
// Places for people: "layers 3 to 5 and 9 of c4.safetensors, layer 2 of wiki.safetensors". `dumps`
// has the hashes of all places.
KVMIX_API std::string PlacesText(std::vector<Place> places, const std::vector<DumpId>& dumps);

// ---- calibrate

// What is known of one KV head's K or V over the tokens of some dumps: sums, so that those of other
// dumps can be added. Every number that codecs have is made from these.
struct KVMIX_API HeadStatistics {
  std::uint64_t tokens = 0;
  std::vector<double> sum;      // [head_dim], over the tokens
  std::vector<float> min, max;  // [head_dim]
  // K only: [head_dim][head_dim], the sum of q q^T over the tokens and over the query heads that
  // read the head, in every layer that does. Symmetric.
  std::vector<double> query_moment = {};

  // Adds those of other tokens of the same head.
  HeadStatistics& operator+=(const HeadStatistics& o);
  bool operator==(const HeadStatistics&) const = default;
};

struct Calibration {
  Model model = {};
  std::vector<DumpId> dumps = {};                   // by hash
  Pieces<std::vector<HeadStatistics>> pieces = {};  // [kv_heads][K, V]
};

// Layers [first_layer, last_layer) of dumps of one model, whose shapes must agree, layers side by
// side. NaN or Inf, a dump without Q and one that is given twice are errors. All of every dump is
// read, for its hash. Memory: a layer's tensors and statistics.
KVMIX_API Result<Calibration> Calibrate(const std::vector<const Dump*>& dumps,
                                        std::size_t first_layer, std::size_t last_layer,
                                        const MeasureOptions& options = {});

// Associative, and the same in any order. Other shapes are an error, and so is a layer of a dump
// that is in both.
KVMIX_API Result<Calibration> Merge(const Calibration& a, const Calibration& b);

// ---- measure

// The codecs that the tuner may choose from.
struct CandidateKinds {
  std::vector<CodecKind> k, v;
};
// By name:
//   seed  f16, i8-head, i8-token (the study's)
//   int8  f16, i8-token, i8-token-bf16; K also centred
//   all   int8; i8 of K also rotated, centred and rotated, centred and folded, all three, and these
//         shaped; of V also rotated. i6, i4 and i3, with a bf16 scale, rotated; K also centred,
//         folded and shaped. (V is never centred: the V of an attention sink is near zero, and
//         centring makes its codes large.) For speed, i8x8 with a bf16 scale: K centred and
//         rotated, folded, shaped, V rotated.
// A kind that does not fit the heads' dimension is left out.
KVMIX_API Result<CandidateKinds> Candidates(const std::string& name);

// What one candidate does to one KV head's K or V: this tensor encoded, the rest exact.
struct CandidateError {
  HeadCodec codec;                      // whole: with its scale and mean
  std::vector<AttentionError> queries;  // [layers that read the head, itself first][group]
  ErrorSums values;                     // of K or V itself
};

struct HeadErrors {
  std::size_t layer = 0;
  std::size_t kv_head = 0;
  Tensor tensor = KVMIX_K;
  double max_abs = 0.0;
  std::vector<CandidateError> candidates;  // in the order of CandidateKinds
};

struct ErrorTable {
  Model model;
  std::size_t exact_first = 0;  // of the plans that the errors are those of
  std::size_t exact_newest = 0;
  std::vector<std::string> dumps;  // names, sorted
  std::string model_name;
  std::size_t tokens = 0;
  std::size_t longest_prompt = 0;
  // Of layers that own K and V. Sorted by layer, kv head, tensor; each once.
  std::vector<HeadErrors> heads;
};

// What Measure() found out, and where it stands.
struct Measurement {
  Model model = {};
  std::vector<DumpId> dumps = {};  // of the calibration, by hash
  CandidateKinds candidates = {};
  std::string candidate_set = {};  // their name, for people
  std::size_t exact_first = 0;     // of the plans that the errors are those of
  std::size_t exact_newest = 0;
  std::string target = {};  // the instruction set
  std::string library_version = {};
  // Of each layer that was measured [kv_heads][K, V], over all dumps: what its codecs are made
  // from.
  std::map<std::size_t, std::vector<HeadStatistics>> statistics = {};
  // [kv_heads][K, V]; of their codecs the kinds alone.
  Pieces<std::vector<HeadErrors>> pieces = {};
};

// A measurement of nothing yet. With exact newest tokens a K candidate's centre is an own one.
KVMIX_API Result<Measurement> StartMeasurement(const Calibration& calibration,
                                               const CandidateKinds& candidates,
                                               const MeasureOptions& options = {});

// Measures what `measurement` lacks of these layers of these dumps, by the queries of every layer
// that reads a head. The calibration must hold every layer of all of its dumps, and know these
// ones; their numbers must be those that it saw. `finished`, if given, is called whenever a layer
// was added, by one thread at a time; its error ends the work. Layers run side by side. Memory: a
// few times one layer's tensors for every layer in work; layers whose outputs would take more than
// 1 GiB together wait their turn.
KVMIX_API Status Measure(const std::vector<const Dump*>& dumps, const Calibration& calibration,
                         std::size_t first_layer, std::size_t last_layer,
                         const MeasureOptions& options, Measurement* measurement,
                         const std::function<Status()>& finished = {});

// As for calibrations. Other candidates, target, version of the library or calibration are an
// error.
KVMIX_API Result<Measurement> Merge(const Measurement& a, const Measurement& b);

// Measure() of candidates that Candidates() knows by name, kept in a file: what `path` holds
// already is not measured again, and the file is written after every layer. path "": no file.
KVMIX_API Result<Measurement> MeasureInto(const std::string& path,
                                          const std::vector<const Dump*>& dumps,
                                          const Calibration& calibration,
                                          const std::string& candidates, std::size_t first_layer,
                                          std::size_t last_layer,
                                          const MeasureOptions& options = {});

// Every layer that owns K and V was measured on every dump; else an error that names those missing.
KVMIX_API Status CheckWhole(const Measurement& measurement);

// The errors over all dumps, and the codecs that make them. The measurement must be whole.
KVMIX_API Result<ErrorTable> Table(const Measurement& measurement);

// Calibration and measuring at once, of these layers alone.
KVMIX_API Result<ErrorTable> Measure(const std::vector<const Dump*>& dumps,
                                     const CandidateKinds& candidates, std::size_t first_layer,
                                     std::size_t last_layer, const MeasureOptions& options = {});

// ---- files (docs/formats.md)

enum class PartKind { kCalibration, kMeasurement };

// Save writes `path` whole or leaves it untouched. Load refuses a newer major version, damage and
// whatever contradicts itself, naming the file.
KVMIX_API Status SavePart(const Calibration& calibration, const std::string& path);
KVMIX_API Status SavePart(const Measurement& measurement, const std::string& path);
KVMIX_API Result<PartKind> KindOfPart(const std::string& path);
KVMIX_API Result<Calibration> LoadCalibration(const std::string& path);
KVMIX_API Result<Measurement> LoadMeasurement(const std::string& path);

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

// Holds the table that a plan was chosen from against the plan as a whole. truth: its errors on the
// table's dumps, as MeasurePlan() gives them. Where a query head's NMSE is more than `factor` times
// what the table predicts, the errors of all candidates of its KV head's K and V are raised by that
// ratio. Returns how many query heads these are; if any, choose again.
KVMIX_API std::size_t RaiseToTruth(const Plan& plan, const std::vector<AttentionError>& truth,
                                   double factor, ErrorTable* table);

}  // namespace kvmix::tune

#endif  // KVMIX_TUNE_STEPS_H_
