// The attention kernel at its own door, kernels/attend.h, on every target: out, max and sum of a
// task against double precision over the very codes and scales that its blocks hold. (Attention
// over a cache: attend_test.cc, attend_options_test.cc.)
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/amx.h"
#include "kernels/amx_bodies.h"
#include "kernels/kernels.h"
#include "kernels/levels.h"
#include "kvmix/half.h"
#include "tests/amx_emulator.h"

namespace kvmix::kernels {
namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;
using Sizes = std::initializer_list<std::size_t>;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr double kLog2E = 1.4426950408889634;

// The bound that kvmix/attention.h states, on NMSE.
constexpr double kBound = 1e-6;

// All targets, and the kernels of tiles for any number of rows: over tiles in memory and, where the
// CPU has them, by its instructions.
// Tiles are off unless somebody asks, which must be before anybody looks at the targets.
[[maybe_unused]] const int kAsked = setenv("KVMIX_AMX", "16", 0);

const std::vector<Kernels>& TestedKernels() {
  static const std::vector<Kernels> kernels = [] {
    std::vector<Kernels> all = AllKernels();
    const auto add = [&](const char* name, const AttendKernels& attend) {
      if (attend.attend == nullptr) {
        std::printf("  NOT TESTED HERE: %s, for want of AVX3_DL\n", name);
        return;
      }
      all.push_back(*FindKernels("AVX3_DL"));
      all.back().target = name;
      all.back().attend = attend;
    };
    add("tiles in memory", PortableTileKernels());
    if (Amx().yes) add("tiles of AMX", HardwareTileKernels());
    return all;
  }();
  return kernels;
}

RowFormat Format(Storage storage, ScaleStore scale, std::size_t dim, float constant) {
  RowFormat format;
  format.storage = storage;
  format.scale = scale;
  format.dim = dim;
  if (storage == KVMIX_STORAGE_I8 && scale == ScaleStore::kConstant) format.constant = constant;
  return format;
}

// Every storage, and i8 and i4 with each scale: K's and V's formats are any two of these.
constexpr std::pair<Storage, ScaleStore> kKinds[] = {
    {KVMIX_STORAGE_F16, ScaleStore::kConstant}, {KVMIX_STORAGE_I8, ScaleStore::kConstant},
    {KVMIX_STORAGE_I8, ScaleStore::kF32},       {KVMIX_STORAGE_I8, ScaleStore::kBF16},
    {KVMIX_STORAGE_I4, ScaleStore::kF32},       {KVMIX_STORAGE_I4, ScaleStore::kBF16},
    {KVMIX_STORAGE_I6, ScaleStore::kBF16},      {KVMIX_STORAGE_I3, ScaleStore::kF32}};
constexpr auto kF16 = kKinds[0], kI8F32 = kKinds[2], kI8BF16 = kKinds[3], kI4F32 = kKinds[4],
               kI4BF16 = kKinds[5], kI6BF16 = kKinds[6], kI3F32 = kKinds[7];
using Kind = std::pair<Storage, ScaleStore>;

// The planes of a storage below i8, and the level of each code.
struct Packed {
  std::vector<std::size_t> planes;  // bits, from the code's lowest
  std::vector<int> levels;
};
const Packed& PackedOf(Storage storage) {
  static const Packed i6 = [] {
    Packed p{{4, 2}, std::vector<int>(64)};
    for (int v = -31; v <= 31; ++v) p.levels[static_cast<std::size_t>(v & 63)] = v;
    return p;
  }();
  static const Packed i4{{4}, {kLevels.begin(), kLevels.end()}};
  static const Packed i3{{2, 1}, {14, 45, 79, 127, -127, -79, -45, -14}};
  return storage == KVMIX_STORAGE_I6 ? i6 : storage == KVMIX_STORAGE_I4 ? i4 : i3;
}
bool IsPacked(Storage storage) {
  return storage != KVMIX_STORAGE_F16 && storage != KVMIX_STORAGE_I8;
}
// Rows are whole bytes.
bool Fits(Storage storage, std::size_t dim) {
  return !IsPacked(storage) || dim * PackedOf(storage).planes.back() % 8 == 0;
}

// Codes of K or V, canonical rows, and the numbers that they are.
struct Rows {
  RowFormat format;
  std::vector<std::uint8_t> codes;  // [tokens][RowBytes]
  Floats scales;                    // [tokens]

  void Put(std::size_t token, std::size_t channel, float x) {
    const std::size_t at = token * format.dim + channel;
    if (format.storage == KVMIX_STORAGE_F16) {
      const Half half = FloatToHalf(x);
      std::memcpy(&codes[2 * at], &half, 2);
    } else if (const auto& [planes, levels] = PackedOf(format.storage); IsPacked(format.storage)) {
      const float unit = format.storage == KVMIX_STORAGE_I6 ? 10.0f : 40.0f;
      const auto far = [&](int level) { return std::fabs(unit * x - static_cast<float>(level)); };
      auto code = static_cast<unsigned>(std::ranges::min_element(levels, {}, far) - levels.begin());
      std::uint8_t* plane = &codes[token * RowBytes(format)];
      for (const std::size_t bits : planes) {
        std::uint8_t& byte = plane[channel * bits / 8];
        const unsigned mask = (1u << bits) - 1, shift = channel * bits % 8;
        byte = static_cast<std::uint8_t>((byte & ~(mask << shift)) | (code & mask) << shift);
        plane += format.dim * bits / 8;
        code >>= bits;
      }
    } else {
      const float code = std::clamp(std::nearbyint(40.0f * x), -127.0f, 127.0f);
      codes[at] = static_cast<std::uint8_t>(static_cast<std::int8_t>(code));
    }
  }
  double At(std::size_t token, std::size_t channel) const {
    const std::size_t at = token * format.dim + channel;
    if (format.storage == KVMIX_STORAGE_F16) {
      Half half;
      std::memcpy(&half, &codes[2 * at], 2);
      return HalfToFloat(half);
    }
    if (IsPacked(format.storage)) {
      std::size_t code = 0, from = 0;
      const std::uint8_t* plane = &codes[token * RowBytes(format)];
      for (const std::size_t bits : PackedOf(format.storage).planes) {
        const unsigned byte = plane[channel * bits / 8];
        code |= std::size_t{byte >> channel * bits % 8 & ((1u << bits) - 1)} << from;
        plane += format.dim * bits / 8;
        from += bits;
      }
      return double{scales[token]} * PackedOf(format.storage).levels[code];
    }
    return double{scales[token]} * static_cast<std::int8_t>(codes[at]);
  }
};

// Normal numbers around `offset`, in tokens of different size where there is a scale for it.
Rows RandomRows(std::mt19937& rng, Kind kind, std::size_t tokens, std::size_t dim, float spread,
                float offset = 0.0f) {
  std::normal_distribution<float> normal;
  Rows rows{Format(kind.first, kind.second, dim, 0.025f), {}, Floats(tokens)};
  rows.codes.resize(tokens * RowBytes(rows.format));
  for (std::size_t t = 0; t < tokens; ++t) {
    const float size = std::exp2(spread * normal(rng));
    const bool f16 = rows.format.storage == KVMIX_STORAGE_F16;
    const ScaleStore scale = rows.format.scale;
    rows.scales[t] = scale == ScaleStore::kConstant ? rows.format.constant : 0.025f * size;
    if (scale == ScaleStore::kBF16) {
      rows.scales[t] =
          std::bit_cast<float>(std::bit_cast<std::uint32_t>(rows.scales[t]) & 0xFFFF0000u);
    }
    for (std::size_t c = 0; c < dim; ++c) {
      rows.Put(t, c, (f16 ? size : 1.0f) * (normal(rng) + offset));
    }
  }
  return rows;
}

struct Head {
  Rows k, v;
  std::size_t stretch = 0;
  std::vector<std::uint8_t> centres = {};  // [stretches of all blocks][4 + K's dim]
  std::size_t tokens() const { return k.scales.size(); }
  std::size_t centre_bytes() const { return 4 + k.format.dim; }

