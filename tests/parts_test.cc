// Calibrating and measuring in parts: however the work is split, the bytes are the same; what is
// missing, doubled, of another origin or damaged is named.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "dump_files.h"
#include "kvmix/tune/steps.h"
#include "kvmix/version.h"
#include "lib/files/safetensors.h"
#include "same_errors.h"
#include "synthetic_dump.h"
#include "tests/expect_error.h"

namespace kvmix::testing {
namespace {

using namespace tune;

const Geometry kGeometry{4, 2, 6, 32};

class PartsTest : public ::testing::Test {
 protected:
  PartsTest() : a_(Make("a", {9, 1, 30}, 1)), b_(Make("b", {17}, 2)), c_(Make("c", {2}, 3)) {}

  Dump Make(const std::string& name, const std::vector<std::size_t>& prompts, std::uint32_t seed,
            const Model& model = kGeometry) {
    SyntheticDump{model, prompts, seed, 0.4, 1.0, {{0, 1}, {2, 0}}, 30.0}.Write(folder_.file(name));
    return Opened(folder_.file(name));
  }

  static Dump Opened(const std::string& path) { return std::move(*Dump::Open(path)); }

  static Calibration CalibrationOf(const std::vector<const Dump*>& dumps, std::size_t first,
                                   std::size_t last, int threads = 1) {
    return Calibrate(dumps, first, last, {.runner = threads}).value();
  }

  // A measurement with the seed's candidates.
  static Measurement MeasurementOf(const std::vector<const Dump*>& dumps,
                                   const Calibration& calibration, std::size_t first,
                                   std::size_t last, int threads = 1) {
    Measurement m = StartMeasurement(calibration, *Candidates("seed")).value();
    const Status s = Measure(dumps, calibration, first, last, {.runner = threads}, &m);
    EXPECT_TRUE(s.ok()) << s.message();
    return m;
  }

  template <class Part>
  std::string Bytes(const Part& part) {
    const Status s = SavePart(part, folder_.file("part"));
    EXPECT_TRUE(s.ok()) << s.message();
    return ReadBytes(folder_.file("part"));
  }

  // All parts, each merged into what those before it gave.
  template <class Part>
  static Part Merged(std::vector<Part> parts) {
    Part all = std::move(parts[0]);
    for (std::size_t i = 1; i < parts.size(); ++i) {
      Result<Part> more = Merge(all, parts[i]);
      if (!more.ok()) ADD_FAILURE() << more.status().message();
      all = std::move(*more);
    }
    return all;
  }

