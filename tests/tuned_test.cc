// Tune(): progress, work files, holdouts, policies. That its plans are kvmix-tune's: tune_test.py.
#include <gtest/gtest.h>

#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "kvmix/tune/tune.h"
#include "synthetic_dump.h"
#include "tests/expect_error.h"

namespace kvmix::tune {
namespace {

using testing::ExpectError;
using testing::ReadBytes;
using testing::SyntheticDump;
using testing::TempFolder;

constexpr Geometry kGeometry{3, 2, 4, 16};

class TunedTest : public ::testing::Test {
 protected:
  TunedTest() : a_(Make("a", {20, 9}, 1)), b_(Make("b", {30}, 2)), long_(Make("long", {150}, 3)) {
    options_.constraints.budget = 0.6;
    options_.context = 64;
    options_.runner = 1;
  }

  Dump Make(const std::string& name, const std::vector<std::size_t>& prompts, std::uint32_t seed,
            const Geometry& geometry = kGeometry) {
    SyntheticDump{geometry, prompts, seed, 0.4, 1.0, {{0, 1}}, 30.0}.Write(folder_.file(name));
    return std::move(*Dump::Open(folder_.file(name)));
  }

  std::string PlanBytes(const Result<Tuned>& tuned) {
    EXPECT_TRUE(tuned.ok()) << tuned.status().message();
    EXPECT_TRUE(SavePlan(tuned->choice.plan, folder_.file("plan")).ok());
    return ReadBytes(folder_.file("plan"));
  }