  // K with the centre of the token's stretch.
  double K(std::size_t token, std::size_t channel) const {
    if (stretch == 0) return k.At(token, channel);
    const std::uint8_t* const centre = &centres[token / stretch * centre_bytes()];
    float scale;
    std::memcpy(&scale, centre, 4);
    return k.At(token, channel) + double{scale} * static_cast<std::int8_t>(centre[4 + channel]);
  }
  // The centre of a stretch: codes of -127 to 127, times `scale`.
  void Centre(std::size_t of, float scale, const std::vector<int>& codes) {
    std::uint8_t* const centre = &centres[of * centre_bytes()];
    std::memcpy(centre, &scale, 4);
    for (std::size_t c = 0; c < codes.size(); ++c)
      centre[4 + c] = static_cast<std::uint8_t>(codes[c]);
  }
};

// The head around centres whose numbers go up to `size`.
Head AroundCentres(Head head, std::size_t stretch, float size, unsigned seed) {
  std::mt19937 rng(seed);
  head.stretch = stretch;
  const std::size_t count = (head.tokens() / kBlockTokens + 1) * kBlockTokens / stretch;
  head.centres.resize(count * head.centre_bytes());
  for (std::size_t s = 0; s < count; ++s) {
    std::vector<int> codes(head.k.format.dim);
    for (int& code : codes) code = static_cast<int>(rng() % 255) - 127;
    head.Centre(s, size / 127.0f, codes);
  }
  return head;
}

// An output of one number would cancel almost to zero, and its relative error grow: V has an offset
// there.
Head RandomHead(Kind k, Kind v, std::size_t k_dim, std::size_t v_dim, std::size_t tokens,
                unsigned seed) {
  std::mt19937 rng(seed);
  return {RandomRows(rng, k, tokens, k_dim, 0.3f),
          RandomRows(rng, v, tokens, v_dim, 1.0f, v_dim == 1 ? 1.5f : 0.0f)};
}

Floats RandomFloats(std::mt19937& rng, std::size_t n) {
  std::normal_distribution<float> normal;
  Floats x(n);
  for (float& f : x) f = normal(rng);
  return x;
}

// Memory on cache lines.
class Lines {
 public:
  explicit Lines(std::size_t bytes, std::uint8_t fill = 0) : lines_(bytes / 64 + 1) {
    std::memset(data(), fill, lines_.size() * 64);
  }
  std::uint8_t* data() { return lines_[0].bytes; }

 private:
  struct alignas(64) Line {
    std::uint8_t bytes[64];
  };
  std::vector<Line> lines_;
};

// A head's tokens as a target's blocks: block b at place order[b] of memory (in order, if there is
// none).
class Blocks {
 public:
  Blocks(const Kernels& k, const Head& head, std::vector<std::size_t> order = {})
      : kernels(k), format(Lay(k, head)), memory_(Bytes(head, format)) {
    const std::size_t count = (head.tokens() + kBlockTokens - 1) / kBlockTokens;
    if (order.empty()) {
      order.resize(count);
      std::iota(order.begin(), order.end(), std::size_t{0});
    }
    std::vector<std::uint8_t*> blocks;
    for (std::size_t b = 0; b < count; ++b)
      blocks.push_back(memory_.data() + order[b] * format.block_bytes);
    kernels.tiles.store_k(format, blocks.data(), 0, head.tokens(), head.k.codes.data(),
                          RowBytes(format.k.row), head.k.scales.data());
    kernels.tiles.store_v(format, blocks.data(), 0, head.tokens(), head.v.codes.data(),
                          RowBytes(format.v.row), head.v.scales.data());
    for (std::size_t b = 0; b < count && head.stretch != 0; ++b) {
      const std::size_t bytes = kBlockTokens / head.stretch * head.centre_bytes();
      std::memcpy(blocks[b] + format.centres_offset, &head.centres[b * bytes], bytes);
    }
    table_.assign(blocks.begin(), blocks.end());
  }
  // Of the blocks that hold tokens of [first, last); null for the others.
  std::vector<const std::uint8_t*> Table(std::size_t first, std::size_t last) const {
    std::vector<const std::uint8_t*> table(table_.size() + 1, nullptr);
    for (std::size_t t = first; t < last; ++t) table[t / kBlockTokens] = table_[t / kBlockTokens];
    return table;
  }

  const Kernels& kernels;
  const BlockFormat format;

 private:
  static BlockFormat Lay(const Kernels& k, const Head& head) {
    BlockFormat f;
    f.k.row = head.k.format;
    f.v.row = head.v.format;
    f.stretch = head.stretch;
    k.tiles.lay_out(f);
    return f;
  }
  static std::size_t Bytes(const Head& head, const BlockFormat& f) {
    return (head.tokens() / kBlockTokens + 1) * f.block_bytes;
  }
  Lines memory_;
  std::vector<const std::uint8_t*> table_;
};

// What a task asks.
struct Ask {
  Floats q;  // [rows, K's dim]
  std::size_t rows = 1, group = 1;
  std::int64_t first_end = 0;
  std::size_t tokens = 0;
  std::size_t first = 0, last = 0;
  std::size_t window = 0, prefix = 0, forgotten = 0;
  bool causal = true;
  float scale = 0.125f;
  float soft_cap = 0.0f;
  Floats bias = {};  // [rows], or empty
  const Mask* mask = nullptr;
};

Ask RandomAsk(std::mt19937& rng, const Head& head, std::size_t rows, std::size_t group) {
  const std::size_t dim = head.k.format.dim;
  Ask ask;
  ask.q = RandomFloats(rng, rows * dim);
  ask.rows = rows;
  ask.group = group;
  ask.first_end =
      static_cast<std::int64_t>(head.tokens()) - static_cast<std::int64_t>((rows - 1) / group);
  ask.tokens = ask.last = head.tokens();
  ask.scale = 1.0f / std::sqrt(static_cast<float>(dim));
  return ask;
}

// What one row should get; out and sum are relative to `top`.
struct Expected {
  bool seen = false;
  double top = -std::numeric_limits<double>::infinity();  // the largest s
  double max = -std::numeric_limits<double>::infinity();  // the largest s + log2(V's scale)
  double sum = 0.0;
  Doubles out;
};

// In double precision, straight from kernels/attend.h.
std::vector<Expected> Reference(const Head& head, const Ask& ask) {
  const std::size_t k_dim = head.k.format.dim, v_dim = head.v.format.dim;
  std::vector<Expected> rows(ask.rows);
  Doubles k, v;  // tokens [first, last)
  for (std::size_t t = ask.first; t < ask.last; ++t) {
    for (std::size_t c = 0; c < k_dim; ++c) k.push_back(head.K(t, c));
    for (std::size_t c = 0; c < v_dim; ++c) v.push_back(head.v.At(t, c));
  }
  for (std::size_t r = 0; r < ask.rows; ++r) {
    Expected& e = rows[r];
    e.out.assign(v_dim, 0.0);
    const std::int64_t end = ask.first_end + static_cast<std::int64_t>(r / ask.group);
    const std::int64_t window = static_cast<std::int64_t>(ask.window);
    const std::int64_t begin = window != 0 ? std::max<std::int64_t>(end - window, 0) : 0;
    const std::int64_t prefix = static_cast<std::int64_t>(ask.prefix);
    const auto sees = [&](std::int64_t token) {
      if (token < static_cast<std::int64_t>(ask.forgotten)) return false;
      return (token >= begin && (token < end || !ask.causal)) ||
             (token < prefix && end >= 1 && end <= prefix);
    };
    Doubles s(head.tokens(), -std::numeric_limits<double>::infinity());
    for (std::size_t t = ask.first; t < ask.last; ++t) {
      if (!sees(static_cast<std::int64_t>(t))) continue;
      double score = 0.0;
      for (std::size_t c = 0; c < k_dim; ++c)
        score += double{ask.q[r * k_dim + c]} * k[(t - ask.first) * k_dim + c];
      score *= ask.scale;
      if (ask.soft_cap != 0.0f) {
        if (!ask.bias.empty()) score += ask.bias[r];
        score = ask.soft_cap * std::tanh(score / ask.soft_cap);
      }
      s[t] = kLog2E * score;
      const bool scaled = head.v.format.storage != KVMIX_STORAGE_F16;
      const double log2 = scaled ? std::max(std::log2(double{head.v.scales[t]}), -32.0) : 0.0;
      e.seen = true;
      e.top = std::max(e.top, s[t]);
      e.max = std::max(e.max, s[t] + log2);
    }
    for (std::size_t t = ask.first; t < ask.last && e.seen; ++t) {
      const double weight = std::exp2(s[t] - e.top);
      e.sum += weight;
      if (weight == 0.0) continue;
      for (std::size_t c = 0; c < v_dim; ++c) e.out[c] += weight * v[(t - ask.first) * v_dim + c];
    }
  }
  return rows;
}

struct Outcome {
  std::size_t padded = 0;
  Floats out, max, sum;
};

// Writes neither past its outputs nor past its scratch, and looks up no other block.
Outcome Attend(const Blocks& blocks, const Ask& ask, bool stream,
               const std::uint8_t* after = nullptr) {
  constexpr std::uint8_t kGuard = 0xA5;
  const AttendKernels& k = blocks.kernels.attend;
  const std::size_t operand_bytes = k.operand_bytes(blocks.format, ask.rows);
  Lines operand(operand_bytes, kGuard);
  Outcome o;
  o.padded = k.padded_dim(blocks.format);
  EXPECT_GE(o.padded, blocks.format.v.row.dim);
  o.out.assign(ask.rows * o.padded + 1, -7.0f);
  o.max.assign(ask.rows + 1, -7.0f);
  o.sum.assign(ask.rows + 1, -7.0f);
  const std::vector<const std::uint8_t*> table = blocks.Table(ask.first, ask.last);
  AttendTask task{};
  task.format = &blocks.format;
  task.blocks = table.data();
  task.first_token = ask.first;
  task.last_token = ask.last;
  task.q = ask.q.data();
  task.rows = ask.rows;
  task.group = ask.group;
  task.sight = {.first_end = ask.first_end,
                .tokens = ask.tokens,
                .window = ask.window,
                .prefix = ask.prefix,
                .forgotten = ask.forgotten,
                .causal = ask.causal};
  task.mask = ask.mask;
  task.scale = ask.scale;
  task.soft_cap = ask.soft_cap;
  task.bias = ask.bias.empty() ? nullptr : ask.bias.data();
  task.stream = stream;
  task.after = after;
  task.operand = operand.data();
  task.out = o.out.data();
  task.max = o.max.data();
  task.sum = o.sum.data();
  k.attend(task);
  EXPECT_EQ(operand.data()[operand_bytes], kGuard);
  for (Floats* floats : {&o.out, &o.max, &o.sum}) {
    EXPECT_EQ(floats->back(), -7.0f);
    floats->pop_back();
  }
  return o;
}

bool SameBits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}
bool SameBits(const Outcome& a, const Outcome& b) {
  return SameBits(a.out, b.out) && SameBits(a.max, b.max) && SameBits(a.sum, b.sum);
}