  TempFolder folder_;
  Dump a_, b_, c_;
};

// ---- splits

TEST_F(PartsTest, EverySplitGivesTheSameBytes) {
  for (const bool unlike : {false, true}) {
    std::vector<Dump> dumps;
    const Model model = unlike ? UnlikeModel() : Model(kGeometry);
    const std::size_t layers = model.layers.size();
    dumps.push_back(Make("x", {9, 1, 30}, 1, model));
    dumps.push_back(Make("y", {17}, 2, model));
    dumps.push_back(Make("z", {1, 1}, 3, model));
    std::vector<const Dump*> all = {&dumps[0], &dumps[1], &dumps[2]};
    const Calibration calibration = CalibrationOf(all, 0, layers);
    const Measurement measurement = MeasurementOf(all, calibration, 0, layers);
    const std::string calibrated = Bytes(calibration), measured = Bytes(measurement);
    std::mt19937 random(1);
    for (int round = 0; round < 6; ++round) {
      SCOPED_TRACE(round);
      const int threads = round % 3 + 1;
      std::ranges::shuffle(all, random);
      EXPECT_EQ(Bytes(CalibrationOf(all, 0, layers, threads)), calibrated);
      EXPECT_EQ(Bytes(MeasurementOf(all, calibration, 0, layers, threads)), measured);
      std::vector<Calibration> calibrations;
      std::vector<Measurement> measurements;
      for (std::size_t first = 0; first < layers;) {
        const std::size_t last = std::min<std::size_t>(layers, first + 1 + random() % 3),
                          cut = random() % 4;  // dumps before it, and the others
        const std::vector<const Dump*> halves[] = {{all.begin(), all.begin() + cut % 4},
                                                   {all.begin() + cut % 4, all.end()}};
        for (const std::vector<const Dump*>& half : halves) {
          if (half.empty()) continue;
          calibrations.push_back(CalibrationOf(half, first, last, threads));
          measurements.push_back(MeasurementOf(half, calibration, first, last, threads));
        }
        first = last;
      }
      std::ranges::shuffle(calibrations, random);
      std::ranges::shuffle(measurements, random);
      EXPECT_EQ(Bytes(Merged(calibrations)), calibrated);
      EXPECT_EQ(Bytes(Merged(measurements)), measured);
    }
    // In one go, and through files.
    const ErrorTable table = Measure(all, *Candidates("seed"), 0, layers).value();
    ExpectSame(Table(measurement).value(), table);
    WriteBytes(folder_.file("calibration"), calibrated);
    WriteBytes(folder_.file("measurement"), measured);
    EXPECT_EQ(Bytes(LoadCalibration(folder_.file("calibration")).value()), calibrated);
    const Measurement loaded = LoadMeasurement(folder_.file("measurement")).value();
    EXPECT_EQ(Bytes(loaded), measured);
    ExpectSame(Table(loaded).value(), table);
    EXPECT_EQ(KindOfPart(folder_.file("calibration")).value(), PartKind::kCalibration);
    EXPECT_EQ(KindOfPart(folder_.file("measurement")).value(), PartKind::kMeasurement);
  }
}

TEST_F(PartsTest, MergingIsAssociative) {
  const Calibration x = CalibrationOf({&a_}, 0, 2), y = CalibrationOf({&a_}, 2, 4),
                    z = CalibrationOf({&b_}, 1, 3);
  EXPECT_EQ(Bytes(*Merge(*Merge(x, y), z)), Bytes(*Merge(z, *Merge(y, x))));
}

// Interrupted after a layer, the work goes on where it stopped.
TEST_F(PartsTest, MeasuringGoesOnWhereItStopped) {
  const Calibration calibration = CalibrationOf({&a_, &b_}, 0, 4);
  const std::string whole = Bytes(MeasurementOf({&a_, &b_}, calibration, 0, 4));
  Measurement m = StartMeasurement(calibration, *Candidates("seed")).value();
  const Status stopped = Measure({&b_, &a_}, calibration, 0, 4, {.runner = 1}, &m,
                                 [] { return Status(ErrorCode::kIo, "the disk is full"); });
  EXPECT_EQ(stopped.message(), "the disk is full");
  EXPECT_EQ(m.pieces.size(), 1u);
  std::vector<std::pair<std::size_t, std::size_t>> progress;
  MeasureOptions options;
  options.runner = 1;
  options.progress = [&](std::size_t done, std::size_t of) {
    progress.emplace_back(done, of);
    return true;
  };
  ASSERT_TRUE(Measure({&a_, &b_}, calibration, 0, 4, options, &m).ok());
  EXPECT_EQ(progress, (std::vector<std::pair<std::size_t, std::size_t>>{{1, 3}, {2, 3}, {3, 3}}));
  EXPECT_EQ(Bytes(m), whole);
}

// ---- what does not belong together

TEST_F(PartsTest, NamesWhatIsInBothParts) {
  const Calibration all = CalibrationOf({&a_, &b_}, 0, 4);
  ExpectError(Merge(all, CalibrationOf({&b_}, 1, 4)).status(), ErrorCode::kMismatch,
              {"both have layers 1 to 3 of b"});
  const Measurement m = MeasurementOf({&a_, &b_}, all, 0, 3);
  ExpectError(Merge(m, MeasurementOf({&a_}, all, 2, 4)).status(), ErrorCode::kMismatch,
              {"both have layer 2 of a"});
  ExpectError(Calibrate({&a_, &b_, &a_}, 0, 1).status(), ErrorCode::kInvalidArgument,
              {a_.path(), "expected each once"});
  Measurement empty = StartMeasurement(all, *Candidates("seed")).value();
  ExpectError(Measure({&b_, &b_}, all, 0, 1, {}, &empty), ErrorCode::kInvalidArgument,
              {b_.path(), "expected each once"});
}

TEST_F(PartsTest, NamesWhatIsMissing) {
  const Calibration all = CalibrationOf({&a_, &b_}, 0, 4);
  const Calibration some =
      Merged<Calibration>({CalibrationOf({&a_}, 0, 1), CalibrationOf({&b_}, 1, 4)});
  Measurement m = StartMeasurement(some, *Candidates("seed")).value();
  // In the order of hashes, which nobody can foretell.
  ExpectError(Measure({&a_}, some, 0, 4, {}, &m), ErrorCode::kMismatch,
              {"the calibration lacks", "layers 1 to 3 of a", "layer 0 of b"});
  m = MeasurementOf({&a_, &b_}, all, 1, 2);
  ExpectError(Table(m).status(), ErrorCode::kMismatch,
              {"the measurement lacks", "layers 0 and 2 to 3 of a", "layers 0 and 2 to 3 of b"});
}

TEST_F(PartsTest, RefusesPartsOfAnotherOrigin) {
  const Calibration all = CalibrationOf({&a_, &b_}, 0, 4), of_a = CalibrationOf({&a_}, 0, 4);
  const Dump other = Make("other", {5}, 1, Geometry{3, 2, 6, 32});
  ExpectError(Merge(all, CalibrationOf({&other}, 0, 3)).status(), ErrorCode::kMismatch,
              {ToString(kGeometry), ToString(other.model())});
  const Measurement m = MeasurementOf({&a_}, all, 0, 2);
  const auto refused = [&](const auto& change, const std::vector<std::string>& names) {
    Measurement changed = MeasurementOf({&a_}, all, 2, 3);
    change(changed);
    ExpectError(Merge(m, changed).status(), ErrorCode::kMismatch, names);
  };
  refused([&](Measurement& x) { x = MeasurementOf({&a_}, of_a, 2, 3); },
          {"calibration dumps: expected", "b (", "found a (" + of_a.dumps[0].hash + ")"});
  refused([](Measurement& x) { x.candidates.k.pop_back(); },
          {"candidates of K: expected f16,i8-head,i8-token, found f16,i8-head"});
  refused([](Measurement& x) { x.candidates.v.pop_back(); }, {"candidates of V"});
  refused([](Measurement& x) { x.exact_first = 4; }, {"exact first tokens: expected 0, found 4"});
  refused([](Measurement& x) { x.target = "AVX9"; }, {"instruction set", "found AVX9"});
  refused([](Measurement& x) { x.library_version = "9"; }, {"version of kvmix", "found 9"});
  refused(
      [&](Measurement& x) {
        x = MeasurementOf({&b_}, all, 1, 2);
        x.statistics[1][0].sum[0] += 1.0;
      },
      {"layer 1 was measured with another calibration"});
}

TEST_F(PartsTest, RefusesDumpsThatWereNotCalibrated) {
  const Calibration all = CalibrationOf({&a_, &b_}, 0, 4);
  Measurement m = StartMeasurement(all, *Candidates("seed")).value();
  ExpectError(Measure({&c_}, all, 0, 1, {}, &m), ErrorCode::kMismatch,
              {c_.path(), "expected a dump that was calibrated on, a, b"});
  // The same file with another number in layer 2: its name alone does not make it the dump.
  std::string bytes = ReadBytes(a_.path());
  std::filesystem::create_directory(folder_.file("changed"));
  const std::string path = folder_.file("changed/a");
  const DumpLayer loaded = *a_.Load(2);
  const char* number = static_cast<const char*>(loaded.k.row(0, 0));
  const std::string row(number, 64);
  bytes[bytes.find(row)] ^= 1;
  WriteBytes(path, bytes);
  const Dump changed = Opened(path);
  ExpectError(Measure({&changed}, all, 1, 4, {}, &m), ErrorCode::kMismatch,
              {path, "with other numbers in layer 2"});
  // The layers that are the same can be measured; and two dumps that differ elsewhere are told
  // apart.
  EXPECT_TRUE(Measure({&changed}, all, 0, 2, {}, &m).ok());
  const Calibration twins = CalibrationOf({&a_, &changed}, 0, 4);
  const Measurement one = MeasurementOf({&a_}, twins, 0, 1),
                    two = MeasurementOf({&changed}, twins, 0, 1);
  EXPECT_TRUE(Merge(one, two).ok());
}

TEST_F(PartsTest, ADumpIsKnownByWhatIsInIt) {
  const DumpId id = Identify(a_).value();
  EXPECT_EQ(id.name, "a");
  EXPECT_EQ(id.tokens, 40u);
  EXPECT_EQ(id.longest_prompt, 30u);
  EXPECT_EQ(id.layers.size(), 4u);
  std::filesystem::copy_file(a_.path(), folder_.file("copy"));
  const DumpId copy = Identify(Opened(folder_.file("copy"))).value();
  EXPECT_EQ(copy.hash, id.hash);
  EXPECT_EQ(copy.name, "copy");
  // The same numbers as prompts of other lengths.
  const DumpId split = Identify(Make("split", {40}, 1)).value();
  EXPECT_EQ(split.layers, id.layers);
  EXPECT_NE(split.hash, id.hash);
}

// ---- files

// A part's file in pieces that a test can change; written with a checksum that is right.
struct PartFile {
  std::map<std::string, std::string> metadata;
  std::map<std::string, internal::SafetensorsTensor> tensors;
  std::string bytes;

