// Wisdom files, and the timing code: what is called when, not how fast.
#include "kvmix/tune/speed.h"

#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <string_view>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "dump_files.h"
#include "kvmix/tune/steps.h"
#include "kvmix/version.h"
#include "lib/tune/stopwatch.h"

namespace kvmix::tune {
namespace {

using testing::ExpectGoodMessage;
using testing::ReadBytes;
using testing::TempFolder;
using testing::WriteBytes;

// A layer of one head of each kind.
LayerShape Shape(std::size_t group, std::size_t dim) { return {1, group, dim, dim}; }

// Of this machine, with times that use all of their bits.
Wisdom SomeWisdom() {
  Wisdom wisdom = ThisMachine();
  wisdom.speeds = {{"i8-token", "f16", 6, 128, 128, 4096, 0.1 + 0.2},
                   {"f16", "i8-head", 7, 192, 128, 1, 1e12 / 3.0}};
  return wisdom;
}

void ExpectRefused(const std::string& path, ErrorCode code, const std::vector<std::string>& parts) {
  const Result<Wisdom> wisdom = LoadWisdom(path);
  ASSERT_FALSE(wisdom.ok());
  EXPECT_EQ(wisdom.status().code(), code) << wisdom.status().message();
  ExpectGoodMessage(wisdom.status(), path);
  for (const std::string& part : parts)
    EXPECT_NE(wisdom.status().message().find(part), std::string::npos)
        << wisdom.status().message() << " does not name " << part;
}

TEST(WisdomFile, ComesBackExactly) {
  const TempFolder folder;
  const std::string path = folder.file("wisdom.json");
  const Wisdom saved = SomeWisdom();
  ASSERT_TRUE(SaveWisdom(saved, path).ok());
  EXPECT_EQ(folder.entries(), 1u);
  const Result<Wisdom> loaded = LoadWisdom(path);
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  EXPECT_EQ(loaded->cpu, saved.cpu);
  EXPECT_EQ(loaded->target, saved.target);
  EXPECT_EQ(loaded->version, saved.version);
  ASSERT_EQ(loaded->speeds.size(), 2u);
  for (const HeadSpeed& s : saved.speeds) {
    const HeadSpeed* found =
        loaded->Find(s.k_codec, s.v_codec, {1, s.group, s.k_dim, s.v_dim}, s.context);
    ASSERT_NE(found, nullptr);
    EXPECT_EQ(found->decode_ns, s.decode_ns);
  }
}

TEST(WisdomFile, FindsOnlyWhatAgreesInEverything) {
  const Wisdom wisdom = SomeWisdom();
  EXPECT_EQ(wisdom.Find("i8-token", "f16", Shape(6, 128), 4096), &wisdom.speeds[0]);
  EXPECT_EQ(wisdom.Find("f16", "f16", Shape(6, 128), 4096), nullptr);
  EXPECT_EQ(wisdom.Find("i8-token", "i8-token", Shape(6, 128), 4096), nullptr);
  EXPECT_EQ(wisdom.Find("i8-token", "f16", Shape(7, 128), 4096), nullptr);
  EXPECT_EQ(wisdom.Find("i8-token", "f16", Shape(6, 64), 4096), nullptr);
  EXPECT_EQ(wisdom.Find("i8-token", "f16", Shape(6, 128), 4095), nullptr);
  EXPECT_EQ(wisdom.Find("i8-token", "f16", {1, 6, 128, 64}, 4096), nullptr);
  EXPECT_EQ(wisdom.Find("f16", "i8-head", {2, 14, 192, 128}, 1), &wisdom.speeds[1]);
  LayerShape windowed = Shape(6, 128);
  windowed.window = 4096;
  EXPECT_EQ(wisdom.Find("i8-token", "f16", windowed, 9000), &wisdom.speeds[0]);
  EXPECT_EQ(wisdom.Find("i8-token", "f16", windowed, 4095), nullptr);
}

TEST(WisdomFile, OfAnotherMachineIsRefusedNamingBoth) {
  const TempFolder folder;
  const std::string path = folder.file("wisdom.json");
  for (std::string Wisdom::*field : {&Wisdom::cpu, &Wisdom::target, &Wisdom::version}) {
    Wisdom other = SomeWisdom();
    other.*field = "something \"else\"";
    ASSERT_TRUE(SaveWisdom(other, path).ok());
    ExpectRefused(path, ErrorCode::kMismatch, {ThisMachine().*field, "something "});
  }
}

TEST(WisdomFile, BelongsToOneTarget) {
  const TempFolder folder;
  const std::string path = folder.file("wisdom.json"), best = ThisMachine().target;
  EXPECT_EQ(best, Targets().front());
  for (const std::string_view target : Targets()) {
    Wisdom wisdom = ThisMachine(target);
    EXPECT_EQ(wisdom.target, target);
    ASSERT_TRUE(SaveWisdom(wisdom, path).ok());
    EXPECT_TRUE(LoadWisdom(path, target).ok());
    if (target == best) {
      EXPECT_TRUE(LoadWisdom(path).ok());
    } else {
      ExpectRefused(path, ErrorCode::kMismatch, {best, std::string(target)});
    }
  }
  EXPECT_EQ(LoadWisdom(path, "AVX9").status().code(), ErrorCode::kMismatch);
}

TEST(WisdomFile, RefusesWhatIsWrong) {
  const TempFolder folder;
  const std::string path = folder.file("wisdom.json");
  EXPECT_EQ(LoadWisdom(path).status().code(), ErrorCode::kNotFound);
  EXPECT_FALSE(LoadWisdom(folder.path()).ok());
  ASSERT_TRUE(SaveWisdom(SomeWisdom(), path).ok());
  const std::string good = ReadBytes(path);
  for (const std::size_t size :
       {std::size_t{0}, std::size_t{1}, good.size() / 2, good.size() - 3}) {
    WriteBytes(path, good.substr(0, size));
    ExpectRefused(path, ErrorCode::kCorrupt, {});
  }
  const auto refused = [&](const char* pointer, const nlohmann::json& value, ErrorCode code) {
    SCOPED_TRACE(pointer);
    nlohmann::json json = nlohmann::json::parse(good);
    json[nlohmann::json::json_pointer(pointer)] = value;
    WriteBytes(path, json.dump());
    ExpectRefused(path, code, {});
  };
  refused("/format", "kvmix-plan", ErrorCode::kCorrupt);
  refused("/version", {2, 0}, ErrorCode::kVersion);
  refused("/version", "0.1.0", ErrorCode::kCorrupt);
  refused("/format", 1, ErrorCode::kCorrupt);
  refused("/cpu", nullptr, ErrorCode::kCorrupt);
  refused("/speeds", "fast", ErrorCode::kCorrupt);
  refused("/speeds/0", nlohmann::json::object(), ErrorCode::kCorrupt);
  refused("/speeds/0/group", -1, ErrorCode::kCorrupt);
  refused("/speeds/0/decode_ns", "1", ErrorCode::kCorrupt);
  refused("/speeds/0/decode_ns", 0.0, ErrorCode::kCorrupt);
  refused("/speeds/1/decode_ns", -5.0, ErrorCode::kCorrupt);
  WriteBytes(path, good.substr(0, good.size() - 3) + ", \"cpu\": \"another\"}");  // given twice
  ExpectRefused(path, ErrorCode::kCorrupt, {"cpu"});
  WriteBytes(path, std::string(100000, '['));
  ExpectRefused(path, ErrorCode::kCorrupt, {"deeper"});
  ExpectGoodMessage(SaveWisdom(SomeWisdom(), folder.file("no/wisdom.json")),
                    folder.file("no/wisdom.json"));
}

TEST(WisdomFile, SaysWhereItIsWrong) {
  const TempFolder folder;
  const std::string path = folder.file("wisdom.json");
  ASSERT_TRUE(SaveWisdom(SomeWisdom(), path).ok());
  nlohmann::json json = nlohmann::json::parse(ReadBytes(path));
  json["speeds"][1]["decode_ns"] = -5.0;
  WriteBytes(path, json.dump());
  ExpectRefused(path, ErrorCode::kCorrupt, {"speeds[1].decode_ns", "found -5"});
}

TEST(WisdomFile, OfANewerMinorVersionIsRead) {
  const TempFolder folder;
  const std::string path = folder.file("wisdom.json");
  ASSERT_TRUE(SaveWisdom(SomeWisdom(), path).ok());
  nlohmann::json json = nlohmann::json::parse(ReadBytes(path));
  json["version"] = {1, 9};
  json["speeds"][0]["watts"] = 5;
  WriteBytes(path, json.dump());
  EXPECT_TRUE(LoadWisdom(path).ok());
}

TEST(WisdomFile, OfTheOldFormSaysWhatToDo) {
  const TempFolder folder;
  const std::string path = folder.file("wisdom.json");
  WriteBytes(
      path,
      R"({"format": "kvmix-wisdom-1", "cpu": "a", "target": "b", "version": "0.1.0", "speeds": []})");
  ExpectRefused(path, ErrorCode::kVersion, {"kvmix-wisdom-1", "delete", "measured anew"});
}

TEST(MedianSeconds, CallsEveryFunctionOnceARound) {
  std::string calls;
  const std::vector<double> medians =
      MedianSeconds({[&] { calls += 'a'; }, [&] { calls += 'b'; }, [&] { calls += 'c'; }}, 0.0, 4);
  EXPECT_EQ(calls, "abcabcabcabcabc");  // one round to warm up, then four
  ASSERT_EQ(medians.size(), 3u);
  for (const double m : medians) EXPECT_GE(m, 0.0);
  EXPECT_TRUE(MedianSeconds({}, 0.0).empty());
}

TEST(MedianSeconds, GoesOnUntilTheTimeHasPassed) {
  std::size_t calls = 0;
  const auto begin = std::chrono::steady_clock::now();
  (void)MedianSeconds({[&] {
                        ++calls;
                        std::this_thread::sleep_for(std::chrono::microseconds(200));
                      }},
                      0.05, 1);
  EXPECT_GE(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(), 0.05);
  EXPECT_GT(calls, 3u);
}

TEST(MedianSeconds, IsTheMiddleAndNotMovedByOneSlowRound) {
  using std::chrono::milliseconds;
  std::size_t slow = 0, usual = 0;
  const std::vector<double> medians = MedianSeconds(
      {[&] {
         if (slow++ == 3) std::this_thread::sleep_for(milliseconds(300));
       },                                                                 // in one round of five
       [&] { std::this_thread::sleep_for(milliseconds(++usual * 4)); }},  // 8, 12, 16, 20, 24 ms
      0.0, 5);
  EXPECT_LT(medians[0], 0.1);
  EXPECT_GE(medians[1], 0.016);
}

TEST(MeasureHeadSpeeds, FillsAllPairsThatAreMissing) {
  const std::vector<CodecKind> kinds = Candidates("seed")->k;
  Wisdom wisdom = ThisMachine();
  const HeadSpeed known{"f16", "i8-token", 3, 32, 32, 100, 12345.0};
  wisdom.speeds = {known};
  ASSERT_TRUE(MeasureHeadSpeeds(kinds, kinds, Shape(3, 32), 100, 0.0, &wisdom).ok());
  EXPECT_EQ(wisdom.speeds.size(), 9u);
  for (const char* k : {"f16", "i8-head", "i8-token"}) {
    for (const char* v : {"f16", "i8-head", "i8-token"}) {
      const HeadSpeed* found = wisdom.Find(k, v, Shape(3, 32), 100);
      ASSERT_NE(found, nullptr) << k << " " << v;
      EXPECT_GT(found->decode_ns, 0.0);
    }
  }
  EXPECT_EQ(wisdom.Find("f16", "i8-token", Shape(3, 32), 100)->decode_ns,
            12345.0);  // not measured again
  const std::vector<HeadSpeed> before = wisdom.speeds;
  ASSERT_TRUE(
      MeasureHeadSpeeds(kinds, kinds, Shape(3, 32), 100, 0.0, &wisdom).ok());  // nothing left to do
  ASSERT_EQ(wisdom.speeds.size(), 9u);
  for (std::size_t i = 0; i < 9; ++i) EXPECT_EQ(wisdom.speeds[i].decode_ns, before[i].decode_ns);
  ASSERT_TRUE(MeasureHeadSpeeds({kinds[0], kinds[0]}, {kinds[0]}, Shape(3, 32), 101, 0.0, &wisdom)
                  .ok());  // another context; twice the same is one
  EXPECT_EQ(wisdom.speeds.size(), 10u);
}

// K and V of unlike widths, over what the window lets through, of a layer that shares.
TEST(MeasureHeadSpeeds, OfUnlikeLayers) {
  Wisdom wisdom = ThisMachine();
  LayerShape layer{2, 6, 24, 16};
  layer.window = 50;
  layer.kv_layer = 0;
  ASSERT_TRUE(MeasureHeadSpeeds({CodecKind()}, {CodecKind()}, layer, 100, 0.0, &wisdom).ok());
  ASSERT_EQ(wisdom.speeds.size(), 1u);
  const HeadSpeed& s = wisdom.speeds[0];
  EXPECT_EQ(std::tuple(s.group, s.k_dim, s.v_dim, s.context), std::tuple(3u, 24u, 16u, 50u));
  EXPECT_EQ(wisdom.Find("f16", "f16", layer, 100), &s);
}

TEST(MeasureHeadSpeeds, StepsAreNoCodecsOfTheirOwn) {
  for (const auto& [name, storages] :
       {std::pair<const char*, std::size_t>{"int8", 3}, {"all", 7}}) {
    Wisdom wisdom = ThisMachine();
    const CandidateKinds kinds = *Candidates(name);
    ASSERT_TRUE(MeasureHeadSpeeds(kinds.k, {kinds.v[0]}, Shape(1, 16), 20, 0.0, &wisdom).ok());
    EXPECT_EQ(wisdom.speeds.size(), storages);
    EXPECT_NE(wisdom.Find("i8-token-bf16", "f16", Shape(1, 16), 20), nullptr);
    ASSERT_TRUE(MeasureHeadSpeeds(kinds.k, kinds.v, Shape(1, 16), 20, 0.0, &wisdom).ok());
    EXPECT_EQ(wisdom.speeds.size(), storages * storages);
  }
  Wisdom odd = ThisMachine();  // i6, i4 and i3 do not fit
  const CandidateKinds all = *Candidates("all");
  ASSERT_TRUE(MeasureHeadSpeeds(all.k, all.v, Shape(1, 17), 20, 0.0, &odd).ok());
  EXPECT_EQ(odd.speeds.size(), 16u);
  for (const bool step : {false, true}) {
    EXPECT_EQ(SpeedName({KVMIX_STORAGE_I8, KVMIX_SCALE_TOKEN_BF16, step, step, step}),
              "i8-token-bf16");
    EXPECT_EQ(SpeedName({KVMIX_STORAGE_I8, KVMIX_SCALE_HEAD, step, false, step}), "i8-head");
  }
  EXPECT_EQ(SpeedName(ParseCodecKind("i8x8-token+centre").value()), "i8x8-token");
  EXPECT_EQ(SpeedName({}), "f16");
}

TEST(MeasureHeadSpeeds, OfTheTargetThatTheRecordNames) {
  for (const std::string_view target : Targets()) {
    Wisdom wisdom = ThisMachine(target);
    EXPECT_TRUE(
        MeasureHeadSpeeds({CodecKind()}, {CodecKind()}, Shape(2, 16), 20, 0.0, &wisdom).ok());
    EXPECT_EQ(wisdom.speeds.size(), 1u);
  }
  Wisdom unknown = ThisMachine();
  unknown.target = "AVX9";
  const Status s = MeasureHeadSpeeds({CodecKind()}, {CodecKind()}, Shape(2, 16), 20, 0.0, &unknown);
  EXPECT_EQ(s.code(), ErrorCode::kInvalidArgument);
  EXPECT_NE(s.message().find("AVX9"), std::string::npos) << s.message();
  EXPECT_TRUE(unknown.speeds.empty());
}

TEST(MeasureHeadSpeeds, RefusesShapesThatAreNone) {
  Wisdom wisdom = ThisMachine();
  const std::vector<CodecKind> kinds = Candidates("seed")->k;
  EXPECT_EQ(MeasureHeadSpeeds(kinds, kinds, Shape(0, 32), 100, 0.0, &wisdom).code(),
            ErrorCode::kInvalidArgument);
  EXPECT_EQ(MeasureHeadSpeeds(kinds, kinds, Shape(3, 513), 100, 0.0, &wisdom).code(),
            ErrorCode::kInvalidArgument);
  EXPECT_EQ(MeasureHeadSpeeds(kinds, kinds, Shape(3, 32), 0, 0.0, &wisdom).code(),
            ErrorCode::kInvalidArgument);
  EXPECT_EQ(
      MeasureHeadSpeeds(kinds, kinds, Shape(3, 32), std::size_t{1} << 50, 0.0, &wisdom).code(),
      ErrorCode::kOutOfMemory);
  EXPECT_TRUE(wisdom.speeds.empty());
}

}  // namespace
}  // namespace kvmix::tune