std::string Names(const Head& head) {
  std::string names;
  for (const Rows* rows : {&head.k, &head.v}) {
    const RowFormat& f = rows->format;
    names += rows == &head.k ? "K " : ", V ";
    names += f.storage == KVMIX_STORAGE_F16 ? "f16"
                                            : "i" + std::to_string(kvmix_storage_bits(f.storage));
    names += f.scale == ScaleStore::kF32 ? " f32" : f.scale == ScaleStore::kBF16 ? " bf16" : "";
    names += " x " + std::to_string(f.dim);
  }
  return names;
}

class AttendKernel : public ::testing::Test {
 protected:
  // out / sum is the attention, per query head within `bound` of NMSE; max is near its place, and
  // sum is what it is said to be for this very max. (But for huge scores, where f32 leaves a sum no
  // meaning but beside its own out: it may not overflow.)
  void Expect(const Head& head, const Ask& ask, const std::vector<Expected>& expected,
              const Outcome& o, double bound = kBound, bool huge_scores = false) {
    SCOPED_TRACE(::testing::Message()
                 << Names(head) << "; " << ask.rows << " rows of groups of " << ask.group
                 << ", first end " << ask.first_end << ", tokens " << ask.first << " to "
                 << ask.last << ", window " << ask.window << ", cap " << ask.soft_cap);
    const std::size_t dim = head.v.format.dim;
    Doubles error(ask.group), size(ask.group);
    for (std::size_t r = 0; r < ask.rows; ++r) {
      const Expected& e = expected[r];
      const float* out = &o.out[r * o.padded];
      if (!e.seen) {
        EXPECT_EQ(o.max[r], -kInf) << "row " << r << " saw nothing";
        EXPECT_EQ(o.sum[r], 0.0f) << "row " << r << " saw nothing";
        EXPECT_TRUE(std::all_of(out, out + dim, [](float x) { return x == 0.0f; })) << r;
        continue;
      }
      // Log2Bound is at most 0.09 too large; a q of 8 bits moves scores as well.
      const double near = bound > kBound ? 0.2 : 0.1;
      EXPECT_NEAR(o.max[r], e.max, near + 1e-5 * std::fabs(e.max)) << "row " << r;
      if (huge_scores) {
        EXPECT_GT(o.sum[r], 0.0f) << "row " << r;
        EXPECT_LE(o.sum[r], 0x1p33 * static_cast<double>(head.tokens())) << "row " << r;
      } else {
        const double to_top = std::exp2(o.max[r] - e.top);
        EXPECT_NEAR(o.sum[r] * to_top / e.sum, 1.0, std::sqrt(bound)) << "row " << r;
      }
      for (std::size_t c = 0; c < dim; ++c) {
        const double found = out[c] / double{o.sum[r]}, wanted = e.out[c] / e.sum;
        error[r % ask.group] += (found - wanted) * (found - wanted);
        size[r % ask.group] += wanted * wanted;
      }
    }
    for (std::size_t h = 0; h < ask.group; ++h) {
      EXPECT_TRUE(error[h] <= bound * size[h])
          << "query head " << h << ": NMSE " << error[h] / size[h];
      if (size[h] > 0.0) worst_ = std::max(worst_, error[h] / size[h] / bound);
    }
  }

  // On every target; from memory and from L2.
  void Check(const Head& head, const Ask& ask, const std::vector<std::size_t>& order = {},
             double bound = kBound, bool huge_scores = false) {
    const std::vector<Expected> expected = Reference(head, ask);
    for (const Kernels& kernels : TestedKernels()) {
      SCOPED_TRACE(kernels.target);
      const Blocks blocks(kernels, head, order);
      for (const bool stream : {false, true}) {
        Expect(head, ask, expected, Attend(blocks, ask, stream), bound, huge_scores);
      }
    }
  }

  void TearDown() override {
    if (worst_ > 0.0) std::printf("  worst NMSE: %.1e of the bound\n", worst_);
  }

 private:
  double worst_ = 0.0;
};

