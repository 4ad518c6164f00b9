// Caches of one pool against a simple model of them: random calls, thousands of them, and after
// each the caches hold the rows that the model holds, and attention over them has the bits of
// attention over a new cache that was filled with the model's rows. The pool is small, so that it
// gets full.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "kvmix/rope.h"
#include "kvmix/session.h"
#include "tests/cache_rows.h"

namespace kvmix::testing {
namespace {

constexpr std::size_t kSlots = 4;
constexpr std::size_t kBankTokens = 97;

struct Setup {
  Geometry g;
  Names k, v;
  std::size_t capacity;
  std::size_t pool_bytes;
  unsigned seed;
  std::size_t steps;
};

// What a layer should hold.
struct LayerModel {
  std::size_t tokens = 0, forgotten = 0;
  std::vector<bool> written;  // [capacity]
  LayerRows rows;             // [kv_heads][K, V], of `capacity` tokens each

  bool HasHoles() const {
    const auto at = [&](std::size_t cell) {
      return written.begin() + static_cast<std::ptrdiff_t>(cell);
    };
    return std::find(at(forgotten), at(tokens), false) != at(tokens);
  }
};

struct Slot {
  std::optional<Cache> cache;
  std::vector<LayerModel> layers;
};

class Machine {
 public:
  explicit Machine(const Setup& setup)
      : s_(setup),
        bank_(RandomRows(setup.g, kBankTokens, setup.seed)),
        plan_(MakePlan(setup.g, bank_, setup.k, setup.v)),
        pool_(Pool::Create(plan_, {.bytes = setup.pool_bytes}).value()),
        rng_(setup.seed) {
    // Encoded for the least of the targets: canonical rows are the same on all.
    for (std::size_t i = 0; i < 2 * s_.g.kv_heads; ++i) {
      const Tensor t = static_cast<Tensor>(i % 2);
      const RowCodec codec =
          RowCodec::Create(plan_.codec(0, i / 2, t), s_.g.head_dim, Targets().back()).value();
      HeadRows coded{std::vector<std::uint8_t>(kBankTokens * codec.row_bytes()),
                     std::vector<float>(kBankTokens, -7.0f)};
      codec.Encode(KvView(s_.g, t == KVMIX_K ? bank_.k : bank_.v).Head(i / 2), coded.codes.data(),
                   coded.scales.data());
      coded_.push_back(std::move(coded));
    }
    for (Slot& slot : slots_) Renew(slot);
    AppendToAll(*slots_[0].cache, bank_, 0, 1);
    run_bytes_ = 4 * pool_.bytes() / s_.g.layers;  // of the largest page: four blocks
    Renew(slots_[0]);
  }

  void Run() {
    for (std::size_t step = 0; step < s_.steps && !::testing::Test::HasFailure(); ++step) {
      SCOPED_TRACE(::testing::Message() << "step " << step << ", " << ToString(s_.g));
      Slot& slot = slots_[Below(kSlots)];
      const std::string call = Call(slot);
      SCOPED_TRACE(call);
      CheckRows(slot);
      if (Below(3) == 0) CheckAttention(slot);
      if (step % 16 == 0) {
        for (const Slot& other : slots_) CheckRows(other);
      }
      ASSERT_LE(pool_.bytes(), pool_.most_bytes());
    }
    for (Slot& slot : slots_) kvmix::Release(*slot.cache);
    EXPECT_EQ(pool_.bytes(), 0u);
    // The run was one of use: pages were shared, the pool was full, and calls were refused.
    EXPECT_GT(full_, s_.steps / 200) << "the pool is too large for this test";
    EXPECT_GT(forks_, s_.steps / 100);
  }

 private:
  std::size_t Below(std::size_t n) {
    return std::uniform_int_distribution<std::size_t>(0, n - 1)(rng_);
  }
  // Mostly few, sometimes many.
  std::size_t Some() {
    constexpr std::size_t kMost[] = {2, 2, 20, 300, 900};
    return Below(kMost[Below(5)]) + (Below(8) != 0);
  }

