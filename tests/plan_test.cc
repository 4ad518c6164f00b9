// Plans: sizes, checks, and their file, which gives back every bit or says what is wrong with it.
#include "kvmix/plan.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "dump_files.h"

namespace kvmix {
namespace {

using nlohmann::json;
using testing::ExpectGoodMessage;
using testing::ReadBytes;
using testing::TempFolder;
using testing::WriteBytes;

constexpr float kInf = std::numeric_limits<float>::infinity();

HeadCodec Head(float scale = 0.5f) {
  return {{KVMIX_STORAGE_I8, KVMIX_SCALE_HEAD}, scale, nullptr};
}
HeadCodec Token(Scale scale = KVMIX_SCALE_TOKEN) { return {{KVMIX_STORAGE_I8, scale}}; }

// The same with steps, as their vectors say: one that is not empty is a step.
HeadCodec With(HeadCodec codec, std::vector<float> mean, std::vector<float> factor = {},
               bool hadamard = false) {
  codec.kind.centre = !mean.empty();
  codec.kind.fold = !factor.empty();
  codec.kind.hadamard = hadamard;
  codec.vectors =
      std::make_shared<const CodecVectors>(CodecVectors{std::move(mean), std::move(factor)});
  return codec;
}

const Geometry kStudy{24, 2, 14, 64};

TEST(Plan, BytesPerToken) {
  EXPECT_EQ(BytesPerToken(UniformPlan(kStudy, {}, {})), 12288u);
  EXPECT_EQ(BytesPerToken(UniformPlan(kStudy, Head(), Head())), 6144u);
  EXPECT_EQ(BytesPerToken(UniformPlan(kStudy, Token(), Token())), 6528u);
  EXPECT_EQ(BytesPerToken(
                UniformPlan(kStudy, Token(KVMIX_SCALE_TOKEN_BF16), Token(KVMIX_SCALE_TOKEN_BF16))),
            6336u);
  EXPECT_EQ(Fp16BytesPerToken(kStudy), 12288u);

  Plan strategy3 = UniformPlan(kStudy, Head(), Token());
  const std::pair<std::size_t, std::size_t> outliers[] = {{0, 0}, {0, 1}, {1, 1},
                                                          {2, 0}, {2, 1}, {8, 0}};
  for (const auto& [layer, head] : outliers) strategy3.codec(layer, head, KVMIX_K) = {};
  EXPECT_EQ(BytesPerToken(strategy3), 6720u);
  EXPECT_DOUBLE_EQ(SavedFraction(strategy3), 1.0 - 6720.0 / 12288.0);
  EXPECT_DOUBLE_EQ(BitsPerNumber(strategy3).k, 8.0 + 8.0 * 6 / 48);  // 6 of 48 heads
  EXPECT_DOUBLE_EQ(BitsPerNumber(strategy3).v, 8.5);
  strategy3.exact_first = 4;
  EXPECT_DOUBLE_EQ(BitsPerNumber(strategy3).v, 8.5);  // of a token that is not among them
  EXPECT_DOUBLE_EQ(BitsPerNumber(strategy3, 64).v, 8.5 + 16.0 * 4 / 64);
  EXPECT_EQ(SavedFraction(UniformPlan(kStudy, {}, {})), 0.0);
}

// (Names, kinds and their numbers: codec_test.cc.)
TEST(Model, ShortForm) {
  EXPECT_TRUE(CheckModel(kStudy).ok());
  EXPECT_TRUE(CheckModel(Geometry{65536, 65536, 65536, 512}).ok());
  const std::pair<Geometry, const char*> bad[] = {
      {{0, 2, 14, 64}, "layers: expected 1 to 65536, found 0"},
      {{65537, 2, 14, 64}, "layers: expected 1 to 65536, found 65537"},
      {{~std::size_t{0}, 2, 14, 64}, "layers: expected 1 to 65536, found 65537"},
      {{24, 0, 14, 64}, "layers: expected one with K and V, found none"},
      {{24, 2, 0, 64}, "layer 0: query_heads: expected 1 to 65536, found 0"},
      {{24, 2, 15, 64}, "layer 0: query_heads: expected a multiple of the 2 KV heads, found 15"},
      {{24, 2, 14, 0}, "layer 0: k_dim: expected 1 to 512, found 0"},
      {{24, 2, 14, 513}, "layer 0: k_dim: expected 1 to 512, found 513"},
      {{24, 1, 16, 576},
       "layer 0: k_dim: expected 1 to 512 (a latent cache, MLA, is not supported), found 576"},
      {{24, 28, 14, 64}, "layer 0: query_heads: expected a multiple of the 28 KV heads, found 14"},
  };
  for (const auto& [geometry, text] : bad) EXPECT_EQ(CheckModel(geometry).message(), text);
  EXPECT_EQ(ToString(kStudy), "24 layers x 2 KV heads x 64, 14 query heads");
  EXPECT_EQ(Model(kStudy).geometry(), kStudy);
  Model model = kStudy;
  EXPECT_EQ(model.kv_heads_before(24), 48u);
  EXPECT_EQ(model.query_heads_before(1), 14u);
  model.layers[7].window = 64;
  EXPECT_FALSE(model.geometry().has_value());
  EXPECT_EQ(Stored(model), Model(kStudy));
  EXPECT_FALSE(Model().geometry().has_value());
}

// As Gemma has them: layers that see a window, a global one, each of its own shape; one without K
// and V; one that reads the first layer's, with a longer window.
Model UnlikeModel() {
  const LayerShape local{
      .kv_heads = 2, .query_heads = 4, .k_dim = 8, .v_dim = 8, .window = 64, .soft_cap = 50.0f};
  LayerShape shared = local;
  shared.window = 100;
  shared.kv_layer = 0;
  return Model({local,
                local,
                {},
                {.kv_heads = 1,
                 .query_heads = 2,
                 .k_dim = 24,
                 .v_dim = 16,
                 .attention_scale = 0.1f,
                 .sinks = {0.5f, -1.0f / 3.0f}},
                shared});
}

TEST(Model, UnlikeLayers) {
  const Model model = UnlikeModel();
  ASSERT_TRUE(CheckModel(model).ok()) << CheckModel(model).message();
  Model bad = model;
  bad.layers[3].sinks[1] = kInf;
  EXPECT_EQ(CheckModel(bad).message(), "layer 3: sinks: expected finite numbers, found inf");
  EXPECT_EQ(ToString(model),
            "2 layers x 2 KV heads x 8, 4 query heads, window 64, soft cap 50; 1 layers x no K and "
            "V; 1 layers x 1 KV heads x 24/16, 2 query heads, scale 0.1, sinks; 1 layers x 2 KV "
            "heads x 8, 4 query heads, window 100, soft cap 50, of another layer");
  EXPECT_EQ(model.readers(0), (std::vector<std::size_t>{0, 4}));
  EXPECT_EQ(model.readers(2), std::vector<std::size_t>());
  EXPECT_EQ(model.tokens_held(0, 4096), 100u);
  EXPECT_EQ(model.tokens_held(1, 4096), 64u);
  EXPECT_EQ(model.tokens_held(1, 10), 10u);
  EXPECT_EQ(model.tokens_held(3, 4096), 4096u);
  EXPECT_EQ(model.kv_heads_before(5), 5u);
  EXPECT_EQ(model.query_heads_before(4), 10u);

  Plan plan = UniformPlan(model, {}, Token());
  EXPECT_EQ(plan.codecs.size(), 10u);
  EXPECT_EQ(plan.index(4, 1, KVMIX_V), 3u);  // layer 0's
  EXPECT_EQ(plan.index(3, 0, KVMIX_K), 8u);
  EXPECT_EQ(BytesPerToken(plan), 2 * 2 * (16u + 12u) + 48u + 20u);
  EXPECT_EQ(Fp16BytesPerToken(model), 2 * 2 * 32u + 80u);
  EXPECT_EQ(ContextBytes(plan, 4096), (100 + 64) * 2 * 28u + 4096 * 68u);
  EXPECT_EQ(Fp16ContextBytes(model, 4096), (100 + 64) * 2 * 32u + 4096 * 80u);
  EXPECT_DOUBLE_EQ(SavedFraction(plan, 4096), 1.0 - 287712.0 / 338176.0);
  // V's rows are of 8 and 16 channels, an f32 scale each.
  const double k_numbers = (100 + 64) * 2 * 8.0 + 4096 * 24.0,
               v_numbers = (100 + 64) * 2 * 8.0 + 4096 * 16.0;
  const EffectiveBits bits = BitsPerNumber(plan, 4096);
  EXPECT_EQ(bits.k, 16.0);
  EXPECT_DOUBLE_EQ(bits.v, 8.0 + 32.0 * ((100 + 64) * 2 + 4096.0) / v_numbers);
  EXPECT_DOUBLE_EQ(bits.all, 8.0 * 287712.0 / (k_numbers + v_numbers));
  const std::uint64_t fingerprint = Fingerprint(plan);
  plan.model.layers[4].kv_layer = 1;
  EXPECT_NE(Fingerprint(plan), fingerprint);
  plan.model = Stored(model);
  EXPECT_EQ(Fingerprint(plan), fingerprint);
}

TEST(Plan, CheckPlan) {
  const Geometry small{2, 2, 4, 3};
  const Plan good = UniformPlan(small, Head(), Token());
  EXPECT_TRUE(CheckPlan(good).ok());
  const auto refused = [&](const HeadCodec& codec, const char* text) {
    Plan plan = good;
    plan.codec(1, 0, KVMIX_V) = codec;
    const Status status = CheckPlan(plan);
    EXPECT_EQ(status.code(), ErrorCode::kInvalidArgument);
    ExpectGoodMessage(status, "layer 1, KV head 0, V: ");
    EXPECT_NE(status.message().find(text), std::string::npos) << status.message();
  };
  for (const float scale : {0.0f, -1.0f, kInf, std::nanf("")})
    refused(Head(scale), "expected a scale above 0");
  refused(With(Token(), {1.0f, 2.0f, 3.0f, 4.0f}), "expected a mean of 3 channels, found 4");
  refused(With(Token(), {1.0f, kInf, 3.0f}),
          "expected a mean of finite numbers in its range, found inf in channel 1");
  refused(With(Token(), {}, {1.0f, 2.0f}), "expected a factor of 3 channels, found 2");
  refused(With(Token(), {}, {1.0f, 2.0f, 0.0f}),
          "expected a factor of finite numbers in its range, found 0 in channel 2");
  HeadCodec fp16 = With({}, {1.0f, 2.0f, 3.0f});
  refused(fp16, "steps that it cannot have");
  fp16.kind = {};
  refused(fp16, "expected a mean of 0 channels, found 3");
  refused({{KVMIX_STORAGE_F16, KVMIX_SCALE_TOKEN}}, "a storage with a scale");
  refused({{KVMIX_STORAGE_I8, KVMIX_SCALE_NONE}}, "a storage with a scale");
  refused({{KVMIX_STORAGE_I4, KVMIX_SCALE_HEAD}, 1.0f, nullptr}, "a storage with a scale");
  refused({{KVMIX_STORAGE_I4, KVMIX_SCALE_TOKEN}},
          "i4-token: expected a head_dim that is a multiple of 2, found 3");

  Plan plan = good;
  plan.codecs.pop_back();
  EXPECT_EQ(CheckPlan(plan).message(),
            "codecs: expected 8 (2 layers x 2 KV heads x 3, 4 query heads), found 7");
  plan = good;
  plan.model.layers[1].k_dim = 0;
  EXPECT_FALSE(CheckPlan(plan).ok());
}

// One of everything, with numbers that use all of their bits.
Plan RichPlan() {
  std::mt19937 random(3);
  std::uniform_real_distribution<float> uniform(-300.0f, 300.0f);
  Plan plan = UniformPlan(Geometry{3, 2, 6, 40}, Token(), Token(KVMIX_SCALE_TOKEN_BF16));
  plan.codec(0, 0, KVMIX_K) = {};
  plan.codec(1, 1, KVMIX_V) = Head(std::nextafter(0.1f, 1.0f));
  const auto numbers = [&](float low) {
    std::vector<float> x(40);
    for (float& number : x) number = std::max(low, uniform(random));
    return x;
  };
  for (std::size_t layer = 0; layer < 3; ++layer) {
    std::vector<float> mean = numbers(-300.0f);
    if (layer == 2) {
      mean[0] = std::numeric_limits<float>::max();
      mean[1] = -std::numeric_limits<float>::denorm_min();
      mean[2] = 1.0f / 3.0f;
    }
    plan.codec(layer, 1, KVMIX_K) =
        With(layer == 2 ? Head(0x1.fffffep-100f) : Token(), std::move(mean));
  }
  std::vector<float> factor = numbers(1.0f / 3.0f);
  factor[0] = 0x1p-32f;
  factor[1] = 0x1p32f;
  factor[2] = std::nextafter(1.0f, 2.0f);
  plan.codec(1, 0, KVMIX_K) = With(Token(KVMIX_SCALE_TOKEN_BF16), numbers(-300.0f), factor, true);
  plan.codec(2, 0, KVMIX_K) = With(Token(), {}, factor);
  plan.codec(0, 1, KVMIX_V) = With(Token(), {}, {}, true);
  plan.codec(2, 1, KVMIX_V) = With(Head(3.0f), {}, std::move(factor), true);
  plan.provenance = {"a \"model\"\nby someone, \u00e9",
                     "one,two",
                     512,
                     256,
                     "three",
                     64,
                     {0.99, 0.1 + 0.2, 1e-300, 2e-5, 2, 5},
                     {1.0 / 3.0, 1.0, 0.0, 0.5, 1, 0}};
  return plan;
}

void ExpectSame(const Fidelity& a, const Fidelity& b) {
  EXPECT_EQ(a.worst_cosine, b.worst_cosine);
  EXPECT_EQ(a.mean_cosine, b.mean_cosine);
  EXPECT_EQ(a.worst_nmse, b.worst_nmse);
  EXPECT_EQ(a.mean_nmse, b.mean_nmse);
  EXPECT_EQ(a.worst_layer, b.worst_layer);
  EXPECT_EQ(a.worst_query_head, b.worst_query_head);
}

TEST(PlanLength, FarBeyondTheCalibration) {
  Plan plan = UniformPlan(Geometry{1, 1, 1, 8}, {}, {});
  EXPECT_FALSE(IsFarBeyond(plan, 1u << 20));  // it does not say what it was calibrated on
  plan.provenance.longest_prompt = 64;
  EXPECT_FALSE(IsFarBeyond(plan, kFarBeyondCalibration * 64));
  EXPECT_FALSE(IsFarBeyond(plan, 257));  // nothing of it ages
  const auto mean =
      std::make_shared<const CodecVectors>(CodecVectors{.mean = {1, 2, 3, 4, 5, 6, 7, 8}});
  plan.codecs[0] = {ParseCodecKind("i8-token+centre").value(), 0.0f, mean};
  EXPECT_TRUE(IsFarBeyond(plan, 257));
}

TEST(PlanFile, ComesBackExactly) {
  const TempFolder folder;
  const std::string path = folder.file("plan.json");
  const Plan plan = RichPlan();
  ASSERT_TRUE(SavePlan(plan, path).ok());
  EXPECT_EQ(folder.entries(), 1u);
  const Result<Plan> loaded = LoadPlan(path);
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  EXPECT_EQ(loaded->model, plan.model);
  EXPECT_EQ(loaded->codecs, plan.codecs);
  const Provenance& p = loaded->provenance;
  EXPECT_EQ(p.model, plan.provenance.model);
  EXPECT_EQ(p.calibration, "one,two");
  EXPECT_EQ(p.calibration_tokens, 512u);
  EXPECT_EQ(p.longest_prompt, 256u);
  EXPECT_EQ(p.holdout, "three");
  EXPECT_EQ(p.holdout_tokens, 64u);
  ExpectSame(p.on_calibration, plan.provenance.on_calibration);
  ExpectSame(p.on_holdout, plan.provenance.on_holdout);
  ASSERT_TRUE(SavePlan(*loaded, folder.file("again.json")).ok());
  EXPECT_EQ(ReadBytes(path), ReadBytes(folder.file("again.json")));
  const json written = json::parse(ReadBytes(path));
  EXPECT_EQ(written["bytes_per_token"], BytesPerToken(plan));
  EXPECT_EQ(written["saved_fraction"], SavedFraction(plan));
  EXPECT_EQ(written["version"], (json{1, 1}));
  EXPECT_EQ(written["codecs"][1][0]["k"], "i8-token-bf16+centre+fold+hadamard");
  EXPECT_EQ(written["codecs"][1][0]["k_factor"].size(), 40u);
  EXPECT_EQ(written["codecs"][0][1]["v"], "i8-token+hadamard");
  EXPECT_FALSE(written["codecs"][0][1].contains("v_factor"));
}

// What a version without i4, or i6 and i3, would refuse by the codec's name is a newer minor
// version.
TEST(PlanFile, CodesBelowInt8ComeBack) {
  const TempFolder folder;
  const std::string path = folder.file("plan.json");
  const std::tuple<const char*, unsigned, std::size_t> cases[] = {{"i4-token-bf16+hadamard", 5, 6},
                                                                  {"i6-token-bf16", 5, 8},
                                                                  {"i3-token", 5, 7},
                                                                  {"i4x16-token-bf16", 5, 6},
                                                                  {"i8x8-token-bf16", 5, 10}};
  for (const auto& [name, minor, bytes] : cases) {
    SCOPED_TRACE(name);
    Plan plan = UniformPlan(Geometry{1, 2, 2, 8}, Token(), Token());
    plan.codec(0, 1, KVMIX_K) = {ParseCodecKind(name).value()};
    ASSERT_TRUE(SavePlan(plan, path).ok());
    const Result<Plan> loaded = LoadPlan(path);
    ASSERT_TRUE(loaded.ok()) << loaded.status().message();
    EXPECT_EQ(loaded->codecs, plan.codecs);
    const json written = json::parse(ReadBytes(path));
    EXPECT_EQ(written["version"], (json{1, minor}));
    EXPECT_EQ(written["codecs"][0][1]["k"], name);
    EXPECT_EQ(written["bytes_per_token"], 3 * 12 + bytes);
  }
}

// Before version 1.5 all operands had 16 bits.
TEST(PlanFile, OldPlansKeepTheirOperands) {
  const TempFolder folder;
  const std::string path = folder.file("plan.json");
  Plan plan = UniformPlan(Geometry{1, 1, 1, 8}, Token(), Token());
  for (const char* storage : {"i6", "i4", "i3"}) {
    plan.codecs[0] = {ParseCodecKind(std::string(storage) + "-token").value()};
    ASSERT_TRUE(SavePlan(plan, path).ok());
    json file = json::parse(ReadBytes(path));
    for (const unsigned minor : {0, 1, 3, 4, 5, 6}) {
      file["version"] = {1, minor};
      WriteBytes(path, file.dump());
      const Result<Plan> loaded = LoadPlan(path);
      ASSERT_TRUE(loaded.ok()) << loaded.status().message();
      EXPECT_EQ(ToString(loaded->codecs[0].kind),
                std::string(storage) + (minor < 5 ? "x16-token" : "-token"));
      EXPECT_EQ(ToString(loaded->codecs[1].kind), "i8-token");
    }
  }
}

// A plan of two layers whose K heads but one are shaped, each with numbers of its own.
Plan ShapedPlan(float first) {
  Plan plan = UniformPlan(Geometry{2, 2, 2, 8}, Token(), Token());
  for (std::size_t i = 0; i < 3; ++i) {
    CodecVectors vectors{std::vector<float>(8, 0.25f), {}, std::vector<float>(64, 0.0f)};
    for (std::size_t c = 0; c < 8; ++c) vectors.shaping[c * 9] = 1.0f;
    vectors.shaping[8] = first + static_cast<float>(i) / 3.0f;
    plan.codec(i / 2, i % 2, KVMIX_K) = {
        ParseCodecKind("i3-token-bf16+centre+hadamard+shape").value(), 0.0f,
        std::make_shared<const CodecVectors>(std::move(vectors))};
  }
  return plan;
}

std::string MatricesOf(const std::string& plan_path) {
  const json written = json::parse(ReadBytes(plan_path));
  return (std::filesystem::path(plan_path).parent_path() / written["shaping"]["file"]).string();
}

TEST(PlanFile, ShapingMatricesComeBackExactly) {
  const TempFolder folder;
  const std::string path = folder.file("plan.json");
  const Plan plan = ShapedPlan(0.1f);
  ASSERT_TRUE(SavePlan(plan, path).ok());
  const json written = json::parse(ReadBytes(path));
  EXPECT_EQ(written["version"], (json{1, 5}));
  EXPECT_EQ(written["shaping"]["file"].get<std::string>(),
            "shaping-" + written["shaping"]["xxh3"].get<std::string>() + ".safetensors");
  const Result<Plan> loaded = LoadPlan(path);
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  EXPECT_EQ(loaded->codecs, plan.codecs);

  // The same plan is the same text under another name. Another one in its place has another file,
  // and the first plan's copy still has its own.
  ASSERT_TRUE(SavePlan(plan, folder.file("copy.json")).ok());
  EXPECT_EQ(ReadBytes(folder.file("copy.json")), ReadBytes(path));
  ASSERT_TRUE(SavePlan(ShapedPlan(0.2f), path).ok());
  EXPECT_EQ(LoadPlan(path)->codecs, ShapedPlan(0.2f).codecs);
  EXPECT_EQ(LoadPlan(folder.file("copy.json"))->codecs, plan.codecs);
}

// Only an encoder looks at the matrices: what is stored means the same without them.
TEST(Plan, ShapingIsNoPartOfTheFingerprint) {
  Plan plain = ShapedPlan(0.1f);
  for (HeadCodec& codec : plain.codecs) {
    if (!codec.kind.shape) continue;
    codec.kind.shape = false;
    codec.vectors = std::make_shared<const CodecVectors>(
        CodecVectors{{codec.mean().begin(), codec.mean().end()}, {}, {}});
  }
  ASSERT_TRUE(CheckPlan(plain).ok());
  EXPECT_EQ(Fingerprint(ShapedPlan(0.1f)), Fingerprint(ShapedPlan(0.2f)));
  EXPECT_EQ(Fingerprint(ShapedPlan(0.1f)), Fingerprint(plain));
}

// A link to a plan: its matrices may lie beside the link or beside the file, and are written beside
// the file.
TEST(PlanFile, ThroughALink) {
  const TempFolder folder;
  std::filesystem::create_directory(folder.file("real"));
  std::filesystem::create_directory(folder.file("link"));
  const std::string real = folder.file("real/p.json"), link = folder.file("link/plan.json");
  const Plan plan = ShapedPlan(0.1f);
  std::filesystem::create_symlink("../real/p.json", link);
  for (int round = 0; round < 2; ++round) {  // the link dangles, then leads to a plan
    ASSERT_TRUE(SavePlan(plan, link).ok());
    EXPECT_TRUE(std::filesystem::is_symlink(link));
    EXPECT_TRUE(std::filesystem::exists(MatricesOf(real)));
    EXPECT_FALSE(std::filesystem::exists(MatricesOf(link)));
  }
  ASSERT_TRUE(LoadPlan(link).ok()) << LoadPlan(link).status().message();
  EXPECT_EQ(LoadPlan(link)->codecs, plan.codecs);
  std::filesystem::rename(MatricesOf(real), MatricesOf(link));
  ASSERT_TRUE(LoadPlan(link).ok()) << LoadPlan(link).status().message();
  EXPECT_EQ(LoadPlan(link)->codecs, plan.codecs);
  EXPECT_FALSE(LoadPlan(real).ok());
}

TEST(PlanFile, MatricesNeedAFile) {
  const TempFolder folder;
  const Plan plan = ShapedPlan(0.1f);
  ASSERT_EQ(mkfifo(folder.file("pipe").c_str(), 0600), 0);
  for (const std::string& path : {folder.file("pipe"), std::string("/dev/full")}) {
    const Status status = SavePlan(plan, path);
    ExpectGoodMessage(status, path);
    EXPECT_EQ(status.code(), ErrorCode::kInvalidArgument);
  }
  EXPECT_TRUE(SavePlan(plan, "/dev/null").ok());
  EXPECT_EQ(folder.entries(), 1u);
  ASSERT_TRUE(SavePlan(plan, folder.file("plan")).ok());
  const std::string matrices = std::filesystem::path(MatricesOf(folder.file("plan"))).filename();
  EXPECT_FALSE(std::filesystem::exists("/dev/" + matrices));
}

TEST(PlanFile, RefusesMatricesThatAreNotItsOwn) {
  const TempFolder folder;
  const std::string path = folder.file("plan.json");
  ASSERT_TRUE(SavePlan(ShapedPlan(0.1f), path).ok());
  const std::string matrices = MatricesOf(path), good = ReadBytes(matrices),
                    json_text = ReadBytes(path);
  const auto refused = [&](const std::string& text) {
    const Status status = LoadPlan(path).status();
    EXPECT_FALSE(status.ok()) << "expected: " << text;
    EXPECT_NE(status.message().find(text), std::string::npos)
        << status.message() << "\nshould speak of: " << text;
    return status.code();
  };
  std::filesystem::remove(matrices);
  EXPECT_EQ(refused(matrices), ErrorCode::kNotFound);
  WriteBytes(matrices, good.substr(0, good.size() - 5));  // cut off
  EXPECT_EQ(refused(matrices), ErrorCode::kCorrupt);
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string changed = good;
    changed.replace(changed.find(from), from.size(), to);
    WriteBytes(matrices, changed);
  };
  with("layers.1.heads.0.k", "layers.1.heads.1.k");  // that one is not shaped
  refused("layers.1.heads.0.k: expected a matrix, as the plan has the step, found none");
  with("[8,8]", "[64]");
  refused("expected");
  const float third = 0.1f + 1.0f / 3.0f, other = 0.5f;
  const auto bytes = [](float x) {
    return std::string(reinterpret_cast<const char*>(&x), sizeof x);
  };
  with(bytes(third), bytes(other));
  refused("hash of the matrices: expected");
  WriteBytes(matrices, good);
  EXPECT_TRUE(LoadPlan(path).ok());