TEST_F(AttendKernel, EveryStorageScaleAndDim) {
  constexpr std::pair<std::size_t, std::size_t> kDims[] = {
      {1, 1}, {33, 33}, {64, 64}, {80, 80}, {128, 128}, {256, 256}, {192, 128}, {7, 100}};
  constexpr std::size_t kTokens[] = {1, 3, 15, 16, 17, 255, 256, 257, 600};
  constexpr std::size_t kGroups[] = {1, 4, 7};
  std::mt19937 rng(1);
  unsigned count = 0;
  for (const auto& [k_dim, v_dim] : kDims) {
    for (const Kind& k : kKinds) {
      for (const Kind& v : kKinds) {
        if (!Fits(k.first, k_dim) || !Fits(v.first, v_dim)) continue;
        const Head head = RandomHead(k, v, k_dim, v_dim, kTokens[count % 9], count);
        const std::size_t rows = count % 5 == 0 ? 48 + count % 9 : 1 + count % 18;
        Check(head, RandomAsk(rng, head, rows, kGroups[count % 3]));
        ++count;
      }
    }
  }
}

TEST_F(AttendKernel, EveryNumberOfRowsAndGroup) {
  std::mt19937 rng(2);
  for (const auto& [k, v] : {std::pair(kI8F32, kI8F32),
                             {kF16, kF16},
                             {kI8BF16, kF16},
                             {kI4BF16, kI4F32},
                             {kI3F32, kI6BF16}}) {
    const Head head = RandomHead(k, v, 64, 80, 300, 2);
    // One turn to several, and so many that they have tiles of their own.
    for (std::size_t rows = 1; rows <= 49; rows += rows == 18 ? 29 : 1) {
      for (const std::size_t group : Sizes{1, 4, 7}) {
        Check(head, RandomAsk(rng, head, rows, group));
      }
    }
  }
}

// Blocks lie anywhere; those without tokens of the range are not there at all.
TEST_F(AttendKernel, RangesAtAndAroundTheBordersOfBlocks) {
  constexpr std::size_t kBorders[] = {0, 1, 16, 100, 255, 256, 257, 511, 512, 513, 768, 1000};
  std::mt19937 rng(3);
  for (const auto& [k, v] :
       {std::pair(kI8F32, kI8BF16), {kF16, kF16}, {kI4F32, kI4BF16}, {kI6BF16, kI3F32}}) {
    const Head head = RandomHead(k, v, IsPacked(k.first) ? 36 : 33, 64, 1000, 3);
    Ask ask = RandomAsk(rng, head, 5, 2);
    for (const std::int64_t first_end : {1000, 511, 255}) {  // rows end before the range does
      for (const std::size_t first : kBorders) {
        for (const std::size_t last : kBorders) {
          if (last < first) continue;
          ask.first = first;
          ask.last = last;
          ask.first_end = first_end;
          Check(head, ask, {2, 0, 3, 1});
        }
      }
    }
  }
}

TEST_F(AttendKernel, WindowsAndEnds) {
  std::mt19937 rng(4);
  const Head head = RandomHead(kI8F32, kI8F32, 64, 33, 700, 4);
  for (const std::size_t window : Sizes{0, 1, 2, 5, 64, 255, 256, 257, 700, 5000}) {
    for (const std::int64_t first_end : {-20, -3, -1, 0, 1, 16, 250, 256, 257, 510, 690}) {
      for (const std::size_t group : Sizes{1, 4, 7}) {
        Ask ask = RandomAsk(rng, head, 10, group);
        ask.first_end = first_end;
        ask.window = window;
        Check(head, ask);
        ask.first = 200;
        ask.last = 520;
        Check(head, ask);
      }
    }
  }
}

TEST_F(AttendKernel, PrefixesForgottenTokensAndNoCausality) {
  std::mt19937 rng(44);
  const Head head = RandomHead(kI8F32, kI4BF16, 64, 64, 700, 44);
  for (const std::int64_t first_end : {-2, 1, 30, 250, 600}) {
    for (const std::size_t prefix : Sizes{0, 1, 5, 255, 256, 300, 700}) {
      for (const std::size_t window : Sizes{0, 3, 257}) {
        Ask ask = RandomAsk(rng, head, 24, 2);
        ask.first_end = first_end;
        ask.prefix = prefix;
        ask.window = window;
        ask.forgotten = prefix % 2 * 7;
        ask.causal = prefix != 5;
        Check(head, ask);
        ask.first = 200;
        ask.last = 520;
        Check(head, ask);
      }
    }
  }
}

TEST_F(AttendKernel, SoftCapAndBias) {
  std::mt19937 rng(5);
  for (const auto& [k, v] : {std::pair(kI8F32, kI8F32), {kF16, kF16}, {kI8F32, kF16}}) {
    const Head head = RandomHead(k, v, 80, 64, 400, 5);
    for (const std::size_t rows : Sizes{1, 7, 18}) {
      Ask ask = RandomAsk(rng, head, rows, 4);
      Floats bias = RandomFloats(rng, rows);
      for (float& b : bias) b *= 10.0f;
      for (const float cap : {0.5f, 5.0f, 30.0f, 1000.0f}) {
        ask.soft_cap = cap;
        ask.bias = {};
        Check(head, ask);
        ask.bias = bias;
        Check(head, ask);
      }
      // Softmax does not see a bias.
      ask.soft_cap = 0.0f;
      Ask without = ask;
      without.bias = {};
      for (const Kernels& kernels : TestedKernels()) {
        const Blocks blocks(kernels, head);
        EXPECT_TRUE(SameBits(Attend(blocks, ask, true), Attend(blocks, without, true)))
            << kernels.target;
      }
    }
  }
}

// A row with NaN or Inf in q has max NaN; its neighbours do not notice.
TEST_F(AttendKernel, NotANumberInQ) {
  std::mt19937 rng(6);
  for (const Kind& k : kKinds) {
    const std::size_t k_dim = IsPacked(k.first) ? 40 : 33;
    for (const Kind& v : {kF16, kI8F32, kI4F32}) {
      const Head head = RandomHead(k, v, k_dim, 20, 300, 6);
      for (const std::size_t rows : Sizes{1, 4, 9, 18}) {
        const Ask ask = RandomAsk(rng, head, rows, 3);
        for (const float special : {kNaN, -kNaN, kInf, -kInf}) {
          for (const std::size_t channel : Sizes{0, 15, 32}) {
            Ask with = ask;
            for (std::size_t r = channel % 2; r < rows; r += 3)
              with.q[r * k_dim + channel] = special;
            for (const Kernels& kernels : TestedKernels()) {
              const Blocks blocks(kernels, head);
              for (const bool stream : {false, true}) {
                const Outcome clean = Attend(blocks, ask, stream), o = Attend(blocks, with, stream);
                for (std::size_t r = 0; r < rows; ++r) {
                  if (r >= channel % 2 && (r - channel % 2) % 3 == 0) {
                    EXPECT_TRUE(std::isnan(o.max[r])) << kernels.target << ", row " << r;
                    continue;
                  }
                  EXPECT_EQ(o.max[r], clean.max[r]) << kernels.target << ", row " << r;
                  EXPECT_EQ(o.sum[r], clean.sum[r]) << kernels.target << ", row " << r;
                  EXPECT_EQ(std::memcmp(&o.out[r * o.padded], &clean.out[r * o.padded],
                                        o.padded * sizeof(float)),
                            0)
                      << kernels.target << ", row " << r;
                }
              }
            }
          }
        }
      }
    }
  }
}

// Where blocks lie and what is read after them changes nothing.
TEST_F(AttendKernel, ScatteredBlocksGiveTheSameBits) {
  std::mt19937 rng(7);
  for (const auto& [k, v] : {std::pair(kI8F32, kI8BF16),
                             {kF16, kI8F32},
                             {kI8F32, kF16},
                             {kI4BF16, kI4BF16},
                             {kI6BF16, kI3F32}}) {
    const Head head = RandomHead(k, v, 64, 64, 1100, 7);
    for (const std::size_t rows : Sizes{1, 5, 18}) {
      Ask ask = RandomAsk(rng, head, rows, 4);
      ask.first = 100;
      for (const Kernels& kernels : TestedKernels()) {
        const Blocks in_order(kernels, head), scattered(kernels, head, {3, 0, 4, 1, 2});
        for (const bool stream : {false, true}) {
          const Outcome expected = Attend(in_order, ask, stream);
          EXPECT_GT(expected.sum.back(), 0.0f);
          EXPECT_TRUE(SameBits(Attend(scattered, ask, stream), expected)) << kernels.target;
          const std::uint8_t* after = in_order.Table(0, 1)[0];
          EXPECT_TRUE(SameBits(Attend(scattered, ask, stream, after), expected)) << kernels.target;
        }
      }
    }
  }
}

