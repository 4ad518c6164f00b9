// A small engine with cells of its own, which it mirrors, and caches of the rows that attention
// should see.
#ifndef KVMIX_TESTS_MIRROR_CASES_H_
#define KVMIX_TESTS_MIRROR_CASES_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "engines/common/mirror.h"
#include "tests/cache_rows.h"
#include "tests/mask_cases.h"

namespace kvmix::testing {

using engine::EngineRows;
using engine::Mirror;
using engine::MirrorOptions;
using engine::MirrorRequest;
using engine::SeenCells;

using Cells = std::vector<std::int64_t>;

enum class Type { kF32, kF16, kQ8 };  // q8: a scale, then codes
inline constexpr Type kTypes[] = {Type::kF32, Type::kF16, Type::kQ8};

inline std::size_t RowBytes(Type type, std::size_t n) {
  return type == Type::kF32 ? 4 * n : type == Type::kF16 ? 2 * n : 4 + n;
}

inline void Encode(Type type, const std::vector<float>& x, std::uint8_t* to) {
  if (type == Type::kF32) std::memcpy(to, x.data(), 4 * x.size());
  if (type == Type::kF16) {
    std::vector<Half> halves(x.size());
    std::transform(x.begin(), x.end(), halves.begin(), FloatToHalf);
    std::memcpy(to, halves.data(), 2 * x.size());
  }
  if (type != Type::kQ8) return;
  float most = 0.0f;
  for (const float number : x) most = std::max(most, std::fabs(number));
  const float scale = most / 127.0f;
  std::memcpy(to, &scale, 4);
  for (std::size_t i = 0; i < x.size(); ++i) {
    to[4 + i] = static_cast<std::uint8_t>(static_cast<std::int8_t>(std::lround(x[i] / scale)));
  }
}

inline void FromF32(const void* row, float* out, std::int64_t n) {
  std::memcpy(out, row, 4 * static_cast<std::size_t>(n));
}
inline void FromF16(const void* row, float* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = HalfToFloat(static_cast<const Half*>(row)[i]);
}
inline void FromQ8(const void* row, float* out, std::int64_t n) {
  float scale;
  std::memcpy(&scale, row, 4);
  const auto* const codes = static_cast<const std::int8_t*>(row) + 4;
  for (std::int64_t i = 0; i < n; ++i) out[i] = scale * static_cast<float>(codes[i]);
}
inline constexpr decltype(&FromF32) kToFloat[] = {FromF32, FromF16, FromQ8};

// ---- the engine

// K or V of all cells: the engine's own, and what attention should see.
struct Side {
  std::size_t row, bytes;
  std::vector<std::uint8_t> own;
  std::vector<float> expected;
};

// One stream's part of a call: the cells that each query sees.
struct Part {
  std::size_t stream;
  std::vector<Cells> queries;
};

inline const LayerShape kShape{.kv_heads = 2, .query_heads = 4, .k_dim = 64, .v_dim = 32};

inline Plan ThePlan() {
  return UniformPlan(Model(std::vector<LayerShape>{kShape}),
                     {ParseCodecKind("i8-token-bf16+hadamard").value()},
                     {ParseCodecKind("i8-token").value()});
}

struct Engine {
  static constexpr std::size_t kPadding = 8;  // bytes between its rows

  Type type;
  std::size_t streams, cells;
  Mirror mirror;
  Side side[2];
  std::vector<bool> held;  // cells that attention may see
  std::mt19937 rng{7};

  Engine(Type of, std::size_t num_streams, std::size_t num_cells, const MirrorOptions& options = {})
      : type(of),
        streams(num_streams),
        cells(num_cells),
        mirror(std::move(*Mirror::Create(ThePlan(), streams, cells, options))),
        held(streams * cells) {
    for (const std::size_t t : {0, 1}) {
      Side& s = side[t];
      s.row = kShape.kv_heads * (t == 0 ? kShape.k_dim : kShape.v_dim);
      s.bytes = RowBytes(type, s.row);
      s.own.resize(streams * cells * (s.bytes + kPadding));
      s.expected.resize(streams * cells * s.row);
    }
  }

  std::uint8_t* Own(Side& s, std::size_t cell) {
    return s.own.data() + cell * (s.bytes + kPadding);
  }
  // New rows in the engine's own cells.
  std::vector<float> Put(Side& s, const Cells& at) {
    std::normal_distribution<float> normal;
    std::vector<float> all, row(s.row);
    for (const std::int64_t cell : at) {
      for (float& x : row) x = normal(rng);
      Encode(type, row, Own(s, static_cast<std::size_t>(cell)));
      all.insert(all.end(), row.begin(), row.end());
    }
    return all;
  }
  // The engine's own rows of a stream become zeros, as pages that went back to the system are.
  void Empty(std::size_t stream) {
    for (Side& s : side) {
      std::fill_n(Own(s, stream * cells), cells * (s.bytes + kPadding), std::uint8_t{0});
    }
  }
  // Attention should see the engine's own rows.
  void ExpectOwn(const Cells& at) {
    for (Side& s : side) {
      for (const std::int64_t c : at) {
        const auto cell = static_cast<std::size_t>(c);
        kToFloat[static_cast<int>(type)](Own(s, cell), &s.expected[cell * s.row],
                                         static_cast<std::int64_t>(s.row));
        held[cell] = true;
      }
    }
  }
  void Change(const Cells& at) {
    for (Side& s : side) Put(s, at);
    ExpectOwn(at);
  }
  void Tell(Tensor t, const Cells& at) {
    Side& s = side[t == KVMIX_V];
    const std::vector<float> rows = Put(s, at);
    const RowsView view =
        RowsView::F32(rows.data(), at.size(), kShape.kv_heads, s.row / kShape.kv_heads);
    const Status status = mirror.Write(t, at, view);
    ASSERT_TRUE(status.ok()) << status.message();
    for (std::size_t i = 0; i < at.size(); ++i) {
      const auto cell = static_cast<std::size_t>(at[i]);
      std::copy_n(rows.begin() + static_cast<std::ptrdiff_t>(i * s.row), s.row,
                  s.expected.begin() + static_cast<std::ptrdiff_t>(cell * s.row));
      held[cell] = true;
    }
  }
  void Write(const Cells& at) {
    Tell(KVMIX_K, at);
    Tell(KVMIX_V, at);
  }

