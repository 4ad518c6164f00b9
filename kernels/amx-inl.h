// Attention of one KV head by tiles, the same bits as attend.cc's on AVX3_DL: matrix units multiply
// 16 rows of 64 bytes with 64 x 16 bytes at once (Intel's AMX, Sapphire Rapids and later).
//
// Rows come in groups of 16 or of 8, each as two byte limbs. A limb of 16 rows is a tile; of 8 rows
// both are one. Four tiles of sums are in flight: two tiles of K or V times two limbs, or four
// tiles times one of both.
//
//   scores   q is [64 channels][limb][rows][64]; a tile of K as the block has it is 64 channels of
//            16 tokens. The next tiles' products stand before the walk over these tiles' results,
//            which makes them floats and finds the block's maxima.
//   softmax  row by row in steps of 64 tokens, as softmax-inl.h has it; weights are
//            [64 tokens][limb][rows][64].
//   weigh    a tile of V as the block has it is 64 tokens of 16 channels. Half of the tokens are
//            weighed between the rows of the other half's softmax, the rest in the next rows'
//            first walk: the matrix unit works beside the vector units, in the order of the source.
//
// The few instructions that move and multiply tiles are a seam: amx_tiles-inl.h.
// Per target, but only for AVX3_DL, whose blocks are made of such tiles.
#if defined(KVMIX_KERNELS_AMX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVMIX_KERNELS_AMX_INL_H_
#undef KVMIX_KERNELS_AMX_INL_H_
#else
#define KVMIX_KERNELS_AMX_INL_H_
#endif

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/amx_tiles-inl.h"
#include "kernels/attend.h"
#include "kernels/product-inl.h"
#include "kernels/softmax-inl.h"
#include "kernels/task-inl.h"
#include "kernels/unpack-inl.h"