  json plan = json::parse(json_text);
  plan["shaping"]["file"] = "../" + plan["shaping"]["file"].get<std::string>();
  WriteBytes(path, plan.dump());
  refused("shaping.file: expected the name of a file beside it");
  plan.erase("shaping");
  WriteBytes(path, plan.dump());
  refused("shaping");
}

TEST(PlanFile, VIsNotShaped) {
  Plan plan = ShapedPlan(0.1f);
  std::swap(plan.codec(0, 0, KVMIX_K), plan.codec(0, 0, KVMIX_V));
  EXPECT_EQ(CheckPlan(plan).message(),
            "layer 0, KV head 0, V: expected a codec without +shape, which only K has, found "
            "i3-token-bf16+centre+hadamard+shape");
}

// Neither file stays where one of them cannot be written.
TEST(PlanFile, AShapedPlanThatCannotBeWrittenLeavesNothing) {
  const TempFolder folder;
  const std::string path = folder.file("plan.json");
  std::filesystem::create_directory(path);
  EXPECT_FALSE(SavePlan(ShapedPlan(0.1f), path).ok());
  std::filesystem::remove(path);
  EXPECT_TRUE(std::filesystem::is_empty(std::filesystem::path(path).parent_path()));
}

TEST(PlanFile, UnlikeLayersComeBackExactly) {
  const TempFolder folder;
  const std::string path = folder.file("plan.json");
  Plan plan = UniformPlan(UnlikeModel(), Token(), Token(KVMIX_SCALE_TOKEN_BF16));
  plan.codec(3, 0, KVMIX_K) = With(Token(), std::vector<float>(24, 0.1f));
  plan.codec(4, 1, KVMIX_V) = Head(0.1f);  // layer 0's
  ASSERT_TRUE(SavePlan(plan, path).ok());
  const Result<Plan> loaded = LoadPlan(path);
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  EXPECT_EQ(loaded->model, plan.model);
  EXPECT_EQ(loaded->codecs, plan.codecs);
  const json written = json::parse(ReadBytes(path));
  EXPECT_EQ(written["version"], (json{1, 2}));
  EXPECT_FALSE(written.contains("geometry"));
  EXPECT_EQ(written["layers"][1], (json{{"kv_heads", 2},
                                        {"query_heads", 4},
                                        {"k_dim", 8},
                                        {"v_dim", 8},
                                        {"window", 64},
                                        {"soft_cap", 50}}));
  EXPECT_TRUE(written["layers"][2].is_null());
  EXPECT_EQ(written["layers"][4]["kv_layer"], 0);
  EXPECT_TRUE(written["codecs"][4].is_null());
  EXPECT_EQ(written["codecs"][0][1]["v"], "i8-head");
}

TEST(PlanFile, EveryFloatComesBack) {
  const TempFolder folder;
  std::mt19937 random(5);
  Plan plan = UniformPlan(Geometry{1, 64, 64, 512}, Token(), Token());
  for (HeadCodec& codec : plan.codecs) {
    std::vector<float> mean, factor;
    while (mean.size() < 512) {
      const float number = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
      if (std::isfinite(number)) mean.push_back(number);
    }
    while (factor.size() < 512) {  // any bits, with an exponent that is allowed
      const std::uint32_t bits = static_cast<std::uint32_t>(random()) & 0x7FFFFFu;
      factor.push_back(std::ldexp(std::bit_cast<float>(0x3F800000u | bits),
                                  static_cast<int>(random() % 64) - 32));
    }
    codec = With(codec, std::move(mean), std::move(factor));
  }
  ASSERT_TRUE(SavePlan(plan, folder.file("plan.json")).ok());
  const Result<Plan> loaded = LoadPlan(folder.file("plan.json"));
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  EXPECT_EQ(loaded->codecs, plan.codecs);
}

TEST(PlanFile, HandwrittenMinimum) {
  const TempFolder folder;
  WriteBytes(folder.file("plan.json"),
             R"({"format": "kvmix-plan", "version": [1, 7], "a later field": [null],
    "geometry": {"layers": 1, "kv_heads": 1, "query_heads": 2, "head_dim": 2}, "codecs": [[{"k": "i8-token+centre", "k_mean": [1, -2e1], "v": "f16"}]]})");
  const Result<Plan> plan = LoadPlan(folder.file("plan.json"));
  ASSERT_TRUE(plan.ok()) << plan.status().message();
  EXPECT_EQ(plan->codec(0, 0, KVMIX_K), With(Token(), {1.0f, -20.0f}));
  EXPECT_EQ(plan->codec(0, 0, KVMIX_V), HeadCodec{});
  EXPECT_EQ(plan->provenance.model, "");
}

