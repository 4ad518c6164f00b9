// Sight says for a sequence which tokens its queries see: from its queries, the tokens that the
// layer holds, and the tokens that are gone. Schedule, exact tokens, forgetting and refusals ask
// it. The rule itself is in kernels/sight.h, because kernels read it as well.
#ifndef KVMIX_LIB_CACHE_SIGHT_H_
#define KVMIX_LIB_CACHE_SIGHT_H_

#include <cstddef>
#include <cstdint>
#include <optional>

#include "kernels/sight.h"
#include "kvmix/status.h"

namespace kvmix::internal {

using kernels::Tokens;

struct Sight {
  std::size_t queries = 0;  // query i stands at token tokens - queries + i
  std::size_t tokens = 0;   // that the layer holds
  std::size_t window = 0;   // 0: none
  std::size_t prefix = 0;   // kvmix_sight::bidirectional_prefix
  // Tokens before `forgotten` are gone. A query does not see those before `dropped`, which went on
  // purpose (Forget, Shift). The others left with the window: a query that would see one is wrong.
  std::size_t forgotten = 0;
  std::size_t dropped = 0;
  bool causal = true;

  // The rule for the queries from `query` on, as kernels want it.
  kernels::Sight From(std::size_t query) const;
  Tokens Of(std::size_t query) const { return From(query).Of(0); }
  // The tokens that some query of [first, first + count) sees, and the tokens that all queries see.
  Tokens OfRun(std::size_t first, std::size_t count) const;
  Tokens OfAll() const;
  // A bound of the tokens that `count` neighbouring queries see, in blocks that are read whole.
  std::size_t Most(std::size_t count) const;

  // The first query that would see tokens that left with the window, and these.
  struct Missing {
    std::size_t query;
    Tokens tokens;
  };
  std::optional<Missing> FindMissing() const;
  // An error that names them.
  Status CheckHeld() const;
  // An error if a query stands in the prefix, and the layer does not hold all of the prefix yet.
  Status CheckPrefix() const;
};

// The first token that a query at token `next` sees through a window. Tokens before it may be
// forgotten when all later queries stand there or after it.
inline std::size_t FirstSeen(std::size_t next, std::size_t window) {
  const std::size_t end = next + 1;
  return kernels::Sight{
      .first_end = static_cast<std::int64_t>(end), .tokens = end, .window = window}
      .Of(0)
      .first;
}

// True if a layer that is cut to `tokens` tokens still has all that its next query sees.
bool HasPast(std::size_t window, std::size_t forgotten, std::size_t dropped, std::size_t tokens);

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_CACHE_SIGHT_H_
