#include "lib/cache/schedule.h"

#include <algorithm>

#include "kernels/formats.h"
#include "lib/cache/round.h"

namespace kvmix::internal {
namespace {

using kernels::kBlockTokens;

// A part has at most about this many rows: its q, weights and output stay in L2 beside a block of K
// and V.
constexpr std::size_t kRowsPerPart = 64;
// The same where many sequences read one prefix: more of them read it once.
constexpr std::size_t kRowsPerSharedPart = 256;
// Where KV heads and queries alone give fewer parts than this, the context is cut into spans as
// well, so that one KV head keeps many threads busy; but no shorter than kShortestSpan tokens, or
// merging would cost more than a few percent.
constexpr std::size_t kPartsWanted = 32;
constexpr std::size_t kShortestSpan = 1024;

std::size_t SpanOf(std::size_t tokens, std::size_t parts) {
  return std::max(kShortestSpan, RoundUp(CeilDiv(tokens * parts, kPartsWanted), kBlockTokens));
}

// The tokens that queries [query, query + count) of a sequence read: what they see, from the start
// of a block on (which is there, because they see a token of it).
Tokens SeenBy(const Sequence& s, std::size_t query, std::size_t count) {
  Tokens seen = s.OfRun(query, count);
  if (seen.first < seen.last) seen.first = seen.first / kBlockTokens * kBlockTokens;
  seen.first = std::max({seen.first, s.shared, s.exact});
  if (s.mask == nullptr) return seen;
  std::size_t first = s.mask->blocks, last = 0;
  for (std::size_t q = query; q < query + count; ++q) {
    for (std::size_t b = 0; b < s.mask->blocks; ++b) {
      if (s.mask->ranges[q * s.mask->blocks + b].last == 0) continue;
      first = std::min(first, b);
      last = std::max(last, b + 1);
    }
  }
  return {std::max(seen.first, first * kBlockTokens), std::min(seen.last, last * kBlockTokens)};
}

}  // namespace

// The tokens [first_token, last_token) in spans, for neighbouring units of unit_of. A unit that
// sees nothing still has a part.
void Schedule::AddParts(std::size_t kv_head, std::size_t first_unit, std::size_t count,
                        std::size_t rows, std::size_t first_token, std::size_t last_token,
                        std::size_t span) {
  std::size_t token = first_token;
  do {  // spans end at ends of blocks
    const std::size_t last = std::min(last_token, token / kBlockTokens * kBlockTokens + span);
    parts.push_back({static_cast<std::uint32_t>(kv_head), static_cast<std::uint32_t>(first_unit),
                     static_cast<std::uint32_t>(count), token, last, rows, Part::kOwn});
    for (std::size_t i = first_unit; i < first_unit + count; ++i) ++units[unit_of[i]].partials;
    token = last;
  } while (token < last_token);
}

// What a group's sequences read together: their units of a KV head side by side.
void Schedule::AddShared(std::span<const Sequence> sequences, std::size_t kv_heads,
                         std::size_t gqa) {
  for (std::size_t leader = 0; leader < sequences.size(); ++leader) {
    const Sequence& s = sequences[leader];
    const auto of_group = [&](const Unit& unit) {
      return sequences[unit.sequence].shared != 0 && sequences[unit.sequence].group == leader;
    };
    if (s.shared == 0 || s.group != leader) continue;
    std::size_t rows = 0;
    for (const Sequence& other : sequences) {
      if (other.shared != 0 && other.group == leader) rows += other.queries * gqa;
    }
    const std::size_t span = SpanOf(s.shared, kv_heads * CeilDiv(rows, kRowsPerSharedPart));
    for (std::size_t h = 0; h < kv_heads; ++h) {
      std::size_t first = unit_of.size(), part_rows = 0;
      const auto close = [&] {
        if (part_rows != 0) {
          AddParts(h, first, unit_of.size() - first, part_rows, s.exact, s.shared, span);
        }
        first = unit_of.size();
        part_rows = 0;
      };
      for (std::size_t u = 0; u < units.size(); ++u) {
        if (units[u].kv_head != h || !of_group(units[u])) continue;
        const std::size_t own = units[u].queries * gqa;
        if (part_rows + own > kRowsPerSharedPart) close();
        unit_of.push_back(static_cast<std::uint32_t>(u));
        part_rows += own;
      }
      close();
    }
  }
}

void Schedule::AddOwn(const Sequence& s, std::uint32_t first_unit, std::size_t count,
                      std::size_t gqa) {
  if (count == 0) return;
  const std::size_t seen = std::min(s.tokens - s.shared, s.Most(units[first_unit].queries));
  const std::size_t span = SpanOf(seen, count);
  for (std::size_t u = first_unit; u < first_unit + count; ++u) {
    const Unit unit = units[u];
    Tokens tokens = SeenBy(s, unit.first_query, unit.queries);
    unit_of.push_back(static_cast<std::uint32_t>(u));
    const auto add = [&](std::size_t first, std::size_t last) {
      AddParts(unit.kv_head, unit_of.size() - 1, 1, unit.queries * gqa, first, last, span);
    };
    // Between the stretches that are read exactly.
    s.ForExact(unit.first_query, [&](const Stretch& exact) {
      const std::size_t first = exact.index * s.stretch;
      if (first >= tokens.last || first + s.stretch <= tokens.first) return;
      if (first > tokens.first) add(tokens.first, first);
      tokens.first = first + s.stretch;
    });
    if (tokens.first < tokens.last || units[u].partials == 0) add(tokens.first, tokens.last);
  }
}

// Runs of neighbouring queries, as long as each other, that stand in one stretch.
void Schedule::AddUnits(const Sequence& s, std::uint32_t number, std::size_t kv_heads,
                        std::size_t gqa) {
  const std::size_t most_queries = std::max<std::size_t>(1, kRowsPerPart / gqa);
  const std::size_t runs = CeilDiv(s.queries, most_queries);
  const std::size_t of_run = runs != 0 ? CeilDiv(s.queries, runs) : 1;
  for (std::size_t h = 0; h < kv_heads; ++h) {
    for (std::size_t first = 0, n; first < s.queries; first += n) {
      const std::size_t most = std::min(s.stretch != 0 ? most_queries : of_run, s.queries - first);
      for (n = 1; n < most && s.OwnOf(first + n) == s.OwnOf(first);) ++n;
      units.push_back({number, static_cast<std::uint32_t>(h), static_cast<std::uint32_t>(first),
                       static_cast<std::uint32_t>(n), 0, 0});
    }
  }
}

void Schedule::Make(std::span<const Sequence> sequences, std::size_t kv_heads, std::size_t gqa,
                    std::size_t row_bytes) {
  units.clear();
  parts.clear();
  unit_of.clear();
  std::vector<std::uint32_t>& first_units = first_units_;
  first_units.clear();
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    first_units.push_back(static_cast<std::uint32_t>(units.size()));
    AddUnits(sequences[i], static_cast<std::uint32_t>(i), kv_heads, gqa);
  }
  first_units.push_back(static_cast<std::uint32_t>(units.size()));
  AddShared(sequences, kv_heads, gqa);
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    AddOwn(sequences[i], first_units[i], first_units[i + 1] - first_units[i], gqa);
  }

  // Every unit's partials side by side, in the order of the parts.
  std::uint32_t place = 0;
  for (Unit& unit : units) {
    unit.first_partial = place;
    place += unit.partials;
    unit.partials = 0;
  }
  partials.resize(place);
  memory = 0;
  for (std::uint32_t p = 0; p < parts.size(); ++p) {
    Part& part = parts[p];
    std::uint32_t row = 0;
    for (std::size_t i = part.first_unit; i < part.first_unit + part.units; ++i) {
      Unit& unit = units[unit_of[i]];
      partials[unit.first_partial + unit.partials++] = {p, row};
      row += unit.queries * static_cast<std::uint32_t>(gqa);
    }
  }
  for (Part& part : parts) {
    if (part.units == 1 && units[unit_of[part.first_unit]].partials == 1) continue;
    part.memory = memory;
    memory += RoundUp(part.rows * row_bytes, 64);
  }
}

}  // namespace kvmix::internal