// As version 0.1.0 wrote it, before there were folds and rotations.
TEST(PlanFile, OfVersion1_0) {
  const TempFolder folder;
  WriteBytes(folder.file("plan.json"), R"({
  "format": "kvmix-plan",
  "version": [1, 0],
  "geometry": {"layers": 2, "kv_heads": 2, "query_heads": 4, "head_dim": 3},
  "bytes_per_token": 42,
  "saved_fraction": 0.125,
  "provenance": {"model": "Qwen2.5", "calibration": "a.safetensors", "calibration_tokens": 64, "longest_prompt": 32, "holdout": "b.safetensors", "holdout_tokens": 16},
  "accuracy": {
    "calibration": {"worst_cosine": 0.9993, "mean_cosine": 0.99999, "worst_nmse": 0.0014, "mean_nmse": 1e-05, "worst_layer": 1, "worst_query_head": 3},
    "holdout": {"worst_cosine": 0.999, "mean_cosine": 0.9999, "worst_nmse": 0.002, "mean_nmse": 2e-05, "worst_layer": 0, "worst_query_head": 2}
  },
  "codecs": [
    [{"k": "i8-token+centre", "k_mean": [0.100000001, -300.25, 1.17549435e-38], "v": "i8-token-bf16"},
     {"k": "f16", "v": "i8-head", "v_scale": 0.0625}],
    [{"k": "i8-token-bf16+centre", "k_mean": [0, 1, -2], "v": "f16"},
     {"k": "i8-head+centre", "k_scale": 0.333333343, "k_mean": [1, 2, 3], "v": "i8-token"}]
  ]
}
)");
  const Result<Plan> plan = LoadPlan(folder.file("plan.json"));
  ASSERT_TRUE(plan.ok()) << plan.status().message();
  EXPECT_EQ(plan->model.geometry(), (Geometry{2, 2, 4, 3}));
  const std::vector<HeadCodec> expected = {
      With(Token(), {0.1f, -300.25f, std::numeric_limits<float>::min()}),
      Token(KVMIX_SCALE_TOKEN_BF16),
      {},
      Head(0.0625f),
      With(Token(KVMIX_SCALE_TOKEN_BF16), {0.0f, 1.0f, -2.0f}),
      {},
      With(Head(1.0f / 3.0f), {1.0f, 2.0f, 3.0f}),
      Token()};
  EXPECT_EQ(plan->codecs, expected);
  EXPECT_EQ(BytesPerToken(*plan), 7u + 5u + 6u + 3u + 5u + 6u + 3u + 7u);
  EXPECT_EQ(plan->provenance.model, "Qwen2.5");
  EXPECT_EQ(plan->provenance.calibration_tokens, 64u);
  EXPECT_EQ(plan->provenance.longest_prompt, 32u);
  EXPECT_EQ(plan->provenance.holdout, "b.safetensors");
  EXPECT_EQ(plan->provenance.on_calibration.worst_query_head, 3u);
  EXPECT_EQ(plan->provenance.on_holdout.worst_nmse, 0.002);
}

