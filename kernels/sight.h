// The rule of who sees what, by place: a sequence's tokens stand in a row, a query stands at one of
// them (or before the first), and sees a run of neighbouring tokens. A mask (kernels/mask.h) may
// hide some of these.
#ifndef KVMIX_KERNELS_SIGHT_H_
#define KVMIX_KERNELS_SIGHT_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace kvmix::kernels {

// The tokens [first, last); first >= last: no token.
struct Tokens {
  std::size_t first = 0, last = 0;
};

// Query i stands at token end - 1, end = first_end + i, and sees
//   [end - window, end)                      without a window: [0, end)
//   the tokens from `end` on as well         unless causal
//   [0, prefix) as well                      if it stands at a token of the prefix
// and of these the tokens that exist, from `forgotten` to `tokens`. A causal query with end <= 0
// stands before the first token and sees nothing. Both ends of the run grow with i.
struct Sight {
  std::int64_t first_end = 0;
  std::size_t tokens = 0;
  std::size_t window = 0;  // 0: none
  std::size_t prefix = 0;  // these first tokens, at most `tokens`, see each other; 0: none
  std::size_t forgotten = 0;
  bool causal = true;

  // The sight of queries that see all of the first `tokens` tokens.
  static Sight Whole(std::size_t tokens) { return {.tokens = tokens, .causal = false}; }

  Tokens Of(std::size_t query) const {
    const std::int64_t end = first_end + static_cast<std::int64_t>(query);
    const std::int64_t all = static_cast<std::int64_t>(tokens);
    std::int64_t first = 0, last = causal ? end : all;
    if (window != 0) first = end - static_cast<std::int64_t>(std::min(window, tokens));
    if (end > 0 && end <= static_cast<std::int64_t>(prefix)) {
      first = 0;
      last = std::max(last, static_cast<std::int64_t>(prefix));
    }
    first = std::max(first, static_cast<std::int64_t>(forgotten));
    last = std::clamp(last, std::int64_t{0}, all);
    return {static_cast<std::size_t>(first), static_cast<std::size_t>(last)};
  }
};

}  // namespace kvmix::kernels

#endif  // KVMIX_KERNELS_SIGHT_H_
