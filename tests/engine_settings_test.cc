// A plug-in's settings out of the environment, and the plans that they name.
#include "engines/common/settings.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <initializer_list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "dump_files.h"
#include "engines/common/plans.h"
#include "kvmix/plan.h"
#include "kvmix/version.h"
#include "tests/expect_error.h"

namespace kvmix::testing {
namespace {

using engine::Plans;
using engine::ReadSettings;
using engine::Settings;

Result<Settings> Read(std::vector<const char*> environment) {
  environment.push_back(nullptr);
  return ReadSettings(environment.data());
}

TEST(EngineSettings, WithoutAny) {
  const Result<Settings> s = Read({"PATH=/bin", "KVMIXED=1", "NOTHING", "OMP_KVMIX_X=2"});
  ASSERT_TRUE(s.ok()) << s.status().message();
  EXPECT_TRUE(s->plans.empty());
  EXPECT_EQ(s->target, "");
  EXPECT_EQ(s->dump, "");
  EXPECT_FALSE(s->memory || s->verbose || s->help);
  EXPECT_EQ(Summary(*s), "the default plan, " + std::string(Targets().front()));
}

TEST(EngineSettings, EachIsTaken) {
  const std::string target = "KVMIX_TARGET=" + std::string(Targets().back());
  const Result<Settings> s = Read({"KVMIX_CODEC=f16", target.c_str(), "KVMIX_DUMP=a=b",
                                   "KVMIX_MEMORY=1", "KVMIX_VERBOSE=0", "KVMIX_HELP=1"});
  ASSERT_TRUE(s.ok()) << s.status().message();
  EXPECT_EQ(Summary(*s), "f16 in all heads, " + std::string(Targets().back()));
  EXPECT_EQ(s->dump, "a=b");
  EXPECT_TRUE(s->memory && !s->verbose && s->help);
  for (const char* const name : {"KVMIX_PLAN", "KVMIX_BUDGET", "KVMIX_CODEC", "KVMIX_TARGET",
                                 "KVMIX_DUMP", "KVMIX_MEMORY", "KVMIX_VERBOSE", "KVMIX_HELP"}) {
    EXPECT_NE(engine::SettingsHelp().find(name), std::string::npos) << name;
  }
}

// As compose files set them.
TEST(EngineSettings, AnEmptyVariableIsAnUnsetOne) {
  const Result<Settings> s = Read({"KVMIX_PLAN=", "KVMIX_CODEC=", "KVMIX_TARGET=", "KVMIX_DUMP=",
                                   "KVMIX_MEMORY=", "KVMIX_VERBOSE=", "KVMIX_HELP="});
  ASSERT_TRUE(s.ok()) << s.status().message();
  EXPECT_EQ(Summary(*s), Summary(*Read({})));
}

TEST(EngineSettings, VariablesOfTheLibraryAndItsToolsPass) {
  const Result<Settings> s =
      Read({"KVMIX_AMX=0", "KVMIX_DATA_DIR=/data", "KVMIX_BUILD=build", "KVMIX_BROWSER=chromium",
            "KVMIX_LLAMA=/there", "KVMIX_TUNE=kvmix-tune", "KVMIX_MEASURE=--candidates int8"});
  EXPECT_TRUE(s.ok()) << s.status().message();
}

TEST(EngineSettings, WrongOnesAreNamed) {
  const auto refused = [](const char* variable, const std::vector<std::string>& words) {
    const Status s = Read({"KVMIX_AMX=0", variable}).status();
    EXPECT_FALSE(s.ok()) << variable;
    ExpectError(s, s.code(), words);
  };
  refused("KVMIX_MEMROY=1", {"KVMIX_MEMROY", "KVMIX_HELP=1", "unknown"});
  refused("KVMIX_=1", {"KVMIX_:", "unknown"});
  refused("KVMIX_MEMORY=yes", {"KVMIX_MEMORY", "0 or 1", "yes"});
  refused("KVMIX_HELP=2", {"KVMIX_HELP", "0 or 1"});
  refused("KVMIX_CODEC=i9", {"KVMIX_CODEC", "i9"});
  for (const char* const codec :
       {"i8-token+centre", "i8-token+fold", "i8-head", "i8-token+own-centre", "i4-token+shape"}) {
    refused(("KVMIX_CODEC=" + std::string(codec)).c_str(), {"numbers of its own", codec});
  }
  for (const char* const budget : {"0", "1", "half", "0.5x", "-0.5", "nan"}) {
    refused(("KVMIX_BUDGET=" + std::string(budget)).c_str(), {"KVMIX_BUDGET", budget});
  }
  for (const auto& both : {std::pair("KVMIX_BUDGET=0.5", "KVMIX_CODEC=f16"),
                           std::pair("KVMIX_CODEC=f16", "KVMIX_BUDGET=0.5")}) {
    const Status s = Read({both.first, both.second}).status();
    ExpectError(s, s.code(), {"a codec or a budget, found both"});
  }
  refused("KVMIX_TARGET=Z80", {"KVMIX_TARGET", std::string(Targets().front()), "Z80"});
  refused("KVMIX_PLAN=/nowhere/plan.json", {"KVMIX_PLAN", "/nowhere/plan.json"});
}

// ---- plans

const HeadCodec kF16 = {ParseCodecKind("f16").value()};
const HeadCodec kI8 = {ParseCodecKind("i8-token").value()};

LayerShape ShapeOf(std::size_t kv_heads, std::size_t dim) {
  return {.kv_heads = kv_heads, .query_heads = 4, .k_dim = dim, .v_dim = dim};
}

void Save(const std::string& path, const std::vector<LayerShape>& layers, const HeadCodec& codec,
          const std::string& model) {
  Plan plan = UniformPlan(Model(layers), codec, codec);
  plan.provenance.model = model;
  plan.provenance.longest_prompt = 100;
  plan.exact_first = 3;
  const Status s = SavePlan(plan, path);
  ASSERT_TRUE(s.ok()) << s.message();
}

struct PlanFiles : ::testing::Test {
  const TempFolder folder;
  const std::string target = folder.file("target.json"), draft = folder.file("draft.json");
  const LayerShape large = ShapeOf(2, 64), small = ShapeOf(1, 32);