  void Renew(Slot& slot) {
    slot.cache.emplace(Cache::Create(pool_, s_.capacity).value());
    LayerModel empty;
    empty.written.resize(s_.capacity);
    for (const HeadRows& head : coded_) {
      empty.rows.push_back({std::vector<std::uint8_t>(s_.capacity * RowBytes(head)),
                            std::vector<float>(s_.capacity, -7.0f)});
    }
    slot.layers.assign(s_.g.layers, empty);
  }

  static std::size_t RowBytes(const HeadRows& bank) { return bank.codes.size() / kBankTokens; }

  // Token `from` of the bank is now in `cell`.
  void Write(LayerModel& layer, std::size_t cell, std::size_t from) {
    for (std::size_t i = 0; i < coded_.size(); ++i) {
      const std::size_t bytes = RowBytes(coded_[i]);
      std::memcpy(&layer.rows[i].codes[cell * bytes], &coded_[i].codes[from * bytes], bytes);
      layer.rows[i].scales[cell] = coded_[i].scales[from];
    }
    layer.written[cell] = true;
    layer.tokens = std::max(layer.tokens, cell + 1);
  }

  // Tokens of the bank, side by side.
  Rows Gather(const std::vector<std::size_t>& from) const {
    const std::size_t row = s_.g.kv_heads * s_.g.head_dim;
    Rows rows;
    for (const std::size_t t : from) {
      const auto at = static_cast<std::ptrdiff_t>(t * row),
                 end = static_cast<std::ptrdiff_t>((t + 1) * row);
      rows.k.insert(rows.k.end(), bank_.k.begin() + at, bank_.k.begin() + end);
      rows.v.insert(rows.v.end(), bank_.v.begin() + at, bank_.v.begin() + end);
    }
    return rows;
  }

  // A call that may be refused only because the pool is full, which `tokens` more in a row have to
  // explain.
  bool Done(const Status& s, std::size_t tokens = 1 << 20) {
    if (s.ok()) return true;
    EXPECT_EQ(s.code(), ErrorCode::kPoolFull) << s.message();
    EXPECT_NE(s.message().find("no page"), std::string::npos) << s.message();
    const std::size_t most_pages = tokens / 256 + 2;
    EXPECT_GT(pool_.bytes() + most_pages * run_bytes_, pool_.most_bytes())
        << "refused, but there is room";
    ++full_;
    return false;
  }

  std::string Call(Slot& slot) {
    const std::size_t layer = Below(s_.g.layers);
    switch (Below(16)) {
      case 0:
        return Truncate(slot);
      case 1:
        return SaveAndLoad(slot);
      case 2:
        return Shift(slot);
      case 3:
        return Forget(slot, layer);
      case 4:
      case 5:
        return Fork(slot);
      case 6:
      case 7:
      case 8:
        return Store(slot, layer);
      case 9:
        return AppendToEvery(layer);
      case 10:
        if (Below(3) == 0) return Release(slot);
        [[fallthrough]];
      default:
        return Append(slot, layer);
    }
  }

  std::string Release(Slot& slot) {
    kvmix::Release(*slot.cache);
    EXPECT_EQ(slot.cache->Truncate(0).code(), ErrorCode::kInvalidArgument);
    EXPECT_FALSE(slot.cache->Fork().ok());
    Renew(slot);
    return "release";
  }

  std::vector<std::size_t> FromBank(std::size_t count) {
    std::vector<std::size_t> from(count);
    for (std::size_t& t : from) t = Below(kBankTokens);
    return from;
  }

  std::string Append(Slot& slot, std::size_t layer) {
    LayerModel& model = slot.layers[layer];
    const std::vector<std::size_t> from = FromBank(Some());
    const Status s = AppendTokens(*slot.cache, layer, Gather(from), 0, from.size());
    if (from.size() > s_.capacity - model.tokens) {
      EXPECT_EQ(s.code(), ErrorCode::kPastCapacity);
    } else if (Done(s, from.size())) {
      for (const std::size_t t : from) Write(model, model.tokens, t);
    }
    return "append " + std::to_string(from.size());
  }