  TempFolder folder_;
  Dump a_, b_, long_;
  TuneOptions options_;
};

TEST_F(TunedTest, StepsHaveNamesAndTheLastOneIsTheHoldout) {
  std::vector<std::string> steps;
  std::size_t last_done = 0, last_total = 0;
  options_.progress = [&](const std::string& step, std::size_t done, std::size_t total) {
    if (steps.empty() || steps.back() != step) steps.push_back(step);
    last_done = done;
    last_total = total;
    return true;
  };
  const Result<Tuned> tuned = Tune({&a_}, {&b_}, options_);
  ASSERT_TRUE(tuned.ok()) << tuned.status().message();
  ASSERT_GE(steps.size(), 5u);
  EXPECT_EQ(steps[0], "calibrating");
  EXPECT_EQ(steps[1], "measuring every head and codec");
  EXPECT_EQ(steps[2], "timing the kernels");
  EXPECT_EQ(steps.back(), "measuring the plan on b");
  EXPECT_EQ(last_done, kGeometry.layers);
  EXPECT_EQ(last_total, kGeometry.layers);
  EXPECT_EQ(tuned->choice.plan.provenance.holdout, "b");
}

TEST_F(TunedTest, StopsAtEveryStepAndTheWorkFileGoesOn) {
  const std::string whole = PlanBytes(Tune({&a_}, {&b_}, options_));
  std::set<std::string> steps;
  options_.progress = [&](const std::string& step, std::size_t, std::size_t) {
    steps.insert(step);
    return true;
  };
  ASSERT_TRUE(Tune({&a_}, {&b_}, options_).ok());
  for (const std::string& stop : steps) {
    options_.progress = [&](const std::string& step, std::size_t, std::size_t) {
      return step != stop;
    };
    ExpectError(Tune({&a_}, {&b_}, options_).status(), ErrorCode::kCancelled, {"stopped"});
  }
  // Stopped after the first layer, which another run does not measure again.
  options_.work = folder_.file("work");
  const auto measuring = [](const std::string& step) {
    return step.starts_with("measuring every");
  };
  options_.progress = [&](const std::string& step, std::size_t done, std::size_t) {
    return !measuring(step) || done == 0;
  };
  ExpectError(Tune({&a_}, {&b_}, options_).status(), ErrorCode::kCancelled, {"stopped"});
  std::size_t layers = 0;
  options_.progress = [&](const std::string& step, std::size_t, std::size_t total) {
    if (measuring(step)) layers = total;
    return true;
  };
  EXPECT_EQ(PlanBytes(Tune({&a_}, {&b_}, options_)), whole);
  EXPECT_EQ(layers, kGeometry.layers - 1);
}

TEST_F(TunedTest, AMeasurementGivesTheSamePlan) {
  const std::string whole = PlanBytes(Tune({&a_, &b_}, {&long_}, options_));
  const Calibration calibration = Calibrate({&b_, &a_}, 0, 3).value();
  const Result<Measurement> m =
      MeasureInto(folder_.file("part"), {&a_, &b_}, calibration, "all", 0, 3);
  ASSERT_TRUE(m.ok()) << m.status().message();
  EXPECT_EQ(PlanBytes(Tune(*m, {&b_, &a_}, {&long_}, options_)), whole);
  EXPECT_EQ(PlanBytes(Tune(*LoadMeasurement(folder_.file("part")), {&a_, &b_}, {&long_}, options_)),
            whole);
  const Result<Tuned> untried = Tune(*m, {}, {}, options_);
  ASSERT_TRUE(untried.ok());
  EXPECT_FALSE(untried->calibration.has_value());
  EXPECT_TRUE(untried->worse_than_predicted.empty());
  ExpectError(Tune(*m, {&a_}, {}, options_).status(), ErrorCode::kMismatch, {"1 of 2"});
  ExpectError(Tune(*m, {&long_}, {}, options_).status(), ErrorCode::kMismatch, {"long"});
}

TEST_F(TunedTest, HoldoutsSayWhatTheyAre) {
  const Result<Tuned> tuned = Tune({&a_}, {&a_, &b_, &long_}, options_);
  ASSERT_TRUE(tuned.ok()) << tuned.status().message();
  ASSERT_EQ(tuned->holdouts.size(), 3u);
  const std::vector<Holdout>& h = tuned->holdouts;
  EXPECT_TRUE(h[0].is_calibration);
  EXPECT_FALSE(h[1].is_calibration || h[2].is_calibration);
  EXPECT_TRUE(h[2].is_far_beyond);  // 150 tokens of prompt, calibrated on 20
  EXPECT_FALSE(h[0].is_far_beyond || h[1].is_far_beyond);
  EXPECT_EQ(h[0].found.worst_cosine, tuned->calibration->worst_cosine);
  EXPECT_EQ(WorstHoldout(*tuned)->name, tuned->choice.plan.provenance.holdout);
}

TEST_F(TunedTest, TimesDecideOnlyWhereTheyAreKept) {
  EXPECT_EQ(Tune({&a_}, {}, options_)->constraints.time_tolerance, 1.0);
  options_.wisdom = folder_.file("wisdom");
  const std::string first = PlanBytes(Tune({&a_}, {}, options_));
  EXPECT_EQ(Tune({&a_}, {}, options_)->constraints.time_tolerance, 1.02);
  EXPECT_EQ(PlanBytes(Tune({&a_}, {}, options_)), first);  // the kept times, whatever today's are
}

TEST_F(TunedTest, RefusesBeforeTheWork) {
  options_.progress = [](const std::string& step, std::size_t, std::size_t) {
    ADD_FAILURE() << step;
    return true;
  };
  const Dump other = Make("other", {9}, 4, {2, 2, 4, 16});
  ExpectError(Tune({}, {}, options_).status(), ErrorCode::kInvalidArgument, {"dump"});
  ExpectError(Tune({&a_}, {&other}, options_).status(), ErrorCode::kMismatch,
              {"other", "3 layers"});
  ExpectError(Tune({&a_}, {&b_, &b_}, options_).status(), ErrorCode::kInvalidArgument,
              {"b", "expected each once"});
  TuneOptions bad = options_;
  bad.candidates = "int2";
  ExpectError(Tune({&a_}, {}, bad).status(), ErrorCode::kInvalidArgument, {"int2"});
  bad = options_;
  bad.constraints.budget = 1.5;
  ExpectError(Tune({&a_}, {}, bad).status(), ErrorCode::kInvalidArgument, {"budget 1.5"});
  bad.constraints.budget.reset();
  ExpectError(Tune({&a_}, {}, bad).status(), ErrorCode::kInvalidArgument, {"found neither"});
}

}  // namespace
}  // namespace kvmix::tune
