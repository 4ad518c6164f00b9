// Rows <-> tiles, token by token: K's row is scattered in words of some channels; V's row is
// merged, some tokens to a word, with one read-modify-write of a tile vector per `lanes`
// channels.
#include "kernels/tiles.h"

#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/tiles.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/highway.h"
#include "kernels/nibbles-inl.h"
#include "kernels/storage-inl.h"
#include "kernels/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvmix::kernels::HWY_NAMESPACE {
namespace {

std::size_t ScaleBytes(ScaleStore s) {
  return s == ScaleStore::kConstant ? 0 : kBlockTokens * (s == ScaleStore::kF32 ? 4 : 2);
}

void LayOut(BlockFormat& f) {
  std::size_t at = 0;
  const auto place = [&](TileFormat& t, std::size_t code_bytes) KVMIX_LAMBDA {
    t.codes_offset = at;
    at = t.scales_offset = RoundUp(at + code_bytes, 64);
    at = RoundUp(at + ScaleBytes(t.row.scale), 64);
  };
  place(f.k, WithStorage(f.k.row.storage, [&](auto s) KVMIX_LAMBDA {
          return kBlockTokens / kLanes * KTileBytes<decltype(s)>(f.k.row.dim);
        }));
  place(f.v, WithStorage(f.v.row.storage, [&](auto s) KVMIX_LAMBDA {
          return RoundUp(f.v.row.dim, kLanes) / kLanes * kVTileBytes<decltype(s)>;
        }));
  f.block_bytes = at;
}

// `token`: in its block. A bf16 scale is the upper half of an f32: the encoder rounded it.
void StoreScale(const TileFormat& f, std::uint8_t* block, std::size_t token, float scale) {
  std::uint8_t* scales = block + f.scales_offset;
  const std::uint32_t bits = hwy::BitCastScalar<std::uint32_t>(scale);
  const std::uint16_t upper = static_cast<std::uint16_t>(bits >> 16);
  if (f.row.scale == ScaleStore::kF32) std::memcpy(scales + 4 * token, &bits, 4);
  if (f.row.scale == ScaleStore::kBF16) std::memcpy(scales + 2 * token, &upper, 2);
}

float LoadScale(const TileFormat& f, const std::uint8_t* block, std::size_t token) {
  const std::uint8_t* scales = block + f.scales_offset;
  if (f.row.scale == ScaleStore::kConstant) return f.row.constant;
  if (f.row.scale == ScaleStore::kF32) return LoadScalar<float>(scales + 4 * token);
  const std::uint32_t upper = LoadScalar<std::uint16_t>(scales + 2 * token);
  return hwy::BitCastScalar<float>(upper << 16);
}

// The first word of K's row `token` of a block; the following ones are kLanes words apart.
template <class S, typename Byte>
HWY_INLINE Byte* KRow(const TileFormat& f, Byte* block, std::size_t token) {
  return block + f.codes_offset + token / kLanes * KTileBytes<S>(f.row.dim) +
         token % kLanes * sizeof(typename S::Word);
}

// The codes of V's row `token` lie a word apart in vectors that are kVTileBytes apart.
template <class S, typename Byte>
HWY_INLINE Byte* VRow(const TileFormat& f, Byte* block, std::size_t token) {
  return block + f.codes_offset + token / kTerms<S> * kVectorBytes<S>;
}

template <class S>
HWY_INLINE void ScatterK(const std::uint8_t* row, std::size_t row_bytes, std::uint8_t* to) {
  using Word = typename S::Word;
  const auto scatter = [&](std::size_t i, std::size_t bytes) KVMIX_LAMBDA {
    Word word = 0;
    std::memcpy(&word, row + i, bytes);
    word = S::KWord(word);
    std::memcpy(to + i * kLanes, &word, sizeof(Word));
  };
  std::size_t i = 0;
  for (; i + sizeof(Word) <= row_bytes; i += sizeof(Word)) scatter(i, sizeof(Word));
  if (i < row_bytes) scatter(i, row_bytes - i);
}

template <class S>
HWY_INLINE void GatherK(const std::uint8_t* from, std::size_t row_bytes, std::uint8_t* row) {
  using Word = typename S::Word;
  for (std::size_t i = 0; i < row_bytes; i += sizeof(Word)) {
    const Word word = S::Canonical(LoadScalar<Word>(from + i * kLanes));
    std::memcpy(row + i, &word, HWY_MIN(sizeof(Word), row_bytes - i));
  }
}

// Merges the codes of one token into the words that it shares with its neighbours; sub: its place
// among them.
template <class S>
HWY_INLINE void MergeV(const std::uint8_t* row, std::size_t dim, std::size_t sub,
                       std::uint8_t* to) {
  HWY_ALIGN std::uint8_t one_a_byte[S::kStorage == Storage::kI4 ? kMaxDim : 1];
  if constexpr (S::kStorage == Storage::kI4) {
    SpreadNibbles(row, dim, one_a_byte, [](VU8 codes) KVMIX_LAMBDA { return codes; });
    row = one_a_byte;
  }
  using Code = typename S::Code;
  using Word = typename S::Word;
  const hn::CappedTag<Word, kLanes> dw;
  const hn::Rebind<Code, decltype(dw)> dc;
  const Code* codes = reinterpret_cast<const Code*>(row);
  const int shift = S::Shift(sub);
  const Word own = static_cast<Word>(S::kMask << shift);
  const auto keep = hn::Set(dw, static_cast<Word>(~own));
  const auto merge = [&](auto values, std::uint8_t* at) KVMIX_LAMBDA {
    Word* words = reinterpret_cast<Word*>(at);
    if constexpr (sizeof(Word) == sizeof(Code)) {
      hn::StoreU(values, dw, words);
    } else {
      const auto others = hn::And(hn::LoadU(dw, words), keep);
      hn::StoreU(hn::Or(others, hn::ShiftLeftSame(hn::PromoteTo(dw, values), shift)), dw, words);
    }
  };
  std::size_t c = 0;
  for (; c + kLanes <= dim; c += kLanes, to += kVTileBytes<S>) merge(hn::LoadU(dc, codes + c), to);
  if (c < dim) merge(hn::LoadN(dc, codes + c, dim - c), to);
}

template <class S>
HWY_INLINE void SplitV(const std::uint8_t* from, std::size_t dim, std::size_t sub,
                       std::uint8_t* row) {
  using Code = typename S::Code;
  using Word = typename S::Word;
  const int shift = S::Shift(sub);
  for (std::size_t c = 0; c < dim; ++c) {
    const Word word =
        LoadScalar<Word>(from + c / kLanes * kVTileBytes<S> + c % kLanes * sizeof(Word));
    const Code code = static_cast<Code>(word >> shift & S::kMask);
    if constexpr (S::kStorage != Storage::kI4) {
      std::memcpy(row + c * sizeof(Code), &code, sizeof(Code));
    } else {
      row[c / 2] = static_cast<std::uint8_t>(c % 2 == 0 ? code : row[c / 2] | code << 4);
    }
  }
}

// body(storage, block, token in the block, r) for the rows r of tokens [token, token + count).
template <typename Byte, class Body>
HWY_INLINE void ForRows(const TileFormat& f, Byte* const* blocks, std::size_t token,
                        std::size_t count, const Body& body) {
  WithStorage(f.row.storage, [&](auto s) KVMIX_LAMBDA {
    for (std::size_t r = 0; r < count; ++r) {
      body(s, blocks[(token + r) / kBlockTokens], (token + r) % kBlockTokens, r);
    }
  });
}

constexpr auto kK = &BlockFormat::k, kV = &BlockFormat::v;

template <TileFormat BlockFormat::*kTensor>
void Store(const BlockFormat& format, std::uint8_t* const* blocks, std::size_t token,
           std::size_t count, const std::uint8_t* rows, std::size_t row_stride,
           const float* scales) {
  const TileFormat& f = format.*kTensor;
  ForRows(f, blocks, token, count,
          [&]<class S>(S, std::uint8_t* block, std::size_t t, std::size_t r) KVMIX_LAMBDA {
            const std::uint8_t* row = rows + r * row_stride;
            if constexpr (kTensor == kK) {
              ScatterK<S>(row, RowBytes(f.row), KRow<S>(f, block, t));
            } else {
              MergeV<S>(row, f.row.dim, t % kTerms<S>, VRow<S>(f, block, t));
            }
            if (scales != nullptr) StoreScale(f, block, t, scales[r]);
          });
}

template <TileFormat BlockFormat::*kTensor>
void Load(const BlockFormat& format, const std::uint8_t* const* blocks, std::size_t token,
          std::size_t count, std::uint8_t* rows, std::size_t row_stride, float* scales) {
  const TileFormat& f = format.*kTensor;
  ForRows(f, blocks, token, count,
          [&]<class S>(S, const std::uint8_t* block, std::size_t t, std::size_t r) KVMIX_LAMBDA {
            std::uint8_t* row = rows + r * row_stride;
            if constexpr (kTensor == kK) {
              GatherK<S>(KRow<S>(f, block, t), RowBytes(f.row), row);
            } else {
              SplitV<S>(VRow<S>(f, block, t), f.row.dim, t % kTerms<S>, row);
            }
            if (scales != nullptr) scales[r] = LoadScale(f, block, t);
          });
}

void Prefetch(const BlockFormat& format, std::uint8_t* const* blocks, std::size_t token) {
  const auto ask = [](const std::uint8_t* at, std::size_t stride, std::size_t count) KVMIX_LAMBDA {
    for (std::size_t i = 0; i < count; ++i) __builtin_prefetch(at + i * stride, 1);
  };
  ForRows(format.k, blocks, token, 1,
          [&]<class S>(S, const std::uint8_t* block, std::size_t t, std::size_t) KVMIX_LAMBDA {
            ask(KRow<S>(format.k, block, t), 64, KTileBytes<S>(format.k.row.dim) / 64);
          });
  ForRows(format.v, blocks, token, 1,
          [&]<class S>(S, const std::uint8_t* block, std::size_t t, std::size_t) KVMIX_LAMBDA {
            const std::size_t dim = RoundUp(format.v.row.dim, kLanes);
            ask(VRow<S>(format.v, block, t), kVTileBytes<S>, dim / kLanes);
          });
}

}  // namespace

TileKernels TileTable() {
  return {&LayOut, &Store<kK>, &Store<kV>, &Load<kK>, &Load<kV>, &Prefetch};
}

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvmix::kernels {
HWY_EXPORT(TileTable);
TileKernels TileKernelsFor(std::int64_t target) { return KVMIX_CALL_FOR(target, TileTable)(); }
}  // namespace kvmix::kernels
#endif  // HWY_ONCE