  // A batch of all caches, which is done for all or for none.
  std::string AppendToEvery(std::size_t layer) {
    const std::size_t count = Below(3) + 1;
    const std::vector<std::size_t> from = FromBank(count);
    const Rows rows = Gather(from);
    std::vector<AppendRequest> requests;
    for (Slot& slot : slots_) {
      if (slot.layers[layer].tokens + count > s_.capacity) continue;
      requests.push_back({&*slot.cache, KvView(s_.g, rows.k), KvView(s_.g, rows.v)});
    }
    const bool done = Done(kvmix::Append(requests, layer, 1 + static_cast<int>(Below(2))));
    for (Slot& slot : slots_) {
      if (!done || slot.layers[layer].tokens + count > s_.capacity) continue;
      for (const std::size_t t : from) Write(slot.layers[layer], slot.layers[layer].tokens, t);
    }
    return "append to every cache";
  }

  std::string Store(Slot& slot, std::size_t layer) {
    LayerModel& model = slot.layers[layer];
    if (model.forgotten == s_.capacity) return "nothing";
    const std::vector<std::size_t> from = FromBank(Some());
    const Rows rows = Gather(from);
    std::vector<std::int64_t> cells(from.size());
    // Near to what there is, or anywhere; in runs, and here and there.
    const std::size_t end = Below(4) == 0 ? s_.capacity : std::min(s_.capacity, model.tokens + 10);
    std::size_t cell = 0;
    for (std::size_t i = 0; i < cells.size(); ++i) {
      const std::size_t first = std::min(model.forgotten, end - 1);
      const bool jumps = i == 0 || Below(10) == 0 || cell + 1 >= s_.capacity;
      cell = jumps ? first + Below(end - first) : cell + 1;
      cells[i] = static_cast<std::int64_t>(cell);
    }
    if (std::ranges::any_of(cells, [&](std::int64_t c) {
          return c < static_cast<std::int64_t>(model.forgotten);
        })) {
      return "nothing";
    }
    if (Done(slot.cache->Store(layer, cells, KvView(s_.g, rows.k), KvView(s_.g, rows.v)))) {
      for (std::size_t i = 0; i < cells.size(); ++i) {
        Write(model, static_cast<std::size_t>(cells[i]), from[i]);
      }
    }
    return "store " + std::to_string(from.size());
  }

  std::size_t FewestTokens(const Slot& slot) const {
    return std::ranges::min(slot.layers, {}, &LayerModel::tokens).tokens;
  }

  std::string Truncate(Slot& slot) {
    const std::size_t fewest = FewestTokens(slot);
    std::size_t tokens = Below(fewest + 2);
    if (Below(2) == 0) tokens = fewest - std::min(fewest, Below(5));
    const bool possible = std::ranges::all_of(slot.layers, [&](const LayerModel& l) {
      return tokens <= l.tokens && (tokens == 0 || l.forgotten <= tokens);
    });
    EXPECT_EQ(slot.cache->Truncate(tokens).ok(), possible) << tokens;
    for (LayerModel& l : slot.layers) {
      if (!possible) continue;
      for (std::size_t t = tokens; t < l.tokens; ++t) l.written[t] = false;
      l.tokens = tokens;
      if (tokens == 0) l.forgotten = 0;
    }
    return "truncate to " + std::to_string(tokens);
  }

  std::string Fork(Slot& slot) {
    Slot& to = slots_[Below(kSlots)];
    const std::size_t before = pool_.bytes();
    Result<Cache> fork = slot.cache->Fork();
    EXPECT_TRUE(fork.ok());
    EXPECT_EQ(pool_.bytes(), before) << "a fork takes memory";
    to.cache.emplace(std::move(*fork));
    if (&to != &slot) to.layers = slot.layers;
    ++forks_;
    return "fork";
  }

  std::string Forget(Slot& slot, std::size_t layer) {
    LayerModel& model = slot.layers[layer];
    const std::size_t first = Below(4) == 0 ? Below(model.tokens + 2) : Below(model.tokens / 4 + 1);
    EXPECT_EQ(slot.cache->Forget(layer, first).ok(), first <= model.tokens);
    if (first <= model.tokens) model.forgotten = std::max(model.forgotten, first);
    return "forget those before " + std::to_string(first);
  }

