// A codec compiled for one KV head's K or V and one target: the only place that knows what the
// fields of a codec do. The cache, attention, measuring and quantizing call it and never ask.
#ifndef KVMIX_LIB_CACHE_HEAD_H_
#define KVMIX_LIB_CACHE_HEAD_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "kernels/kernels.h"
#include "kvmix/codec.h"
#include "kvmix/rows.h"
#include "kvmix/status.h"

namespace kvmix::internal {

// The kernels of a target, "" for the best; an error that lists the targets.
Result<const kernels::Kernels*> KernelsFor(std::string_view target);

// The rows of one head: tokens. The rows of one token: its heads, from `head` on.
kernels::RowsIn TokenRows(const kvmix_rows& view, std::size_t head, std::size_t first,
                          std::size_t count);
kernels::RowsIn HeadRows(const kvmix_rows& view, std::size_t token, std::size_t head,
                         std::size_t count);

// Immutable. Points to vectors that its owner (CompiledHeads) keeps.
class CompiledCodec {
 public:
  const kernels::RowFormat& format() const { return format_; }
  std::size_t row_bytes() const { return kernels::RowBytes(format_); }
  bool stores_scales() const { return format_.scale != kernels::ScaleStore::kConstant; }

  // Tokens of this head to canonical rows, row_bytes() apart; returns the clamped values.
  std::uint64_t Encode(const kernels::RowsIn& tokens, std::uint8_t* rows, float* scales) const;
  // One row each of this head and of those after it that CompiledHeads calls alike.
  std::uint64_t EncodeHeads(const kernels::RowsIn& heads, std::uint8_t* rows, float* scales) const;

  bool own_centre() const { return own_centre_; }
  // f32 rows of a stretch [count][dim] around their mean, which goes to `centre`, CentreBytes of
  // it; rows before `skip` are not part of the mean. Of a codec with an own centre. in_place: the
  // rows are scratch.
  std::uint64_t EncodeAround(float* in_place, std::size_t count, std::size_t skip,
                             std::uint8_t* centre, std::uint8_t* rows, float* scales) const;
  // Rows of one stretch back, to [count][dim]; centre: as EncodeAround made it, or null.
  void DecodeAround(const std::uint8_t* centre, const void* rows, const float* scales,
                    std::size_t count, float* out) const;

  // `count` canonical rows, row_bytes() apart, to out + r * stride; scales may be null where none
  // are stored.
  void Decode(const void* rows, const float* scales, std::size_t count, float* out,
              std::size_t stride) const;
  void Decode(const void* rows, const float* scales, std::size_t count, Half* out,
              std::size_t stride) const;
  // The numbers as they are (NaN and Inf too).
  void ToFloat(const kernels::RowsIn& rows, float* out) const;
  kernels::RowErrors Errors(const void* rows, const float* scales,
                            const kernels::RowsIn& tokens) const;
  // Rows that an encoder makes: no code of -128, no half and no scale that is not finite. (Every
  // nibble is a code of i4.)
  Status CheckCoded(const void* rows, const float* scales, std::size_t count) const;
  // The scale that covers these tokens of this head.
  float HeadScale(const kernels::RowsIn& tokens) const;

  // Queries [rows, dim] for the codes of a K. bias, if not null: [rows], what the scores lack then,
  // attention_scale * q . mean. Only a soft cap and a sink see that; softmax does not.
  void PrepareQueries(float* q, std::size_t rows, float attention_scale, float* bias) const;
  // An output over the codes of a V, and the weight that its tokens have together, to the output.
  void RestoreOutput(float* out, float weight) const;

 private:
  friend class CompiledHeads;
  kernels::CodedRows Coded(const void* rows, const float* scales, std::size_t count) const;

  const kernels::Kernels* kernels_ = nullptr;
  kernels::RowFormat format_;
  kernels::Transform transform_;     // for tokens of this head
  kernels::Transform across_heads_;  // for heads of a token
  bool own_centre_ = false;
};

// All KV heads' K, or V, of a layer. Owns the vectors, those of a kind side by side.
class CompiledHeads {
 public:
  CompiledHeads() = default;
  // Codecs that CheckCodec accepts.
  CompiledHeads(std::span<const HeadCodec* const> codecs, std::size_t dim,
                const kernels::Kernels& kernels);

  std::size_t size() const { return heads_.size(); }
  const CompiledCodec& operator[](std::size_t head) const { return heads_[head]; }
  // How many heads from this one on are encoded alike: EncodeHeads takes a row of each.
  std::size_t alike(std::size_t head) const { return alike_[head]; }

 private:
  std::vector<CompiledCodec> heads_;
  std::vector<std::size_t> alike_;
  std::unique_ptr<float[]> vectors_;   // [mean, factor, 1 / factor][heads][dim]
  std::unique_ptr<float[]> matrices_;  // [heads][dim][dim]
};

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_CACHE_HEAD_H_