#if HWY_TARGET == HWY_AVX3_DL
HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {

static_assert(KVMIX_UNSIGNED_QUADS && kLanes == 16);
static_assert(kTokenStep == kTileTerms && kSeenStep == kTokenStep);

// What is below int8 is unpacked for all rows.
template <class S>
using TileMultiplied = std::conditional_t<S::kPacked, I8, S>;

// Bytes, and operands of two limbs; no centres.
HWY_INLINE bool HasByteTiles(const BlockFormat& f) {
  return f.k.row.storage != KVMIX_STORAGE_F16 && f.v.row.storage != KVMIX_STORAGE_F16 &&
         f.k.row.operand_bits == 16 && f.v.row.operand_bits == 16 && f.stretch == 0;
}

// Shuffles of two vectors by blocks of four lanes, and of lanes within blocks: two of a's and two
// of b's.
template <int kOrder>
HWY_INLINE VF Blocks(VF a, VF b) {
  return VF{_mm512_shuffle_f32x4(a.raw, b.raw, kOrder)};
}
template <int kOrder>
HWY_INLINE VF Lanes(VF a, VF b) {
  return VF{_mm512_shuffle_ps(a.raw, b.raw, kOrder)};
}

// The vector of op over all lanes of each of 16 vectors: 45 instructions, where one by one they
// take 128. In the order of hn::ReduceSum: the same bits.
template <class Op>
HWY_INLINE VF ReduceRows(const VF (&rows)[kTileRows], const Op& op) {
  VF quads[4];  // quads[q]: rows q, q + 4, q + 8 and q + 12, a block each
  Unroll<4>([&](auto q) KVMIX_LAMBDA {
    const auto pair = [&](VF a, VF b) KVMIX_LAMBDA {
      return op(Blocks<0x88>(a, b), Blocks<0xDD>(a, b));  // blocks 0 and 2; 1 and 3
    };
    quads[q] = pair(pair(rows[q], rows[q + 4]), pair(rows[q + 8], rows[q + 12]));
  });
  const auto halves = [&](VF a, VF b) KVMIX_LAMBDA {
    return op(Lanes<0x44>(a, b), Lanes<0xBB>(a, b));  // lanes 0 and 1; 3 and 2
  };
  const VF lower = halves(quads[0], quads[1]), upper = halves(quads[2], quads[3]);
  return op(Lanes<0x88>(lower, upper), Lanes<0xDD>(lower, upper));
}

// The limbs of a step's weights, a row of a tile each: the same numbers as IntProduct's
// PackWeights, by shifts and blends where that has shuffles of two vectors (three instructions on
// the CPUs that have tiles).
HWY_INLINE void PackTileWeights(const WeightVectors& e, const float* scale, std::uint8_t* high,
                                std::uint8_t* low) {
  static constexpr auto kOrder = [] {
    std::array<std::uint8_t, kTileTerms> order{};
    constexpr std::size_t kPlace[] = {0, 2, 1, 3};
    for (std::size_t t = 0; t < kTileTerms; ++t)
      order[t] = static_cast<std::uint8_t>(t % kLanes * 4 + kPlace[t / kLanes]);
    return order;
  }();
  const DU8 d8;
  const hn::ScalableTag<std::uint16_t> d16;
  const auto pair = [&](auto i) KVMIX_LAMBDA {
    const VI32 first = WeightCodes<16>(e[i], scale, i * kLanes),
               second = WeightCodes<16>(e[i + 1], scale, (i + 1) * kLanes);
    return hn::OddEven(hn::BitCast(d16, hn::ShiftLeft<16>(second)), hn::BitCast(d16, first));
  };
  const auto lower = pair(std::integral_constant<std::size_t, 0>());
  const auto upper = pair(std::integral_constant<std::size_t, 2>());
  // In a lane, the four vectors' bytes in the order 0, 2, 1, 3.
  const VU8 highs = hn::OddEven(hn::BitCast(d8, upper), hn::BitCast(d8, hn::ShiftRight<8>(lower)));
  const VU8 lows = hn::OddEven(hn::BitCast(d8, hn::ShiftLeft<8>(upper)), hn::BitCast(d8, lower));
  const auto order = hn::SetTableIndices(d8, kOrder.data());
  hn::StoreU(hn::TableLookupLanes(highs, order), d8, high);
  hn::StoreU(hn::TableLookupLanes(lows, order), d8, low);
}

// 256 * high + low, from two tiles of sums; exact, though the sums by themselves may wrap.
HWY_INLINE VF TileSums(const std::uint8_t* high, const std::uint8_t* low) {
  const DI32 di;
  const VI32 h = hn::Load(di, reinterpret_cast<const std::int32_t*>(high));
  const VI32 l = hn::Load(di, reinterpret_cast<const std::int32_t*>(low));
  return hn::ConvertTo(DF(), hn::Add(hn::ShiftLeft<8>(h), l));
}

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

HWY_PUSH_ATTRIBUTES(KVMIX_TILE_TARGET)
namespace kvmix::kernels::HWY_NAMESPACE {

// The rows of a task in groups.
struct RowGroups {
  std::size_t rows;
  std::size_t count() const { return (rows + kTileRows - 1) / kTileRows; }
  std::size_t first(std::size_t group) const { return group * kTileRows; }
  std::size_t of(std::size_t group) const { return HWY_MIN(kTileRows, rows - first(group)); }
  // f(std::integral_constant) with the rows that the group's tiles have: 16 or 8.
  template <class F>
  HWY_INLINE void WithTileRows(std::size_t group, const F& f) const {
    if (of(group) > kTileRows / 2) {
      f(std::integral_constant<std::size_t, kTileRows>());
    } else {
      f(std::integral_constant<std::size_t, kTileRows / 2>());
    }
  }
};

// Scratch in an operand, bytes from its start: q | what undoes K's flipped sign, first values of
// the low limbs' sums, a tile for a group | factors of the rows' products | sums of the weighed V |
// K's and V's tiles of a block, unpacked.
struct AmxScratch {
  std::size_t steps;  // of 64 channels
  std::size_t start, scale, sums, k, v, end;

  AmxScratch(const BlockFormat& f, RowGroups groups)
      : steps(RoundUp(f.k.row.dim, kTileTerms) / kTileTerms),
        start(groups.count() * steps * 2 * kTileBytes),
        scale(start + groups.count() * kTileBytes),
        sums(scale + groups.count() * kTileRows * sizeof(float)),
        k(sums + RoundUp(f.v.row.dim, 4 * kLanes) / kLanes * 2 * kTileBytes),
        v(k + UnpackedBytes<true, TileMultiplied>(f.k) + kTileBytes),  // the last may be read past
        end(v + UnpackedBytes<false, TileMultiplied>(f.v)) {}
};

template <class T>
class TileAttention {
 public:
  TileAttention(const AttendTask& task, const T& tiles)
      : task_(task),
        groups_{task.rows},
        scratch_(*task.format, groups_),
        operand_(static_cast<std::uint8_t*>(task.operand)),
        padded_(RoundUp(task.format->v.row.dim, kLanes)),
        tiles_(tiles) {}

  void Run() {
    Begin();
    tiles_.Configure();
    const BlockFormat& f = *task_.format;
    const Tiles k_tiles = TilesOf<true, TileMultiplied>(f.k, operand_ + scratch_.k),
                v_tiles = TilesOf<false, TileMultiplied>(f.v, operand_ + scratch_.v);
    // No lambda to be inlined: ForBlocks knows no tiles.
    ForBlocks(task_, w_, [&](std::size_t b, const std::uint8_t* block, const std::uint8_t* next) {
      const Range tokens = TaskTokens(task_, b);
      k_ = k_tiles.Of(block + f.k.codes_offset);
      k_.Keep(tokens.first / kLanes, tokens.last / kLanes, 0, f.k.row.dim);
      if (v_tiles.unpack != nullptr) Finish();  // before its V goes
      v_ = v_tiles.Of(block + f.v.codes_offset);
      v_.Keep(0, padded_ / kLanes, tokens.first, tokens.last);
      fetch_ = next;
      fetch_lines_ = task_.stream && next != nullptr ? f.block_bytes / 64 : 0;
      for (std::size_t group = 0; group < groups_.count(); ++group) {
        groups_.WithTileRows(group,
                             [&](auto rows) KVMIX_TILE_LAMBDA { AttendRows<rows>(group, b); });
      }
    });
    Finish();
    tiles_.Release();
  }

 private:
  static constexpr std::size_t kSteps = kBlockTokens / kTileTerms;
  static constexpr std::size_t kSumTiles = 4;
  using KP = IntProduct<I8, true, 16>;
  using VP = IntProduct<I8, false, 16>;

  // Of a group of kRows rows, with both limbs: bytes of a step of its operand and of a tile's sums;
  // the low limb begins in the middle. And tiles of K or V that are multiplied side by side.
  template <std::size_t kRows>
  static constexpr std::size_t kStepBytes = 2 * kRows * 64;
  template <std::size_t kRows>
  static constexpr std::size_t kSide = (kSumTiles * kTileBytes) / kStepBytes<kRows>;

  // Weighed V that is still to come: steps [first, last) of a group's tokens, from channel tile
  // `next` on; of those before `output`, the output is done.
  struct Pending {
    std::size_t group = 0;
    std::size_t first = 0, last = 0;
    bool add = false;  // to the sums that are there
    const std::uint8_t* v = nullptr;
    std::size_t v_stride = 0;
    std::size_t tiles = 0, next = 0, output = 0;
  };

  // q as tiles; max, sum and out as of rows that have seen nothing.
  void Begin() {
    std::memset(operand_, 0, scratch_.sums);
    std::memset(weights_, 0, sizeof(weights_));  // of rows that a tile has and the task has not
    const std::size_t dim = task_.format->k.row.dim;
    for (std::size_t r = 0; r < task_.rows; ++r)
      task_.max[r] = LargestFinite(task_.q + r * dim, dim);
    for (std::size_t group = 0; group < groups_.count(); ++group) {
      groups_.WithTileRows(group, [&](auto rows) KVMIX_TILE_LAMBDA {
        for (std::size_t r = 0; r < groups_.of(group); ++r) BeginRow<rows>(group, r);
      });
    }
    std::memset(task_.out, 0, task_.rows * padded_ * sizeof(float));
  }
  template <std::size_t kRows>
  void BeginRow(std::size_t group, std::size_t r) {
    const std::size_t row = groups_.first(group) + r, dim = task_.format->k.row.dim;
    const float scale = QueryScale<KP>(task_.max[row]);
    VI32 sums[2] = {hn::Zero(DI32()), hn::Zero(DI32())};
    for (std::size_t c = 0; scale != 0.0f && c < dim; c += kLanes) {
      alignas(64) std::uint8_t limbs[2 * kLanes];
      KP::PackQuery(hn::LoadN(DF(), task_.q + row * dim + c, HWY_MIN(kLanes, dim - c)),
                    hn::Set(DF(), 1.0f / scale), limbs, sums);
      std::uint8_t* const to =
          Queries(group) + c / kTileTerms * kStepBytes<kRows> + r * 64 + c % kTileTerms;
      std::memcpy(to, limbs, kLanes);
      std::memcpy(to + kRows * 64, limbs + kLanes, kLanes);
    }
    const std::int32_t sum = 256 * hn::ReduceSum(DI32(), sums[0]) + hn::ReduceSum(DI32(), sums[1]);
    const std::size_t low = kRows == kTileRows ? 0 : kRows * 64;  // in the tile
    hn::StoreU(hn::Set(DI32(), -128 * sum), DI32(),
               reinterpret_cast<std::int32_t*>(Start(group) + low + r * 64));
    RowScales(group)[r] = StartRow(task_, row, scale);
  }

  std::uint8_t* Queries(std::size_t group) const {
    return operand_ + group * scratch_.steps * 2 * kTileBytes;
  }
  std::uint8_t* Start(std::size_t group) const {
    return operand_ + scratch_.start + group * kTileBytes;
  }
  float* RowScales(std::size_t group) const {
    return reinterpret_cast<float*>(operand_ + scratch_.scale) + group * kTileRows;
  }
  template <std::size_t kRows>
  std::uint8_t* Sums(std::size_t channel_tile) const {
    return operand_ + scratch_.sums + channel_tile * kStepBytes<kRows>;
  }

  // ---- tiles only

  template <bool kOfK, int kC, int kA, int kB>
  HWY_INLINE void Dot() {
    if constexpr (kOfK) {
      tiles_.template SignedTimesUnsigned<kC, kA, kB>();
    } else {
      tiles_.template UnsignedTimesSigned<kC, kA, kB>();
    }
  }

  // Adds a group's steps times kSide neighbouring tiles to tiles 4 to 7, [tile][limb]. at(i): where
  // tile i of them is.
  template <bool kOfK, std::size_t kRows, class At>
  HWY_INLINE void Multiply(const std::uint8_t* rows, std::size_t steps, const At& at) {
    const std::uint8_t* tile[kSide<kRows>];
    for (std::size_t i = 0; i < kSide<kRows>; ++i) tile[i] = at(i);
    for (std::size_t s = 0; s < steps; ++s, rows += kStepBytes<kRows>) {
      const std::size_t to_step = s * kTileBytes;
      tiles_.template Load<0>(rows);
      if constexpr (kRows == kTileRows) {
        tiles_.template Load<2>(tile[0] + to_step);
        tiles_.template Load<1>(rows + kTileBytes);
        tiles_.template Load<3>(tile[1] + to_step);
        Dot<kOfK, 4, 0, 2>();
        Dot<kOfK, 5, 1, 2>();
        Dot<kOfK, 6, 0, 3>();
        Dot<kOfK, 7, 1, 3>();
      } else {
        tiles_.template Load<1>(tile[0] + to_step);
        tiles_.template Load<2>(tile[1] + to_step);
        Dot<kOfK, 4, 0, 1>();
        tiles_.template Load<3>(tile[2] + to_step);
        Dot<kOfK, 5, 0, 2>();
        tiles_.template Load<1>(tile[3] + to_step);
        Dot<kOfK, 6, 0, 3>();
        Dot<kOfK, 7, 0, 1>();
      }
    }
  }
  HWY_INLINE void ZeroSums() {
    tiles_.template Zero<4>();
    tiles_.template Zero<5>();
    tiles_.template Zero<6>();
    tiles_.template Zero<7>();
  }
  HWY_INLINE void LoadSums(const std::uint8_t* first, const std::uint8_t* second,
                           const std::uint8_t* third, const std::uint8_t* fourth) {
    tiles_.template Load<4>(first);
    tiles_.template Load<5>(second);
    tiles_.template Load<6>(third);
    tiles_.template Load<7>(fourth);
  }
  HWY_INLINE void StoreSums(std::uint8_t* first_half, std::uint8_t* second_half) {
    tiles_.template Store<4>(first_half);
    tiles_.template Store<5>(first_half + kTileBytes);
    tiles_.template Store<6>(second_half);
    tiles_.template Store<7>(second_half + kTileBytes);
  }

  // Products of a group with kSide tiles of K from `tile` on, into one of two places in turn.
  template <std::size_t kRows>
  HWY_INLINE void ScoreTiles(std::size_t group, std::size_t tile) {
    const std::uint8_t* const start = Start(group);
    if constexpr (kRows == kTileRows) {  // high limbs start at 0
      tiles_.template Zero<4>();
      tiles_.template Load<5>(start);
      tiles_.template Zero<6>();
      tiles_.template Load<7>(start);
    } else {
      LoadSums(start, start, start, start);
    }
    const std::uint8_t* const k = k_.codes + tile * k_.stride;
    Multiply<true, kRows>(Queries(group), scratch_.steps,
                          [&](std::size_t i) KVMIX_LAMBDA { return k + i * k_.stride; });
    const std::size_t turn = tile / kSide<kRows> % 2;
    StoreSums(products_[0][turn], products_[1][turn]);
  }

  // The next kSide channel tiles of what is pending. Past the end, the last is multiplied again.
  template <std::size_t kRows>
  HWY_INLINE void WeighTiles() {
    const std::size_t first = pending_.next;
    pending_.next += kSide<kRows>;
    std::uint8_t* const sums = Sums<kRows>(first);
    if (pending_.add) {
      LoadSums(sums, sums + kTileBytes, sums + 2 * kTileBytes, sums + 3 * kTileBytes);
    } else {
      ZeroSums();
    }
    const std::uint8_t* const v = pending_.v + pending_.first * kTileBytes;
    Multiply<false, kRows>(weights_ + pending_.first * kStepBytes<kRows>,
                           pending_.last - pending_.first, [&](std::size_t i) KVMIX_LAMBDA {
                             return v + HWY_MIN(first + i, pending_.tiles - 1) * pending_.v_stride;
                           });
    StoreSums(sums, sums + 2 * kTileBytes);
  }

  // ---- vectors

  // out = out * correction + w_scale * sums, for the pending rows and channel tiles up to `last`.
  template <std::size_t kRows>
  HWY_INLINE void Output(std::size_t last) {
    const DF df;
    const std::size_t rows = groups_.of(pending_.group), padded = padded_;
    for (; pending_.output < HWY_MIN(last, pending_.tiles); ++pending_.output) {
      const std::uint8_t* sums = Sums<kRows>(pending_.output);
      float* out = task_.out + groups_.first(pending_.group) * padded + pending_.output * kLanes;
      KVMIX_ROLLED
      for (std::size_t r = 0; r < rows; ++r, out += padded, sums += 64) {
        const VF before = hn::Mul(hn::LoadU(df, out), hn::Set(df, w_.correction[r]));
        const VF weighed = TileSums(sums, sums + kRows * 64);
        hn::StoreU(hn::MulAdd(weighed, hn::Set(df, w_.weight_scale[0][r]), before), df, out);
      }
    }
  }

  // What is pending advances by a step: first the output of what was weighed a step ago, whose sums
  // have had time to reach memory; then, after `between`, the next tiles.
  template <class Between>
  HWY_INLINE void Advance(const Between& between) {
    if (pending_.output == pending_.tiles) return between();
    groups_.WithTileRows(pending_.group, [&](auto rows) KVMIX_TILE_LAMBDA {
      Output<rows>(pending_.next);
      between();
      if (pending_.next < pending_.tiles) WeighTiles<rows>();
    });
  }
  void Finish() {
    while (pending_.output < pending_.tiles) Advance([] {});
  }

  // Scores of kSide tiles of tokens from their products; kMaxima: and what they raise the rows'
  // maxima to.
  template <std::size_t kRows, bool kMaxima>
  HWY_INLINE void WalkProducts(std::size_t tile, VF (&maxima)[kTileRows]) {
    const DF df;
    const std::size_t turn = tile / kSide<kRows> % 2;
    for (std::size_t i = 0; i < kSide<kRows>; ++i) {
      const std::size_t t = (tile + i) * kLanes, of_tile = i * kStepBytes<kRows>;
      const std::uint8_t* const products =
          products_[of_tile / kHalfBytes][turn] + of_tile % kHalfBytes;
      const VF k_scale = hn::LoadU(df, w_.k_scale + t), v_log2 = hn::Load(df, w_.v_log2 + t);
      Unroll<kRows>([&](auto r) KVMIX_LAMBDA {
        const std::uint8_t* const at = products + r * 64;
        const VF s = hn::Mul(TileSums(at, at + kRows * 64), k_scale);
        hn::Store(s, df, w_.scores[r] + t);
        if constexpr (kMaxima) {
          maxima[r] = hn::Max(maxima[r], hn::MulAdd(s, hn::Set(df, w_.scale[r]), v_log2));
        }
      });
    }
  }

  // The scores of a group, w_.first to w_.last; kMaxima: and block_max. What is pending is weighed
  // on the way.
  template <std::size_t kRows, bool kMaxima>
  HWY_NOINLINE void Score(std::size_t group) {
    const std::size_t first = w_.first / kLanes, last = w_.last / kLanes;
    VF maxima[kTileRows];
    Unroll<kTileRows>([&](auto r) KVMIX_LAMBDA { maxima[r] = hn::Set(DF(), kNegInf); });
    ScoreTiles<kRows>(group, first);
    for (std::size_t tile = first; tile < last; tile += kSide<kRows>) {
      Advance([&]() KVMIX_TILE_LAMBDA {
        if (tile + kSide<kRows> < last) ScoreTiles<kRows>(group, tile + kSide<kRows>);
      });
      WalkProducts<kRows, kMaxima>(tile, maxima);
    }
    if constexpr (kMaxima) {
      const auto max = [](VF a, VF b) KVMIX_LAMBDA { return hn::Max(a, b); };
      hn::Store(ReduceRows(maxima, max), DF(), w_.block_max);
    }
  }

  // Weights of steps [first, last) of all rows; adds up totals. What is pending is weighed between
  // rows; its output is not due yet.
  template <std::size_t kRows>
  HWY_NOINLINE void WeightSteps(std::size_t rows, std::size_t first, std::size_t last, VF* totals) {
    for (std::size_t r = 0; r < rows; ++r) {
      const VF scale = hn::Set(DF(), w_.scale[r]), shift = hn::Set(DF(), w_.shift[0][r]);
      VF total = totals[r];
      for (std::size_t s = first; s < last; ++s) {
        std::uint8_t* const to = weights_ + s * kStepBytes<kRows> + r * 64;
        if (w_.seen[r].last == 0) {
          std::memset(to, 0, 64);
          std::memset(to + kRows * 64, 0, 64);
          continue;
        }
        const std::size_t t = s * kTileTerms;
        WeightVectors e;
        total = Weights<VP>(w_.scores[r] + t, scale, shift, total, e);
        PackTileWeights(e, w_.v_scale + t, to, to + kRows * 64);
        Fetch();
      }
      totals[r] = total;
      while (pending_.next * rows < (r + 1) * pending_.tiles) WeighTiles<kRows>();
    }
  }

  // A step of weights asks for its share of the next block's lines.
  HWY_INLINE void Fetch() {
    const std::size_t steps = kSteps * task_.rows;  // of a whole block
    for (fetch_due_ += fetch_lines_; fetch_due_ >= steps; fetch_due_ -= steps, fetch_ += 64)
      __builtin_prefetch(fetch_, 0, 2);
  }

  template <std::size_t kRows>
  void AttendRows(std::size_t group, std::size_t b) {
    const DF df;
    const std::size_t first_row = groups_.first(group), rows = groups_.of(group);
    if (!See(task_, first_row, rows, b, w_)) return;
    std::memcpy(w_.scale, RowScales(group), sizeof(w_.scale));
    bool all = IsPlain(task_);
    for (std::size_t r = 0; r < rows; ++r)
      all &= w_.seen[r].first <= w_.first && w_.seen[r].last >= w_.last;
    if (all) {
      Score<kRows, true>(group);
    } else {
      Score<kRows, false>(group);
      FinishScores(task_, first_row, rows, b, w_);
      BlockMaxima<VP>(rows, w_);
    }
    Finish();
    RaiseMaxima<VP>(rows, task_.max + first_row, w_);

    const std::size_t first = w_.first / kTileTerms, last = w_.last / kTileTerms,
                      middle = first + (last - first + 1) / 2;
    VF totals[kTileRows];
    Unroll<kTileRows>([&](auto r) KVMIX_LAMBDA { totals[r] = hn::Zero(df); });
    for (const Range half : {Range{first, middle}, Range{middle, last}}) {
      if (half.first == half.last) break;
      WeightSteps<kRows>(rows, half.first, half.last, totals);
      pending_ = {group,    half.first, half.last,       half.first != first,
                  v_.codes, v_.stride,  padded_ / kLanes};
    }
    const auto add = [](VF a, VF b) KVMIX_LAMBDA { return hn::Add(a, b); };
    float* const sum = task_.sum + first_row;
    hn::StoreN(hn::Add(hn::Mul(hn::LoadN(df, sum, rows), hn::Load(df, w_.correction)),
                       hn::Mul(ReduceRows(totals, add), hn::Load(df, w_.weight_scale[0]))),
               df, sum, rows);
  }

  const AttendTask& task_;
  const RowGroups groups_;
  const AmxScratch scratch_;
  std::uint8_t* const operand_;
  const std::size_t padded_;
  T tiles_;
  Tiles k_, v_;                                  // of the block
  const std::uint8_t* fetch_ = nullptr;          // the next line of the next block
  std::size_t fetch_lines_ = 0, fetch_due_ = 0;  // lines due are due / steps
  Pending pending_;
  // Rows of scores are a line apart from a power of two: a column of a tile's rows then falls on
  // many sets of L1.
  SoftmaxRows<kTileRows, kBlockTokens + kLanes> w_;
  // [half of the sums' tiles][turn], a half as [tile][limb][row][token]: turns share pages, so that
  // loads of one never look to the CPU like loads of what is being stored to the other (4 KiB
  // apart).
  static constexpr std::size_t kHalfBytes = kSumTiles / 2 * kTileBytes;
  alignas(4096) std::uint8_t products_[2][2][kHalfBytes];
  alignas(64) std::uint8_t weights_[kSteps * 2 * kTileBytes];  // [step][limb][row][token]
};

// The kernels over tiles T, for tasks of so many rows that kPays says yes; for the others, and for
// what HasByteTiles refuses, AVX3_DL's.
template <class T, bool (*kPays)(std::size_t rows)>
AttendKernels TileKernels() {
  static const AttendKernels vectors = AttendKernelsFor(HWY_AVX3_DL);
  return {[](const AttendTask& t) {
            HasByteTiles(*t.format) && kPays(t.rows) ? TileAttention<T>(t, T()).Run()
                                                     : vectors.attend(t);
          },
          [](const BlockFormat& f, std::size_t rows) {
            return HasByteTiles(f) && kPays(rows) ? AmxScratch(f, {rows}).end
                                                  : vectors.operand_bytes(f, rows);
          },
          vectors.padded_dim};
}

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_POP_ATTRIBUTES

#endif  // HWY_AVX3_DL
#endif  // per-target include guard