// Reading tiles as if they came from memory takes other register blocks and other turns of rows,
// and gives the same bits.
TEST_F(AttendKernel, StreamingGivesTheSameBits) {
  constexpr std::size_t kTokens = 700;
  for (const Kernels& kernels : TestedKernels()) {
    for (const std::size_t head_dim : Sizes{64, 80}) {
      for (const auto& [k, v] : {std::pair(kI8F32, kI8F32),
                                 {kF16, kF16},
                                 {kF16, kI8F32},
                                 {kI8F32, kF16},
                                 {kI4F32, kI4F32},
                                 {kI4BF16, kI8F32},
                                 {kI8F32, kI4BF16},
                                 {kI6BF16, kI3F32},
                                 {kI3F32, kI6BF16}}) {
        std::mt19937 rng(21);
        const Head head = RandomHead(k, v, head_dim, head_dim, kTokens, 21);
        const Blocks blocks(kernels, head);
        for (std::size_t rows = 1; rows <= 18; ++rows) {
          Ask ask = RandomAsk(rng, head, rows, rows);
          ask.scale = 0.125f;
          const Outcome out = Attend(blocks, ask, false);
          EXPECT_GT(out.sum.back(), 0.0f);
          EXPECT_TRUE(SameBits(Attend(blocks, ask, true), out))
              << kernels.target << ", " << rows << " rows, " << Names(head);
        }
      }
    }
  }
}

// Tiles take 16 rows at a time, vectors up to eight: rows, dims and ends of every kind give the
// same bits.
TEST_F(AttendKernel, TilesGiveTheBitsOfVectors) {
  const Kernels* const vectors = FindKernels("AVX3_DL");
  if (vectors == nullptr) GTEST_SKIP() << "no AVX3_DL here, so no kernel of tiles";
  std::mt19937 rng(31);
  const auto compare = [&](const Head& head, Ask ask) {
    const Blocks blocks(*vectors, head);
    const Outcome expected = Attend(blocks, ask, false);
    for (const Kernels& kernels : TestedKernels()) {
      if (!std::string_view(kernels.target).starts_with("tiles")) continue;
      const Blocks same(kernels, head);
      for (const bool stream : {false, true}) {
        EXPECT_TRUE(SameBits(Attend(same, ask, stream), expected))
            << kernels.target << ", " << ask.rows << " rows in groups of " << ask.group << ", "
            << ask.first << " to " << ask.last << ", window " << ask.window << ", " << Names(head);
      }
    }
  };
  for (const std::size_t dim : Sizes{16, 64, 80, 96, 128, 256, 512}) {
    for (const auto& [k, v] : {std::pair(kI8F32, kI8BF16), {kI4BF16, kI3F32}, {kI6BF16, kI8F32}}) {
      const Head head = RandomHead(k, v, dim, dim, 610, 31);
      for (const std::size_t rows : Sizes{1, 7, 15, 16, 17, 33}) {
        Ask ask = RandomAsk(rng, head, rows, 4);
        compare(head, ask);
        ask.first = 256 + 70;
        compare(head, ask);
        ask.window = 100;
        ask.soft_cap = rows % 2 == 0 ? 5.0f : 0.0f;
        compare(head, ask);
      }
    }
  }
  // A prompt from its first token on: rows that see nothing in blocks that others see; and scores
  // so far apart that blocks replace each other.
  for (const std::size_t group : Sizes{1, 7}) {
    const Head head = RandomHead(kI8F32, kI8F32, 64, 48, 530, 32);
    Ask ask = RandomAsk(rng, head, 530 * group, group);
    ask.first_end = 1;
    ask.scale = 5.0f;
    compare(head, ask);
    ask.first_end = -20;
    ask.window = 40;
    compare(head, ask);
  }
  // Masks: zeros in runs, numbers, queries and blocks of which nothing is seen, slopes.
  for (const std::size_t group : Sizes{1, 3}) {
    const Head head = RandomHead(kI8F32, kI4BF16, 64, 64, 800, 33);
    constexpr std::size_t kQueries = 21;
    const std::size_t blocks = (head.tokens() + kBlockTokens - 1) / kBlockTokens;
    Floats numbers(kQueries * head.tokens(), -kInf);
    std::vector<MaskRange> ranges(kQueries * blocks);
    for (std::size_t i = 0; i < kQueries; ++i) {
      const std::size_t first = rng() % head.tokens(), count = i % 7 == 0 ? 0 : rng() % 700;
      float* const of_query = &numbers[i * head.tokens()];
      for (std::size_t t = first; t < std::min(first + count, head.tokens()); ++t) {
        if (i % 2 == 0 || rng() % 5 != 0) {
          of_query[t] = i % 3 == 0 ? 0.0f : -0.01f * static_cast<float>(rng() % 100);
        }
      }
      ASSERT_TRUE(vectors->mask.scan(of_query, KVMIX_F32, head.tokens(), &ranges[i * blocks]));
    }
    const Floats slopes = {0.5f, 0.25f, 2.0f};
    Mask mask{numbers.data(), KVMIX_F32,     static_cast<std::ptrdiff_t>(head.tokens()),
              head.tokens(),  ranges.data(), blocks,
              slopes.data()};
    Ask ask = RandomAsk(rng, head, kQueries * group, group);
    ask.mask = &mask;
    compare(head, ask);
    mask.slopes = nullptr;
    ask.soft_cap = 3.0f;
    compare(head, ask);
  }
}

#if defined(__x86_64__) && defined(__linux__)
// The instructions as the compiler has left them, done by this test where the CPU lacks them.
TEST_F(AttendKernel, InstructionsOfTilesGiveTheBitsOfTilesInMemory) {
  Kernels portable, hardware;
  if (FindKernels("AVX3_DL") == nullptr) GTEST_SKIP() << "no AVX3_DL here, so no kernel of tiles";
  portable = hardware = *FindKernels("AVX3_DL");
  portable.attend = PortableTileKernels();
  hardware.attend = HardwareTileKernels();
  std::optional<kvmix::testing::AmxEmulator> emulator;
  if (!Amx().why_not.empty()) GTEST_SKIP() << "AMX must not be used: " << Amx().why_not;
  if (!Amx().yes) {
    std::printf("  no AMX here: its instructions are emulated\n");
    emulator.emplace();
  }
  std::mt19937 rng(41);
  for (const auto& [dim, rows] : {std::pair<std::size_t, std::size_t>{64, 35}, {80, 8}, {128, 5}}) {
    const Head head = RandomHead(kI8F32, kI4BF16, dim, dim, 600, 41);
    const Ask ask = RandomAsk(rng, head, rows, 5);
    const Outcome expected = Attend(Blocks(portable, head), ask, false);
    EXPECT_TRUE(SameBits(Attend(Blocks(hardware, head), ask, false), expected)) << dim;
  }
  // The target's own kernel: tiles from so many rows on.
  hardware.attend = AmxAttendKernels();
  std::size_t done = kvmix::testing::AmxEmulator::done();
  ASSERT_LT(Amx().fewest_rows, 100u) << "KVMIX_AMX";
  for (const std::size_t rows : {Amx().fewest_rows, Amx().fewest_rows - 1}) {
    const Head head = RandomHead(kI8F32, kI6BF16, 64, 64, 300, 42);
    const Ask ask = RandomAsk(rng, head, rows, 5);
    const Outcome expected = Attend(Blocks(*FindKernels("AVX3_DL"), head), ask, false);
    EXPECT_TRUE(SameBits(Attend(Blocks(hardware, head), ask, false), expected)) << rows;
    if (!emulator) continue;
    EXPECT_EQ(kvmix::testing::AmxEmulator::done() > done, rows >= Amx().fewest_rows);
    done = kvmix::testing::AmxEmulator::done();
  }
  EXPECT_EQ(AmxDotU8I8(2), 2.0 * 8 * 16 * 64 * 16);
  if (emulator) {
    EXPECT_GT(done, 1000u);
    EXPECT_FALSE(kvmix::testing::AmxEmulator::configured()) << "tiles were not released";
  }
}
#endif

