// Attention of one KV head, block by block of 256 tokens, up to eight query rows at a time (a
// turn):
//   scores   s[r][t] = scale * k_scale[t] * q_scale[r] * (q codes . k codes), in units of log2;
//            and scale * (q . the centre of t's stretch), if K's codes are around such
//   softmax  b = max over t of (s + log2(v_scale[t]));  m' = max(m, b)
//            sum = sum * 2^(m - m') + sum over t of 2^(s - m')
//            w[t] = 2^(s - m') * v_scale[t] / w_scale, fixed point of 16 bits against the block's
//            own largest, 2^(b - m'), or of 8 bits against that of 64 tokens, so that a sink in one
//            block cannot cost another its small weights
//   weigh    out = out * 2^(m - m') + w_scale * (w codes . v codes)
// All rows of a turn share one read of K and V; the rows of later turns find the block in L1 or L2.
// Scores and weights of eight rows (16 KiB) live in L1.
//
// The first and the last step belong to a storage, K's and V's: a table each (ScoreStage,
// WeighStage), so that every storage meets every other without a copy of this loop.
#include "kernels/attend.h"

#include <bit>
#include <cstring>
#include <utility>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attend.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/highway.h"
#include "kernels/per_target.h"
#include "kernels/product-inl.h"
#include "kernels/softmax-inl.h"
#include "kernels/task-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {
namespace {

// Where a product's tiles come from. Kept are those of a block, unpacked: MultipliedOften.
enum TilesFrom : std::size_t { kFromCache, kFromMemory, kFromKept, kTilesFrom };

// f(S(), std::integral_constant of bits) with a storage's struct and the bits of its operands.
template <class F>
decltype(auto) WithOperand(const RowFormat& row, const F& f) {
  return WithStorage(row.storage, [&]<class S>(S s) KVMIX_LAMBDA -> decltype(auto) {
    constexpr std::integral_constant<std::size_t, 16> kWide;
    constexpr std::integral_constant<std::size_t, 8> kNarrow;
    if constexpr (!std::is_same_v<S, F16>) {
      if (row.operand_bits == 8) return f(s, kNarrow);
    }
    return f(s, kWide);
  });
}

// ---- a storage of K: scores

// One row of a turn of `rows`, as terms; to: its first term's place, as QueryTerms has it. largest:
// LargestFinite of the row. A row with NaN or Inf counts as zeros. info.scale: QueryScale, or 1.
template <class P>
void PackQuery(const float* q, std::size_t dim, float largest, std::size_t rows, std::uint8_t* to,
               RowInfo& info) {
  using S = typename P::Stored;
  const DF df;
  const float scale = QueryScale<P>(largest);
  const VF inv_scale = hn::Set(df, scale == 0.0f ? 0.0f : 1.0f / scale);
  VI32 sums[2] = {hn::Zero(DI32()), hn::Zero(DI32())};
  for (std::size_t c = 0; c < dim; c += kLanes) {
    const std::size_t n = HWY_MIN(kLanes, dim - c);
    alignas(64) std::uint8_t terms[kLanes * 4];
    P::PackQuery(scale == 0.0f ? hn::Zero(df) : hn::LoadN(df, q + c, n), inv_scale, terms, sums);
    for (std::size_t i = 0; i < n; i += S::kWidth, to += rows * P::kTermBytes) {
      for (std::size_t limb = 0; limb < P::kTermBytes / 4; ++limb) {
        std::memcpy(to + 4 * limb, terms + limb * kLanes + i * (4 / S::kWidth), 4);
      }
    }
  }
  for (std::size_t step = (dim + S::kWidth - 1) / S::kWidth; step < KSteps<S>(dim);
       ++step, to += rows * P::kTermBytes) {
    std::memset(to, 0, P::kTermBytes);
  }
  info = {P::kFixedPoint ? scale : 1.0f, {0, 0}};
  if constexpr (P::kFixedPoint && KVMIX_UNSIGNED_QUADS) {
    for (std::size_t limb = 0; limb < 2; ++limb)
      info.start[limb] = -128 * hn::ReduceSum(DI32(), sums[limb]);
  }
}

// Fills w.around for the stretches of tokens that a turn's rows see. Centres and q are multiplied
// as f32: beside a large centre, the error of a q of 8 or 16 bits would be that of all codes. Rows
// with NaN count as zeros here as well.
template <std::size_t kRows>
HWY_NOINLINE void Around(const BlockFormat& f, Work& w) {
  constexpr std::size_t kCount = HWY_MIN(kLanes, std::bit_ceil(kRows));
  constexpr std::size_t kSums = RoundUp(kRows, kCount);
  const std::size_t dim = f.k.row.dim;
  VF to_score[kSums / kCount];
  Unroll<kSums / kCount>([&](auto i) KVMIX_LAMBDA {
    to_score[i] = hn::Div(hn::Set(DF(), w.to_log2), hn::LoadU(DF(), w.scale + i * kCount));
  });
  for (std::size_t stretch = w.first / f.stretch; stretch * f.stretch < w.last; ++stretch) {
    const std::uint8_t* const centre = w.centres + stretch * CentreBytes(f);
    const VF scale = hn::Set(DF(), LoadScalar<float>(centre));
    const auto* const codes = reinterpret_cast<const std::int8_t*>(centre + sizeof(float));
    VF sums[kSums];
    Unroll<kSums>([&](auto r) KVMIX_LAMBDA { sums[r] = hn::Zero(DF()); });
    ForVectors(0, dim, [&](auto io, std::size_t c) KVMIX_LAMBDA {
      const VF code = hn::ConvertTo(DF(), hn::PromoteTo(DI32(), io.Load(DCodes(), codes + c)));
      Unroll<kRows>([&](auto r) KVMIX_LAMBDA {
        sums[r] = hn::MulAdd(io.Load(DF(), w.q + r * dim + c), code, sums[r]);
      });
    });
    const auto add = [](VF a, VF b) KVMIX_LAMBDA { return hn::Add(a, b); };
    Unroll<kSums / kCount>([&](auto i) KVMIX_LAMBDA {
      constexpr std::size_t kFirst = i * kCount;
      const VF dot = hn::Mul(hn::Mul(Reduced<kCount>(sums + kFirst, add), scale), to_score[i]);
      hn::StoreU(hn::IfThenZeroElse(hn::IsNaN(dot), dot), DF(), w.around[stretch] + kFirst);
    });
  }
}

template <class P, std::size_t kRows, std::size_t kVecs>
HWY_NOINLINE void Score(const BlockFormat& f, const std::uint8_t* queries, const RowInfo* info,
                        Prefetcher& prefetch, Work& w) {
  static_assert(kTokenStep % (kVecs * kLanes) == 0);
  using S = typename P::Stored;
  const std::size_t dim = f.k.row.dim;
  const bool centred = w.centres != nullptr;
  if (centred) Around<kRows>(f, w);
  const int log2_stretch = std::countr_zero(f.stretch);
  for (std::size_t token = w.first; token < w.last; token += kVecs * kLanes) {
    Multiply<P, QueryTerms<P, kRows>, kRows, kVecs>(
        w.k.Get(token / kLanes, kVecs, 0, dim), w.k.stride, queries, info, 0,
        KSteps<S>(dim) / S::kParts, prefetch, [&](auto r, auto v, VF sum) KVMIX_LAMBDA {
          const std::size_t at = token + v * kLanes;
          const VF scale = hn::LoadU(DF(), w.k_scale + at);
          const VF score =
              centred ? hn::MulAdd(sum, scale, hn::Set(DF(), w.around[at >> log2_stretch][r]))
                      : hn::Mul(sum, scale);
          hn::Store(score, DF(), w.scores[r] + at);
        });
  }
}

struct ScoreStage {
  std::size_t most_rows,
      most_rows_of_one_turn;  // of a turn; the second where all rows are one turn
  std::size_t term_bytes;     // of a row, for a step
  std::size_t (*steps)(std::size_t dim);
  void (*pack)(const float* q, std::size_t dim, float largest, std::size_t rows, std::uint8_t* to,
               RowInfo& info);
  void (*run[kTilesFrom][kMaxRows])(const BlockFormat& f, const std::uint8_t* queries,
                                    const RowInfo* info, Prefetcher& prefetch, Work& w);
};

// Packed: the product whose terms rows become; P and Often multiply them.
template <class Packed, class P, class Often, std::size_t... R>
constexpr ScoreStage MakeScoreStage(std::index_sequence<R...>) {
  return {kTurnRows<P>,
          kOneTurnRows<P>,
          P::kTermBytes,
          &KSteps<typename P::Stored>,
          &PackQuery<Packed>,
          {{&Score<P, R + 1, kHotVecs<P, R + 1>>...},
           {&Score<P, R + 1, kStreamVecs<P, R + 1>>...},
           {&Score<Often, R + 1, kHotVecs<Often, R + 1>>...}}};
}
template <class M, class Often, std::size_t kBits>
constexpr ScoreStage kScoreStage =
    MakeScoreStage<KProduct<M, kBits>, KProduct<M, kMultipliedBits<kBits>>,
                   KProduct<Often, kMultipliedBits<kBits>>>(std::make_index_sequence<kMaxRows>());

const ScoreStage& ScoreStageOf(const BlockFormat& f) {
  return WithOperand(f.k.row, []<class S, class Bits>(S, Bits) KVMIX_LAMBDA -> const ScoreStage& {
    return kScoreStage<Multiplied<S>, MultipliedOften<S>, Bits::value>;
  });
}

// ---- a storage of V: softmax weights, and the sum that they weigh

template <class P, std::size_t kRows, std::size_t kVecs>
HWY_NOINLINE void Weigh(const BlockFormat& f, float* out, std::size_t out_stride,
                        Prefetcher& prefetch, const Work& w) {
  using S = typename P::Stored;
  constexpr RowInfo kFromZero[kMaxRows] = {};
  const std::size_t padded = RoundUp(f.v.row.dim, kLanes);
  const std::size_t scaled_tokens =
      f.v.row.storage == KVMIX_STORAGE_F16 ? kBlockTokens : ScaledTokens(f.v.row.operand_bits);
  for (std::size_t r = 0; r < kRows; ++r) {
    const VF correction = hn::Set(DF(), w.correction[r]);
    if (w.correction[r] == 1.0f) continue;
    float* const row = out + r * out_stride;
    for (std::size_t c = 0; c < padded; c += kLanes)
      hn::StoreU(hn::Mul(hn::LoadU(DF(), row + c), correction), DF(), row + c);
  }
  std::size_t channel = 0;
  const auto columns = [&](auto vecs) KVMIX_LAMBDA {
    const std::uint8_t* const tiles = w.v.Get(channel / kLanes, vecs, w.first, w.last);
    ForGrids(scaled_tokens, w,
             [&](std::size_t grid, std::size_t first, std::size_t last) KVMIX_LAMBDA {
               Multiply<P, WeightTerms, kRows, vecs>(
                   tiles, kVTileBytes<S>, w.weights[0], kFromZero, first / S::kTerms,
                   last / S::kTerms, prefetch, [&](auto r, auto v, VF sum) KVMIX_LAMBDA {
                     float* to = out + r * out_stride + channel + v * kLanes;
                     const VF scale = hn::Set(DF(), w.weight_scale[grid][r]);
                     hn::StoreU(hn::MulAdd(sum, scale, hn::LoadU(DF(), to)), DF(), to);
                   });
             });
    channel += vecs * kLanes;
  };
  while (channel + kVecs * kLanes <= padded) columns(std::integral_constant<std::size_t, kVecs>());
  while (channel < padded) columns(std::integral_constant<std::size_t, 1>());
}

struct WeighStage {
  std::size_t most_rows, most_rows_of_one_turn;
  void (*softmax)(std::size_t rows, float* max, float* sum, std::size_t lines, Prefetcher& prefetch,
                  Work& w);
  void (*run[kTilesFrom][kMaxRows])(const BlockFormat& f, float* out, std::size_t out_stride,
                                    Prefetcher& prefetch, const Work& w);
};

template <class Packed, class P, class Often, std::size_t... R>
constexpr WeighStage MakeWeighStage(std::index_sequence<R...>) {
  return {kTurnRows<P>,
          kOneTurnRows<P>,
          &Softmax<Packed>,
          {{&Weigh<P, R + 1, kHotVecs<P, R + 1>>...},
           {&Weigh<P, R + 1, kStreamVecs<P, R + 1>>...},
           {&Weigh<Often, R + 1, kHotVecs<Often, R + 1>>...}}};
}
template <class M, class Often, std::size_t kBits>
constexpr WeighStage kWeighStage =
    MakeWeighStage<VProduct<M, kBits>, VProduct<M, kMultipliedBits<kBits>>,
                   VProduct<Often, kMultipliedBits<kBits>>>(std::make_index_sequence<kMaxRows>());

const WeighStage& WeighStageOf(const BlockFormat& f) {
  return WithOperand(f.v.row, []<class S, class Bits>(S, Bits) KVMIX_LAMBDA -> const WeighStage& {
    return kWeighStage<Multiplied<S>, MultipliedOften<S>, Bits::value>;
  });
}

// ---- one task

// Turns that share in fetching the next block: with more, arithmetic outweighs memory anyway.
constexpr std::size_t kMaxFetchingTurns = 4;
// So many turns are worth tiles of MultipliedOften. (i8: six break even, by count of cycles.)
constexpr std::size_t kOften = 8;

// Tiles as products multiply them, and scratch for all of a block.
template <bool kOfK>
Tiles TilesFor(bool often, const TileFormat& f, std::uint8_t* scratch) {
  return often ? TilesOf<kOfK, MultipliedOften>(f, scratch) : TilesOf<kOfK, Multiplied>(f, scratch);
}
template <bool kOfK>
std::size_t BytesFor(bool often, const TileFormat& f) {
  return often ? UnpackedBytes<kOfK, MultipliedOften>(f) : UnpackedBytes<kOfK, Multiplied>(f);
}

// Scratch in an operand: the terms of its rows, row_bytes each | RowInfo of all rows | K's and V's
// tiles of a block, unpacked. Bytes from its start.
struct Scratch {
  bool often;
  std::size_t row_bytes, info, k, v, end;

