// Per target: what every attention kernel knows of its task, whatever multiplies: who sees which
// tokens of a block, the block's scales, and what changes scores before softmax.
#if defined(KVMIX_KERNELS_TASK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVMIX_KERNELS_TASK_INL_H_
#undef KVMIX_KERNELS_TASK_INL_H_
#else
#define KVMIX_KERNELS_TASK_INL_H_
#endif

#include <cmath>
#include <limits>

#include "hwy/highway.h"
#include "kernels/attend.h"
#include "kernels/softmax-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {

// max |q| of n numbers; NaN if one is NaN or infinite.
HWY_INLINE float LargestFinite(const float* q, std::size_t n) {
  const DF df;
  VF largest = hn::Zero(df);
  hn::Mask<DF> finite = hn::FirstN(df, kLanes);
  for (std::size_t c = 0; c < n; c += kLanes) {
    const VF x = hn::LoadN(df, q + c, HWY_MIN(kLanes, n - c));
    largest = hn::Max(largest, hn::Abs(x));
    finite = hn::And(finite, hn::IsFinite(x));
  }
  return hn::AllTrue(df, finite) ? hn::ReduceMax(df, largest)
                                 : std::numeric_limits<float>::quiet_NaN();
}

// A query's number is so much times its term; 0: the row counts as zeros. largest: LargestFinite.
template <class P>
HWY_INLINE float QueryScale(float largest) {
  const float scale = largest / P::kLargestQuery;
  return scale >= 0x1p-100f ? scale : 0.0f;
}

// Max and sum of a row that has seen nothing; max has been LargestFinite. query_scale: QueryScale,
// or 1. Returns the factor of the row's products, in units of log2.
HWY_INLINE float StartRow(const AttendTask& t, std::size_t row, float query_scale) {
  if (!std::isnan(t.max[row])) t.max[row] = kNegInf;
  t.sum[row] = 0.0f;
  // Not 0, which times a masked score of -inf would be NaN.
  return HWY_MAX((query_scale == 0.0f ? 1.0f : query_scale) * t.scale * kLog2E, 0x1p-100f);
}

// The scales of a block's tokens as f32: in place, or in `copy` (of a constant one, only the first
// time).
HWY_INLINE const float* Scales(const TileFormat& f, const std::uint8_t* block, bool first_time,
                               float* copy) {
  const DF df;
  if (f.row.scale == ScaleStore::kF32)
    return reinterpret_cast<const float*>(block + f.scales_offset);
  if (f.row.scale == ScaleStore::kConstant && !first_time) return copy;
  for (std::size_t t = 0; t < kBlockTokens; t += kLanes) {
    VF s = hn::Set(df, f.row.constant);
    if (f.row.scale == ScaleStore::kBF16) {
      const hn::Rebind<hwy::bfloat16_t, DF> db;
      s = hn::PromoteTo(
          df, hn::LoadU(db, reinterpret_cast<const hwy::bfloat16_t*>(block + f.scales_offset) + t));
    }
    hn::Store(s, df, copy + t);
  }
  return copy;
}

// Tokens of block b that a query sees.
HWY_INLINE Range Visible(const AttendTask& t, std::size_t query, std::size_t b) {
  const Tokens seen = t.sight.Of(query);
  const std::size_t start = b * kBlockTokens,
                    begin = HWY_MAX(HWY_MAX(seen.first, t.first_token), start),
                    end = HWY_MIN(HWY_MIN(seen.last, t.last_token), start + kBlockTokens);
  if (begin >= end) return {0, 0};
  if (t.mask == nullptr) return {begin - start, end - start};
  const MaskRange& range = t.mask->ranges[query * t.mask->blocks + b];
  const std::size_t first = HWY_MAX(begin - start, std::size_t{range.first}),
                    last = HWY_MIN(end - start, std::size_t{range.last});
  return first < last ? Range{first, last} : Range{0, 0};
}

// Tokens seen are rounded to whole steps of softmax, and to whole groups where products read them.
constexpr std::size_t kSeenStep = KVMIX_QUADS ? HWY_MAX(kTokenStep, I3::kTerms) : kTokenStep;

