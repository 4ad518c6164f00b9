// Tensors of rows as they enter the library: f16, bf16 or f32, any strides. A view: owns nothing.
#ifndef KVMIX_ROWS_H_
#define KVMIX_ROWS_H_

#include <cstddef>
#include <cstdint>

#include "kvmix/half.h"
#include "kvmix/kvmix.h"

namespace kvmix {

// [tokens, heads, head_dim]: channel c of head h of token t is element
// t * token_stride + h * head_stride + c of `data`. Strides are in elements and may be negative;
// the channels of a row lie side by side. `data` needs no alignment beyond its type's. (Hugging
// Face's [heads, tokens, head_dim] has token_stride head_dim and head_stride tokens * head_dim.)
struct RowsView : kvmix_rows {
  RowsView() : kvmix_rows{} {}
  RowsView(const kvmix_rows& rows) : kvmix_rows(rows) {}
  RowsView(const void* x, Dtype type, std::size_t n, std::size_t n_heads, std::size_t dim,
           std::ptrdiff_t by_token, std::ptrdiff_t by_head)
      : kvmix_rows{x, type, n, n_heads, dim, by_token, by_head} {}

  // In C order, without gaps. bf16 numbers are 16 raw bits.
  static RowsView F16(const Half* x, std::size_t tokens, std::size_t heads, std::size_t head_dim) {
    return Dense(x, KVMIX_F16, tokens, heads, head_dim);
  }
  static RowsView BF16(const std::uint16_t* x, std::size_t tokens, std::size_t heads,
                       std::size_t head_dim) {
    return Dense(x, KVMIX_BF16, tokens, heads, head_dim);
  }
  static RowsView F32(const float* x, std::size_t tokens, std::size_t heads, std::size_t head_dim) {
    return Dense(x, KVMIX_F32, tokens, heads, head_dim);
  }
  static RowsView Dense(const void* x, Dtype dtype, std::size_t tokens, std::size_t heads,
                        std::size_t head_dim) {
    return {x,
            dtype,
            tokens,
            heads,
            head_dim,
            static_cast<std::ptrdiff_t>(heads * head_dim),
            static_cast<std::ptrdiff_t>(head_dim)};
  }

  std::size_t element_bytes() const { return kvmix_dtype_bytes(dtype); }
  const void* row(std::size_t token, std::size_t head) const { return Row(*this, token, head); }
  static const void* Row(const kvmix_rows& rows, std::size_t token, std::size_t head) {
    const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(token) * rows.token_stride +
                              static_cast<std::ptrdiff_t>(head) * rows.head_stride;
    return static_cast<const char*>(rows.data) +
           at * static_cast<std::ptrdiff_t>(kvmix_dtype_bytes(rows.dtype));
  }
  // `count` tokens from `first` on; one head.
  RowsView Tokens(std::size_t first, std::size_t count) const {
    return {row(first, 0), dtype, count, heads, head_dim, token_stride, head_stride};
  }
  RowsView Head(std::size_t head) const {
    return {row(0, head), dtype, tokens, 1, head_dim, token_stride, head_stride};
  }
  // One number as f32. Meant for tests and single numbers; the kernels convert whole rows.
  float At(std::size_t token, std::size_t head, std::size_t channel) const {
    const void* x = row(token, head);
    if (dtype == KVMIX_F32) return static_cast<const float*>(x)[channel];
    const std::uint16_t bits = static_cast<const std::uint16_t*>(x)[channel];
    return dtype == KVMIX_F16 ? HalfToFloat(bits) : BFloatToFloat(bits);
  }
};

// A place for rows, as a call of attention or decoding fills it: f32, f16 or bf16, any strides
// (both 0: C order, without gaps). Its rows may overlap neither each other nor what the call reads.
struct OutView : kvmix_out {
  OutView(float* x) : kvmix_out{x, KVMIX_F32, 0, 0} {}
  OutView(void* x, Dtype type, std::ptrdiff_t by_token = 0, std::ptrdiff_t by_head = 0)
      : kvmix_out{x, type, by_token, by_head} {}
};

}  // namespace kvmix

#endif  // KVMIX_ROWS_H_
