// Rows <-> tiles, token by token: K's row is scattered in words of some channels; V's row is
// merged, some tokens to a word, with one read-modify-write of a tile vector per `lanes`
// channels.
#include "kernels/tiles.h"

#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/tiles.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/highway.h"
#include "kernels/planes-inl.h"
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
          return kBlockTokens / kLanes * TileBytes<decltype(s)>(f.k.row.dim);
        }));
  place(f.v, WithStorage(f.v.row.storage, [&](auto s) KVMIX_LAMBDA {
          return RoundUp(f.v.row.dim, kLanes) / kLanes * kVTileBytes<decltype(s)>;
        }));
  f.centres_offset = at;
  if (f.stretch != 0) at = RoundUp(at + kBlockTokens / f.stretch * CentreBytes(f), 64);
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

// A word of a lane in a tile.
template <class S>
using WordOf = typename std::conditional_t<std::is_same_v<S, F16>, F16, I8>::Word;

// ---- K: a row is a lane's words in one tile

// The first word of K's row `token` of a block; the following ones are kLanes words apart.
template <class S, typename Byte>
HWY_INLINE Byte* KRow(const TileFormat& f, Byte* block, std::size_t token) {
  using Word = WordOf<S>;
  return block + f.codes_offset + token / kLanes * TileBytes<S>(f.row.dim) +
         token % kLanes * sizeof(Word);
}