// Ranges of a context, merged by their out, max and sum, are the whole of it.
TEST_F(AttendKernel, MergedRangesAreOne) {
  std::mt19937 rng(8);
  for (const auto& [k, v] : {std::pair(kI8F32, kI8F32), {kF16, kF16}, {kI8BF16, kKinds[1]}}) {
    const Head head = RandomHead(k, v, 64, 80, 900, 8);
    const Ask whole = RandomAsk(rng, head, 9, 2);
    const std::vector<Expected> expected = Reference(head, whole);
    for (const std::vector<std::size_t>& cuts :
         std::vector<std::vector<std::size_t>>{{0, 1, 900},
                                               {0, 100, 900},
                                               {0, 256, 900},
                                               {0, 513, 900},
                                               {0, 899, 900},
                                               {0, 256, 512, 768, 900}}) {
      for (const Kernels& kernels : TestedKernels()) {
        SCOPED_TRACE(kernels.target);
        const Blocks blocks(kernels, head);
        Outcome merged;
        for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
          Ask part = whole;
          part.first = cuts[i];
          part.last = cuts[i + 1];
          const Outcome o = Attend(blocks, part, false);
          if (i == 0) {
            merged = o;
            continue;
          }
          for (std::size_t r = 0; r < whole.rows; ++r) {
            const float max = std::max(merged.max[r], o.max[r]);
            const float a = std::exp2(merged.max[r] - max), b = std::exp2(o.max[r] - max);
            for (std::size_t c = 0; c < o.padded; ++c) {
              float& out = merged.out[r * o.padded + c];
              out = a * out + b * o.out[r * o.padded + c];
            }
            merged.sum[r] = a * merged.sum[r] + b * o.sum[r];
            merged.max[r] = max;
          }
        }
        Expect(head, whole, expected, merged);
      }
    }
  }
}

// Tokens that a row does not see, before its window, after its end or out of range, count for
// nothing, whatever size they have.
TEST_F(AttendKernel, TokensOutOfSightDoNotCount) {
  std::mt19937 rng(11);
  for (const Kind& k : kKinds) {
    for (const Kind& v : kKinds) {
      const Head head = RandomHead(k, v, 64, 64, 600, 11);
      Head with = head;
      for (std::size_t t = 0; t < head.tokens(); ++t) {
        if (t >= 100 && t < 400) continue;
        for (std::size_t c = 0; c < 64; ++c) {
          with.k.Put(t, c, 60000.0f);
          with.v.Put(t, c, 60000.0f);
        }
        if (k.second != ScaleStore::kConstant) with.k.scales[t] = 0x1p100f;
        if (v.second != ScaleStore::kConstant) with.v.scales[t] = 0x1p90f;
      }
      Ask ask = RandomAsk(rng, head, 1, 1);
      ask.first_end = 400;
      ask.window = 300;
      Ask range = RandomAsk(rng, head, 6, 2);
      range.first = 100;
      range.last = 400;
      for (const Ask& a : {ask, range}) {
        for (const Kernels& kernels : TestedKernels()) {
          const Blocks blocks(kernels, head), blocks_with(kernels, with);
          const Outcome o = Attend(blocks, a, true), o_with = Attend(blocks_with, a, true);
          EXPECT_TRUE(std::ranges::all_of(o.sum, [](float x) { return x > 0.0f; }));
          EXPECT_TRUE(SameBits(o_with, o)) << kernels.target << ", " << Names(head);
        }
      }
    }
  }
}

// V's tokens of any size, down to nothing: max follows the largest weight times scale, as far as
// 2^-32, and the sum of the weights stays right.
TEST_F(AttendKernel, ScalesOfVFarApart) {
  std::mt19937 rng(9);
  for (const Kind& k : {kF16, kI8F32}) {
    for (const Kind& v : {kI8F32, kI8BF16, kI4BF16, kI6BF16, kI3F32}) {
      for (const int kind : {0, 1, 2, 3}) {
        Head head = RandomHead(k, v, 64, 64, 600, 9);
        std::uniform_real_distribution<float> exponent(-38.0f, 38.0f);
        for (std::size_t t = 0; t < head.tokens(); ++t) {
          float& scale = head.v.scales[t];
          if (kind == 0) scale = std::exp2(exponent(rng));         // any
          if (kind == 1) scale = t % 3 == 0 ? 0.0f : 0.02f;        // rows of zeros among others
          if (kind == 2) scale = t == 300 ? 0x1p-30f : 0x1p-120f;  // hardly anything
          if (kind == 3) scale = 0x1p50f;
          scale = std::bit_cast<float>(std::bit_cast<std::uint32_t>(scale) & 0xFFFF0000u);
        }
        for (const std::size_t rows : Sizes{1, 6}) Check(head, RandomAsk(rng, head, rows, 2));
      }
    }
  }
  // Nothing but zeros: an output of zeros with the weights' sum.
  Head head = RandomHead(kI8F32, kI8F32, 64, 64, 600, 9);
  std::ranges::fill(head.v.scales, 0.0f);
  Check(head, RandomAsk(rng, head, 6, 2));
}

// Scores of which f32 itself knows no more than two or three decimals: nothing overflows, and the
// weights stay weights.
TEST_F(AttendKernel, ScoresInTheTensOfThousands) {
  std::mt19937 rng(10);
  for (const Kind& k : {kF16, kI8F32}) {
    for (const Kind& v : {kF16, kI8F32}) {
      for (const float size : {30.0f, 100.0f, 300.0f}) {
        Head head = RandomHead(k, v, 64, 64, 600, 10);
        std::normal_distribution<float> normal;
        for (std::size_t t = 0; t < head.tokens(); ++t) {
          head.k.scales[t] = size / 120.0f;
          for (std::size_t c = 0; c < 64; ++c) {
            const float x = size + 0.02f * normal(rng);
            head.k.Put(t, c, k == kF16 ? x : x * 3.0f / size);  // codes of about 120
            head.v.Put(t, c, 1.0f + 0.1f * normal(rng));
          }
        }
        Ask ask = RandomAsk(rng, head, 6, 2);
        for (float& q : ask.q) q += size;
        Check(head, ask, {}, 1e-2, true);
      }
    }
  }
}

// out / sum of every row, on every target, for a mask whose number for a token is `added` (empty:
// no mask), against the expected rows of V's size.
void ExpectOutputs(const Head& head, const Ask& ask, const Floats& added,
                   const std::vector<Doubles>& expected) {
  for (const Kernels& kernels : TestedKernels()) {
    SCOPED_TRACE(::testing::Message() << kernels.target << ", " << Names(head));
    Ask masked = ask;
    const std::size_t blocks = (head.tokens() + kBlockTokens - 1) / kBlockTokens;
    std::vector<MaskRange> ranges(blocks);
    Mask mask{added.data(), KVMIX_F32, 0, head.tokens(), ranges.data(), blocks, nullptr};
    if (!added.empty()) {
      ASSERT_TRUE(kernels.mask.scan(added.data(), KVMIX_F32, added.size(), ranges.data()));
      masked.mask = &mask;
    }
    const Outcome o = Attend(Blocks(kernels, head), masked, false);
    for (std::size_t r = 0; r < ask.rows; ++r) {
      double error = 0.0, size = 0.0;
      for (std::size_t c = 0; c < expected[r].size(); ++c) {
        const double d = o.out[r * o.padded + c] / double{o.sum[r]} - expected[r][c];
        error += d * d;
        size += expected[r][c] * expected[r][c];
      }
      EXPECT_TRUE(error <= kBound * size) << "row " << r << ": NMSE " << error / size;
    }
  }
}

