// Fused causal attention of one KV head's query rows over its tiles: scores, online softmax and
// weighted sum of V in one pass.
//
// Rows are the query heads of the GQA group times the queries: row r is query r / group. It sees
// the tokens that kernels/sight.h says, but for those that a mask hides. This call takes the tokens
// in [first_token, last_token) of them, so that a long context can be split and merged.
#ifndef KVMIX_KERNELS_ATTEND_H_
#define KVMIX_KERNELS_ATTEND_H_

#include <cstddef>
#include <cstdint>

#include "kernels/formats.h"
#include "kernels/mask.h"
#include "kernels/sight.h"

namespace kvmix::kernels {

struct AttendTask {
  const BlockFormat* format;
  // Tokens of block b lie at blocks[b], wherever that is. Only the blocks that hold tokens of
  // [first_token, last_token) are looked up.
  const std::uint8_t* const* blocks;
  std::size_t first_token, last_token;

  const float* q;  // [rows, K's dim], as K's codec wants it
  std::size_t rows;
  std::size_t group;
  Sight sight;       // its query 0 is that of row 0
  const Mask* mask;  // or null; its query 0 is that of row 0
  float scale;       // attention_scale
  float soft_cap;    // 0: none
  // [rows], added to scale * q . k before the soft cap; or null. (Softmax itself does not see it.)
  // The mask's numbers are added after the soft cap.
  const float* bias;

  // Whether tiles come from memory rather than from L2: they are then read in order, and each block
  // asks for the next. `after`, if not null, is what the caller reads after the last block.
  bool stream;
  const std::uint8_t* after;

  void* operand;  // scratch of operand_bytes(*format, rows), 64-byte aligned

  // Outputs, with s = log2(e) * score:
  //   max  about the largest s + log2(V's scale): near enough to s that nothing overflows
  //   sum  of 2^(s - max) over the tokens
  //   out  [rows, padded_dim(*format)]: the sum of 2^(s - max) * (V as its codes have it)
  // A row that saw nothing has max -inf and sum 0. A row with NaN or Inf in q has max NaN.
  float* out;
  float* max;
  float* sum;
};

struct AttendKernels {
  void (*attend)(const AttendTask& task);
  std::size_t (*operand_bytes)(const BlockFormat& format, std::size_t rows);
  std::size_t (*padded_dim)(const BlockFormat& format);  // V's, in whole vectors
};

AttendKernels AttendKernelsFor(std::int64_t target);

}  // namespace kvmix::kernels

#endif  // KVMIX_KERNELS_ATTEND_H_
