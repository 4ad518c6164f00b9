// How a call of attention is cut into parts: integers only.
#ifndef KVMIX_LIB_CACHE_SCHEDULE_H_
#define KVMIX_LIB_CACHE_SCHEDULE_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/mask.h"
#include "lib/cache/newest.h"
#include "lib/cache/sight.h"

namespace kvmix::internal {

// One sequence's queries, as far as their places and tokens matter.
struct Sequence : Sight {
  std::size_t exact = 0;  // the first tokens, which are no part's
  // The first tokens, of whole blocks, that a group of sequences reads together, and the first
  // sequence of that group; 0: none.
  std::size_t shared = 0;
  std::size_t group = 0;
  const kernels::Mask* mask = nullptr;
  // Tokens of a stretch, 0: none. The stretches with exact rows, by index, and the cells of the
  // queries, where they are not the last tokens.
  std::size_t stretch = 0;
  std::span<const Stretch> stretches = {};
  const std::int64_t* cells = nullptr;

  static constexpr std::size_t kNone = SIZE_MAX;
  // The stretch that a query stands in.
  std::size_t OwnOf(std::size_t query) const {
    if (stretch == 0) return kNone;
    if (cells == nullptr) return (tokens - queries + query) / stretch;
    return cells[query] < 0 ? kNone : static_cast<std::size_t>(cells[query]) / stretch;
  }
  // f(stretch) for each that a query sees exactly: its own, and all that are open.
  template <class F>
  void ForExact(std::size_t query, const F& f) const {
    const std::size_t own = OwnOf(query);
    for (const Stretch& s : stretches) {
      if (!s.whole || s.index == own) f(s);
    }
  }
};

// Queries of one sequence and KV head that are merged at once: rows [query][query head]. They stand
// in one stretch.
struct Unit {
  std::uint32_t sequence, kv_head, first_query, queries;
  std::uint32_t first_partial, partials;  // of Schedule::partials
};

// A span of tokens of one KV head, for the rows of some units.
struct Part {
  std::uint32_t kv_head;
  std::uint32_t first_unit, units;  // of Schedule::unit_of
  std::size_t first_token, last_token;
  std::size_t rows;
  // Offset of its outputs; kOwn: in the thread's own memory, for its one unit has no other part.
  std::size_t memory;
  static constexpr std::size_t kOwn = SIZE_MAX;
};

// Where a unit's rows lie in a part's outputs.
struct Partial {
  std::uint32_t part, row;
};

struct Schedule {
  std::vector<Unit> units;
  std::vector<Part> parts;
  std::vector<std::uint32_t> unit_of;  // units, part by part
  std::vector<Partial> partials;       // unit by unit
  std::size_t memory = 0;              // bytes of all outputs

  // The parts depend on the shape alone, never on the number of threads, and so do the bits. gqa:
  // query heads of a KV head. row_bytes: of a row's outputs. Memory of the vectors is reused.
  void Make(std::span<const Sequence> sequences, std::size_t kv_heads, std::size_t gqa,
            std::size_t row_bytes);

 private:
  void AddShared(std::span<const Sequence> sequences, std::size_t kv_heads, std::size_t gqa);
  void AddUnits(const Sequence& sequence, std::uint32_t number, std::size_t kv_heads,
                std::size_t gqa);
  void AddOwn(const Sequence& sequence, std::uint32_t first_unit, std::size_t units,
              std::size_t gqa);
  void AddParts(std::size_t kv_head, std::size_t first_unit, std::size_t units, std::size_t rows,
                std::size_t first_token, std::size_t last_token, std::size_t span);
  std::vector<std::uint32_t> first_units_;  // of the sequences
};

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_CACHE_SCHEDULE_H_
