// The original study's case: 24 layers x 2 KV heads x 64 with six outlier K heads. With the study's
// codecs and a budget of 0.45 the tuner must find the study's plan: those six K heads in fp16 and
// nothing else (six leave room, seven do not).
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "kvmix/tune/dump.h"
#include "kvmix/tune/steps.h"
#include "synthetic_dump.h"

namespace kvmix::tune {
namespace {

using Heads = std::set<std::pair<std::size_t, std::size_t>>;

const Heads kStudyHeads{{0, 0}, {0, 1}, {1, 1}, {2, 0}, {2, 1}, {8, 0}};

struct Case {
  std::string name;
  std::vector<std::size_t> prompt_tokens;
  std::uint32_t seed;
  double norm_spread, query_norm, offset;
};

void PrintTo(const Case& c, std::ostream* os) { *os << c.name; }

class StudyCase : public ::testing::TestWithParam<Case> {};

// fp16 is slower, all int8 codecs are alike.
Wisdom Speeds(const Geometry& g) {
  Wisdom wisdom;
  for (const std::string k : {"f16", "i8-head", "i8-token"})
    for (const std::string v : {"f16", "i8-head", "i8-token"})
      wisdom.speeds.push_back({k, v, g.group(), g.head_dim, g.head_dim, 4096,
                               100.0 + (k == "f16" ? 50.0 : 0.0) + (v == "f16" ? 50.0 : 0.0)});
  return wisdom;
}

TEST_P(StudyCase, KeepsExactlyTheSixOutliersInFp16) {
  testing::SyntheticDump synthetic{Geometry{24, 2, 14, 64}, GetParam().prompt_tokens,
                                   GetParam().seed,         GetParam().norm_spread,
                                   GetParam().query_norm,   kStudyHeads,
                                   GetParam().offset};
  testing::TempFolder folder;
  synthetic.Write(folder.file("study.safetensors"));
  const auto dump = Dump::Open(folder.file("study.safetensors"));
  ASSERT_TRUE(dump.ok()) << dump.status().message();
  const auto table = Measure({&*dump}, *Candidates("seed"), 0, 24, {.runner = 2});
  ASSERT_TRUE(table.ok()) << table.status().message();
  Constraints constraints;
  constraints.budget = 0.45;
  const auto choice = Choose(*table, Speeds(*synthetic.model.geometry()), 4096, constraints);
  ASSERT_TRUE(choice.ok()) << choice.status().message();
  EXPECT_GE(SavedFraction(choice->plan), 0.45);
  Heads fp16_k, fp16_v;
  for (const HeadErrors& h : table->heads)
    if (choice->plan.codec(h.layer, h.kv_head, h.tensor).kind.storage == KVMIX_STORAGE_F16)
      (h.tensor == KVMIX_K ? fp16_k : fp16_v).insert({h.layer, h.kv_head});
  EXPECT_EQ(fp16_k, kStudyHeads);
  EXPECT_EQ(fp16_v, Heads{});
}

INSTANTIATE_TEST_SUITE_P(
    Dumps, StudyCase,
    ::testing::Values(Case{"normal", {256}, 1, 0.0, 1.0, 60.0},
                      Case{"normal_short", {64}, 2, 0.0, 1.0, 60.0},
                      Case{"prompts", {64, 128, 64}, 3, 0.0, 1.0, 60.0},
                      Case{"norms_vary", {256}, 4, 0.3, 1.0, 60.0},
                      Case{"norms_vary_sharp_queries", {128}, 5, 0.3, 2.0, 100.0},
                      Case{"sharp_queries", {128}, 6, 0.0, 4.0, 60.0},
                      Case{"long", {512}, 7, 0.2, 1.5, 30.0},
                      Case{"large_offsets", {64, 64}, 8, 0.3, 1.0, 300.0}),
    [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace kvmix::tune
