// Masks: who sees whom, where causality does not say it. A number for every query and token: 0 is
// seen, -inf is not, any other is added to the score.
#ifndef KVMIX_KERNELS_MASK_H_
#define KVMIX_KERNELS_MASK_H_

#include <cstddef>
#include <cstdint>

#include "kernels/rows.h"

namespace kvmix::kernels {

// What one query sees of one block: nothing outside of tokens [first, last) of the block.
struct MaskRange {
  std::uint16_t first = 0, last = 0;  // last 0: nothing at all
  bool zeros = true;                  // the numbers in between are all 0: there is nothing to add
};

struct Mask {
  const void* values;  // query i, token t: element i * stride + t
  Dtype dtype;
  std::ptrdiff_t stride;    // elements
  std::size_t tokens;       // of a query; those from here on are not seen
  const MaskRange* ranges;  // as scan() made them: block b of query i at ranges[i * blocks + b]
  std::size_t blocks;
  const float* slopes;  // [group] of the row's query heads, factors of the numbers (ALiBi); or null
};

struct MaskKernels {
  // The ranges of one query's numbers, for every block that they reach. False, if one is NaN or
  // +inf.
  bool (*scan)(const void* values, Dtype dtype, std::size_t tokens, MaskRange* ranges);
};

MaskKernels MaskKernelsFor(std::int64_t target);

}  // namespace kvmix::kernels

#endif  // KVMIX_KERNELS_MASK_H_