template <class S>
HWY_INLINE void ScatterK(const std::uint8_t* row, std::size_t dim, std::uint8_t* to) {
  using Word = typename S::Word;
  const std::size_t row_bytes = dim * sizeof(typename S::Code);
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
HWY_INLINE void GatherK(const std::uint8_t* from, std::size_t dim, std::uint8_t* row) {
  using Word = typename S::Word;
  const std::size_t row_bytes = dim * sizeof(typename S::Code);
  for (std::size_t i = 0; i < row_bytes; i += sizeof(Word)) {
    const Word word = S::Canonical(LoadScalar<Word>(from + i * kLanes));
    std::memcpy(row + i, &word, HWY_MIN(sizeof(Word), row_bytes - i));
  }
}

// f(plane, its four bytes of this lane in the tile, the first code of those that they hold) for
// all registers of all planes: code c + 4 * i, i < kPerByte, has its bits kBits * i bits up.
template <class S, typename Byte, class F>
HWY_INLINE void ForFours(Byte* tile, std::size_t dim, const F& f) {
  for (std::size_t c = 0; c < dim; c += S::kTerms, tile += S::kGroupBytes) {
    S::ForPlanes([&]<class P>(P plane) KVMIX_LAMBDA {
      for (std::size_t r = 0; r < S::kParts; r += P::kPerByte)
        f(plane, tile + S::PlaceOf(plane, 4 * r).at, c + 4 * r);
    });
  }
}
template <class P>
constexpr std::uint32_t kFourMasks = 0x01010101u * P::kMask;

// The four bytes lie in words of kWidth, which are kLanes words apart.
HWY_INLINE void StoreFour(std::uint32_t four, std::uint8_t* to) {
  using Word = I8::Word;
  for (std::size_t i = 0; i < 4; i += sizeof(Word), to += kLanes * sizeof(Word)) {
    const Word word = static_cast<Word>(four >> 8 * i);
    std::memcpy(to, &word, sizeof(Word));
  }
}
HWY_INLINE std::uint32_t LoadFour(const std::uint8_t* from) {
  using Word = I8::Word;
  std::uint32_t four = 0;
  for (std::size_t i = 0; i < 4; i += sizeof(Word), from += kLanes * sizeof(Word))
    four |= std::uint32_t{LoadScalar<Word>(from)} << 8 * i;
  return four;
}

template <class S>
HWY_INLINE void ScatterK(const std::uint8_t* row, std::size_t dim,
                         std::uint8_t* to) requires S::kPacked {
  HWY_ALIGN std::uint8_t codes[kMaxDim];
  SpreadRow<S>(row, dim, codes, [](VU8 c) KVMIX_LAMBDA { return c; });
  std::memset(codes + dim, 0, RoundUp(dim, S::kTerms) - dim);
  ForFours<S>(to, dim, [&]<class P>(P, std::uint8_t* at, std::size_t c) KVMIX_LAMBDA {
    std::uint32_t four = 0;
    Unroll<P::kPerByte>([&](auto i) KVMIX_LAMBDA {
      const std::uint32_t bits = LoadScalar<std::uint32_t>(codes + c + 4 * i) >> P::kFrom;
      four |= (bits & kFourMasks<P>) << i * P::kBits;
    });
    StoreFour(four, at);
  });
}

template <class S>
HWY_INLINE void GatherK(const std::uint8_t* from, std::size_t dim,
                        std::uint8_t* row) requires S::kPacked {
  HWY_ALIGN std::uint8_t codes[kMaxDim] = {};
  ForFours<S>(from, dim, [&]<class P>(P, const std::uint8_t* at, std::size_t c) KVMIX_LAMBDA {
    const std::uint32_t four = LoadFour(at);
    Unroll<P::kPerByte>([&](auto i) KVMIX_LAMBDA {
      std::uint32_t code = LoadScalar<std::uint32_t>(codes + c + 4 * i);
      code |= (four >> i * P::kBits & kFourMasks<P>) << P::kFrom;
      std::memcpy(codes + c + 4 * i, &code, 4);
    });
  });
  PackRow(S::kStorage, codes, dim, row);
}

// ---- V: a row is some bits of a word of each lane, in one tile after the other

// f(the place of V's row `token` in a tile, from the code's bit, so many bits) for every plane.
template <class S, class F>
HWY_INLINE void ForPlaces(std::size_t token, const F& f) {
  if constexpr (S::kPacked) {
    S::ForPlanes([&]<class P>(P plane)
                     KVMIX_LAMBDA { f(S::PlaceOf(plane, token), P::kFrom, P::kMask); });
  } else {
    f(S::PlaceOf(token), 0, static_cast<typename S::Code>(~0u));
  }
}

// Merges the bits of one token's codes into the words that it shares with its neighbours.
template <class S, typename Code>
HWY_INLINE void MergeV(const Code* codes, std::size_t dim, std::size_t token, std::uint8_t* tiles) {
  using Word = WordOf<S>;
  const hn::CappedTag<Word, kLanes> dw;
  const hn::Rebind<Code, decltype(dw)> dc;
  ForPlaces<S>(token, [&](Place place, int from, Code mask) KVMIX_LAMBDA {
    const auto bits = hn::Set(dw, mask);
    const auto keep = hn::Not(hn::ShiftLeftSame(bits, place.shift));
    std::uint8_t* to = tiles + place.at;
    const auto merge = [&](auto values) KVMIX_LAMBDA {
      Word* words = reinterpret_cast<Word*>(to);
      if constexpr (sizeof(Word) == sizeof(Code)) {
        hn::StoreU(values, dw, words);
      } else {
        auto own = hn::PromoteTo(dw, values);
        if constexpr (S::kPacked) own = hn::And(hn::ShiftRightSame(own, from), bits);
        const auto others = hn::And(hn::LoadU(dw, words), keep);
        hn::StoreU(hn::Or(others, hn::ShiftLeftSame(own, place.shift)), dw, words);
      }
      to += kVTileBytes<S>;
    };
    std::size_t c = 0;
    for (; c + kLanes <= dim; c += kLanes) merge(hn::LoadU(dc, codes + c));
    if (c < dim) merge(hn::LoadN(dc, codes + c, dim - c));
  });
}

template <class S, typename Code>
HWY_INLINE void SplitV(const std::uint8_t* tiles, std::size_t dim, std::size_t token, Code* codes) {
  using Word = WordOf<S>;
  ForPlaces<S>(token, [&](Place place, int from, Code mask) KVMIX_LAMBDA {
    for (std::size_t c = 0; c < dim; ++c) {
      const Word word = LoadScalar<Word>(tiles + place.at + c / kLanes * kVTileBytes<S> +
                                         c % kLanes * sizeof(Word));
      Code code = static_cast<Code>((word >> place.shift & mask) << from);
      if (from != 0) code |= codes[c];
      std::memcpy(codes + c, &code, sizeof(Code));
    }
  });
}

template <class S>
HWY_INLINE void StoreV(const std::uint8_t* row, std::size_t dim, std::size_t token,
                       std::uint8_t* tiles) {
  if constexpr (S::kPacked) {
    HWY_ALIGN std::uint8_t codes[kMaxDim];
    SpreadRow<S>(row, dim, codes, [](VU8 c) KVMIX_LAMBDA { return c; });
    MergeV<S>(codes, dim, token, tiles);
  } else {
    MergeV<S>(reinterpret_cast<const typename S::Code*>(row), dim, token, tiles);
  }
}

template <class S>
HWY_INLINE void LoadV(const std::uint8_t* tiles, std::size_t dim, std::size_t token,
                      std::uint8_t* row) {
  if constexpr (S::kPacked) {
    HWY_ALIGN std::uint8_t codes[kMaxDim];
    SplitV<S>(tiles, dim, token, codes);
    PackRow(S::kStorage, codes, dim, row);
  } else {
    SplitV<S>(tiles, dim, token, reinterpret_cast<typename S::Code*>(row));
  }
}

// ---- rows of either

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
              ScatterK<S>(row, f.row.dim, KRow<S>(f, block, t));
            } else {
              StoreV<S>(row, f.row.dim, t, block + f.codes_offset);
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
              GatherK<S>(KRow<S>(f, block, t), f.row.dim, row);
            } else {
              LoadV<S>(block + f.codes_offset, f.row.dim, t, row);
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
            ask(KRow<S>(format.k, block, t), 64, TileBytes<S>(format.k.row.dim) / 64);
          });
  ForRows(format.v, blocks, token, 1,
          [&]<class S>(S, const std::uint8_t* block, std::size_t t, std::size_t) KVMIX_LAMBDA {
            const std::size_t dim = RoundUp(format.v.row.dim, kLanes);
            ForPlaces<S>(t, [&](Place place, int, std::size_t) KVMIX_LAMBDA {
              ask(block + format.v.codes_offset + place.at, kVTileBytes<S>, dim / kLanes);
            });
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
