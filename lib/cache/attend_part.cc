// Runs a part of a call of attention through the kernels. The thread that finishes the last part of
// a row merges all parts of the row.
#include <algorithm>
#include <cmath>
#include <limits>

#include "lib/cache/attend_call.h"
#include "lib/cache/round.h"

namespace kvmix::internal {
namespace {

constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
// In units of log2. A mask makes what it hides -2^100, not -inf (kernels/mask.h): a row whose
// largest score is below -4e29 sees nothing.
constexpr float kNothingSeen = -4e29f * 1.4426950408889634f;

}  // namespace

// What is read after a part's tokens.
const std::uint8_t* AttendCall::BlockAfter(std::size_t part) const {
  if (!from_memory || part + 1 >= schedule.parts.size()) return nullptr;
  const Part& next = schedule.parts[part + 1];
  if (next.first_token >= next.last_token) return nullptr;
  const Unit& unit = schedule.units[schedule.unit_of[next.first_unit]];
  return requests[unit.sequence].held->blocks_of(
      next.kv_head)[next.first_token / kernels::kBlockTokens];
}

// The task of a part, without its queries and its memory. A mask of the task is put in `mask`.
kernels::AttendTask AttendCall::TaskOf(const Part& part, std::span<const std::uint32_t> units,
                                       kernels::Mask& mask) const {
  const Unit& first = schedule.units[units[0]];
  const Request& request = requests[first.sequence];
  kernels::AttendTask task{};
  task.format = &layer->formats[part.kv_head];
  task.blocks = request.held->blocks_of(part.kv_head);
  task.first_token = part.first_token;
  task.last_token = part.last_token;
  task.rows = part.rows;
  task.group = shape->group();
  // Many units read together only what all of their queries see.
  task.sight = units.size() == 1 ? sequences[first.sequence].From(first.first_query)
                                 : kernels::Sight::Whole(part.last_token);
  if (request.masked) {
    mask = request.mask;
    mask.values = request.numbers.row(first.first_query, 0);
    mask.ranges += first.first_query * mask.blocks;
    if (mask.slopes != nullptr) mask.slopes += part.kv_head * task.group;
    task.mask = &mask;
  }
  task.scale = sight.scale;
  task.soft_cap = sight.soft_cap;
  task.stream = from_memory;
  return task;
}

void AttendCall::RunPart(std::size_t index) {
  const Part& part = schedule.parts[index];
  const std::span<const std::uint32_t> units(schedule.unit_of.data() + part.first_unit, part.units);
  const std::size_t group = shape->group(), dim = shape->k_dim;
  kernels::Mask mask;
  kernels::AttendTask task = TaskOf(part, units, mask);
  task.after = BlockAfter(index);

  thread_local Scratch scratch;
  const std::size_t q_bytes = RoundUp(part.rows * dim * sizeof(float), 64),
                    operand_bytes = pool->kernels->attend.operand_bytes(*task.format, part.rows),
                    bias_bytes = RoundUp(part.rows * sizeof(float), 64);
  std::uint8_t* const memory =
      scratch.Get(q_bytes + operand_bytes + bias_bytes + part.rows * Outputs::RowBytes(padded));
  float* const queries = reinterpret_cast<float*>(memory);
  float* const bias = reinterpret_cast<float*>(memory + q_bytes + operand_bytes);
  const Outputs to =
      Outputs::At(part.memory == Part::kOwn ? memory + q_bytes + operand_bytes + bias_bytes
                                            : outputs + part.memory,
                  part.rows, padded);

  float* row = queries;
  bool biased =
      sight.soft_cap != 0.0f || sight.sinks != nullptr || exact != 0 || layer->stretch != 0;
  for (const std::uint32_t u : units) {
    const Unit& unit = schedule.units[u];
    biased |= requests[unit.sequence].log_sum_exp != nullptr;
    GatherQueries(unit, row);
    row += unit.queries * group * dim;
  }
  // Only a soft cap, sinks, exact tokens and a sum see what the codes of a centred K leave out of
  // the scores.
  task.bias = biased ? bias : nullptr;
  layer->k[part.kv_head].PrepareQueries(queries, part.rows, sight.scale, biased ? bias : nullptr);
  task.q = queries;
  task.operand = memory + q_bytes;
  task.out = to.out;
  task.max = to.max;
  task.sum = to.sum;
  pool->kernels->attend.attend(task);

  // The thread that finishes the last part of a unit merges all of them, always in one order.
  const float* unit_bias = task.bias;
  for (const std::uint32_t u : units) {
    const Unit& unit = schedule.units[u];
    if (part.memory == Part::kOwn) {
      Merge(unit, unit_bias, &to);
    } else if (done[u].fetch_add(1, std::memory_order_acq_rel) + 1 == unit.partials) {
      Merge(unit, unit_bias, nullptr);
    }
    if (biased) unit_bias += unit.queries * group;
  }
}

// f32 rows of the query heads that share a KV head.
void AttendCall::GatherQueries(const Unit& unit, float* rows) const {
  const std::size_t group = shape->group();
  for (std::size_t i = 0; i < unit.queries; ++i, rows += group * shape->k_dim) {
    const kernels::RowsIn heads =
        HeadRows(requests[unit.sequence].q, unit.first_query + i, unit.kv_head * group, group);
    pool->kernels->encode.to_float(heads, rows, shape->k_dim);
  }
}

// A unit's rows over the tokens that are kept exact. Their scores lack `bias` as those of codes do.
Outputs AttendCall::AttendExact(const Unit& unit, const float* bias) const {
  const Sequence& s = sequences[unit.sequence];
  const std::size_t rows = unit.queries * shape->group();
  thread_local Scratch scratch;
  const std::size_t q_floats = rows * shape->k_dim,
                    added_floats = rows * std::max(s.exact, s.stretch);
  std::uint8_t* const memory = scratch.Get((q_floats + added_floats) * sizeof(float) +
                                           rows * Outputs::RowBytes(shape->v_dim));
  float* const queries = reinterpret_cast<float*>(memory);
  float* const added = queries + q_floats;
  const Outputs to =
      Outputs::At(reinterpret_cast<std::uint8_t*>(added + added_floats), rows, shape->v_dim);
  GatherQueries(unit, queries);
  std::fill_n(to.out, rows * shape->v_dim, 0.0f);
  std::fill_n(to.max, rows, -kInf);
  std::fill_n(to.sum, rows, 0.0f);
  const CacheLayer& held = *requests[unit.sequence].held;
  // Tokens [first, last); the first of the rows is that of token `begin`.
  const auto attend = [&](const ExactRows& of, std::size_t begin, std::size_t first,
                          std::size_t last) {
    const Tokens seen = s.OfRun(unit.first_query, unit.queries);
    first = std::max(first, seen.first);
    last = std::min(last, seen.last);
    if (first >= last) return;
    AddToScores(unit, bias, first, last, added);
    const std::size_t at = first - begin;
    pool->kernels->exact.attend(
        {of.rows(KVMIX_K) + at * shape->k_dim, of.rows(KVMIX_V) + at * shape->v_dim,
         of.factors(KVMIX_K) + at, of.factors(KVMIX_V) + at, last - first, shape->k_dim,
         shape->v_dim, queries, rows, sight.scale, sight.soft_cap, added, to.out, to.max, to.sum});
  };
  if (s.exact != 0) attend(ExactFirst(*pool, held, layer->shape, unit.kv_head), 0, 0, s.exact);
  s.ForExact(unit.first_query, [&](const Stretch& x) {
    const std::size_t begin = x.index * s.stretch;
    attend(RowsOf(*layer, x, unit.kv_head), begin, std::max(begin, s.exact),
           std::min(begin + s.stretch, s.tokens));
  });
  return to;
}

// added[row][token of first to last] <- what is added to the scores: -inf where it is not seen.
void AttendCall::AddToScores(const Unit& unit, const float* bias, std::size_t first,
                             std::size_t last, float* added) const {
  const Sequence& s = sequences[unit.sequence];
  const Request& request = requests[unit.sequence];
  for (std::size_t r = 0; r < unit.queries * shape->group(); ++r) {
    const std::size_t query = unit.first_query + r / shape->group();
    const std::size_t query_head = unit.kv_head * shape->group() + r % shape->group();
    const Tokens seen = s.Of(query);
    const float lacking = sight.soft_cap != 0.0f ? 0.0f : bias[r];
    for (std::size_t t = first; t < last; ++t) {
      float number = t >= seen.first && t < seen.last ? 0.0f : -kInf;
      if (request.masked) number += MaskNumber(request, query, t, query_head);
      *added++ = number - lacking;
    }
  }
}

// A mask's number for one row and token, with its slope.
float AttendCall::MaskNumber(const Request& request, std::size_t query, std::size_t token,
                             std::size_t query_head) {
  if (token >= request.numbers.head_dim) return -kInf;
  const float* const slopes = request.mask.slopes;
  return (slopes != nullptr ? slopes[query_head] : 1.0f) * request.numbers.At(query, 0, token);
}

// own: the outputs of a unit's only part.
void AttendCall::Merge(const Unit& unit, const float* bias, const Outputs* own) const {
  const std::size_t group = shape->group();
  const Request& request = requests[unit.sequence];
  const bool has_exact =
      sequences[unit.sequence].exact != 0 || !sequences[unit.sequence].stretches.empty();
  const Outputs first = has_exact ? AttendExact(unit, bias) : Outputs{};
  float narrow[kMaxHeadDim];
  for (std::size_t r = 0; r < unit.queries * group; ++r) {
    const std::size_t query = unit.first_query + r / group,
                      query_head = unit.kv_head * group + r % group;
    float* const place = request.out.Direct(query, query_head);
    float* const to = place != nullptr ? place : narrow;
    MergeRow(unit, r, bias != nullptr ? bias[r] : 0.0f, own, has_exact ? &first : nullptr, to);
    if (place == nullptr) request.out.Put(query, query_head, narrow);
  }
}

// Row r of a unit:
//   out = sum over parts of 2^(max_p - max) out_p / (sum over parts of 2^(max_p - max) sum_p +
//   sink)
// and what V's codec restores. exact_first: the part of the tokens that are kept exact, or null.
void AttendCall::MergeRow(const Unit& unit, std::size_t r, float bias, const Outputs* own,
                          const Outputs* exact_first, float* to) const {
  const std::size_t group = shape->group(), dim = shape->v_dim;
  const Request& request = requests[unit.sequence];
  const auto partial = [&](std::size_t p, std::size_t row) {
    if (own != nullptr) return own->From(row, padded);
    const Partial& place = schedule.partials[unit.first_partial + p];
    const Part& part = schedule.parts[place.part];
    return Outputs::At(outputs + part.memory, part.rows, padded).From(place.row + row, padded);
  };
  const std::size_t query_head = unit.kv_head * group + r % group;
  const std::size_t row = (unit.first_query + r / group) * shape->query_heads + query_head;
  float max = exact_first != nullptr ? exact_first->max[r] : -kInf;
  bool nan = std::isnan(max);
  for (std::size_t p = 0; p < unit.partials; ++p) {
    const float own_max = *partial(p, r).max;
    max = std::max(max, own_max);
    nan |= std::isnan(own_max);
  }
  // A sink's logit, and the sum of all weights, are beside scores that lack `bias` (a soft cap
  // has put it back).
  const float lacking = sight.soft_cap != 0.0f ? 0.0f : bias;
  // In units of log2. It stays finite: a sink that takes all leaves 0, not NaN.
  float sink = -kInf;
  if (sight.sinks != nullptr) sink = (sight.sinks[query_head] - lacking) / kLn2;
  sink = std::min(sink, std::numeric_limits<float>::max());
  const bool nothing = max < kNothingSeen;
  if (nan || nothing) {
    std::fill(to, to + dim, nan ? kNaN : 0.0f);
    if (request.log_sum_exp != nullptr) {
      request.log_sum_exp[row] = nan ? kNaN : sink * kLn2 + lacking;
    }
    return;
  }
  max = std::max(max, sink);
  const auto weight = [&](std::size_t p) { return std::exp2(*partial(p, r).max - max); };
  float sum = 0.0f;
  for (std::size_t p = 0; p < unit.partials; ++p) sum += weight(p) * *partial(p, r).sum;
  const float first_weight = exact_first != nullptr ? std::exp2(exact_first->max[r] - max) : 0.0f;
  const float first_sum = exact_first != nullptr ? first_weight * exact_first->sum[r] : 0.0f;
  const float total = sum + first_sum + std::exp2(sink - max);
  std::fill(to, to + dim, 0.0f);
  for (std::size_t p = 0; p < unit.partials; ++p) {
    const float share = weight(p) / total;
    const float* const from = partial(p, r).out;
    for (std::size_t c = 0; c < dim; ++c) to[c] += share * from[c];
  }
  layer->v[unit.kv_head].RestoreOutput(to, sum / total);
  for (std::size_t c = 0; exact_first != nullptr && c < dim; ++c) {
    to[c] += first_weight / total * exact_first->out[r * dim + c];
  }
  if (request.log_sum_exp != nullptr) {
    request.log_sum_exp[row] = (max + std::log2(total)) * kLn2 + lacking;
  }
}

void MergeOutputs(float* out, float* log_sum_exp, const float* other_out,
                  const float* other_log_sum_exp, std::size_t rows, std::size_t dim) {
  for (std::size_t r = 0; r < rows; ++r) {
    const float a = log_sum_exp[r], b = other_log_sum_exp[r];
    if (b == -kInf) continue;  // nothing to add; not even to -inf
    const float max = std::max(a, b), own = std::exp(a - max), other = std::exp(b - max);
    const float own_share = own / (own + other), other_share = other / (own + other);
    for (std::size_t c = r * dim; c < (r + 1) * dim; ++c) {
      out[c] = own_share * out[c] + other_share * other_out[c];
    }
    log_sum_exp[r] = max + std::log(own + other);
  }
}

}  // namespace kvmix::internal