constexpr Kind kKindsOfV[] = {kF16, kI8F32, kI4BF16};

// A query all of whose cells a mask puts equally far down sees the average of V.
TEST_F(AttendKernel, MasksOfAnyFiniteSize) {
  for (const Kind& k : {kF16, kI8F32}) {
    for (const Kind& v : kKindsOfV) {
      Head head = RandomHead(k, v, 64, 64, 600, 11);
      for (std::size_t t = 0; t < head.tokens(); ++t) {
        for (std::size_t c = 0; c < 64; ++c) head.k.Put(t, c, 0.0f);
      }
      for (const std::size_t rows : Sizes{1, 6, 21}) {
        std::mt19937 rng(11);
        const Ask ask = RandomAsk(rng, head, rows, rows);
        for (const float size :
             {1e4f, 1e6f, 2e6f, 3e7f, 1e8f, 1e9f, 1e15f, 1e29f, 3.9e29f, 1e38f}) {
          // Near: equal. Far: the middle block is another 2 % down.
          for (const float far : {1.0f, 1.02f}) {
            if (far != 1.0f && (size < 1e6f || size > 1e29f)) continue;
            for (const float sign : {-1.0f, 1.0f}) {
              Floats added(head.tokens(), sign * size);
              Doubles mean(64);
              double count = 0.0;
              for (std::size_t t = 0; t < head.tokens(); ++t) {
                const bool middle = t / kBlockTokens == 1;
                if (middle) added[t] *= far;
                if (far != 1.0f && middle == (sign < 0.0f)) continue;
                for (std::size_t c = 0; c < 64; ++c) mean[c] += head.v.At(t, c);
                count += 1.0;
              }
              for (double& x : mean) x /= count;
              SCOPED_TRACE(::testing::Message() << sign * size << ", middle x " << far);
              ExpectOutputs(head, ask, added, std::vector<Doubles>(rows, mean));
            }
          }
        }
      }
    }
  }
}

// Scores of any finite size choose the token of the largest.
TEST_F(AttendKernel, ScoresOfAnySize) {
  for (const Kind& k : {kF16, kI8F32, kI4BF16}) {
    for (const Kind& v : kKindsOfV) {
      for (const std::size_t best : Sizes{3, 300, 599}) {
        for (const float level : {1e9f, 1e15f, 1e28f, 1e30f, 1e36f}) {
          for (const float sign : {-1.0f, 1.0f}) {
            Head head = RandomHead(k, v, 64, 64, 600, 12);
            for (std::size_t t = 0; t < head.tokens(); ++t) {
              if (k != kF16) head.k.scales[t] = 0.0078125f;
              for (std::size_t c = 0; c < 64; ++c) head.k.Put(t, c, 0.0f);
              head.k.Put(t, 0, t == best ? 3.0f : t % 2 == 0 ? 1.0f : -1.0f);
              if (sign < 0.0f && t != best) head.k.Put(t, 0, t % 2 == 0 ? 3.0f : 1.0f);
              if (sign < 0.0f && t == best) head.k.Put(t, 0, 0.2f);
            }
            std::mt19937 rng(12);
            Ask ask = RandomAsk(rng, head, 21, 3);
            ask.first_end = 600;
            for (std::size_t i = 0; i < ask.q.size(); ++i)
              ask.q[i] = i % 64 == 0 ? sign * level : 0.0f;
            Doubles row(64);
            for (std::size_t c = 0; c < 64; ++c) row[c] = head.v.At(best, c);
            SCOPED_TRACE(::testing::Message() << "level " << sign * level << ", token " << best);
            ExpectOutputs(head, ask, {}, std::vector<Doubles>(21, row));
          }
        }
      }
    }
  }
}

// ---- operands of 8 bits: what docs/numerics.md says of their errors

Head WithOperandsOf8Bits(Head head) {
  for (Rows* rows : {&head.k, &head.v}) rows->format.operand_bits = 8;
  return head;
}

// NMSE against operands of double precision, of a single row and over many.
constexpr double kBoundOf8Bits = 2e-3, kMeanOf8Bits = 1e-3;

TEST_F(AttendKernel, OperandsOf8Bits) {
  std::mt19937 rng(13);
  for (const Kind& k : kKinds) {
    for (const Kind& v : kKinds) {
      for (const std::size_t dim : Sizes{64, 96, 256}) {
        const Head head = WithOperandsOf8Bits(RandomHead(k, v, dim, dim, 700, 13));
        for (const std::size_t rows : Sizes{1, 3})
          Check(head, RandomAsk(rng, head, rows, rows), {}, kBoundOf8Bits);
        for (const std::size_t rows : Sizes{8, 23})
          Check(head, RandomAsk(rng, head, rows, 1), {}, kMeanOf8Bits);
      }
    }
  }
}

// K and V each by itself, a scale of its own, dims that are no whole vectors, borders, windows.
TEST_F(AttendKernel, OperandsOf8BitsInOneTensor) {
  std::mt19937 rng(14);
  for (const auto& [k_dim, v_dim] : {std::pair<std::size_t, std::size_t>{40, 40}, {192, 128}}) {
    for (const bool in_k : {false, true}) {
      Head head = RandomHead(kI8F32, kI4BF16, k_dim, v_dim, 600, 14);
      (in_k ? head.k : head.v).format.operand_bits = 8;
      for (const std::size_t first : Sizes{0, 1, 63, 64, 255, 300}) {
        Ask ask = RandomAsk(rng, head, 7, 7);
        ask.first = first;
        ask.last = 599;
        for (const std::size_t window : Sizes{0, 200, 333}) {
          ask.window = window;
          Check(head, ask, {}, kBoundOf8Bits);
        }
      }
    }
  }
}

// Every row by itself has the bits of `whole`.
void ExpectRowsAlone(const Blocks& blocks, const Ask& all, const Outcome& whole) {
  for (std::size_t r = 0; r < all.rows; ++r) {
    Ask one = all;
    one.rows = one.group = 1;
    one.q.assign(all.q.begin() + static_cast<std::ptrdiff_t>(r * 64),
                 all.q.begin() + static_cast<std::ptrdiff_t>((r + 1) * 64));
    const Outcome alone = Attend(blocks, one, r % 2 == 0);
    EXPECT_EQ(alone.max[0], whole.max[r]) << r;
    EXPECT_EQ(alone.sum[0], whole.sum[r]) << r;
    EXPECT_TRUE(std::equal(alone.out.begin(), alone.out.end(),
                           whole.out.begin() + static_cast<std::ptrdiff_t>(r * whole.padded)))
        << r;
  }
}

// The bits do not depend on which rows share a turn, on where the tiles come from, or on where a
// range is cut (at a block).
TEST_F(AttendKernel, OperandsOf8BitsGiveTheSameBits) {
  const Head head = WithOperandsOf8Bits(RandomHead(kI8F32, kI6BF16, 64, 64, 1024, 15));
  std::mt19937 rng(15);
  const Ask all = RandomAsk(rng, head, 21, 21);
  for (const Kernels& kernels : TestedKernels()) {
    SCOPED_TRACE(kernels.target);
    const Blocks blocks(kernels, head);
    const Outcome whole = Attend(blocks, all, false);
    EXPECT_TRUE(SameBits(whole, Attend(blocks, all, true)));
    ExpectRowsAlone(blocks, all, whole);
  }
}

// ---- centres of stretches

