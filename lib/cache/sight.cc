#include "lib/cache/sight.h"

#include <algorithm>

#include <fmt/format.h>

#include "kernels/formats.h"

namespace kvmix::internal {

kernels::Sight Sight::From(std::size_t query) const {
  return {.first_end =
              static_cast<std::int64_t>(tokens + query + 1) - static_cast<std::int64_t>(queries),
          .tokens = tokens,
          .window = window,
          .prefix = prefix,
          .forgotten = forgotten,
          .causal = causal};
}

Tokens Sight::OfRun(std::size_t first, std::size_t count) const {
  return {Of(first).first, Of(first + count - 1).last};
}

Tokens Sight::OfAll() const { return {Of(queries - 1).first, Of(0).last}; }

std::size_t Sight::Most(std::size_t count) const {
  if (window == 0 || window >= tokens) return tokens;
  return std::min(tokens, std::max(prefix, window + count + kernels::kBlockTokens));
}

std::optional<Sight::Missing> Sight::FindMissing() const {
  Sight wanted = *this;
  wanted.forgotten = dropped;
  if (queries == 0 || wanted.Of(0).first >= forgotten) return {};
  for (std::size_t query = 0; query < queries; ++query) {
    const Tokens seen = wanted.Of(query);
    const Tokens gone{seen.first, std::min(seen.last, forgotten)};
    if (gone.first < gone.last) return Missing{query, gone};
  }
  return {};
}

Status Sight::CheckHeld() const {
  const std::optional<Missing> missing = FindMissing();
  if (!missing) return {};
  return {
      ErrorCode::kInvalidArgument,
      fmt::format("query {} of {} sees the tokens {} to {}, which the layer's window has let "
                  "go: expected no query that sees a token before {}",
                  missing->query, queries, missing->tokens.first, missing->tokens.last, forgotten)};
}

Status Sight::CheckPrefix() const {
  if (prefix <= tokens || tokens == 0 || queries == 0) return {};
  return {ErrorCode::kInvalidArgument,
          fmt::format("bidirectional_prefix {}: expected all of these tokens in the layer before a "
                      "query stands among them, found {}",
                      prefix, tokens)};
}

bool HasPast(std::size_t window, std::size_t forgotten, std::size_t dropped, std::size_t tokens) {
  const Sight next{.queries = 1,
                   .tokens = tokens + 1,
                   .window = window,
                   .forgotten = forgotten,
                   .dropped = dropped};
  return tokens == 0 || (forgotten <= tokens && !next.FindMissing());
}

}  // namespace kvmix::internal