void ExpectRefused(const std::string& text, ErrorCode code, const std::string& concerns) {
  SCOPED_TRACE(concerns);
  const TempFolder folder;
  WriteBytes(folder.file("plan.json"), text);
  const Result<Plan> plan = LoadPlan(folder.file("plan.json"));
  ASSERT_FALSE(plan.ok());
  ExpectGoodMessage(plan.status(), folder.file("plan.json"));
  EXPECT_EQ(plan.status().code(), code);
  EXPECT_NE(plan.status().message().find(concerns), std::string::npos) << plan.status().message();
}

struct Case {
  const char* pointer;
  json value;  // discarded: the value is removed
  const char* concerns;
};
const json removed(json::value_t::discarded);

std::string Changed(json good, const Case& c) {
  const json::json_pointer pointer(c.pointer);
  json& parent = good[pointer.parent_pointer()];
  if (!c.value.is_discarded())
    good[pointer] = c.value;
  else if (parent.is_array())
    parent.erase(std::stoul(pointer.back()));
  else
    parent.erase(pointer.back());
  return good.dump();
}

TEST(PlanFile, RefusesLayersThatAreWrong) {
  const TempFolder folder;
  ASSERT_TRUE(SavePlan(UniformPlan(UnlikeModel(), Token(), {}), folder.file("plan.json")).ok());
  const json good = json::parse(ReadBytes(folder.file("plan.json")));
  const Case cases[] = {
      {"/layers", 5, "layers: expected an array, found 5"},
      {"/layers/1", 5, "layers[1]: expected an object, found 5"},
      {"/layers/1", nullptr, "codecs[1]: expected null, as the layer has no K and V of its own"},
      {"/layers/2", removed, "codecs: expected 4 layers, found 5"},
      {"/layers/3/v_dim", removed, "layers[3].v_dim: expected a value, found none"},
      {"/layers/3/kv_heads", 0, "layers[3].kv_heads: expected at least 1, or null"},
      {"/layers/3/kv_heads", 2, "codecs[3]: expected 2 KV heads, found 1"},
      {"/layers/3/sinks", {1, 2, 3}, "layer 3: sinks: expected none or 2, found 3"},
      {"/layers/0/window", -1, "layers[0].window: expected a whole number below 2^64, found -1"},
      {"/layers/4/kv_layer", 2, "layer 4: kv_layer: expected an earlier layer"},
      {"/layers/4/kv_layer", 3, "layer 4: kv_layer: expected a layer of 2 KV heads x 8/8"},
      {"/layers/3/k_dim", 576, "layer 3: k_dim: expected 1 to 512 (a latent cache, MLA, is not"},
      {"/codecs/3", nullptr, "codecs[3]: expected an array, found null"},
      {"/codecs/2", json::array(), "codecs[2]: expected null, as the layer has no K and V"}};
  for (const Case& c : cases) ExpectRefused(Changed(good, c), ErrorCode::kCorrupt, c.concerns);
}

