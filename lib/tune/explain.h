// Why heads have the codecs that they have.
#ifndef KVMIX_LIB_TUNE_EXPLAIN_H_
#define KVMIX_LIB_TUNE_EXPLAIN_H_

#include <cstddef>

#include "kvmix/tune/steps.h"
#include "lib/tune/menu.h"

namespace kvmix::tune {

// The limits that a choice was held to.
struct Verdict {
  double worst_limit = 0.0;
  double min_cosine = 0.0;
  bool bytes_bind = false;  // with more bytes its sum would be less
};

// Of the K or V `head`, of `dim` channels, in a choice that has `pick` there and without decode
// times would have `timeless`.
Reason Explain(const HeadErrors& head, std::size_t dim, const Pair& pick, const Pair& timeless,
               const Verdict& verdict);

}  // namespace kvmix::tune

#endif  // KVMIX_LIB_TUNE_EXPLAIN_H_
