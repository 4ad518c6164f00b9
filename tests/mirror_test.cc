// A mirror of a small engine's cells against caches that hold the same rows.
#include "engines/common/mirror.h"

#include <gtest/gtest.h>

#include <functional>
#include <random>
#include <utility>
#include <vector>

#include "tests/mirror_cases.h"

namespace kvmix::testing {
namespace {

// f(engine) for engines of all types.
void ForAllTypes(std::size_t streams, std::size_t cells, const std::function<void(Engine&)>& f) {
  for (const Type type : kTypes) {
    SCOPED_TRACE(static_cast<int>(type));
    Engine e(type, streams, cells);
    f(e);
  }
}

// ---- writes that were told

TEST(Mirror, PrefillAndDecode) {
  ForAllTypes(1, 400, [](Engine& e) {
    e.Write(Iota(0, 3));
    e.Expect({{0, Causal(Iota(0, 3), 3)}});
    e.Write(Iota(3, 290));
    e.Expect({{0, Causal(Iota(0, 293), 290)}});
    for (std::int64_t t = 293; t < 300; ++t) {
      e.Write({t});
      e.Expect({{0, Causal(Iota(0, t + 1), 1)}});
    }
    e.ExpectCounts(300, 0);
    EXPECT_GT(e.mirror.bytes(), 0u);
  });
}

// Sequences come, grow and go; a token takes any cell that is free.
TEST(Mirror, SequencesShareAStream) {
  ForAllTypes(1, 96, [](Engine& e) {
    Cells free = Iota(0, 96);
    std::vector<Cells> of(3);
    std::size_t written = 0;
    for (int step = 0; step < 60; ++step) {
      Cells now;
      std::vector<Cells> queries;
      for (Cells& s : of) {
        if (e.rng() % 3 == 0) continue;  // out of sight for a call
        if (s.size() > 24) {
          free.insert(free.end(), s.begin(), s.end());
          s.clear();
        }
        for (std::size_t n = s.empty() ? 1 + e.rng() % 7 : 1; n > 0; --n) {
          std::swap(free[e.rng() % free.size()], free.back());
          s.push_back(free.back());
          now.push_back(free.back());
          free.pop_back();
          queries.push_back(s);
        }
      }
      if (now.empty()) continue;
      e.Write(now);
      e.Expect({{0, queries}});
      written += now.size();
    }
    e.ExpectCounts(written, 0);
  });
}

TEST(Mirror, SeveralStreamsInOneCall) {
  ForAllTypes(3, 64, [](Engine& e) {
    Cells all = Iota(0, 20);
    for (const std::int64_t at : {64 + 5, 128 + 1, 64 + 4}) all.push_back(at);
    e.Write(all);
    e.Expect({{0, Causal(Iota(0, 20), 20)}, {1, {{5}, {4, 5}}}, {2, {{1}}}});
    e.Write({128 + 2, 64 + 6});
    e.Expect({{1, {{4, 5, 6}}}, {2, {{1, 2}}}});
    e.Write({20});  // a stream of several, each in a call of its own
    e.Write({64 + 7});
    e.Expect({{1, {{4, 7}}}});
    e.Expect({{0, Causal(Iota(0, 21), 1)}});
    e.ExpectCounts(27, 0);
  });
}

TEST(Mirror, WritesInPieces) {
  ForAllTypes(2, 64, [](Engine& e) {
    e.Write({3, 4, 3, 3});  // the last of a cell stays
    e.Write({});
    e.Write({4, 9, 64 + 2, 8});
    e.Expect({{0, {{3, 4, 8, 9}}}, {1, {{2}}}});
    e.Tell(KVMIX_V, {5, 3});
    e.Tell(KVMIX_K, {5});
    e.Tell(KVMIX_K, {3});
    e.Expect({{0, {{3, 4, 5, 8, 9}}}});
    e.ExpectCounts(10, 0);
  });
}

TEST(Mirror, ManyWritesWithoutAttention) {
  Engine e(Type::kF16, 2, 64);
  e.Write({63});
  e.Expect({{0, {{63}}}});
  e.Write({63});
  for (int i = 0; i < 300; ++i) e.Write(Iota(i % 3, 61));
  e.Expect({{0, {Iota(0, 64)}}});
  EXPECT_EQ(e.mirror.counts().read, 0u);
  for (int i = 0; i < 300; ++i) e.Tell(KVMIX_K, Iota(i % 3, 61));
  e.ExpectOwn(Iota(0, 63));
  e.Expect({{0, {Iota(0, 64)}}});
  EXPECT_EQ(e.mirror.counts().read, 63u);
}

// ---- what the engine did by itself

TEST(Mirror, RowsOfBefore) {
  ForAllTypes(2, 700, [](Engine& e) {
    e.Change(Iota(0, 600));
    e.Change(Iota(700, 10));
    e.Write({600, 710});
    e.Expect({{0, Causal(Iota(0, 601), 1)}, {1, Causal(Iota(0, 11), 1)}});
    e.ExpectCounts(2, 610);
    e.Expect({{0, Causal(Iota(0, 601), 2)}});
    e.ExpectCounts(2, 610);
  });
}

TEST(Mirror, ChangedOutOfSight) {
  ForAllTypes(1, 64, [](Engine& e) {
    e.Write(Iota(0, 30));
    e.Expect({{0, Causal(Iota(0, 30), 30)}});
    e.Expect({{0, {Iota(0, 10)}}});
    e.Change(Iota(15, 5));
    e.Expect({{0, {Iota(0, 30)}}});
    e.ExpectCounts(30, 5);
    for (Side& s : e.side) {  // K or V alone
      e.Expect({{0, {Iota(0, 10)}}});
      e.Put(s, {12});
      e.ExpectOwn({12});
      e.Expect({{0, {Iota(0, 30)}}});
    }
    e.ExpectCounts(30, 7);
  });
}

// Told of, but changed before any query saw it.
TEST(Mirror, ChangedBeforeItWasSeen) {
  ForAllTypes(1, 64, [](Engine& e) {
    e.Write(Iota(0, 40));
    e.Expect({{0, {Iota(0, 10)}}});  // the mask ends before cell 32
    e.Change({20, 35});
    e.Expect({{0, {Iota(0, 32)}}});
    e.ExpectOwn(Iota(32, 8));
    e.Expect({{0, {Iota(0, 36)}}});
  });
}

TEST(Mirror, ContextShift) {
  ForAllTypes(1, 500, [](Engine& e) {
    e.Write(Iota(0, 400));
    e.Expect({{0, Causal(Iota(0, 400), 400)}});
    e.Change(Iota(0, 400));
    e.Expect({{0, {Iota(0, 400)}}});
    e.ExpectCounts(400, 400);
    e.Change(Iota(0, 400));
    e.Write({17});
    e.Expect({{0, {{3, 17, 300}}}});  // few are seen
    e.ExpectCounts(401, 402);
    e.Change({3, 300});
    e.Expect({{0, {{3, 17, 300}}}});
    e.ExpectCounts(401, 404);
    e.Expect({{0, {Iota(0, 400)}}});
    e.ExpectCounts(401, 801);
  });
}

TEST(Mirror, OneChangedCell) {
  ForAllTypes(1, 96, [](Engine& e) {
    e.Write(Iota(0, 96));
    e.Expect({{0, {Iota(0, 96)}}});
    for (const std::int64_t cell : {0, 1, 50, 95}) {
      e.Change({cell});
      int calls = 1;
      while (!e.Attend({{0, {Iota(0, 96)}}}).Same()) ASSERT_LE(++calls, 96 / 4) << cell;
    }
    e.ExpectCounts(96, 4);
  });
}

// A context shift of one sequence among others: the tokens that it drops leave sight.
TEST(Mirror, ContextShiftOfOneSequence) {
  Engine e(Type::kF16, 1, 500);
  const Cells first = Iota(0, 400), second = Iota(400, 40);
  e.Write(Iota(0, 440));
  e.Expect({{0, {first, second}}});
  e.Change(Iota(410, 30));
  e.Expect({{0, {first, Iota(410, 30)}}});
  e.ExpectCounts(440, 30);
}

TEST(Mirror, OneOfKAndVAlone) {
  ForAllTypes(2, 64, [](Engine& e) {
    e.Write(Iota(0, 20));
    e.Expect({{0, {Iota(0, 20)}}});
    e.Tell(KVMIX_K, {3, 4});
    e.ExpectOwn({3, 4});
    e.Expect({{0, {Iota(0, 20)}}});
    e.ExpectCounts(20, 2);
    e.Tell(KVMIX_V, {5});
    e.ExpectOwn({5});
    e.Expect({{0, {Iota(0, 20)}}});
    e.ExpectCounts(20, 3);
    e.Tell(KVMIX_K, {6, 7});  // not those of V
    e.Tell(KVMIX_V, {7, 64});
    e.ExpectOwn({6, 7, 64});
    e.Expect({{0, {Iota(0, 20)}}, {1, {{0}}}});
    e.ExpectCounts(20, 6);
  });
}

TEST(Mirror, ToldOfChanges) {
  ForAllTypes(2, 400, [](Engine& e) {
    e.Write(Iota(0, 300));
    e.Write(Iota(400, 300));
    e.Expect({{0, {Iota(0, 300)}}, {1, {Iota(0, 300)}}});
    e.Change({290, 400 + 17});
    e.mirror.Changed(290, 1);
    e.mirror.Changed(417, 1);
    e.Expect({{0, {Iota(0, 300)}}, {1, {Iota(0, 300)}}});
    e.ExpectCounts(600, 2);
    e.mirror.Changed(0, 800);
    EXPECT_EQ(e.mirror.bytes(), 0u);
    e.ExpectOwn(Iota(0, 300));
    e.Expect({{0, {Iota(0, 300)}}});
    e.ExpectCounts(600, 302);
  });
}

// ---- errors

TEST(Mirror, Refusals) {
  const Plan plan = ThePlan();
  EXPECT_FALSE(Mirror::Create(plan, 0, 64).ok());
  EXPECT_FALSE(Mirror::Create(UniformPlan(Geometry{2, 1, 1, 64}, {}, {}), 1, 64).ok());
  EXPECT_FALSE(Mirror::Create(plan, 1, 64, {.pool = {.target = "none"}}).ok());

  Engine e(Type::kF16, 2, 64);
  e.Write(Iota(0, 64));
  e.Write(Iota(64, 8));
  const std::vector<float> x(1000, 1.0f);
  const auto write = [&](Tensor t, const Cells& at, const RowsView& rows) {
    return e.mirror.Write(t, at, rows);
  };
  const RowsView k = RowsView::F32(x.data(), 2, 2, 64), v = RowsView::F32(x.data(), 2, 2, 32);
  ExpectError(write(KVMIX_K, {1, 2}, v), ErrorCode::kMismatch, {"2 heads x 64", "2 x 32"});
  ExpectError(write(KVMIX_V, {1, 2}, k), ErrorCode::kMismatch, {"2 heads x 32", "2 x 64"});
  ExpectError(write(KVMIX_K, {1, 2, 3}, k), ErrorCode::kMismatch, {"3 rows", "found 2"});
  ExpectError(write(KVMIX_K, {1, 128}, k), ErrorCode::kInvalidArgument, {"128"});
  ExpectError(write(KVMIX_V, {-1, 1}, v), ErrorCode::kInvalidArgument, {"128"});

  std::vector<float> q(256, 1.0f), out(128);
  const std::vector<Half> zeros(65);
  const std::vector<std::uint8_t> seen(65, 1);
  const EngineRows rows{e.side[0].own.data(), 0, 64, FromF16};
  MirrorRequest r{0,           RowsView::F32(q.data(), 1, 4, 64),
                  out.data(),  {zeros.data(), KVMIX_F16, 1, 65, 65},
                  seen.data(), rows,
                  rows};
  const auto attend = [&] { return e.mirror.Attend({&r, 1}, e.mirror.sight(), 1); };
  ExpectError(attend(), ErrorCode::kInvalidArgument, {"65", "64"});
  r.stream = 2;
  r.mask.cells = 1;
  ExpectError(attend(), ErrorCode::kInvalidArgument, {"stream 2"});
  r.stream = 0;
  r.mask.data = nullptr;
  ExpectError(attend(), ErrorCode::kInvalidArgument, {"mask"});
  e.Expect({{0, {Iota(0, 64)}}, {1, {Iota(0, 8)}}});
  e.ExpectCounts(72, 0);
}

// A pool that is full is an error for those who see the cells that it has no room for.
TEST(Mirror, FullPool) {
  Engine most(Type::kF16, 1, 5000);
  most.Write({0});
  most.Expect({{0, {{0}}}});
  Engine e(Type::kF16, 2, 5000, {.pool = {.bytes = most.mirror.bytes()}});
  e.Write(Iota(0, 20));
  e.Expect({{0, {Iota(0, 20)}}});
  e.Write({4999, 3});
  e.ExpectOwn({3});
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(e.Attend({{0, {{3, 4999}}}}).status.code(), ErrorCode::kPoolFull);
  }
  e.Change({5});
  EXPECT_EQ(e.Attend({{0, {{5, 4999}}}}).status.code(), ErrorCode::kPoolFull);
  e.Expect({{0, {Iota(0, 20)}}});
}

// ---- a mirror that is alone

// Rows of before are taken over, also where no query sees them; then the engine's are not needed.
TEST(MirrorAlone, TakesOverAndGoesOn) {
  for (const Type type : kTypes) {
    Engine e(type, 2, 400, {.alone = true});
    e.Change(Iota(0, 300));
    e.Change(Iota(400, 10));
    e.Write({300, 410});
    e.Expect({{0, {Iota(0, 100)}}});  // a part of the cells
    e.Empty(0);
    e.Expect({{0, {Iota(0, 301)}}, {1, Causal(Iota(0, 11), 1)}});
    e.Empty(1);
    for (std::int64_t t = 301; t < 320; ++t) {
      e.Write({t, t + 400});
      e.Expect({{0, Causal(Iota(0, t + 1), 1)}, {1, {{0, 5, t}}}});
    }
    e.ExpectCounts(2 + 38, 310);
  }
}

TEST(MirrorAlone, DecodesAndReadsWhatChanged) {
  Engine e(Type::kF32, 2, 400, {.alone = true});
  e.Write(Iota(0, 300));
  e.Write(Iota(400, 20));
  e.Expect({{0, {Iota(0, 300)}}, {1, {Iota(0, 20)}}});
  e.Empty(0);
  e.Empty(1);
  EXPECT_TRUE(e.mirror.Holds(299));
  EXPECT_FALSE(e.mirror.Holds(300));
  EXPECT_TRUE(e.mirror.Holds(419));
  for (const Tensor t : {KVMIX_K, KVMIX_V}) {
    const Side& s = e.side[t == KVMIX_V];
    std::vector<float> rows(290 * s.row);
    e.mirror.Decode(t, 3, 290, rows.data());
    double error = 0.0, sum = 0.0;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const double x = s.expected[3 * s.row + i];
      error += (rows[i] - x) * (rows[i] - x);
      sum += x * x;
    }
    EXPECT_LT(error, 2e-4 * sum);
    EXPECT_GT(error, 0.0);
    e.mirror.Decode(t, 419, 1, rows.data());
    EXPECT_NEAR(rows[0], s.expected[419 * s.row], 0.05);
  }
  // A state is read into cells of one stream, another is cleared.
  e.Change(Iota(40, 30));
  e.mirror.Changed(40, 30);
  EXPECT_FALSE(e.mirror.Holds(40));
  e.Expect({{1, {Iota(0, 20)}}});
  e.Expect({{0, {Iota(0, 300)}}});
  EXPECT_TRUE(e.mirror.Holds(40));
  EXPECT_GT(e.mirror.bytes(), 0u);
  e.mirror.Changed(0, 800);
  EXPECT_EQ(e.mirror.bytes(), 0u);
  EXPECT_FALSE(e.mirror.Holds(0));
  e.Change({7});
  e.Expect({{0, {{7}}}});
}