  // All of a call, and of the same call over caches.
  struct Outputs {
    Status status;
    std::vector<std::vector<float>> found, expected;
    bool Same() const { return status.ok() && std::ranges::equal(found, expected, SameBits); }
  };
  Outputs Attend(const std::vector<Part>& parts) {
    Outputs o;
    std::vector<MirrorRequest> requests;
    std::vector<std::vector<float>> q(parts.size());
    std::vector<MaskData> masks;
    std::vector<std::vector<std::uint8_t>> seen;
    std::int64_t end = 1;
    for (const Part& p : parts) {
      for (const Cells& c : p.queries) {
        for (const std::int64_t cell : c) end = std::max(end, cell + 1);
      }
    }
    // As engines do: a mask of few more cells than are in use.
    const std::size_t width = std::min((static_cast<std::size_t>(end) + 31) / 32 * 32, cells);
    for (const Part& p : parts) {
      const std::size_t i = requests.size(), n = p.queries.size();
      std::vector<float> numbers(n * width, -kInf);
      for (std::size_t j = 0; j < n; ++j) {
        for (const std::int64_t c : p.queries[j]) {
          numbers[j * width + static_cast<std::size_t>(c)] = 0;
        }
      }
      masks.emplace_back(numbers, n, n % 2 == 0 ? KVMIX_F16 : KVMIX_F32, n == 1 ? 0 : 2);
      seen.emplace_back(width);
      std::normal_distribution<float> normal;
      q[i].resize(n * kShape.query_heads * kShape.k_dim);
      for (float& x : q[i]) x = normal(rng);
      for (auto* out : {&o.found, &o.expected}) {
        out->emplace_back(n * kShape.query_heads * kShape.v_dim, kNaN);
      }
      MirrorRequest& r = requests.emplace_back();
      r.stream = p.stream;
      r.q = RowsView::F32(q[i].data(), n, kShape.query_heads, kShape.k_dim);
    }
    AttendOptions options;
    options.causal = false;
    for (std::size_t i = 0; i < parts.size(); ++i) {
      MirrorRequest& r = requests[i];
      r.out = o.found[i].data();
      r.mask = masks[i].view;
      SeenCells(r.mask, seen[i].data());
      r.seen = seen[i].data();
      for (EngineRows* const rows : {&r.k, &r.v}) {
        Side& s = side[rows == &r.v];
        *rows = {Own(s, r.stream * cells), s.bytes + kPadding, s.bytes,
                 kToFloat[static_cast<int>(type)]};
      }
      const Cache cache = Expected(r.stream);
      const AttendRequest same{&cache, r.q, o.expected[i].data(), nullptr, r.mask};
      EXPECT_TRUE(kvmix::Attend({&same, 1}, 0, options).ok());
    }
    o.status = mirror.Attend(requests, mirror.sight(), 1);
    return o;
  }
  Cache Expected(std::size_t stream) {
    Cache cache = Cache::Create(Pool::Create(ThePlan()).value(), cells).value();
    for (std::size_t c = 0; c < cells; ++c) {
      const std::size_t at = stream * cells + c;
      if (!held[at]) continue;
      const auto row = [&](const Side& s) {
        return RowsView::F32(&s.expected[at * s.row], 1, kShape.kv_heads, s.row / kShape.kv_heads);
      };
      const std::int64_t cell = static_cast<std::int64_t>(c);
      EXPECT_TRUE(cache.Store(0, {&cell, 1}, row(side[0]), row(side[1])).ok());
    }
    return cache;
  }
  void Expect(const std::vector<Part>& parts) {
    const Outputs o = Attend(parts);
    ASSERT_TRUE(o.status.ok()) << o.status.message();
    for (std::size_t i = 0; i < parts.size(); ++i) {
      EXPECT_TRUE(SameBits(o.found[i], o.expected[i])) << "part " << i;
    }
  }
  void ExpectCounts(std::size_t written, std::size_t read) {
    EXPECT_EQ(mirror.counts().written, written);
    EXPECT_EQ(mirror.counts().read, read);
  }
};

inline Cells Iota(std::int64_t first, std::int64_t count) {
  Cells c(static_cast<std::size_t>(count));
  std::iota(c.begin(), c.end(), first);
  return c;
}
// A query for every one of the last `queries` of `cells`, which sees those up to its own.
inline std::vector<Cells> Causal(const Cells& cells, std::size_t queries) {
  std::vector<Cells> q;
  for (std::size_t i = cells.size() - queries; i < cells.size(); ++i) {
    q.emplace_back(cells.begin(), cells.begin() + static_cast<std::ptrdiff_t>(i + 1));
  }
  return q;
}

}  // namespace kvmix::testing

#endif  // KVMIX_TESTS_MIRROR_CASES_H_