// What rows [first_row, first_row + rows) see of block b; false: nothing.
template <class Work>
HWY_INLINE bool See(const AttendTask& t, std::size_t first_row, std::size_t rows, std::size_t b,
                    Work& w) {
  w.first = kBlockTokens;
  w.last = 0;
  std::size_t query = first_row / t.group, next_row = (query + 1) * t.group;
  Range seen = Visible(t, query, b);
  for (std::size_t r = 0; r < rows; ++r) {
    if (first_row + r == next_row) {
      seen = Visible(t, ++query, b);
      next_row += t.group;
    }
    w.seen[r] = seen;
    if (seen.last == 0) continue;
    w.first = HWY_MIN(w.first, w.seen[r].first / kSeenStep * kSeenStep);
    w.last = HWY_MAX(w.last, RoundUp(w.seen[r].last, kSeenStep));
  }
  return w.last != 0;
}

// The tokens of block b that any row may see, in whole steps.
HWY_INLINE Range TaskTokens(const AttendTask& t, std::size_t b) {
  const std::size_t start = b * kBlockTokens;
  return {t.first_token > start ? (t.first_token - start) / kTokenStep * kTokenStep : 0,
          RoundUp(HWY_MIN(t.last_token - start, kBlockTokens), kTokenStep)};
}

// The first block from b on, before `end`, of which the mask lets a query see anything; or `end`.
HWY_INLINE std::size_t NextSeen(const AttendTask& t, std::size_t b, std::size_t end) {
  if (t.mask == nullptr) return b;
  const auto seen = [&](std::size_t query) KVMIX_LAMBDA {
    return t.mask->ranges[query * t.mask->blocks + b].last != 0;
  };
  for (; b < end; ++b) {
    for (std::size_t query = 0; query < t.rows / t.group; ++query) {
      if (seen(query)) return b;
    }
  }
  return end;
}

// run(b, block, next) for every block b of the task that is seen, with its scales in w. next: what
// is read after it, or null.
template <class Work, class Run>
HWY_INLINE void ForBlocks(const AttendTask& t, Work& w, const Run& run) {
  if (t.first_token >= t.last_token) return;  // no block to look up
  const BlockFormat& f = *t.format;
  const std::size_t end = (t.last_token + kBlockTokens - 1) / kBlockTokens;
  bool first_time = true;
  for (std::size_t b = NextSeen(t, t.first_token / kBlockTokens, end), after; b < end; b = after) {
    after = NextSeen(t, b + 1, end);
    const std::uint8_t* block = t.blocks[b];
    w.k_scale = Scales(f.k, block, first_time, w.k_copy);
    w.v_scale = Scales(f.v, block, first_time, w.v_copy);
    if (f.v.row.scale != ScaleStore::kConstant || first_time) {
      for (std::size_t i = 0; i < kBlockTokens; i += kLanes) {
        hn::Store(Log2Bound(hn::LoadU(DF(), w.v_scale + i)), DF(), w.v_log2 + i);
      }
    }
    first_time = false;
    run(b, block, after < end ? t.blocks[after] : t.after);
  }
}

// Whether products alone are the scores, but for a factor.
HWY_INLINE bool IsPlain(const AttendTask& t) { return t.soft_cap == 0.0f && t.mask == nullptr; }

// From the products of rows [first_row, first_row + rows) to scores in units of log2, w.scale times
// what is in w.scores, where more than a factor is asked for.
template <class Work>
HWY_INLINE void FinishScores(const AttendTask& t, std::size_t first_row, std::size_t rows,
                             std::size_t b, Work& w) {
  for (std::size_t r = 0; r < rows; ++r) {
    const std::size_t row = first_row + r;
    if (t.soft_cap != 0.0f) {
      const float bias = t.bias != nullptr ? t.bias[row] : 0.0f;
      SoftCap(w.scores[r], w.first, w.last, w.scale[r], t.soft_cap, bias);
      w.scale[r] = 1.0f;
    }
    if (t.mask == nullptr || w.seen[r].last == 0) continue;
    const std::size_t query = row / t.group;
    if (t.mask->ranges[query * t.mask->blocks + b].zeros) continue;
    const float slope = t.mask->slopes != nullptr ? t.mask->slopes[row % t.group] : 1.0f;
    AddMask(*t.mask, query, b, slope, w.scale[r], w.seen[r], w.scores[r]);
    w.scale[r] = 1.0f;
  }
}

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