  Scratch(const BlockFormat& f, const ScoreStage& score, const WeighStage& weigh, std::size_t rows)
      : often(rows >= kOften * HWY_MIN(score.most_rows, weigh.most_rows)),
        row_bytes(score.steps(f.k.row.dim) * score.term_bytes),
        info(rows * row_bytes),
        k(RoundUp(info + rows * sizeof(RowInfo), 64)),
        v(k + BytesFor<true>(often, f.k)),
        end(v + BytesFor<false>(often, f.v)) {}
};

// The task's rows in turns of equal size, as operands.
class Turns {
 public:
  Turns(const AttendTask& task, const Scratch& scratch, const ScoreStage& score,
        const WeighStage& weigh)
      : row_bytes_(scratch.row_bytes),
        queries_(static_cast<std::uint8_t*>(task.operand)),
        info_(reinterpret_cast<RowInfo*>(queries_ + scratch.info)),
        rows_(task.rows) {
    const bool one_turn = task.stream && task.rows <= kMaxRows;
    const std::size_t most = one_turn
                                 ? HWY_MIN(score.most_rows_of_one_turn, weigh.most_rows_of_one_turn)
                                 : HWY_MIN(score.most_rows, weigh.most_rows);
    count_ = (task.rows + most - 1) / most;
  }
  std::size_t count() const { return count_; }
  std::size_t first_row(std::size_t turn) const { return turn * rows_ / count_; }
  std::uint8_t* queries(std::size_t row) const { return queries_ + row * row_bytes_; }
  RowInfo* info(std::size_t row) const { return info_ + row; }

