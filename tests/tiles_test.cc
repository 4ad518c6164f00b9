// Rows -> tiles -> rows on every target, and where each byte lies: the layout that kernels/tiles.h
// promises.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <string_view>
#include <utility>
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
    {"AMX", {16, 4, 0x80}}, {"AVX3_DL", {16, 4, 0x80}}, {"AVX3", {16, 2, 0}},
    {"AVX2", {8, 2, 0}},    {"SSE4", {4, 2, 0}},        {"SSE2", {4, 2, 0}},
    {"NEON", {4, 2, 0}},    {"NEON_BF16", {4, 4, 0}},   {"NEON_WITHOUT_AES", {4, 2, 0}},
};

// Of K and V.
constexpr std::pair<std::size_t, std::size_t> kDims[] = {
    {1, 1},     {3, 3},     {31, 31},   {64, 64},   {80, 80}, {96, 96},
    {128, 128}, {256, 256}, {512, 512}, {192, 128}, {33, 5},  {7, 66}};

std::size_t RoundUp(std::size_t n, std::size_t to) { return (n + to - 1) / to * to; }
// The bits of a code that lie together, from the lowest to the highest; no entry: a code is one or
// two bytes.
std::vector<std::size_t> Planes(const TileFormat& f) {
  switch (f.row.storage) {
    case KVMIX_STORAGE_I6:
      return {4, 2};
    case KVMIX_STORAGE_I4:
      return {4};
    case KVMIX_STORAGE_I3:
      return {2, 1};
    case KVMIX_STORAGE_F16:
    case KVMIX_STORAGE_I8:
      break;
  }
  return {};
}
std::size_t CodeBits(const TileFormat& f) {
  const std::vector<std::size_t> planes = Planes(f);
  if (planes.empty()) return f.row.storage == KVMIX_STORAGE_F16 ? 16 : 8;
  return std::accumulate(planes.begin(), planes.end(), std::size_t{0});
}
std::size_t CodeBytes(const TileFormat& f) { return CodeBits(f) > 8 ? 2 : 1; }
// head_dim is a multiple of it: rows are whole bytes.
std::size_t ChannelStep(const TileFormat& f) {
  return Planes(f).empty() ? 1 : 8 / Planes(f).back();
}
// A tile has a multiple of so many terms of each lane.
std::size_t Terms(const TargetTiles& target, const TileFormat& f) {
  if (!Planes(f).empty()) return 4 * (8 / Planes(f).back());
  return f.row.storage == KVMIX_STORAGE_F16 ? 1 : target.i8_width;
}
std::size_t ScaleBytes(const TileFormat& f) {
  return f.row.scale == ScaleStore::kF32 ? 4 : f.row.scale == ScaleStore::kBF16 ? 2 : 0;
}

// The formats of K and V: every storage and scale, each as K and as V.
std::vector<std::pair<RowFormat, RowFormat>> Formats() {
  RowFormat f16, constant, f32, bf16, i6, i4_f32, i4_bf16, i3;
  i6.storage = KVMIX_STORAGE_I6;
  i4_f32.storage = i4_bf16.storage = KVMIX_STORAGE_I4;
  i3.storage = KVMIX_STORAGE_I3;
  i6.scale = i4_f32.scale = ScaleStore::kF32;
  i3.scale = i4_bf16.scale = ScaleStore::kBF16;
  constant.storage = f32.storage = bf16.storage = KVMIX_STORAGE_I8;
  constant.constant = 0.25f;
  f32.scale = ScaleStore::kF32;
  bf16.scale = ScaleStore::kBF16;
  return {{f16, f32}, {f32, f16},    {constant, bf16}, {bf16, constant},  {f32, f32},
          {f16, f16}, {i4_f32, f16}, {bf16, i4_bf16},  {i4_bf16, i4_f32}, {i6, i6},
          {i3, i3},   {i6, i3},      {i3, i6}};
}

// Code `channel` of a canonical row.
unsigned CodeOf(const TileFormat& f, const std::uint8_t* row, std::size_t channel) {
  if (f.row.storage == KVMIX_STORAGE_I8) return row[channel];
  if (f.row.storage == KVMIX_STORAGE_F16) return row[2 * channel] | row[2 * channel + 1] * 256u;
  unsigned code = 0;
  std::size_t from = 0;
  for (const std::size_t bits : Planes(f)) {
    const unsigned byte = row[channel * bits / 8];
    code |= (byte >> channel * bits % 8 & ((1u << bits) - 1)) << from;
    row += f.row.dim * bits / 8;
    from += bits;
  }
  return code;
}