TEST(PlanFile, RefusesWhatIsWrong) {
  const TempFolder folder;
  ASSERT_TRUE(SavePlan(RichPlan(), folder.file("plan.json")).ok());
  const json good = json::parse(ReadBytes(folder.file("plan.json")));
  const Case cases[] = {
      {"/format", "kvmix-dump", "format: expected \"kvmix-plan\", found \"kvmix-dump\""},
      {"/format", removed, "format: expected a value, found none"},
      {"/version", {0, 9}, "version: expected major version 1, found 0"},
      {"/version", {1}, "version: expected 2 numbers, [major, minor], found 1"},
      {"/version", "1.0", "version: expected an array, found \"1.0\""},
      {"/version", {1, "0"}, "version[1]: expected a whole number below 2^64, found \"0\""},
      {"/version", {-1, 0}, "version[0]: expected a whole number below 2^64, found -1"},
      {"/geometry", removed, "geometry: expected a value, found none"},
      {"/geometry", {1, 2}, "geometry: expected an object, found an array"},
      {"/geometry/layers", nullptr,
       "geometry.layers: expected a whole number below 2^64, found null"},
      {"/geometry/layers", 3.5, "geometry.layers: expected a whole number below 2^64, found 3.5"},
      {"/geometry/layers", 4, "codecs: expected 4 layers, found 3"},
      {"/geometry/layers", std::uint64_t{1} << 63,
       "codecs: expected 9223372036854775808 layers, found 3"},
      {"/geometry/kv_heads", std::uint64_t{1} << 62,
       "codecs[0]: expected 4611686018427387904 KV heads, found 2"},
      {"/geometry/query_heads", 7, "query_heads: expected a multiple of the 2 KV heads, found 7"},
      {"/geometry/head_dim", 41, "expected a mean of 41 channels, found 40"},
      {"/geometry/head_dim", 1000000, "layer 0: k_dim: expected 1 to 512, found 1000000"},
      {"/codecs", removed, "codecs: expected a value, found none"},
      {"/codecs", "none", "codecs: expected an array, found \"none\""},
      {"/codecs/1", json::array(), "codecs[1]: expected 2 KV heads, found 0"},
      {"/codecs/1/1", nullptr, "codecs[1][1]: expected an object, found null"},
      {"/codecs/2/0/k", "i9",
       "codecs[2][0].k: expected a codec that this version knows, found \"i9\""},
      {"/codecs/2/0/k", "f16+centre",
       "codecs[2][0].k: expected a codec that this version knows, found \"f16+centre\""},
      {"/codecs/2/0/v", removed, "codecs[2][0].v: expected a value, found none"},
      {"/codecs/1/1/v_scale", removed, "codecs[1][1].v_scale: expected a value, found none"},
      {"/codecs/1/1/v_scale", 1e39, "codecs[1][1].v_scale: expected a 32-bit number, found 1e+39"},
      {"/codecs/1/1/v_scale", 0, "layer 1, KV head 1, V: expected a scale above 0, found 0"},
      {"/codecs/1/1/v_scale", true, "expected a number, found true"},
      {"/codecs/0/1/k_mean", removed, "codecs[0][1].k_mean: expected a value, found none"},
      {"/codecs/0/1/k_mean", json::array(),
       "layer 0, KV head 1, K: expected a mean of 40 channels, found 0"},
      {"/codecs/0/1/k_mean/39", removed,
       "layer 0, KV head 1, K: expected a mean of 40 channels, found 39"},
      {"/codecs/1/0/k_factor", removed, "codecs[1][0].k_factor: expected a value, found none"},
      {"/codecs/1/0/k_factor/39", removed,
       "layer 1, KV head 0, K: expected a factor of 40 channels, found 39"},
      {"/codecs/1/0/k_factor/7", 0,
       "layer 1, KV head 0, K: expected a factor of finite numbers in its range, found 0 in "
       "channel 7"},
      {"/codecs/1/0/k_factor/7", "1", "codecs[1][0].k_factor[7]: expected a number, found \"1\""},
      {"/codecs/1/0/k", "i8-token+fold+centre",
       "codecs[1][0].k: expected a codec that this version knows, found \"i8-token+fold+centre\""},
      {"/codecs/0/1/k_mean/3", nullptr, "codecs[0][1].k_mean[3]: expected a number, found null"},
      {"/codecs/0/1/k_mean/3", "NaN", "codecs[0][1].k_mean[3]: expected a number, found \"NaN\""},
      {"/provenance", 5, "provenance: expected an object, found 5"},
      {"/provenance/calibration_tokens", -1,
       "provenance.calibration_tokens: expected a whole number below 2^64, found -1"},
      {"/accuracy/holdout/mean_nmse", nullptr,
       "accuracy.holdout.mean_nmse: expected a number, found null"},
  };
  for (const Case& c : cases) ExpectRefused(Changed(good, c), ErrorCode::kCorrupt, c.concerns);
  json newer = good;
  newer["version"] = {2, 0};
  newer["geometry"] = "something else by then";
  ExpectRefused(newer.dump(), ErrorCode::kVersion, "version: expected major version 1, found 2");
}

