// Codecs: how one KV head's K or V is stored.
//
//   y = R((x - mean) / factor)                                          before it is stored
//   code = round-to-nearest-even(y / scale), in [-127, 127]             i8
//   code = round-to-nearest(y / scale), in [-31, 31]                    i6
//   code = the number of the nearest of 16 (8) levels times scale       i4 (i3)
//   x' = mean + factor * R(scale * code)                                what codes stand for
//   x' = mean + factor * R(scale * level[code])                         those of i4 and i3
//
// f16 stores x itself. The levels of i4 and i3, of +-127 at most: kernels/levels.h,
// docs/formats.md.
//
// Each field of a CodecKind is one of these steps, so kinds compose:
//   centre    a mean per channel is subtracted. At attention K's mean costs nothing: q . mean is
//             the same for all keys of a query, and softmax does not see it. V's goes on the
//             output.
//   own-centre  of K in place of the centre: the mean of the token's own stretch (kvmix/plan.h), in
//             the numbers that are coded, y. It needs no calibration, and does not age with the
//             context. A stretch keeps it as int8, and attention adds q . mean to the scores.
//   fold      a factor per channel. K's is folded into q, V's goes on the output.
//   hadamard  R is the Hadamard matrix over sqrt(b), its own inverse, in blocks of b channels, the
//             largest power of two that divides head_dim; else R is nothing. It spreads outliers
//             over the channels. K's is applied to q, V's to the output.
//   shape     K's codes are chosen one channel after the other, so that their errors fall where
//             queries do not look (kernels/shape-inl.h). Needs a scale per token. Decoding and
//             attention do not know of it.
//
// Attention multiplies K's codes with q and V's with softmax weights, both in fixed point: operands
// of 16 bits lose nothing that one would find again (NMSE below 1e-6), those of 8 bits halve the
// multiply-adds and add an NMSE of some 5e-5 (docs/numerics.md), which codes of 6 bits and fewer do
// not show. `operands` asks for the others than the storage's usual ones. The bytes are the same.
#ifndef KVMIX_CODEC_H_
#define KVMIX_CODEC_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kvmix/kvmix.h"
#include "kvmix/status.h"
#include "kvmix/types.h"

namespace kvmix {

// Upper bound of head_dim.
inline constexpr std::size_t kMaxHeadDim = KVMIX_MAX_HEAD_DIM;

struct CodecKind {
  Storage storage = KVMIX_STORAGE_F16;
  Scale scale = KVMIX_SCALE_NONE;
  bool centre = false;
  bool fold = false;
  bool hadamard = false;
  bool shape = false;
  Operands operands = KVMIX_OPERANDS_USUAL;
  bool own_centre = false;

  bool operator==(const CodecKind&) const = default;
};

// "f16", "i8-head", "i4-token", "i8x8-token", "i8-token-bf16+centre+fold+hadamard+shape",
// "i8-token-bf16+own-centre+hadamard": the
// storage, x8 or x16 where the operands are not the usual ones, the scale, and the steps that are
// taken, in this order.
std::string ToString(const CodecKind& kind);
// The inverse. An error lists the parts that a name may have.
Result<CodecKind> ParseCodecKind(std::string_view name);

// Bits of what the codes are multiplied with: 16 or 8; f16: 32.
inline std::size_t OperandBits(const CodecKind& kind) {
  if (kind.storage == KVMIX_STORAGE_F16) return 32;
  if (kind.operands == KVMIX_OPERANDS_USUAL) return kind.storage == KVMIX_STORAGE_I8 ? 16 : 8;
  return kind.operands == KVMIX_OPERANDS_8 ? 8 : 16;
}

// Bits of a code, or of f16's number: 16, 8, 6, 4 or 3.
inline std::size_t BitsOf(Storage storage) { return kvmix_storage_bits(storage); }

// head_dim is such that a canonical row is whole bytes.
inline bool Fits(const CodecKind& kind, std::size_t head_dim) {
  return BitsOf(kind.storage) * head_dim % 8 == 0;
}

// Bytes that one token of one KV head's K or V takes in the canonical form: codes and stored
// scales.
std::size_t BytesPerToken(const CodecKind& kind, std::size_t head_dim);

// The numbers of a codec, per channel. Empty where its kind does not ask for them.
struct CodecVectors {
  std::vector<float> mean = {};     // [head_dim]
  std::vector<float> factor = {};   // [head_dim], each in [2^-32, 2^32]
  std::vector<float> shaping = {};  // [head_dim][head_dim], unit lower triangular, each in +-2^16