// Puts one code into a block that has zeros there. K's tile is [token / lanes], V's
// [channel / lanes]; in it a byte of i8 lies at [term / width][lane][term % width]. Below i8 these
// bytes are cut into vectors of 4 * lanes: plane by plane, vector v of 8 / (bits of the last
// plane) that belong together has its bits in vector v / (8 / bits) of the plane.
void PutCode(const TargetTiles& target, const BlockFormat& f, bool k, std::size_t token,
             std::size_t channel, unsigned code, std::vector<std::uint8_t>& block) {
  const TileFormat& t = k ? f.k : f.v;
  const std::size_t terms = Terms(target, t), lanes = target.lanes;
  const std::size_t lane = k ? token : channel, term = k ? channel : token;
  const std::size_t tile_terms = k ? RoundUp(t.row.dim, terms) : kBlockTokens;
  const auto put = [&](std::size_t at, std::size_t bit, unsigned bits) {
    at += t.codes_offset + lane / lanes * (lanes * tile_terms * CodeBits(t) / 8);
    for (std::size_t i = 0; i < CodeBytes(t); ++i)
      block.at(at + i) = static_cast<std::uint8_t>(block[at + i] | bits << bit >> 8 * i);
  };
  const std::size_t width = t.row.storage == KVMIX_STORAGE_F16 ? 1 : target.i8_width;
  const std::size_t place = (term / width * lanes + lane % lanes) * width + term % width;
  if (Planes(t).empty()) return put(place * CodeBytes(t), 0, code);
  const std::size_t vector = 4 * lanes, together = terms / 4, v = place / vector % together;
  std::size_t plane_at = place / (vector * together) * (vector * together * CodeBits(t) / 8);
  for (const std::size_t bits : Planes(t)) {
    put(plane_at + v / (8 / bits) * vector + place % vector, v % (8 / bits) * bits,
        code & ((1u << bits) - 1));
    plane_at += vector * together * bits / 8;
    code >>= bits;
  }
}

// Canonical rows of some tokens, `gap` bytes between them. As codes at an address that suits no
// vector: one code past any alignment.
class Rows {
 public:
  std::vector<float> scales;  // and one more, which stays

  Rows(const TileFormat& format, std::size_t count, std::size_t gap)
      : scales(count + 1, kNoScale),
        bytes_(RowBytes(format.row)),
        stride_(bytes_ + gap),
        count_(count),
        first_(CodeBytes(format)),
        memory_(first_ + count * stride_ + 64, kUntouched) {}

  std::uint8_t* data() { return memory_.data() + first_; }
  std::uint8_t* row(std::size_t r) { return data() + r * stride_; }
  std::size_t stride() const { return stride_; }
  std::vector<std::uint8_t> Row(std::size_t r) { return {row(r), row(r) + bytes_}; }
  // Nothing was written but rows and scales.
  bool guard_intact() {
    bool intact = scales.back() == kNoScale;
    for (std::size_t i = 0; i < memory_.size(); ++i) {
      const std::size_t at = i - first_;  // wraps before the first
      const bool is_row = i >= first_ && at / stride_ < count_ && at % stride_ < bytes_;
      intact &= is_row || memory_[i] == kUntouched;
    }
    return intact;
  }

 private:
  static constexpr std::uint8_t kUntouched = 0x5A;
  static constexpr float kNoScale = -1.0f;
  std::size_t bytes_, stride_, count_, first_;
  std::vector<std::uint8_t> memory_;
};