TEST(PlanFile, RefusesBadText) {
  const TempFolder folder;
  ASSERT_TRUE(SavePlan(RichPlan(), folder.file("plan.json")).ok());
  const std::string good = ReadBytes(folder.file("plan.json"));
  const auto replaced = [&](const std::string& from, const std::string& to) {
    std::string text = good;
    return text.replace(text.find(from), from.size(), to);
  };
  ExpectRefused("", ErrorCode::kCorrupt, "expected JSON");
  ExpectRefused("null", ErrorCode::kCorrupt, ": expected an object, found null");
  ExpectRefused(good + "x", ErrorCode::kCorrupt, "expected JSON");
  ExpectRefused(good + '\0' + "x", ErrorCode::kCorrupt, "expected JSON, found a zero byte");
  ExpectRefused(replaced("\"kv_heads\": 2", "\"kv_heads\": NaN"), ErrorCode::kCorrupt,
                "expected JSON");
  ExpectRefused(replaced("\"v_scale\": ", "\"v_scale\": 1e999, \"w\": "), ErrorCode::kCorrupt,
                "expected JSON");
  ExpectRefused(replaced("\"kv_heads\": 2", "\"layers\": 3"), ErrorCode::kCorrupt,
                "found the key \"geometry.layers\" twice");
  ExpectRefused(replaced("\"codecs\"", "\"version\": [1, 0], \"codecs\""), ErrorCode::kCorrupt,
                "found the key \"version\" twice");
  ExpectRefused(std::string(1'000'000, '['), ErrorCode::kCorrupt, "found nesting deeper than 16");
  ExpectRefused(replaced("\"model\": ", "\"model\": " + std::string(100'000, '[')),
                ErrorCode::kCorrupt, "found nesting deeper than 16");
  for (std::size_t length = 0; length + 2 < good.size(); length += 37)
    ExpectRefused(good.substr(0, length), ErrorCode::kCorrupt, "expected JSON");
}

TEST(PlanFile, RandomDamageIsAnErrorOrAPlan) {
  const TempFolder folder;
  const std::string path = folder.file("plan.json");
  ASSERT_TRUE(SavePlan(UniformPlan(Geometry{2, 2, 4, 3}, Head(), Token()), path).ok());
  const std::string good = ReadBytes(path);
  std::mt19937 random(11);
  const std::string alphabet = "{}[]\",:0123456789.-eE\\ kv";
  for (int round = 0; round < 500; ++round) {
    std::string bytes = good;
    for (unsigned flips = 1 + random() % 4; flips-- > 0;)
      bytes[random() % bytes.size()] = alphabet[random() % alphabet.size()];
    WriteBytes(path, bytes);
    const Result<Plan> plan = LoadPlan(path);
    if (plan.ok()) {
      EXPECT_TRUE(CheckPlan(*plan).ok());
    } else {
      ExpectGoodMessage(plan.status(), path);
    }
  }
}

TEST(PlanFile, ErrorsLeaveNothing) {
  const TempFolder folder;
  const Plan plan = RichPlan();
  ExpectGoodMessage(SavePlan(plan, folder.file("no/plan.json")), folder.file("no/plan.json"));
  ExpectGoodMessage(SavePlan(plan, folder.path()), folder.path());
  ExpectGoodMessage(SavePlan(plan, "/dev/full"), "/dev/full");
  EXPECT_TRUE(std::filesystem::is_character_file("/dev/full"));
  Plan bad = plan;
  bad.codecs.pop_back();
  ExpectGoodMessage(SavePlan(bad, folder.file("plan.json")), folder.file("plan.json"));
  bad = plan;
  bad.provenance.on_holdout.mean_nmse = std::nan("");
  ExpectGoodMessage(SavePlan(bad, folder.file("plan.json")), folder.file("plan.json"));
  EXPECT_EQ(folder.entries(), 0u);
  EXPECT_EQ(LoadPlan(folder.file("plan.json")).status().code(), ErrorCode::kNotFound);
  EXPECT_FALSE(LoadPlan(folder.path()).ok());
}

}  // namespace
}  // namespace kvmix