// Centres about as large as what is around them, and fifty times as large.
TEST_F(AttendKernel, EveryStorageAroundCentres) {
  std::mt19937 rng(20);
  unsigned count = 0;
  for (const Kind& k : kKinds) {
    if (k == kF16) continue;
    for (const std::size_t dim : Sizes{64, 72, 256}) {
      for (const std::size_t stretch : Sizes{16, 64, 256}) {
        for (const float size : {1.0f, 50.0f}) {
          const Kind v = kKinds[count % std::size(kKinds)];
          const Head head =
              AroundCentres(RandomHead(k, v, dim, 64, 700, count), stretch, size, count);
          const std::size_t rows = Sizes{1, 2, 7, 8, 21, 56}.begin()[count % 6];
          Check(head, RandomAsk(rng, head, rows, 1 + count % 3));
          const Head narrow = WithOperandsOf8Bits(head);
          Check(narrow, RandomAsk(rng, head, 7, 7), {}, kBoundOf8Bits);
          ++count;
        }
      }
    }
  }
}

TEST_F(AttendKernel, CentresAndRangesWindowsCapsAndBias) {
  std::mt19937 rng(21);
  for (const std::size_t stretch : Sizes{16, 64, 128}) {
    const Head head =
        AroundCentres(RandomHead(kI8BF16, kI6BF16, 33, 40, 600, 21), stretch, 3.0f, 3);
    for (const std::size_t rows : Sizes{1, 5, 20}) {
      Ask ask = RandomAsk(rng, head, rows, 5);
      ask.first = 70;
      ask.last = 555;
      Check(head, ask, {2, 0, 1});
      ask.window = 190;
      Check(head, ask);
      ask.soft_cap = 5.0f;
      Check(head, ask);
      ask.bias = RandomFloats(rng, rows);
      Check(head, ask);
    }
  }
}

// A stretch whose centre has the largest score of any size takes everything, with a mask as well.
TEST_F(AttendKernel, CentresOfAnySize) {
  for (const float level : {1e3f, 1e9f, 1e20f, 1e34f}) {
    Head head = AroundCentres(RandomHead(kI8F32, kI8F32, 64, 64, 600, 22), 64, 1.0f, 22);
    for (std::size_t t = 0; t < head.tokens(); ++t) {
      for (std::size_t c = 0; c < 64; ++c) head.k.Put(t, c, 0.0f);
    }
    for (std::size_t s = 0; s < 10; ++s) {
      std::vector<int> codes(64);
      codes[5] = s == 6 ? 127 : static_cast<int>(s) - 100;
      head.Centre(s, level, codes);
    }
    std::mt19937 rng(22);
    Ask ask = RandomAsk(rng, head, 12, 12);
    ask.first_end = 600;
    for (std::size_t i = 0; i < ask.q.size(); ++i) ask.q[i] = i % 64 == 5 ? 1.0f : 0.0f;
    Doubles mean(64);
    for (std::size_t c = 0; c < 64; ++c) {
      for (std::size_t t = 6 * 64; t < 7 * 64; ++t) mean[c] += head.v.At(t, c) / 64.0;
    }
    SCOPED_TRACE(level);
    ExpectOutputs(head, ask, {}, std::vector<Doubles>(12, mean));
    ExpectOutputs(head, ask, Floats(600, -2.0f), std::vector<Doubles>(12, mean));
  }
}

TEST_F(AttendKernel, ARowAroundCentresGetsTheSameBitsAmongOthers) {
  const Head head = AroundCentres(RandomHead(kI8F32, kI6BF16, 64, 64, 1024, 23), 64, 2.0f, 23);
  std::mt19937 rng(23);
  const Ask all = RandomAsk(rng, head, 21, 21);
  for (const Kernels& kernels : TestedKernels()) {
    SCOPED_TRACE(kernels.target);
    const Blocks blocks(kernels, head);
    ExpectRowsAlone(blocks, all, Attend(blocks, all, false));
    EXPECT_TRUE(SameBits(Attend(blocks, all, false), Attend(blocks, all, true)));
    Ask with = all;
    with.q[3 * 64 + 9] = kInf;
    with.q[4 * 64 + 9] = kNaN;
    const Outcome whole = Attend(blocks, all, false), o = Attend(blocks, with, false);
    for (std::size_t r = 0; r < all.rows; ++r) {
      EXPECT_EQ(std::isnan(o.max[r]), r == 3 || r == 4);
      if (r != 3 && r != 4) {
        EXPECT_EQ(o.out[r * o.padded], whole.out[r * whole.padded]);
      }
    }
  }
}

// Weights that are alike keep their sum, however many they are and whatever lies beside them. V is
// 1 everywhere, in tokens of one scale or of many; out / sum is then the sum of the rounded weights
// over that of the exact ones.
TEST_F(AttendKernel, WeightsOf8BitsKeepTheirSum) {
  for (const Kind& v : {kKinds[1], kI8F32, kI8BF16}) {
    for (const std::size_t tokens : Sizes{512, 8192, 131072}) {
      for (const bool sink : {false, true}) {
        Head head = WithOperandsOf8Bits(RandomHead(kI8F32, v, 1, 4, tokens, 16));
        for (std::size_t t = 0; t < tokens; ++t) {
          for (std::size_t c = 0; c < 4; ++c) {
            head.v.Put(t, c, 2.0f);
            if (v == kI8F32) head.v.scales[t] = 0.01f;  // flat, or a weight of its own each
          }
          // A sink has a weight of 1, the others of 1e-6: 13.8155 lower.
          head.k.scales[t] = 1.0f / 40.0f;
          head.k.Put(t, 0, t == 5 ? 2.0f : 0.0f);
        }
        Ask ask;
        ask.q = {sink ? 13.8155f / 2.0f : 0.0f};
        ask.scale = 1.0f;
        ask.first_end = static_cast<std::int64_t>(tokens);
        ask.last = ask.tokens = tokens;
        double wanted = 0.0, weights = 0.0;
        for (std::size_t t = 0; t < tokens; ++t) {
          const double weight = std::exp(double{ask.q[0]} * (head.k.At(t, 0) - 2.0));
          weights += weight;
          wanted += weight * head.v.At(t, 0);
        }
        wanted /= weights;
        for (const Kernels& kernels : TestedKernels()) {
          const Outcome o = Attend(Blocks(kernels, head), ask, false);
          for (std::size_t c = 0; c < 4; ++c) {
            // Weights that are alike: 1/8 of a code in 239, or in the codes that V's scales make of
            // it. One that is alone: 7/8 of a code.
            const double bound = sink ? 4e-3 : v == kI8BF16 ? 1.5e-3 : 6e-4;
            EXPECT_NEAR(o.out[c] / double{o.sum[0]} / wanted, 1.0, bound)
                << kernels.target << ", " << Names(head) << ", " << tokens << " tokens, sink "
                << sink;
          }
        }
      }
    }
  }
}

// q of any kind: equal numbers, one huge channel, denormals, zeros, NaN.
TEST_F(AttendKernel, QueriesOf8BitsOfAnyKind) {
  std::mt19937 rng(17);
  for (const Kind& k : {kI8F32, kI4BF16}) {
    Head head = WithOperandsOf8Bits(RandomHead(k, kI8F32, 64, 64, 400, 17));
    Ask ask = RandomAsk(rng, head, 6, 6);
    for (std::size_t c = 0; c < 64; ++c) {
      ask.q[c] = 0.7f;
      ask.q[64 + c] = c == 3 ? 5.0f : 0.0f;
      ask.q[128 + c] = c % 2 == 0 ? -1e-40f : 1e-42f;
      ask.q[192 + c] = -0.0f;
      ask.q[256 + c] = c % 3 == 0 ? -2.0f : 2.0f;
    }
    Check(head, ask, {}, kBoundOf8Bits);
    ask.q[64 * 5 + 7] = kNaN;
    for (const Kernels& kernels : TestedKernels()) {
      const Outcome o = Attend(Blocks(kernels, head), ask, false);
      for (std::size_t r = 0; r < 6; ++r) EXPECT_EQ(std::isnan(o.max[r]), r == 5) << r;
    }
  }
}

}  // namespace
}  // namespace kvmix::kernels