// Blocks of one head, in memory in any order, with 64 guarded bytes around each.
class Blocks {
 public:
  Blocks(const Kernels& kernels, const BlockFormat& format, std::vector<std::size_t> order)
      : kernels_(kernels),
        format_(format),
        memory_(order.size() * (format.block_bytes + 64) + 64, kGuard),
        blocks_(order.size()) {
    for (std::size_t b = 0; b < order.size(); ++b) {
      blocks_[b] = memory_.data() + 64 + order[b] * (format.block_bytes + 64);
      std::fill_n(blocks_[b], format.block_bytes, std::uint8_t{0});
    }
  }
  const std::uint8_t* data(std::size_t block = 0) const { return blocks_[block]; }
  bool guard_intact() const {
    bool intact = true;
    for (std::size_t i = 0; i < memory_.size(); ++i) {
      intact &= i % (format_.block_bytes + 64) >= 64 || memory_[i] == kGuard;
    }
    return intact;
  }
  // Only the blocks that hold one of the tokens are in the table.
  void Store(bool k, std::size_t token, std::size_t count, Rows& rows, bool scales = true) const {
    const std::vector<std::uint8_t*> table = Table(token, count);
    (k ? kernels_.tiles.store_k : kernels_.tiles.store_v)(format_, table.data(), token, count,
                                                          rows.data(), rows.stride(),
                                                          scales ? rows.scales.data() : nullptr);
  }
  void Load(bool k, std::size_t token, std::size_t count, Rows& rows, bool scales = true) const {
    const std::vector<std::uint8_t*> table = Table(token, count);
    (k ? kernels_.tiles.load_k : kernels_.tiles.load_v)(format_, table.data(), token, count,
                                                        rows.data(), rows.stride(),
                                                        scales ? rows.scales.data() : nullptr);
  }

 private:
  static constexpr std::uint8_t kGuard = 0xA5;
  std::vector<std::uint8_t*> Table(std::size_t token, std::size_t count) const {
    std::vector<std::uint8_t*> table(blocks_.size(), nullptr);
    for (std::size_t t = token; t < token + count; ++t) {
      table[t / kBlockTokens] = blocks_[t / kBlockTokens];
    }
    return table;
  }
  const Kernels& kernels_;
  const BlockFormat& format_;
  std::vector<std::uint8_t> memory_;
  std::vector<std::uint8_t*> blocks_;
};

// A number that survives the scale's type.
float RandomScale(std::mt19937& rng, const TileFormat& f) {
  if (f.row.scale == ScaleStore::kConstant) return f.row.constant;
  return std::bit_cast<float>(static_cast<std::uint32_t>(
      (rng() & 0x3FFFFFFFu) & (f.row.scale == ScaleStore::kBF16 ? 0xFFFF0000u : 0xFFFFFFFFu)));
}

Rows RandomRows(std::mt19937& rng, const TileFormat& f, std::size_t count, std::size_t gap = 0) {
  Rows rows(f, count, gap);
  for (std::size_t r = 0; r < count; ++r) {
    std::uint32_t bits = 0;
    for (std::size_t i = 0; i < RowBytes(f.row); ++i, bits >>= 8) {
      if (i % 4 == 0) bits = static_cast<std::uint32_t>(rng());
      rows.row(r)[i] = static_cast<std::uint8_t>(bits);
    }
    rows.scales[r] = RandomScale(rng, f);
  }
  return rows;
}

