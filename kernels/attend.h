// Fused causal attention of one KV head's query rows over its tiles: scores, online softmax and
// weighted sum of V in one pass.
//
// Rows are the query heads of the GQA group times the queries: row r is query r / group. Row r sees
// the tokens [max(end_r - window, 0), end_r), end_r = first_end + r / group (signed: a row with
// end_r <= 0 sees nothing); of those, this call takes the ones in [first_token, last_token), so
// that a long context can be split and merged.
#ifndef KVMIX_KERNELS_ATTEND_H_
#define KVMIX_KERNELS_ATTEND_H_

#include <cstddef>
#include <cstdint>

#include "kernels/tiles.h"

namespace kvmix::kernels {

struct AttendTask {
  const BlockFormat* format;
  const std::uint8_t* blocks;  // block b at blocks + b * format->block_bytes
  std::size_t first_token, last_token;

  const float* q;  // [rows, head_dim] f32
  std::size_t rows;
  std::size_t group;
  std::int64_t first_end;
  std::size_t window;  // 0: none
  float scale;         // attention_scale
  float soft_cap;      // 0: none
  const float* bias;  // [rows], added to scale * q . k before the soft cap; or null (softmax itself
                      // does not see it)

  bool stream;  // the tiles are expected to come from memory rather than from L2: read them in
                // order, fetch ahead

  void* operand;  // scratch of operand_bytes(*format, rows), 64-byte aligned
  // Outputs, with s = log2(e) * score: out = sum over tokens of 2^(s - max) * V (without its mean),
  // [rows, padded_dim(*format)]; sum of 2^(s - max); max: the largest s + log2(V's scale), near
  // enough to s that nothing overflows. A row that saw nothing has max -inf and sum 0; a row with
  // NaN or Inf in q has max NaN.
  float* out;
  float* max;
  float* sum;
};

struct AttendKernels {
  void (*attend)(const AttendTask& task);
  std::size_t (*operand_bytes)(const BlockFormat& format, std::size_t rows);
  std::size_t (*padded_dim)(const BlockFormat& format);
};

AttendKernels AttendKernelsFor(std::int64_t target);

}  // namespace kvmix::kernels

#endif  // KVMIX_KERNELS_ATTEND_H_
