// What the tests of caches share: canonical rows out of a cache and into one, and when two caches
// are the same.
#ifndef KVMIX_TESTS_CACHE_ROWS_H_
#define KVMIX_TESTS_CACHE_ROWS_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "tests/attend_cases.h"
#include "tests/expect_error.h"

namespace kvmix::testing {

inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
inline constexpr float kUntouched = -7.0f;

// One KV head's K or V in the canonical form.
struct HeadRows {
  std::vector<std::uint8_t> codes;  // [count][RowBytes]
  std::vector<float> scales;        // [count], kUntouched where the codec stores none
  bool operator==(const HeadRows&) const = default;
};
using LayerRows = std::vector<HeadRows>;  // [kv_heads][K, V]

inline LayerRows Export(const Cache& cache, std::size_t layer, std::size_t first,
                        std::size_t count) {
  LayerRows all;
  for (std::size_t i = 0; i < 2 * GeometryOf(cache.model()).kv_heads; ++i) {
    const Tensor tensor = static_cast<Tensor>(i % 2);
    HeadRows rows{std::vector<std::uint8_t>(count * cache.RowBytes(layer, i / 2, tensor)),
                  std::vector<float>(count, kUntouched)};
    const Status s =
        cache.ExportRows(layer, i / 2, tensor, first, count, rows.codes.data(), rows.scales.data());
    EXPECT_TRUE(s.ok()) << s.message();
    all.push_back(std::move(rows));
  }
  return all;
}

// All that the layer has.
inline LayerRows Export(const Cache& cache, std::size_t layer) {
  const std::size_t first = cache.forgotten(layer);
  return Export(cache, layer, first, cache.tokens(layer) - first);
}

inline Status Import(Cache& cache, std::size_t layer, const LayerRows& all) {
  std::vector<const void*> codes[2];
  std::vector<const float*> scales[2];
  for (std::size_t i = 0; i < all.size(); ++i) {
    codes[i % 2].push_back(all[i].codes.data());
    scales[i % 2].push_back(all[i].scales.data());
  }
  return cache.ImportRows(layer, all[0].scales.size(), codes[0].data(), scales[0].data(),
                          codes[1].data(), scales[1].data());
}

// Tokens [first, first + count) of rows, to one layer.
inline Status AppendTokens(Cache& cache, std::size_t layer, const Rows& rows, std::size_t first,
                           std::size_t count, const Runner& runner = 1) {
  const Geometry g = GeometryOf(cache.model());
  return cache.Append(layer, KvView(g, rows.k).Tokens(first, count),
                      KvView(g, rows.v).Tokens(first, count), runner);
}

// The same to every layer.
inline void AppendToAll(Cache& cache, const Rows& rows, std::size_t first, std::size_t count) {
  for (std::size_t layer = 0; layer < GeometryOf(cache.model()).layers; ++layer) {
    const Status s = AppendTokens(cache, layer, rows, first, count);
    ASSERT_TRUE(s.ok()) << s.message();
  }
}

inline std::vector<Half> RandomQueries(const Geometry& g, std::size_t queries, unsigned seed) {
  std::mt19937 rng(seed);
  return RandomHalves(rng, queries * g.query_heads * g.head_dim);
}

inline bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// The same rows, and, where both are of one target, the same bits of attention over them.
inline void ExpectSame(const Cache& found, const Cache& expected, bool same_target = true) {
  const Geometry g = GeometryOf(found.model());
  const std::vector<Half> q = RandomQueries(g, 3, 9);
  for (std::size_t layer = 0; layer < g.layers; ++layer) {
    ASSERT_EQ(found.tokens(layer), expected.tokens(layer));
    ASSERT_EQ(found.forgotten(layer), expected.forgotten(layer));
    EXPECT_TRUE(Export(found, layer) == Export(expected, layer)) << "layer " << layer;
    if (!same_target) continue;
    EXPECT_TRUE(SameBits(Attended(found, layer, q), Attended(expected, layer, q)))
        << "layer " << layer;
  }
}

}  // namespace kvmix::testing

#endif  // KVMIX_TESTS_CACHE_ROWS_H_