  void SetUp() override {
    Save(target, {large, large, ShapeOf(2, 128)}, kI8, "Target");
    Save(draft, {small, small}, kF16, "Draft");
  }
};

TEST_F(PlanFiles, OneAlone) {
  const Result<Plans> plans = Plans::Load(target);
  ASSERT_TRUE(plans.ok()) << plans.status().message();
  EXPECT_EQ(plans->Summary(), target + " (Target)");
  EXPECT_TRUE(plans->Check(2, ShapeOf(2, 128)).ok());
  for (const auto& [layer, shape] : {std::pair<std::size_t, LayerShape>{2, large},
                                     {3, large},
                                     {0, small},
                                     {0, ShapeOf(4, 64)}}) {
    ExpectError(plans->Check(layer, shape), ErrorCode::kMismatch,
                {target, "Target", "layer " + std::to_string(layer) + " here"});
  }
  const Plan one = plans->OfLayer(1, large);
  EXPECT_TRUE(CheckPlan(one).ok());
  EXPECT_EQ(one.model.layers.size(), 1u);
  EXPECT_EQ(one.exact_first, 3u);
  EXPECT_EQ(one.codec(0, 1, KVMIX_V), kI8);
  EXPECT_EQ(plans->LengthWarning(1, large, 1000), "");  // nothing of it ages
  Plan centred = LoadPlan(target).value();
  const CodecVectors mean{.mean = std::vector<float>(64, 1.0f)};
  centred.codecs[0] = {ParseCodecKind("i8-token+centre").value(), 0.0f,
                       std::make_shared<const CodecVectors>(mean)};
  ASSERT_TRUE(SavePlan(centred, target).ok());
  const Result<Plans> ages = Plans::Load(target);
  EXPECT_EQ(ages->LengthWarning(1, large, 300), "");
  EXPECT_NE(ages->LengthWarning(1, large, 1000), "");
  EXPECT_EQ(Plans(kF16).LengthWarning(1, large, 1000), "");
  EXPECT_EQ(Plans(kF16).OfLayer(1, large).codec(0, 1, KVMIX_V), kF16);
}

// Without a plan: the storage of the most bits that saves what was asked for.
TEST(Budgets, ChooseTheStorage) {
  const LayerShape shape = ShapeOf(2, 128);
  const std::pair<double, Storage> expected[] = {{0.3, KVMIX_STORAGE_I8},
                                                 {0.47, KVMIX_STORAGE_I8},
                                                 {0.5, KVMIX_STORAGE_I6},
                                                 {0.7, KVMIX_STORAGE_I4},
                                                 {0.78, KVMIX_STORAGE_I3}};
  for (const auto& [budget, storage] : expected) {
    const Plans plans(budget);
    ASSERT_TRUE(plans.Check(0, shape).ok());
    const Plan plan = plans.OfLayer(0, shape);
    EXPECT_TRUE(CheckPlan(plan).ok());
    EXPECT_EQ(plan.codec(0, 1, KVMIX_K).kind.storage, storage) << budget;
    EXPECT_GE(SavedFraction(plan, Plans::kBudgetContext), budget);
    EXPECT_EQ(plan.exact_newest, 64u);
  }
  EXPECT_EQ(Plans().OfLayer(0, shape).codecs, DefaultPlan(Model({shape})).codecs);
  ExpectError(Plans(0.9).Check(3, shape), ErrorCode::kInfeasible, {"0.9", "layer 3"});
}

// A draft beside its target: each layer's shape says which plan is its own.
TEST_F(PlanFiles, SeveralAreChosenByShapes) {
  std::filesystem::create_directory(folder.file("no plans"));
  for (const std::string& paths :
       {target + ":" + draft, ":" + draft + "::" + target, folder.path()}) {
    const Result<Plans> plans = Plans::Load(paths);
    ASSERT_TRUE(plans.ok()) << plans.status().message();
    EXPECT_TRUE(plans->Check(0, large).ok());
    EXPECT_TRUE(plans->Check(1, small).ok());
    EXPECT_EQ(plans->OfLayer(1, large).codec(0, 0, KVMIX_K), kI8);
    EXPECT_EQ(plans->OfLayer(1, small).codec(0, 0, KVMIX_K), kF16);
    ExpectError(plans->Check(2, small), ErrorCode::kMismatch,
                {"Target", "Draft", "layer 2 here is 1 layer"});
    EXPECT_NE(plans->Summary().find("(Draft)"), std::string::npos);
    EXPECT_NE(plans->Summary().find("(Target)"), std::string::npos);
  }
  const std::string colon = folder.file("a:b.json");
  Save(colon, {small}, kI8, "Colon");
  EXPECT_TRUE(Plans::Load(colon).ok());
}

TEST_F(PlanFiles, Refused) {
  Save(folder.file("twin.json"), {ShapeOf(2, 32), large}, kF16, "Twin");
  ExpectError(Plans::Load(target + ":" + folder.file("twin.json")).status(), ErrorCode::kMismatch,
              {"target.json", "twin.json", "layer 1"});
  ExpectError(Plans::Load(folder.path()).status(), ErrorCode::kMismatch, {"twin.json"});
  std::filesystem::create_directory(folder.file("empty"));
  ExpectError(Plans::Load(folder.file("empty")).status(), ErrorCode::kNotFound, {"empty"});
  ExpectError(Plans::Load(":").status(), ErrorCode::kInvalidArgument, {"expected a plan", ":"});
  EXPECT_FALSE(Plans::Load(target + ":" + folder.file("none.json")).ok());
  WriteBytes(folder.file("bad.json"), "{");
  EXPECT_NE(Plans::Load(draft + ":" + folder.file("bad.json")).status().message().find("bad.json"),
            std::string::npos);
}

}  // namespace
}  // namespace kvmix::testing