// Rows that are nowhere are an error for all that follows, until everything is cleared.
TEST(MirrorAlone, LostRows) {
  Engine most(Type::kF16, 1, 5000);
  most.Write({0});
  most.Expect({{0, {{0}}}});
  Engine e(Type::kF16, 1, 5000, {.pool = {.bytes = most.mirror.bytes()}, .alone = true});
  e.Write({0, 4999});
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(e.Attend({{0, {{0}}}}).status.code(), ErrorCode::kPoolFull);
  }
  e.Empty(0);
  e.mirror.Changed(0, 5000);
  e.Write({1});
  e.Expect({{0, {{1}}}});
  e.Tell(KVMIX_K, {2});
  ExpectError(e.Attend({{0, {{1}}}}).status, ErrorCode::kMismatch, {"K and V"});
}

// ---- masks

TEST(SeenCells, OfAllTypesAndStrides) {
  std::mt19937 rng(3);
  for (const Dtype dtype : kDtypes) {
    for (const std::size_t queries : {0, 1, 3}) {
      for (const bool backwards : {false, true}) {
        constexpr std::size_t kCells = 77;
        std::vector<float> x(queries * kCells, -kInf);
        std::vector<std::uint8_t> expected(kCells), found(kCells + 1, 9);
        for (std::size_t i = 0; i < x.size(); ++i) {
          constexpr float kNumbers[] = {0.0f, -2.0f, 1.0f, -0.0f};
          if (rng() % 4 != 0) continue;
          x[i] = kNumbers[rng() % 4];
          expected[i % kCells] = 1;
        }
        MaskData mask(x, queries, dtype, 5, backwards);
        mask.view.cells = kCells;
        SeenCells(mask.view, found.data());
        EXPECT_EQ(found.back(), 9);
        found.pop_back();
        EXPECT_EQ(found, expected);
      }
    }
  }
}

}  // namespace
}  // namespace kvmix::testing
