// Rows -> tiles -> rows on every target, and where each byte lies: the layout that kernels/tiles.h
// promises.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace kvmix::kernels {
namespace {

struct TargetTiles {
  std::size_t lanes;
  std::size_t i8_width;
  std::uint8_t k_flip;
};

// What each target is meant to use. One that is missing here fails the tests: it would run on some
// fall-back that nobody has looked at.
const std::map<std::string, TargetTiles> kTargets = {
    {"AVX3_DL", {16, 4, 0x80}}, {"AVX3", {16, 2, 0}},
    {"AVX2", {8, 2, 0}},        {"SSE4", {4, 2, 0}},
    {"SSE2", {4, 2, 0}},        {"NEON", {4, 2, 0}},
    {"NEON_BF16", {4, 4, 0}},   {"NEON_WITHOUT_AES", {4, 2, 0}},
};

constexpr std::size_t kHeadDims[] = {1, 3, 31, 64, 80, 96, 128, 256, 512};

std::size_t RoundUp(std::size_t n, std::size_t to) { return (n + to - 1) / to * to; }
std::size_t CodeBytes(const TileFormat& f) { return f.storage == TileStorage::kF16 ? 2 : 1; }
std::size_t ScaleBytes(const TileFormat& f) {
  return f.scale == TileScale::kF32 ? 4 : f.scale == TileScale::kBF16 ? 2 : 0;
}

BlockFormat MakeFormat(const TileKernels& tiles, TileFormat k, TileFormat v, std::size_t head_dim) {
  BlockFormat f{k, v, head_dim, 0};
  tiles.lay_out(f);
  return f;
}

// The formats of K and V: every storage and scale, each as K and as V.
std::vector<std::pair<TileFormat, TileFormat>> Formats() {
  TileFormat f16, constant, f32, bf16;
  constant.storage = f32.storage = bf16.storage = TileStorage::kI8;
  constant.constant = 0.25f;
  f32.scale = TileScale::kF32;
  bf16.scale = TileScale::kBF16;
  return {{f16, f32}, {f32, f16}, {constant, bf16}, {bf16, constant}, {f32, f32}, {f16, f16}};
}

// Offset of one code in a block: tile [token / lanes][channel / width][lanes][width] of K, [channel
// / lanes][token / width][lanes][width] of V.
std::size_t CodeAt(const TargetTiles& target, const BlockFormat& f, bool k, std::size_t token,
                   std::size_t channel) {
  const TileFormat& t = k ? f.k : f.v;
  const std::size_t width = t.storage == TileStorage::kF16 ? 1 : target.i8_width,
                    lanes = target.lanes;
  const std::size_t lane = k ? token : channel, term = k ? channel : token;
  const std::size_t terms = k ? RoundUp(f.head_dim, width) : kBlockTokens;
  return t.codes_offset + ((lane / lanes * (terms / width) + term / width) * lanes * width +
                           lane % lanes * width + term % width) *
                              CodeBytes(t);
}

class Block {
 public:
  Block(const Kernels& kernels, const BlockFormat& format)
      : kernels_(kernels), format_(format), bytes_(format.block_bytes + 64) {
    std::fill(bytes_.end() - 64, bytes_.end(), std::uint8_t{0xA5});
  }
  std::uint8_t* data() { return bytes_.data(); }
  bool guard_intact() const {
    return std::all_of(bytes_.end() - 64, bytes_.end(), [](std::uint8_t b) { return b == 0xA5; });
  }
  void Store(bool k, std::size_t token, const void* codes, float scale) {
    (k ? kernels_.tiles.store_k : kernels_.tiles.store_v)(format_, data(), token, codes, scale);
  }
  // Exactly head_dim codes are written.
  std::vector<std::uint8_t> Load(bool k, std::size_t token, float* scale) {
    const std::size_t n = format_.head_dim * CodeBytes(k ? format_.k : format_.v);
    std::vector<std::uint8_t> row(n + 64, 0x5A);
    (k ? kernels_.tiles.load_k : kernels_.tiles.load_v)(format_, data(), token, row.data(), scale);
    EXPECT_TRUE(std::all_of(row.begin() + static_cast<std::ptrdiff_t>(n), row.end(),
                            [](std::uint8_t b) { return b == 0x5A; }));
    row.resize(n);
    return row;
  }

