// How a call of attention is cut into parts: every row sees what it should see, once, whatever else
// is in the batch. Windows, forgotten tokens and shared prefixes in any mix.
#include "lib/cache/schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

namespace kvmix::internal {
namespace {

constexpr std::size_t kRowBytes = 264;

Schedule Make(const std::vector<Sequence>& sequences, std::size_t kv_heads, std::size_t gqa) {
  Schedule schedule;
  schedule.Make(sequences, kv_heads, gqa, kRowBytes);
  return schedule;
}

// The first token that query `query` sees, by window, prefix and forgetting, and the end.
std::pair<std::int64_t, std::int64_t> Seen(const Sequence& s, std::size_t query) {
  const auto tokens = static_cast<std::int64_t>(s.tokens);
  const std::int64_t end =
      tokens - static_cast<std::int64_t>(s.queries) + 1 + static_cast<std::int64_t>(query);
  const std::int64_t prefix = static_cast<std::int64_t>(s.prefix);
  const bool in_prefix = end >= 1 && end <= prefix;
  std::int64_t first = static_cast<std::int64_t>(s.forgotten);
  if (s.window != 0 && !in_prefix) {
    first = std::max(first, end - static_cast<std::int64_t>(std::min(s.window, s.tokens)));
  }
  if (!s.causal) return {first, tokens};
  return {first, in_prefix ? prefix : std::max<std::int64_t>(end, 0)};
}

// Parts of a unit, in their order, as its partials have them.
std::vector<Part> PartsOf(const Schedule& schedule, const Unit& unit) {
  std::vector<Part> parts;
  for (std::size_t p = unit.first_partial; p < unit.first_partial + unit.partials; ++p) {
    parts.push_back(schedule.parts[schedule.partials[p].part]);
  }
  return parts;
}

// A part reads [first_token, last_token), and the kernel shows a row of these what its sight says.
void ExpectAllSeenOnce(const Schedule& schedule, const std::vector<Sequence>& sequences) {
  for (const Unit& unit : schedule.units) {
    const Sequence& s = sequences[unit.sequence];
    const std::vector<Part> parts = PartsOf(schedule, unit);
    ASSERT_FALSE(parts.empty()) << "also a row that sees nothing has an output";
    for (std::size_t q = unit.first_query; q < unit.first_query + unit.queries; ++q) {
      const auto [first, last] = Seen(s, q);
      std::int64_t at = first;
      for (const Part& part : parts) {
        const std::int64_t from = std::max(static_cast<std::int64_t>(part.first_token), first),
                           to = std::min(static_cast<std::int64_t>(part.last_token), last);
        if (from >= to) continue;
        ASSERT_EQ(from, at) << "sequence " << unit.sequence << ", query " << q;
        at = to;
      }
      ASSERT_GE(at, last) << "sequence " << unit.sequence << ", query " << q;
    }
    for (const Part& part : parts) ASSERT_EQ(part.kv_head, unit.kv_head);
  }
}

// Each query and KV head has one unit; rows of a part are those of its units, one after the other;
// memory of parts does not overlap.
void ExpectWhole(const Schedule& schedule, const std::vector<Sequence>& sequences,
                 std::size_t kv_heads, std::size_t gqa) {
  std::size_t queries = 0, expected = 0, memory = 0;
  for (const Unit& unit : schedule.units) queries += unit.queries;
  for (const Sequence& s : sequences) expected += s.queries * kv_heads;
  ASSERT_EQ(queries, expected);
  for (std::size_t p = 0; p < schedule.parts.size(); ++p) {
    const Part& part = schedule.parts[p];
    std::size_t rows = 0;
    for (std::size_t i = part.first_unit; i < part.first_unit + part.units; ++i) {
      const Unit& unit = schedule.units[schedule.unit_of[i]];
      const auto first = schedule.partials.begin() + unit.first_partial;
      ASSERT_EQ(std::count_if(first, first + unit.partials,
                              [&](const Partial& x) { return x.part == p && x.row == rows; }),
                1);
      rows += unit.queries * gqa;
    }
    ASSERT_EQ(rows, part.rows);
    if (part.memory == Part::kOwn) {
      ASSERT_EQ(part.units, 1u);
      ASSERT_EQ(schedule.units[schedule.unit_of[part.first_unit]].partials, 1u);
      continue;
    }
    ASSERT_GE(part.memory, memory);
    memory = part.memory + part.rows * kRowBytes;
  }
  ASSERT_LE(memory, schedule.memory);
}

Sequence RandomSequence(std::mt19937& rng) {
  const auto below = [&](std::size_t n) { return std::size_t{rng()} % n; };
  constexpr std::size_t kTokens[] = {2, 300, 3000, 40000}, kQueries[] = {2, 5, 100, 700};
  Sequence s;
  s.tokens = below(kTokens[below(4)]);
  s.queries = below(kQueries[below(4)]);
  s.causal = below(4) != 0;
  if (below(2) == 0) s.window = below(2) == 0 ? below(20) + 1 : below(5000) + 1;
  if (below(2) == 0) s.forgotten = below(s.tokens + 1);
  if (below(3) == 0) s.prefix = below(s.tokens + 1);
  // As a layer with a window has it: what the next query does not see is gone.
  if (s.window != 0 && below(2) == 0) {
    s.forgotten = s.tokens + 1 > s.window + s.queries ? s.tokens + 1 - s.window - s.queries : 0;
  }
  return s;
}

TEST(Schedule, EveryQuerySeesAllOnce) {
  std::mt19937 rng(1);
  for (int round = 0; round < 500; ++round) {
    SCOPED_TRACE(round);
    const std::size_t kv_heads = rng() % 4 + 1, gqa = rng() % 9 + 1;
    std::vector<Sequence> sequences(rng() % 6);
    for (Sequence& s : sequences) s = RandomSequence(rng);
    const Schedule schedule = Make(sequences, kv_heads, gqa);
    ExpectAllSeenOnce(schedule, sequences);
    ExpectWhole(schedule, sequences, kv_heads, gqa);
  }
}

TEST(Schedule, ASequenceIsCutAsIfAlone) {
  std::mt19937 rng(2);
  for (int round = 0; round < 100; ++round) {
    const std::size_t kv_heads = rng() % 4 + 1, gqa = rng() % 9 + 1;
    std::vector<Sequence> sequences(5);
    for (Sequence& s : sequences) s = RandomSequence(rng);
    const Schedule all = Make(sequences, kv_heads, gqa);
    for (std::size_t i = 0; i < sequences.size(); ++i) {
      const Schedule alone = Make({sequences[i]}, kv_heads, gqa);
      std::size_t at = 0;
      for (const Unit& unit : all.units) {
        if (unit.sequence != i) continue;
        const Unit& own = alone.units[at++];
        ASSERT_EQ(own.first_query, unit.first_query);
        const std::vector<Part> a = PartsOf(all, unit), b = PartsOf(alone, own);
        ASSERT_EQ(a.size(), b.size());
        for (std::size_t p = 0; p < a.size(); ++p) {
          ASSERT_EQ(a[p].first_token, b[p].first_token);
          ASSERT_EQ(a[p].last_token, b[p].last_token);
        }
      }
      ASSERT_EQ(at, alone.units.size());
    }
  }
}

TEST(Schedule, SharedPrefixes) {
  std::mt19937 rng(3);
  for (int round = 0; round < 300; ++round) {
    SCOPED_TRACE(round);
    const std::size_t kv_heads = rng() % 4 + 1, gqa = rng() % 8 + 1;
    std::vector<Sequence> sequences(rng() % 80 + 2);
    const std::size_t shared[] = {256 * (2 + rng() % 30), 512};
    // Two groups and others between them.
    std::size_t leaders[] = {SIZE_MAX, SIZE_MAX};
    for (std::size_t i = 0; i < sequences.size(); ++i) {
      Sequence& s = sequences[i];
      const std::size_t group = rng() % 3;
      if (group == 2) {
        s = RandomSequence(rng);
        continue;
      }
      s.queries = rng() % std::max<std::size_t>(1, 16 / gqa) + 1;
      s.tokens = shared[group] + s.queries - 1 + rng() % 700;
      s.shared = shared[group];
      leaders[group] = std::min(leaders[group], i);
      s.group = leaders[group];
    }
    const Schedule schedule = Make(sequences, kv_heads, gqa);
    ExpectAllSeenOnce(schedule, sequences);
    ExpectWhole(schedule, sequences, kv_heads, gqa);
  }
}

// Nothing before the window's block is read, so that a page there need not be.
TEST(Schedule, ReadsNothingThatNobodySees) {
  std::mt19937 rng(4);
  for (int round = 0; round < 300; ++round) {
    const Sequence s = RandomSequence(rng);
    const Schedule schedule = Make({s}, 2, 3);
    for (const Unit& unit : schedule.units) {
      const auto [first, last] = Seen(s, unit.first_query);
      const auto end = Seen(s, unit.first_query + unit.queries - 1).second;
      for (const Part& part : PartsOf(schedule, unit)) {
        if (part.first_token >= part.last_token) continue;
        ASSERT_GE(static_cast<std::int64_t>(part.first_token) + 255, first);
        ASSERT_LE(static_cast<std::int64_t>(part.last_token), end);
      }
    }
  }
}

}  // namespace
}  // namespace kvmix::internal