  bool operator==(const CodecVectors&) const = default;
};

// A kind with its numbers. Copies share the vectors.
struct HeadCodec {
  CodecKind kind;
  float head_scale = 0.0f;  // KVMIX_SCALE_HEAD: the scale itself (absmax of the calibration / 127)
  std::shared_ptr<const CodecVectors> vectors = nullptr;

  // Empty if there is none.
  std::span<const float> mean() const { return Get(&CodecVectors::mean); }
  std::span<const float> factor() const { return Get(&CodecVectors::factor); }
  std::span<const float> shaping() const { return Get(&CodecVectors::shaping); }
  bool operator==(const HeadCodec& other) const {  // by the numbers, not by who shares them
    return kind == other.kind && head_scale == other.head_scale &&
           std::ranges::equal(mean(), other.mean()) &&
           std::ranges::equal(factor(), other.factor()) &&
           std::ranges::equal(shaping(), other.shaping());
  }

 private:
  std::span<const float> Get(std::vector<float> CodecVectors::*numbers) const {
    return vectors == nullptr ? std::span<const float>() : (*vectors).*numbers;
  }
};

namespace internal {

inline kvmix_codec ViewOf(const HeadCodec& codec) {
  const CodecKind& kind = codec.kind;
  const auto step = [](bool taken, kvmix_step is) {
    return taken ? static_cast<std::uint32_t>(is) : 0u;
  };
  const std::uint32_t steps =
      step(kind.centre, KVMIX_STEP_CENTRE) | step(kind.fold, KVMIX_STEP_FOLD) |
      step(kind.hadamard, KVMIX_STEP_HADAMARD) | step(kind.shape, KVMIX_STEP_SHAPE) |
      step(kind.own_centre, KVMIX_STEP_OWN_CENTRE);
  return {sizeof(kvmix_codec),
          kind.storage,
          kind.scale,
          kind.operands,
          steps,
          codec.head_scale,
          codec.mean().data(),
          codec.factor().data(),
          codec.shaping().data(),
          codec.mean().size(),
          codec.factor().size(),
          codec.shaping().size()};
}

inline HeadCodec ValueOf(const kvmix_codec& c) {
  const auto has = [&](kvmix_step step) {
    return (c.steps & static_cast<std::uint32_t>(step)) != 0;
  };
  HeadCodec codec{
      {c.storage, c.scale, has(KVMIX_STEP_CENTRE), has(KVMIX_STEP_FOLD), has(KVMIX_STEP_HADAMARD),
       has(KVMIX_STEP_SHAPE), c.operands, has(KVMIX_STEP_OWN_CENTRE)},
      c.head_scale};
  if (c.mean_size + c.factor_size + c.shaping_size == 0) return codec;
  CodecVectors vectors;
  vectors.mean.assign(c.mean, c.mean + c.mean_size);
  vectors.factor.assign(c.factor, c.factor + c.factor_size);
  vectors.shaping.assign(c.shaping, c.shaping + c.shaping_size);
  codec.vectors = std::make_shared<const CodecVectors>(std::move(vectors));
  return codec;
}

}  // namespace internal

inline std::string ToString(const CodecKind& kind) {
  const kvmix_codec codec = internal::ViewOf(HeadCodec{kind});
  return internal::TextOf(
      [&](char* text, std::size_t size) { return kvmix_codec_name(&codec, text, size); });
}

inline Result<CodecKind> ParseCodecKind(std::string_view name) {
  kvmix_codec codec = KVMIX_INIT(kvmix_codec);
  internal::CallError error;
  const Status s = error.Of(kvmix_codec_parse(std::string(name).c_str(), &codec, error));
  if (!s.ok()) return s;
  return internal::ValueOf(codec).kind;
}

inline std::size_t BytesPerToken(const CodecKind& kind, std::size_t head_dim) {
  const kvmix_codec codec = internal::ViewOf(HeadCodec{kind});
  return kvmix_codec_token_bytes(&codec, head_dim);
}

// The kind exists and fits head_dim, and its numbers are there: head_scale above 0 and finite,
// vectors of head_dim finite numbers where the kind asks for them and nowhere else.
inline Status CheckCodec(const HeadCodec& codec, std::size_t head_dim) {
  const kvmix_codec view = internal::ViewOf(codec);
  internal::CallError error;
  return error.Of(kvmix_codec_check(&view, head_dim, error));
}

}  // namespace kvmix

#endif  // KVMIX_CODEC_H_