// f(target, kernels, format) for everything there is.
template <class F>
void ForAllFormats(const F& f) {
  for (const Kernels& kernels : AllKernels()) {
    const auto target = kTargets.find(kernels.target);
    ASSERT_NE(target, kTargets.end()) << kernels.target << " has no entry in this test";
    for (const auto& [k_dim, v_dim] : kDims) {
      for (const auto& [k, v] : Formats()) {
        BlockFormat format;
        format.k.row = k;
        format.v.row = v;
        format.k.row.dim = k_dim;
        format.v.row.dim = v_dim;
        if (k_dim % ChannelStep(format.k) != 0 || v_dim % ChannelStep(format.v) != 0) continue;
        kernels.tiles.lay_out(format);
        SCOPED_TRACE(::testing::Message() << kernels.target << " dims " << k_dim << " " << v_dim
                                          << " storages " << int(k.storage) << int(v.storage)
                                          << " scales " << int(k.scale) << int(v.scale));
        f(target->second, kernels, format);
        if (::testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

TEST(Targets, BestFirstAndFoundByName) {
  ASSERT_FALSE(AllKernels().empty());
  for (const Kernels& k : AllKernels()) {
    ASSERT_EQ(FindKernels(k.target), &k);
    EXPECT_EQ(FindKernels(std::string(k.target) + "_"), nullptr);
  }
  EXPECT_EQ(FindKernels("no such target"), nullptr);
  EXPECT_EQ(FindKernels(""), &AllKernels().front());
}

TEST(Tiles, BlockIsKCodesKScalesVCodesVScalesCentres) {
  ForAllFormats([](const TargetTiles& target, const Kernels& kernels, const BlockFormat& f) {
    const std::size_t k_bytes =
        RoundUp(kBlockTokens * RoundUp(f.k.row.dim, Terms(target, f.k)) * CodeBits(f.k) / 8, 64);
    const std::size_t v_bytes =
        RoundUp(kBlockTokens * RoundUp(f.v.row.dim, target.lanes) * CodeBits(f.v) / 8, 64);
    EXPECT_EQ(f.k.codes_offset, 0u);
    EXPECT_EQ(f.k.scales_offset, k_bytes);
    EXPECT_EQ(f.v.codes_offset, k_bytes + kBlockTokens * ScaleBytes(f.k));
    EXPECT_EQ(f.v.scales_offset, f.v.codes_offset + v_bytes);
    EXPECT_EQ(f.block_bytes, f.v.scales_offset + kBlockTokens * ScaleBytes(f.v));
    for (const std::size_t stretch : {16u, 64u, 256u}) {
      BlockFormat centred = f;
      centred.stretch = stretch;
      kernels.tiles.lay_out(centred);
      EXPECT_EQ(centred.centres_offset, f.block_bytes);
      EXPECT_EQ(centred.block_bytes,
                RoundUp(f.block_bytes + kBlockTokens / stretch * (4 + f.k.row.dim), 64));
      EXPECT_EQ(centred.v.scales_offset, f.v.scales_offset);
    }
  });
}

TEST(Tiles, EveryCodeLiesWhereTheLayoutSays) {
  std::mt19937 rng(1);
  ForAllFormats([&](const TargetTiles& target, const Kernels& kernels, const BlockFormat& f) {
    for (const bool k : {true, false}) {
      const TileFormat& t = k ? f.k : f.v;
      const unsigned flip = k && t.row.storage == KVMIX_STORAGE_I8 ? target.k_flip : 0;
      for (const std::size_t token : {std::size_t{0}, std::size_t{1}, target.lanes - 1,
                                      target.lanes, std::size_t{130}, kBlockTokens - 1}) {
        const Blocks block(kernels, f, {0});
        Rows row = RandomRows(rng, t, 1);
        block.Store(k, token, 1, row);
        std::vector<std::uint8_t> expected(f.block_bytes);
        for (std::size_t c = 0; c < t.row.dim; ++c)
          PutCode(target, f, k, token, c, CodeOf(t, row.row(0), c) ^ flip, expected);
        // Channels that fill K's last word hold code 0. (V's lie in vectors of their own and are 0
        // as well.)
        for (std::size_t c = t.row.dim; k && c < RoundUp(t.row.dim, Terms(target, t)); ++c)
          PutCode(target, f, k, token, c, flip, expected);
        if (t.row.scale != ScaleStore::kConstant) {  // bf16: the upper half of an f32
          const std::size_t bytes = ScaleBytes(t);
          std::memcpy(&expected[t.scales_offset + token * bytes],
                      reinterpret_cast<const char*>(row.scales.data()) + 4 - bytes, bytes);
        }
        ASSERT_EQ(std::vector<std::uint8_t>(block.data(), block.data() + f.block_bytes), expected)
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
    const Blocks block(kernels, f, {0});
    struct Row {
      std::vector<std::uint8_t> codes;
      float scale;
    };
    std::vector<Row> rows[2] = {std::vector<Row>(kBlockTokens), std::vector<Row>(kBlockTokens)};
    for (int round = 0; round < 2; ++round) {  // the second overwrites half of the first
      std::shuffle(order.begin(), order.end(), rng);
      for (std::size_t i = 0; i < (round == 0 ? kBlockTokens : kBlockTokens / 2); ++i) {
        for (const bool k : {true, false}) {
          Rows row = RandomRows(rng, k ? f.k : f.v, 1);
          block.Store(k, order[i], 1, row);
          rows[k][order[i]] = {row.Row(0), row.scales[0]};
        }
      }
    }
    for (std::size_t token = 0; token < kBlockTokens; ++token) {
      for (const bool k : {true, false}) {
        Rows loaded(k ? f.k : f.v, 1, 0);
        block.Load(k, token, 1, loaded);
        ASSERT_EQ(loaded.Row(0), rows[k][token].codes) << (k ? "K" : "V") << " token " << token;
        ASSERT_EQ(loaded.scales[0], rows[k][token].scale) << (k ? "K" : "V") << " token " << token;
        ASSERT_TRUE(loaded.guard_intact());
      }
    }
    EXPECT_TRUE(block.guard_intact());
  });
}

// Runs of any length across the borders of blocks that lie anywhere, with strides, some of them
// written over others: the same bytes as token by token, and rows come back in runs of other
// lengths.
TEST(Tiles, RunsOfTokensOverScatteredBlocks) {
  constexpr std::size_t kTokens = 3 * kBlockTokens;
  std::mt19937 rng(4);
  ForAllFormats([&](const TargetTiles&, const Kernels& kernels, const BlockFormat& f) {
    const Blocks scattered(kernels, f, {2, 0, 1}), in_order(kernels, f, {0, 1, 2});
    for (const bool k : {true, false}) {
      const TileFormat& t = k ? f.k : f.v;
      Rows all = RandomRows(rng, t, kTokens);
      const auto copy = [&](std::size_t from, std::size_t count, std::size_t gap) {
        Rows run(t, count, gap);
        for (std::size_t r = 0; r < count; ++r)
          std::memcpy(run.row(r), all.row(from + r), RowBytes(t.row));
        std::copy_n(all.scales.begin() + static_cast<std::ptrdiff_t>(from), count,
                    run.scales.begin());
        return run;
      };
      for (std::size_t token = 0; token < kTokens; ++token) {
        Rows one = copy(token, 1, 0);
        in_order.Store(k, token, 1, one);
      }
      const std::pair<std::size_t, std::size_t> runs[] = {
          {1, 254}, {0, 3}, {255, 2}, {256, 256}, {510, 258}, {512, 1}, {700, 0}, {200, 500}};
      for (const auto& [first, count] : runs) {
        Rows run = copy(first, count, 2 * (first % 3));
        scattered.Store(k, first, count, run);
        ASSERT_TRUE(run.guard_intact());
      }
      const std::size_t begin = t.codes_offset,
                        bytes = t.scales_offset + kBlockTokens * ScaleBytes(t) - begin;
      for (std::size_t b = 0; b < 3; ++b) {
        ASSERT_EQ(std::memcmp(scattered.data(b) + begin, in_order.data(b) + begin, bytes), 0)
            << (k ? "K" : "V") << " block " << b;
      }
      const std::pair<std::size_t, std::size_t> loads[] = {
          {0, kTokens}, {255, 1}, {255, 258}, {600, 0}, {512, 256}};
      for (const auto& [first, count] : loads) {
        Rows loaded(t, count, 4), expected = copy(first, count, 4);
        scattered.Load(k, first, count, loaded);
        ASSERT_TRUE(loaded.guard_intact());
        for (std::size_t r = 0; r < count; ++r) ASSERT_EQ(loaded.Row(r), expected.Row(r));
        ASSERT_EQ(loaded.scales, expected.scales);
      }
    }
    EXPECT_TRUE(scattered.guard_intact());
  });
}

// Without scales codes go in and out alone, and what was there of the scales stays.
TEST(Tiles, ScalesMayBeLeftOut) {
  std::mt19937 rng(5);
  ForAllFormats([&](const TargetTiles&, const Kernels& kernels, const BlockFormat& f) {
    const Blocks block(kernels, f, {0, 1});
    for (const bool k : {true, false}) {
      const TileFormat& t = k ? f.k : f.v;
      Rows first = RandomRows(rng, t, 9), second = RandomRows(rng, t, 9), loaded(t, 9, 0);
      block.Store(k, 250, 9, first);
      block.Store(k, 250, 9, second, false);
      block.Load(k, 250, 9, loaded, false);
      ASSERT_EQ(loaded.scales, std::vector<float>(10, -1.0f));
      for (std::size_t r = 0; r < 9; ++r) ASSERT_EQ(loaded.Row(r), second.Row(r));
      block.Load(k, 250, 9, loaded);
      ASSERT_EQ(loaded.scales, first.scales);
    }
  });
}

TEST(Tiles, CodesAtAnyAddress) {
  std::mt19937 rng(3);
  ForAllFormats([&](const TargetTiles&, const Kernels& kernels, const BlockFormat& f) {
    const Blocks block(kernels, f, {0});
    for (const bool k : {true, false}) {
      // one code past any alignment that a vector might like
      Rows row = RandomRows(rng, k ? f.k : f.v, 1), loaded(k ? f.k : f.v, 1, 0);
      block.Store(k, 5, 1, row);
      block.Load(k, 5, 1, loaded);
      ASSERT_EQ(row.Row(0), loaded.Row(0)) << (k ? "K" : "V");
    }
  });
}

}  // namespace
}  // namespace kvmix::kernels