 private:
  const Kernels& kernels_;
  const BlockFormat& format_;
  std::vector<std::uint8_t> bytes_;
};

std::vector<std::uint8_t> RandomRow(std::mt19937& rng, std::size_t bytes) {
  std::vector<std::uint8_t> row(bytes);
  for (std::uint8_t& b : row) b = static_cast<std::uint8_t>(rng());
  return row;
}

// A number that survives the scale's type.
float RandomScale(std::mt19937& rng, const TileFormat& f) {
  if (f.scale == TileScale::kConstant) return f.constant;
  const std::uint32_t bits =
      (rng() & 0x3FFFFFFFu) & (f.scale == TileScale::kBF16 ? 0xFFFF0000u : 0xFFFFFFFFu);
  float scale;
  std::memcpy(&scale, &bits, 4);
  return scale;
}

// f(target, kernels, format) for everything there is.
template <class F>
void ForAllFormats(const F& f) {
  for (const Kernels& kernels : AllKernels()) {
    const auto target = kTargets.find(kernels.target);
    ASSERT_NE(target, kTargets.end()) << kernels.target << " has no entry in this test";
    for (const std::size_t head_dim : kHeadDims) {
      for (const auto& [k, v] : Formats()) {
        const BlockFormat format = MakeFormat(kernels.tiles, k, v, head_dim);
        SCOPED_TRACE(::testing::Message()
                     << kernels.target << " head_dim " << head_dim << " storages " << int(k.storage)
                     << int(v.storage) << " scales " << int(k.scale) << int(v.scale));
        f(target->second, kernels, format);
        if (::testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

TEST(Targets, BestFirstAndChosenByName) {
  ASSERT_FALSE(AllKernels().empty());
  for (const Kernels& k : AllKernels()) {
    EXPECT_TRUE(UseTarget(k.target));
    EXPECT_STREQ(ActiveKernels().target, k.target);
    EXPECT_FALSE(UseTarget("no such target"));
    EXPECT_STREQ(ActiveKernels().target, k.target);
  }
  EXPECT_TRUE(UseTarget(""));
  EXPECT_STREQ(ActiveKernels().target, AllKernels().front().target);
}

TEST(Tiles, BlockIsKCodesKScalesVCodesVScales) {
  ForAllFormats([](const TargetTiles& target, const Kernels&, const BlockFormat& f) {
    const std::size_t k_width = f.k.storage == TileStorage::kF16 ? 1 : target.i8_width;
    const std::size_t k_bytes =
        RoundUp(kBlockTokens * RoundUp(f.head_dim, k_width) * CodeBytes(f.k), 64);
    const std::size_t v_bytes =
        RoundUp(kBlockTokens * RoundUp(f.head_dim, target.lanes) * CodeBytes(f.v), 64);
    EXPECT_EQ(f.k.codes_offset, 0u);
    EXPECT_EQ(f.k.scales_offset, k_bytes);
    EXPECT_EQ(f.v.codes_offset, k_bytes + kBlockTokens * ScaleBytes(f.k));
    EXPECT_EQ(f.v.scales_offset, f.v.codes_offset + v_bytes);
    EXPECT_EQ(f.block_bytes, f.v.scales_offset + kBlockTokens * ScaleBytes(f.v));
  });
}

TEST(Tiles, EveryCodeLiesWhereTheLayoutSays) {
  std::mt19937 rng(1);
  ForAllFormats([&](const TargetTiles& target, const Kernels& kernels, const BlockFormat& f) {
    for (const bool k : {true, false}) {
      const TileFormat& t = k ? f.k : f.v;
      const std::uint8_t flip = k && t.storage == TileStorage::kI8 ? target.k_flip : 0;
      for (const std::size_t token : {std::size_t{0}, std::size_t{1}, target.lanes - 1,
                                      target.lanes, std::size_t{130}, kBlockTokens - 1}) {
        Block block(kernels, f);
        const std::vector<std::uint8_t> row = RandomRow(rng, f.head_dim * CodeBytes(t));
        block.Store(k, token, row.data(), RandomScale(rng, t));
        std::vector<std::uint8_t> expected(f.block_bytes);
        for (std::size_t i = 0; i < row.size(); ++i) {
          expected[CodeAt(target, f, k, token, i / CodeBytes(t)) + i % CodeBytes(t)] =
              row[i] ^ flip;
        }
        // Channels that fill K's last group hold code 0. (V's lie in vectors of their own and are 0
        // as well.)
        const std::size_t width = t.storage == TileStorage::kF16 ? 1 : target.i8_width;
        for (std::size_t c = f.head_dim; k && c < RoundUp(f.head_dim, width); ++c)
          expected[CodeAt(target, f, k, token, c)] = flip;
        const std::size_t end = t.scales_offset;
        ASSERT_EQ(std::vector<std::uint8_t>(block.data() + t.codes_offset, block.data() + end),
                  std::vector<std::uint8_t>(
                      expected.begin() + static_cast<std::ptrdiff_t>(t.codes_offset),
                      expected.begin() + static_cast<std::ptrdiff_t>(end)))
            << (k ? "K" : "V") << " token " << token;
      }
    }
  });
}

TEST(Tiles, RowsComeBackWhateverTheOrderAndAfterOverwriting) {
  std::mt19937 rng(2);
  std::vector<std::size_t> order(kBlockTokens);
  std::iota(order.begin(), order.end(), std::size_t{0});
  ForAllFormats([&](const TargetTiles&, const Kernels& kernels, const BlockFormat& f) {
    Block block(kernels, f);
    struct Row {
      std::vector<std::uint8_t> codes;
      float scale;
    };
    std::vector<Row> rows[2] = {std::vector<Row>(kBlockTokens), std::vector<Row>(kBlockTokens)};
    for (int round = 0; round < 2; ++round) {  // the second overwrites half of the first
      std::shuffle(order.begin(), order.end(), rng);
      for (std::size_t i = 0; i < (round == 0 ? kBlockTokens : kBlockTokens / 2); ++i) {
        for (const bool k : {true, false}) {
          const TileFormat& t = k ? f.k : f.v;
          Row& row = rows[k][order[i]];
          row = {RandomRow(rng, f.head_dim * CodeBytes(t)), RandomScale(rng, t)};
          block.Store(k, order[i], row.codes.data(), row.scale);
        }
      }
    }
    for (std::size_t token = 0; token < kBlockTokens; ++token) {
      for (const bool k : {true, false}) {
        float scale = -1.0f;
        ASSERT_EQ(block.Load(k, token, &scale), rows[k][token].codes)
            << (k ? "K" : "V") << " token " << token;
        ASSERT_EQ(scale, rows[k][token].scale) << (k ? "K" : "V") << " token " << token;
      }
    }
    EXPECT_TRUE(block.guard_intact());
  });
}

TEST(Tiles, CodesAtAnyAddress) {
  std::mt19937 rng(3);
  ForAllFormats([&](const TargetTiles&, const Kernels& kernels, const BlockFormat& f) {
    Block block(kernels, f);
    for (const bool k : {true, false}) {
      const std::size_t by = CodeBytes(k ? f.k : f.v),
                        n = f.head_dim *
                            by;  // one code past any alignment that a vector might like
      std::vector<std::uint8_t> row = RandomRow(rng, n + by), loaded(n + by);
      float scale;
      block.Store(k, 5, row.data() + by, 1.0f);
      (k ? kernels.tiles.load_k : kernels.tiles.load_v)(f, block.data(), 5, loaded.data() + by,
                                                        &scale);
      ASSERT_EQ(std::memcmp(row.data() + by, loaded.data() + by, n), 0) << (k ? "K" : "V");
    }
  });
}

}  // namespace
}  // namespace kvmix::kernels