  explicit PartFile(std::string all) : bytes(std::move(all)) {
    const internal::Safetensors content = internal::ParseSafetensors(bytes, "part").value();
    metadata = content.metadata;
    for (const auto& [name, t] : content.tensors)
      tensors[name] = {name, t.dtype, t.shape, t.In(bytes)};
    tensors.erase("checksum");
  }
  nlohmann::json about() const { return nlohmann::json::parse(metadata.at("kvmix")); }
  void Write(const std::string& path) const {
    std::vector<internal::SafetensorsTensor> list;
    for (const auto& [name, t] : tensors) list.push_back({name, t.dtype, t.shape, t.data});
    ASSERT_TRUE(internal::WriteSafetensors(path, metadata, list).ok());
  }
};

class PartFiles : public PartsTest {
 protected:
  PartFiles()
      : calibration_(CalibrationOf({&a_, &b_}, 0, 4)),
        measured_(Bytes(MeasurementOf({&a_, &b_}, calibration_, 0, 2))),
        calibrated_(Bytes(calibration_)) {}

  Calibration calibration_;
  std::string measured_, calibrated_;
};

TEST_F(PartFiles, RefusesEveryDamage) {
  const std::string path = folder_.file("damaged");
  std::mt19937 random(1);
  for (const std::string* good : {&calibrated_, &measured_}) {
    for (int round = 0; round < 300; ++round) {
      std::string bytes = *good;
      if (round < 50) {
        bytes.resize(random() % bytes.size());
      } else if (round < 60) {
        bytes.resize(bytes.size() + 1 + random() % 9);
      } else {  // one bit, in the header as likely as in the numbers
        const std::size_t within = round % 2 == 0 ? 3000 : bytes.size();
        bytes[random() % within] ^= static_cast<char>(1 << random() % 8);
      }
      WriteBytes(path, bytes);
      const Status s =
          good == &calibrated_ ? LoadCalibration(path).status() : LoadMeasurement(path).status();
      SCOPED_TRACE(round);
      ExpectGoodMessage(s, path);
    }
  }
}

TEST_F(PartFiles, RefusesFilesOfAnotherKind) {
  WriteBytes(folder_.file("c"), calibrated_);
  WriteBytes(folder_.file("m"), measured_);
  ExpectError(LoadMeasurement(folder_.file("c")).status(), ErrorCode::kCorrupt,
              {"/c: format: expected \"kvmix-measurement\", found \"kvmix-calibration\""});
  ExpectError(LoadCalibration(folder_.file("m")).status(), ErrorCode::kCorrupt,
              {"/m: format: expected \"kvmix-calibration\", found \"kvmix-measurement\""});
  ExpectError(LoadCalibration(a_.path()).status(), ErrorCode::kCorrupt,
              {a_.path(), "metadata kvmix", "found none"});
  ExpectError(KindOfPart(a_.path()).status(), ErrorCode::kCorrupt, {a_.path(), "found none"});
  ExpectError(LoadCalibration(folder_.file("none")).status(), ErrorCode::kNotFound, {"/none"});
}

TEST_F(PartFiles, NewerVersions) {
  const std::string path = folder_.file("newer");
  PartFile file(measured_);
  nlohmann::json about = file.about();
  about["version"] = {1, 9};
  about["of_later"] = "times";
  file.metadata["kvmix"] = about.dump();
  file.tensors["later"] = {"later", "U8", {3}, "abc"};
  file.Write(path);
  EXPECT_EQ(Bytes(LoadMeasurement(path).value()), measured_);  // what is unknown is not looked at
  about["version"] = {2, 0};
  file.metadata["kvmix"] = about.dump();
  file.Write(path);
  ExpectError(LoadMeasurement(path).status(), ErrorCode::kVersion,
              {path, "version: expected major version 1, found 2"});
}

// Edited by hand, with a checksum that fits.
TEST_F(PartFiles, RefusesWhatContradictsItself) {
  const std::string path = folder_.file("edited");
  const auto refused = [&](const auto& edit, const std::string& text) {
    PartFile file(measured_);
    nlohmann::json about = file.about();
    edit(file, about);
    file.metadata["kvmix"] = about.dump();
    file.Write(path);
    const Status s = LoadMeasurement(path).status();
    ExpectGoodMessage(s, path);
    EXPECT_NE(s.message().find(text), s.message().npos) << s.message();
  };
  const auto about_refused = [&](const auto& edit, const std::string& text) {
    refused([&](PartFile&, nlohmann::json& about) { edit(about); }, text);
  };
  about_refused([](auto& x) { x["layers"][1]["k_dim"] = 64; },
                "layers.1.k.sum: expected F64 [2, 64], found F64 [2, 32]");
  about_refused([](auto& x) { x["layers"][1]["query_heads"] = 7; }, "layers");
  about_refused([](auto& x) { x["layers"][1]["query_heads"] = 4; },
                "layers.1.k.attention: expected F64 [2, 3, 2, 3], found F64 [2, 3, 3, 3]");
  about_refused([](auto& x) { x["candidates"]["k"].push_back("f16"); },
                "k.values: expected F64 [2, 4, 3], found F64 [2, 3, 3]");
  about_refused([](auto& x) { x["candidates"]["v"][1] = "i2-token"; },
                "candidates.v[1]: expected a codec that this version knows, found \"i2-token\"");
  about_refused([](auto& x) { x["candidates"]["k"].clear(); }, "candidates.k: expected 1 codec");
  about_refused([](auto& x) { x["dumps"][0]["tokens"] = 0; }, "tokens: expected 1 or more");
  about_refused([](auto& x) { x["dumps"][0]["pieces"] = {0, 1, 2}; }, "layers.2.k");
  about_refused([](auto& x) { x["dumps"][0]["pieces"] = {0, 4}; }, "found 4");
  about_refused([](auto& x) { x["dumps"][0]["pieces"] = {1, 0}; }, "in order, found 0");
  about_refused([](auto& x) { x["dumps"][0]["layer_hashes"].erase(1); },
                "layer_hashes: expected 4 layers, found 3");
  about_refused([](auto& x) { std::swap(x["dumps"][0], x["dumps"][1]); }, "order of their hashes");
  about_refused([](auto& x) { x["dumps"] = nlohmann::json::array(); }, "dumps: expected 1 dump");
  about_refused([](auto& x) { x.erase("target"); }, "target: expected a value, found none");
  refused([](PartFile& file, auto&) { file.tensors.erase("layers.0.v.max"); },
          "layers.0.v.max: expected a tensor, found none");
  refused([](PartFile& file, auto&) { file.tensors["layers.0.v.max"].dtype = "I64"; },
          "layers.0.v.max: expected F64 [2, 32], found I64 [2, 32]");
  const double nan = std::nan("");
  std::string numbers(64 * sizeof nan, '\0');
  std::memcpy(numbers.data() + 80, &nan, sizeof nan);
  refused([&](PartFile& file, auto&) { file.tensors["layers.1.k.sum"].data = numbers; },
          "layers.1: expected finite numbers");
}

}  // namespace
}  // namespace kvmix::testing