 private:
  std::size_t row_bytes_;
  std::uint8_t* queries_;
  RowInfo* info_;
  std::size_t rows_, count_;
};

// Packs q; sets max, sum and out to those of rows that have seen nothing.
void Begin(const AttendTask& t, const ScoreStage& score, const Turns& turns, std::size_t padded) {
  const std::size_t dim = t.format->k.row.dim;
  // All rows' maxima first: their reductions hide behind each other.
  for (std::size_t r = 0; r < t.rows; ++r) t.max[r] = LargestFinite(t.q + r * dim, dim);
  for (std::size_t turn = 0; turn < turns.count(); ++turn) {
    const std::size_t first = turns.first_row(turn), rows = turns.first_row(turn + 1) - first;
    for (std::size_t i = 0; i < rows; ++i) {
      const std::size_t r = first + i;
      RowInfo& info = *turns.info(r);
      score.pack(t.q + r * dim, dim, t.max[r], rows, turns.queries(first) + i * score.term_bytes,
                 info);
      info.scale = StartRow(t, r, info.scale);
    }
  }
  std::memset(t.out, 0, t.rows * padded * sizeof(float));
}

void Attend(const AttendTask& t) {
  const BlockFormat& f = *t.format;
  const ScoreStage& score = ScoreStageOf(f);
  const WeighStage& weigh = WeighStageOf(f);
  const std::size_t padded = RoundUp(f.v.row.dim, kLanes);
  const Scratch scratch(f, score, weigh, t.rows);
  const Turns turns(t, scratch, score, weigh);
  Begin(t, score, turns, padded);

  Work w;
  w.to_log2 = t.scale * kLog2E;
  std::uint8_t* const operand = static_cast<std::uint8_t*>(t.operand);
  const Tiles k_tiles = TilesFor<true>(scratch.often, f.k, operand + scratch.k),
              v_tiles = TilesFor<false>(scratch.often, f.v, operand + scratch.v);
  const std::size_t sharing = t.stream ? HWY_MIN(turns.count(), kMaxFetchingTurns) : 0;
  const std::size_t scale_lines =
      (f.v.codes_offset - f.k.scales_offset + f.block_bytes - f.v.scales_offset) / 64;
  const auto run = [&](std::size_t b, const std::uint8_t* block,
                       const std::uint8_t* next) KVMIX_LAMBDA {
    const Range tokens = TaskTokens(t, b);
    const std::size_t fetching = next != nullptr ? sharing : 0;
    w.k = k_tiles.Of(block + f.k.codes_offset);
    w.v = v_tiles.Of(block + f.v.codes_offset);
    w.centres = f.stretch != 0 ? block + f.centres_offset : nullptr;
    for (std::size_t turn = 0; turn < turns.count(); ++turn) {
      const std::size_t row = turns.first_row(turn), rows = turns.first_row(turn + 1) - row;
      if (!See(t, row, rows, b, w)) continue;
      w.q = t.q + row * f.k.row.dim;
      for (std::size_t r = 0; r < rows; ++r) w.scale[r] = turns.info(row + r)->scale;
      const auto from = [&](const Tiles& tiles) KVMIX_LAMBDA {
        return scratch.often && tiles.unpack != nullptr ? kFromKept
               : t.stream && turn == 0                  ? kFromMemory
                                                        : kFromCache;
      };
      Prefetcher prefetch{block, 0, k_tiles.packed_stride, k_tiles.stride};
      std::size_t lines = 0;  // for softmax to fetch
      if (turn < fetching) {
        prefetch.next = next + turn * f.block_bytes / fetching;
        prefetch.turns = fetching;
        lines = scale_lines / fetching;
      }
      if (turns.count() > 1) w.k.Keep(tokens.first / kLanes, tokens.last / kLanes, 0, f.k.row.dim);
      score.run[from(k_tiles)][rows - 1](f, turns.queries(row), turns.info(row), prefetch, w);
      FinishScores(t, row, rows, b, w);
      weigh.softmax(rows, t.max + row, t.sum + row, lines, prefetch, w);
      if (turns.count() > 1) w.v.Keep(0, padded / kLanes, tokens.first, tokens.last);
      prefetch.packed_stride = v_tiles.packed_stride;
      prefetch.stride = v_tiles.stride;
      weigh.run[from(v_tiles)][rows - 1](f, t.out + row * padded, padded, prefetch, w);
    }
  };
  ForBlocks(t, w, run);
}

std::size_t OperandBytes(const BlockFormat& f, std::size_t rows) {
  return Scratch(f, ScoreStageOf(f), WeighStageOf(f), rows).end;
}

std::size_t PaddedDim(const BlockFormat& f) { return RoundUp(f.v.row.dim, kLanes); }

}  // namespace

AttendKernels AttendTable() { return {&Attend, &OperandBytes, &PaddedDim}; }

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvmix::kernels {
HWY_EXPORT(AttendTable);
AttendKernels AttendKernelsFor(std::int64_t target) {
  return KVMIX_CALL_FOR(target, AttendTable)();
}
}  // namespace kvmix::kernels
#endif  // HWY_ONCE
