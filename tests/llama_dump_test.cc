// What the plug-in for llama.cpp writes is a dump of what attention saw.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "dump_files.h"
#include "kvmix/tune/dump.h"
#include "tools/llama_cpp/dump.h"

namespace kvmix::testing {
namespace {

using Seen = std::vector<std::size_t>;  // cells that each token sees

Seen Count(std::size_t first, std::size_t last) {
  Seen seen;
  for (; first <= last; ++first) seen.push_back(first);
  return seen;
}

// A dump in the making, and the rows that it should have.
struct Engine {
  LayerShape shape{.kv_heads = 2, .query_heads = 4, .k_dim = 8, .v_dim = 4};
  Dtype mask_type = KVMIX_F16;
  llama::Dump dump;
  int number = 0;
  struct Rows {
    std::vector<float> q, k, v;
  };
  std::map<std::size_t, Rows> expected;  // of layers

  explicit Engine(const std::string& path) : dump(path) {
    shape.attention_scale = 1.0f / std::sqrt(8.0f);
  }

  // A call of tokens that see so many cells. kept: the dump has them.
  Status Call(std::size_t layer, const Seen& seen, bool kept = true, std::size_t stream = 0) {
    constexpr std::size_t kCells = 40, kStride = 43;
    const std::size_t n = seen.size();
    std::vector<Half> halves(n * kStride, Half{0x7E00});
    std::vector<float> floats(n * kStride, NAN);
    for (std::size_t t = 0; t < n; ++t) {
      for (std::size_t c = 0; c < kCells; ++c) {
        const bool sees = (c + t) % kCells < seen[t];  // wherever they are
        floats[t * kStride + c] = sees ? 0.0f : -INFINITY;
        halves[t * kStride + c] = sees ? Half{0} : Half{0xFC00};
      }
    }
    MaskView mask{halves.data(), KVMIX_F16, n, kCells, kStride};
    if (mask_type == KVMIX_F32) mask = {floats.data(), KVMIX_F32, n, kCells, kStride};
    const auto rows = [&](std::size_t heads, std::size_t dim, std::vector<float> Rows::*to) {
      std::vector<float> x(n * heads * dim);
      for (float& f : x) f = static_cast<float>(++number % 2048);
      std::vector<float>& all = expected[layer].*to;
      if (kept) all.insert(all.end(), x.begin(), x.end());
      return x;
    };
    const auto q = rows(shape.query_heads, shape.k_dim, &Rows::q);
    const auto k = rows(shape.kv_heads, shape.k_dim, &Rows::k);
    const auto v = rows(shape.kv_heads, shape.v_dim, &Rows::v);
    return dump.Add(layer, shape, RowsView::F32(q.data(), n, shape.query_heads, shape.k_dim),
                    RowsView::F32(k.data(), n, shape.kv_heads, shape.k_dim),
                    RowsView::F32(v.data(), n, shape.kv_heads, shape.v_dim), mask, stream);
  }
  void Run(std::size_t layer, const Seen& seen, bool kept = true) {
    const Status s = Call(layer, seen, kept);
    ASSERT_TRUE(s.ok()) << s.message();
  }
  void Finish() {
    const Status s = dump.Finish();
    ASSERT_TRUE(s.ok()) << s.message();
  }
};

std::vector<float> Numbers(const RowsView& rows) {
  std::vector<float> x;
  for (std::size_t i = 0; i < rows.tokens * rows.heads; ++i) {
    for (std::size_t c = 0; c < rows.head_dim; ++c) {
      x.push_back(rows.At(i / rows.heads, i % rows.heads, c));
    }
  }
  return x;
}

// The file is whole, and has the rows of these prompts.
Model ExpectDump(const std::string& path, const Engine& engine, const Seen& prompts) {
  const Result<tune::Dump> dump = tune::Dump::Open(path);
  if (!dump.ok()) {
    ADD_FAILURE() << dump.status().message();
    return Model(std::vector<LayerShape>(8));
  }
  EXPECT_EQ(dump->prompt_tokens(), prompts);
  for (const auto& [layer, rows] : engine.expected) {
    EXPECT_EQ(Numbers(dump->Load(layer)->q), rows.q) << "layer " << layer;
    EXPECT_EQ(Numbers(dump->Load(layer)->k), rows.k) << "layer " << layer;
    EXPECT_EQ(Numbers(dump->Load(layer)->v), rows.v) << "layer " << layer;
  }
  return dump->model();
}

TEST(LlamaDump, Prompts) {
  for (const Dtype type : {KVMIX_F16, KVMIX_F32}) {
    const TempFolder folder;
    const std::string path = folder.file("dump");
    {
      Engine e(path);
      e.mask_type = type;
      const auto both = [&](const Seen& seen, bool kept = true) {
        e.Run(0, seen, kept);
        e.Run(2, seen, kept);
      };
      both({1, 2}, false);  // the engine warms up
      both(Count(1, 7));
      both(Count(8, 10));
      both({11});
      both({12});
      both({15}, false);  // follows on nothing
      both({13});
      Seen two = Count(1, 8);  // in one call
      two.push_back(1);
      for (const std::size_t n : Count(2, 9)) two.push_back(n);
      both(two);
      both(Count(1, 3), false);
      both(Count(1, 7), false);
      e.Finish();
      const Model model = ExpectDump(path, e, {13, 8, 9});
      ASSERT_EQ(model.layers.size(), 3u);
      EXPECT_FALSE(model.layers[1].has_kv());
      for (const std::size_t l : {0, 2}) {
        EXPECT_EQ(model.layers[l].kv_heads, 2u);
        EXPECT_EQ(model.layers[l].query_heads, 4u);
        EXPECT_EQ(model.layers[l].k_dim, 8u);
        EXPECT_EQ(model.layers[l].v_dim, 4u);
        EXPECT_EQ(model.layers[l].window, 0u);
      }
    }
    EXPECT_EQ(folder.entries(), 1u);
  }
}

// Prompts of several streams, in pieces that take turns.
TEST(LlamaDump, Streams) {
  const TempFolder folder;
  Engine e(folder.file("dump"));
  const auto run = [&](const Seen& seen, std::size_t stream) {
    for (const std::size_t layer : {0, 1}) {
      const Status s = e.Call(layer, seen, true, stream);
      ASSERT_TRUE(s.ok()) << s.message();
    }
  };
  run(Count(1, 5), 2);
  const std::map<std::size_t, Engine::Rows> first = std::exchange(e.expected, {});
  run(Count(1, 12), 0);
  run(Count(13, 20), 0);
  const std::map<std::size_t, Engine::Rows> other = std::exchange(e.expected, first);
  run(Count(6, 9), 2);
  run(Count(1, 8), 2);
  for (auto& [layer, rows] : e.expected) {  // streams follow on each other
    const Engine::Rows& before = other.at(layer);
    rows.q.insert(rows.q.begin(), before.q.begin(), before.q.end());
    rows.k.insert(rows.k.begin(), before.k.begin(), before.k.end());
    rows.v.insert(rows.v.begin(), before.v.begin(), before.v.end());
  }
  e.Finish();
  ExpectDump(folder.file("dump"), e, {20, 9, 8});
}

// The parts of an engine that was killed go, those of one that runs stay.
TEST(LlamaDump, RemovesStaleParts) {
  const TempFolder folder;
  const std::string path = folder.file("dump");
  const pid_t gone = fork();
  if (gone == 0) _exit(0);
  waitpid(gone, nullptr, 0);
  const std::string stale = path + "." + std::to_string(gone) + ".parts";
  const std::string alive = path + "." + std::to_string(getppid()) + ".parts";
  std::filesystem::create_directory(stale);
  std::filesystem::create_directory(alive);
  Engine e(path);
  e.Run(0, Count(1, 9));
  e.Finish();
  EXPECT_FALSE(std::filesystem::exists(stale));
  EXPECT_TRUE(std::filesystem::exists(alive));
}

TEST(LlamaDump, Windows) {
  const TempFolder folder;
  Engine e(folder.file("dump"));
  for (const std::size_t prompt : {20, 12, 8}) {
    Seen window = Count(1, prompt);
    for (std::size_t& n : window) n = std::min<std::size_t>(n, 9);
    e.Run(0, Count(1, prompt));
    e.Run(1, window);
  }
  e.Finish();
  const Model model = ExpectDump(folder.file("dump"), e, {20, 12, 8});
  EXPECT_EQ(model.layers[0].window, 0u);
  EXPECT_EQ(model.layers[1].window, 9u);
}

// A server computes the last token of a prompt once more when it has all others: no window.
TEST(LlamaDump, ATokenOnceMore) {
  const TempFolder folder;
  Engine e(folder.file("dump"));
  e.Run(0, Count(1, 20));
  e.Run(0, Count(1, 10));
  e.Run(0, {10});
  e.Run(0, Count(11, 21));
  e.Run(0, {21});
  e.Run(0, Count(22, 25));
  e.Finish();
  EXPECT_EQ(ExpectDump(folder.file("dump"), e, {20, 27}).layers[0].window, 0u);
}

TEST(LlamaDump, ScaleAndSoftCap) {
  for (const float scale : {1.0f / std::sqrt(168.0f), 0.0f, 3e-7f}) {
    const TempFolder folder;
    Engine e(folder.file("dump"));
    if (scale != 0.0f) e.shape.attention_scale = scale;
    e.shape.soft_cap = 29.99999f;
    e.Run(0, Count(1, 9));
    e.Finish();
    const Model model = ExpectDump(folder.file("dump"), e, {9});
    EXPECT_EQ(model.layers[0].scale(), e.shape.scale());
    EXPECT_EQ(model.layers[0].soft_cap, 29.99999f);
  }
}

// Layers that read another's K and V have no rows of their own.
TEST(LlamaDump, CallsWithoutRows) {
  const TempFolder folder;
  Engine e(folder.file("dump"));
  e.Run(0, Count(1, 9));
  const std::vector<float> q(9 * 32);
  EXPECT_TRUE(e.dump
                  .Add(0, e.shape, RowsView::F32(q.data(), 9, 4, 8),
                       RowsView::F32(nullptr, 0, 2, 8), RowsView::F32(nullptr, 0, 2, 4),
                       {q.data(), KVMIX_F32, 9, 9, 9})
                  .ok());
  e.Finish();
  ExpectDump(folder.file("dump"), e, {9});
}

TEST(LlamaDump, UnfinishedLeavesNothing) {
  const TempFolder folder;
  const std::string path = folder.file("dump");
  WriteBytes(path, "before");
  {
    Engine e(path);
    e.Run(0, Count(1, 20));
    EXPECT_GT(folder.entries(), 1u);
  }
  EXPECT_EQ(folder.entries(), 1u);
  EXPECT_EQ(ReadBytes(path), "before");
  { Engine(path).Finish(); }  // without a call
  EXPECT_EQ(ReadBytes(path), "before");
  {
    Engine e(path);
    e.Run(0, Count(1, 20));
    e.Finish();
  }
  EXPECT_TRUE(tune::Dump::Open(path).ok());
  EXPECT_EQ(folder.entries(), 1u);
}

TEST(LlamaDump, Errors) {
  const TempFolder folder;
  const std::string path = folder.file("dump");
  const auto expect = [&](const Status& s, ErrorCode code, const std::string& words) {
    EXPECT_EQ(s.code(), code);
    EXPECT_TRUE(s.message().starts_with(path)) << s.message();
    EXPECT_NE(s.message().find(words), std::string::npos) << s.message();
  };
  {
    Engine e(path);
    e.Run(0, Count(1, 20));
    e.Run(1, Count(1, 19));
    expect(e.dump.Finish(), ErrorCode::kMismatch, "unlike");
  }
  {
    Engine e(path);
    e.Run(0, Count(1, 2));
    expect(e.dump.Finish(), ErrorCode::kMismatch, "8 tokens");
  }
  EXPECT_EQ(folder.entries(), 0u);
  WriteBytes(path, "a file");
  Engine e(path + "/dump");
  for (int i = 0; i < 2; ++i) expect(e.Call(0, Count(1, 9)), ErrorCode::kIo, "cannot be written");
  EXPECT_EQ(ReadBytes(path), "a file");
  {
    Engine on_folder(folder.path());
    on_folder.Run(0, Count(1, 9));
    EXPECT_EQ(on_folder.dump.Finish().code(), ErrorCode::kIo);
  }
  EXPECT_EQ(folder.entries(), 1u);
}

}  // namespace
}  // namespace kvmix::testing
