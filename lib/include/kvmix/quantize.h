// Rows of one KV head -> canonical rows, and back, by a codec; and the errors that its codes make.
// The canonical form: codes [tokens][row_bytes] and, with a scale per token, scales [tokens] as
// f32. The same bytes on every instruction set. The formula: kvmix/codec.h.
//
//   scale of a row = absmax(y) / 127, f32 division; bf16 scales are then rounded up to bf16
//   code = round-to-nearest-even(y / scale), f32 division, clamped to [-127, 127]
//
// That is i8. The storages below try four or five scales a row, take the codes whose squared error
// is the smallest once their scale is the best one for them, and store that scale. With +shape
// other codes follow, of the same scale. docs/formats.md has every step.
//
// Input is f16, bf16 or f32. The same numbers give the same bytes, whatever type they come in.
//   NaN          counts as 0, in every storage
//   infinities   count as +-65504, the largest half, in every storage
//   huge values  f16 storage cuts at +-65504. The others take any finite number; with a rotation, a
//                fold or shaping it is cut at 2^64.
//   zero rows    have scale 0 and codes 0; so has a row whose |y| all lie below 2^-100
// Pointers need no alignment beyond their types' own; outputs may not overlap inputs.
#ifndef KVMIX_QUANTIZE_H_
#define KVMIX_QUANTIZE_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "kvmix/codec.h"
#include "kvmix/half.h"
#include "kvmix/rows.h"
#include "kvmix/status.h"

namespace kvmix {

// Error sums of x' against x, mergeable: MSE = sum_squared_error / count.
struct ErrorSums {
  std::uint64_t count = 0;
  double sum_squared_error = 0.0;
  double max_error = 0.0;  // max |x' - x|
  double max_abs = 0.0;    // max |x|
  double mse() const { return count != 0 ? sum_squared_error / static_cast<double>(count) : 0.0; }
  ErrorSums& operator+=(const ErrorSums& o) {
    count += o.count;
    sum_squared_error += o.sum_squared_error;
    max_error = std::max(max_error, o.max_error);
    max_abs = std::max(max_abs, o.max_abs);
    return *this;
  }
};

// A codec made ready for one instruction set. Immutable: any number of threads may use it. Calls
// neither allocate nor fail. `rows` have head_dim channels, and their first head is taken; rows
// that do not fit are a bug, which stops the program.
class RowCodec {
 public:
  // target: "" for the best of this CPU, or a name of Targets(). Errors: a codec that CheckCodec
  // refuses, an unknown target.
  static Result<RowCodec> Create(const HeadCodec& codec, std::size_t head_dim,
                                 std::string_view target = {}) {
    const kvmix_codec view = internal::ViewOf(codec);
    kvmix_row_codec* made = nullptr;
    internal::CallError error;
    const Status s = error.Of(
        kvmix_row_codec_create(&view, head_dim, std::string(target).c_str(), &made, error));
    if (!s.ok()) return s;
    return RowCodec(made, codec.kind, kvmix_codec_row_bytes(&view, head_dim));
  }

  std::size_t row_bytes() const { return row_bytes_; }
  bool stores_scales() const { return stores_scales_; }  // else `scales` is not touched

  // codes: [rows.tokens][row_bytes]. Returns how many values were beyond the format (a head's
  // scale; f16's range) and were clamped. A head's scale of 0 counts what is not zero.
  std::uint64_t Encode(const RowsView& rows, void* codes, float* scales) const {
    std::uint64_t clamped = 0;
    const RowsView head = rows.Head(0);
    Check([&](kvmix_error* error) {
      return kvmix_quantize(get(), &head, codes, scales, &clamped, error);
    });
    return clamped;
  }
  // Token t to out + t * out_stride. Large outputs are written past the caches.
  void Decode(const void* codes, const float* scales, std::size_t tokens, float* out,
              std::size_t out_stride) const {
    Decode(codes, scales, tokens, {out, KVMIX_F32, static_cast<std::ptrdiff_t>(out_stride)});
  }
  void Decode(const void* codes, const float* scales, std::size_t tokens, Half* out,
              std::size_t out_stride) const {
    Decode(codes, scales, tokens, {out, KVMIX_F16, static_cast<std::ptrdiff_t>(out_stride)});
  }
  // Errors of the numbers that the codes stand for, against `rows`.
  ErrorSums Errors(const RowsView& rows, const void* codes, const float* scales) const {
    kvmix_errors sums{};
    const RowsView head = rows.Head(0);
    Check([&](kvmix_error* error) {
      return kvmix_quantize_errors(get(), &head, codes, scales, &sums, error);
    });
    return {sums.count, sums.sum_squared_error, sums.max_error, sums.max_abs};
  }

  const kvmix_row_codec* get() const { return handle_.get(); }

 private:
  RowCodec(kvmix_row_codec* handle, const CodecKind& kind, std::size_t row_bytes)
      : handle_(handle, kvmix_row_codec_destroy),
        row_bytes_(row_bytes),
        stores_scales_(kind.scale == KVMIX_SCALE_TOKEN || kind.scale == KVMIX_SCALE_TOKEN_BF16) {}
  template <class F>
  static void Check(const F& call) {
    internal::CallError error;
    if (const Status s = error.Of(call(error)); !s.ok()) internal::WrongResult(s);
  }
  void Decode(const void* codes, const float* scales, std::size_t tokens,
              const OutView& out) const {
    Check([&](kvmix_error* error) {
      return kvmix_dequantize(get(), codes, scales, tokens, &out, error);
    });
  }

  std::shared_ptr<const kvmix_row_codec> handle_;
  std::size_t row_bytes_;
  bool stores_scales_;
};

// The scale that covers these rows of one head: absmax(y) / 127, y as codec's kind and vectors make
// it (its head_scale is not looked at; CheckCodec must accept the rest); 0 for rows of zeros.
inline float HeadScale(const RowsView& rows, const HeadCodec& codec) {
  const kvmix_codec view = internal::ViewOf(codec);
  const RowsView head = rows.Head(0);
  float scale = 0.0f;
  internal::CallError error;
  const Status s = error.Of(kvmix_head_scale(&view, &head, &scale, error));
  if (!s.ok()) internal::WrongResult(s);
  return scale;
}

}  // namespace kvmix

#endif  // KVMIX_QUANTIZE_H_