  std::string SaveAndLoad(Slot& slot) {
    Slot& to = slots_[Below(kSlots)];
    std::stringstream stream;
    EXPECT_TRUE(SaveSession(*slot.cache, stream).ok());
    if (Done(LoadSession(*to.cache, stream)) && &to != &slot) to.layers = slot.layers;
    CheckRows(to);
    return "save and load";
  }

  // V moves as it is. The new K is taken over from the cache (session_test.cc looks at its error).
  std::string Shift(Slot& slot) {
    const std::size_t fewest = FewestTokens(slot);
    const std::size_t keep = Below(fewest + 1),
                      drop = Below(std::min<std::size_t>(fewest - keep, 40) + 1);
    const Rope rope;
    if (!Done(slot.cache->Shift(keep, drop, {&rope, 1}))) return "shift of a full pool";
    for (std::size_t layer = 0; layer < s_.g.layers; ++layer) {
      LayerModel& model = slot.layers[layer];
      const std::size_t from = std::max(model.forgotten, keep + drop);
      for (std::size_t t = from; t < model.tokens; ++t) {
        for (std::size_t i = 0; i < coded_.size(); ++i) {
          const std::size_t bytes = RowBytes(coded_[i]);
          std::memmove(&model.rows[i].codes[(t - drop) * bytes], &model.rows[i].codes[t * bytes],
                       bytes);
          model.rows[i].scales[t - drop] = model.rows[i].scales[t];
        }
        model.written[t - drop] = model.written[t];
      }
      if (model.forgotten > keep) model.forgotten = from - drop;
      for (std::size_t t = model.tokens - drop; t < model.tokens; ++t) model.written[t] = false;
      model.tokens -= drop;
      EXPECT_EQ(slot.cache->tokens(layer), model.tokens);
      EXPECT_EQ(slot.cache->forgotten(layer), model.forgotten);
      if (slot.cache->tokens(layer) != model.tokens || from - drop > model.tokens) continue;
      const std::size_t count = model.tokens - (from - drop);
      const LayerRows found = Export(*slot.cache, layer, from - drop, count);
      for (std::size_t i = 0; i < found.size(); i += 2) {
        std::ranges::copy(found[i].codes,
                          &model.rows[i].codes[(from - drop) * RowBytes(coded_[i])]);
        std::ranges::copy(found[i].scales, &model.rows[i].scales[from - drop]);
      }
    }
    return "shift " + std::to_string(keep) + " " + std::to_string(drop);
  }

  void CheckRows(const Slot& slot) const {
    for (std::size_t layer = 0; layer < s_.g.layers; ++layer) {
      const LayerModel& model = slot.layers[layer];
      ASSERT_EQ(slot.cache->tokens(layer), model.tokens) << "layer " << layer;
      ASSERT_EQ(slot.cache->forgotten(layer), model.forgotten) << "layer " << layer;
      const LayerRows found = Export(*slot.cache, layer);
      for (std::size_t i = 0; i < found.size(); ++i) {
        const std::size_t bytes = RowBytes(coded_[i]);
        for (std::size_t t = model.forgotten; t < model.tokens; ++t) {
          if (!model.written[t]) continue;
          const std::size_t at = t - model.forgotten;
          ASSERT_EQ(
              std::memcmp(&found[i].codes[at * bytes], &model.rows[i].codes[t * bytes], bytes), 0)
              << "layer " << layer << ", KV head " << i / 2 << ", " << (i % 2 == 0 ? "K" : "V")
              << ", cell " << t << " of " << model.tokens;
          ASSERT_EQ(found[i].scales[at], model.rows[i].scales[t])
              << "layer " << layer << ", KV head " << i / 2 << ", cell " << t;
        }
      }
    }
  }

  // A cache of its own that holds the model's rows, and zeros where nothing was written.
  Cache Fresh(const LayerModel& model, std::size_t layer) const {
    Cache cache = std::move(*Cache::Create(plan_, s_.capacity));
    LayerRows rows = model.rows;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const std::size_t bytes = RowBytes(coded_[i]);
      rows[i].codes.resize(model.tokens * bytes);
      rows[i].scales.resize(model.tokens);
      for (std::size_t t = 0; t < model.tokens; ++t) {
        if (model.written[t] && t >= model.forgotten) continue;
        std::fill_n(&rows[i].codes[t * bytes], bytes, std::uint8_t{0});
        rows[i].scales[t] = 0.0f;
      }
    }
    EXPECT_TRUE(model.tokens == 0 || Import(cache, layer, rows).ok());
    EXPECT_TRUE(cache.Forget(layer, model.forgotten).ok());
    return cache;
  }

  void CheckAttention(const Slot& slot) {
    const std::size_t layer = Below(s_.g.layers);
    const LayerModel& model = slot.layers[layer];
    const Cache fresh = Fresh(model, layer);
    const std::size_t queries = Below(5) + 1;
    const std::vector<Half> q = RandomHalves(rng_, queries * s_.g.query_heads * s_.g.head_dim);
    AttendOptions options;
    if (Below(3) == 0) options.sliding_window = Below(600) + 1;
    options.causal = Below(3) != 0;
    std::vector<float> numbers(queries * model.tokens + 1);
    for (std::size_t i = 0; i < queries * model.tokens; ++i) {
      const std::size_t cell = i % model.tokens;
      constexpr float kNumbers[] = {0.0f, 0.0f, -1.5f, -kInf};
      const bool seen = model.written[cell] && cell >= model.forgotten;
      numbers[i] = seen ? kNumbers[Below(4)] : -kInf;
    }
    MaskView mask;
    if (model.HasHoles() || Below(3) == 0) {
      mask = {numbers.data(), KVMIX_F32, queries, model.tokens,
              static_cast<std::ptrdiff_t>(model.tokens)};
    }
    const auto attend = [&](const Cache& cache) {
      std::vector<float> out(q.size() + queries * s_.g.query_heads, kNaN);
      const AttendRequest request{&cache, QView(s_.g, q), out.data(), out.data() + q.size(), mask};
      const Status s = Attend({&request, 1}, layer, options);
      EXPECT_TRUE(s.ok()) << s.message();
      return out;
    };
    EXPECT_TRUE(SameBits(attend(*slot.cache), attend(fresh)))
        << "layer " << layer << ", tokens " << model.forgotten << " to " << model.tokens
        << (mask.data != nullptr ? ", a mask" : "");
  }

  Setup s_;
  Rows bank_;
  Plan plan_;
  LayerRows coded_;  // the bank
  Pool pool_;
  std::mt19937 rng_;
  Slot slots_[kSlots];
  std::size_t run_bytes_ = 0, full_ = 0, forks_ = 0;
};

TEST(CacheModel, F16) {
  Machine({{2, 1, 3, 64}, {"f16"}, {"f16"}, 1500, 1200 << 10, 1, 3000}).Run();
}

TEST(CacheModel, Int8OfMixedHeads) {
  Machine({{2, 2, 4, 80}, {"i8-token", "f16"}, {"i8-head", "i8-token"}, 1300, 2400 << 10, 2, 1000})
      .Run();
}

TEST(CacheModel, EveryStep) {
  const Names steps = {"i8-token-bf16+centre+hadamard", "i8-token+centre",
                       "i8-head+centre+fold+hadamard"};
  Machine({{2, 3, 3, 16}, steps, steps, 2600, 700 << 10, 3, 3000}).Run();
}

TEST(CacheModel, FourBits) {
  const Names k = {"i4-token-bf16+centre+hadamard", "i8-token"}, v = {"f16", "i4-token"};
  Machine({{2, 2, 4, 80}, k, v, 1300, 1900 << 10, 5, 1000}).Run();
}

TEST(CacheModel, ScalesOfHeads) {
  Machine({{2, 2, 2, 64}, {"i8-head"}, {"i8-head"}, 2400, 1200 << 10, 4, 3000}).Run();
}

}  // namespace
}  // namespace kvmix::testing
