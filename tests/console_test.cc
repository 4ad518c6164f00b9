// How the programs talk to people: the line that says what is under way, wrong arguments.
#include "tools/console.h"

#include <gtest/gtest.h>
#include <CLI/CLI.hpp>

#include <chrono>
#include <csignal>
#include <functional>
#include <new>
#include <string>
#include <utility>
#include <vector>

namespace kvmix::tools {
namespace {

using std::chrono::seconds;
using ::testing::internal::CaptureStderr;
using ::testing::internal::GetCapturedStderr;
using Clock = StatusLine::Clock;

TEST(StatusLine, IsWrittenOnceAMinuteWhereThereIsNoTerminal) {
  CaptureStderr();
  const Clock::time_point start = Clock::now();
  {
    StatusLine line(start);
    for (int second = 0; second <= 200; second += 7)
      line.Show("at " + std::to_string(second), start + seconds(second));
  }
  EXPECT_EQ(GetCapturedStderr(), "at 63, 1 min\nat 126, 2 min\nat 189, 3 min\n");
}

TEST(ProgressBar, SaysHowManyLayersAreDone) {
  CaptureStderr();
  {
    ProgressBar bar("measuring");
    bar.Update(1, 28);
    bar.Update(12, 28, Clock::now() + seconds(185));
    bar.Update(13, 28, Clock::now() + seconds(190));
  }
  EXPECT_EQ(GetCapturedStderr(), "measuring: 12 of 28 layers, 3 min\n");
}

TEST(StepBar, HasALineForEveryStep) {
  CaptureStderr();
  {
    StepBar bar;
    bar.Update("one", 0, 1);
    bar.Update("one", 1, 2);
    bar.Update("two", 0, 1);
  }
  EXPECT_EQ(GetCapturedStderr(), "");  // no minute has passed
}

TEST(ParsePair, TwoNumbersAndNothingElse) {
  EXPECT_EQ(ParsePair("0:8"), std::pair(std::size_t{0}, std::size_t{8}));
  for (const char* bad : {"", ":", "1", "1:", ":2", "1:2:3", "1:2 ", " 1:2", "-1:2", "1:-2", "a:b",
                          "99999999999999999999:1"}) {
    EXPECT_FALSE(ParsePair(bad).has_value()) << bad;
  }
}

// The exit code of a program with an option --number, and what it said on stderr.
std::pair<int, std::string> RunWith(std::vector<const char*> arguments,
                                    const std::function<void(int)>& run) {
  CLI::App app("An app.", "program");
  int number = 0;
  app.add_option("--number", number);
  arguments.insert(arguments.begin(), "program");
  CaptureStderr();
  const int code = RunProgram(&app, static_cast<int>(arguments.size()),
                              const_cast<char**>(arguments.data()), [&] { run(number); });
  return {code, GetCapturedStderr()};
}

TEST(RunProgram, RunsWithWhatTheCommandLineSays) {
  int found = 0;
  EXPECT_EQ(RunWith({"--number", "3"}, [&](int number) { found = number; }),
            std::pair(0, std::string()));
  EXPECT_EQ(found, 3);
}

TEST(RunProgram, AnswersHelpWithoutRunning) {
  ::testing::internal::CaptureStdout();
  EXPECT_EQ(RunWith({"--help"}, [](int) { FAIL(); }), std::pair(0, std::string()));
  EXPECT_NE(::testing::internal::GetCapturedStdout().find("--number"), std::string::npos);
}

TEST(RunProgram, SaysWhatIsWrongInOneLine) {
  const auto [code, line] = RunWith({"--number", "x"}, [](int) { FAIL(); });
  EXPECT_EQ(code, 1);
  EXPECT_TRUE(line.starts_with("program: error: ")) << line;
  EXPECT_EQ(line.find('\n'), line.size() - 1) << line;
}

TEST(RunProgram, TurnsAnExceptionIntoALine) {
  EXPECT_EQ(RunWith({}, [](int) { throw std::bad_alloc(); }),
            std::pair(1, std::string("program: error: std::bad_alloc\n")));
  EXPECT_EQ(RunWith({}, [](int) { Refuse("{}\ntwo", "one"); }),
            std::pair(1, std::string("program: error: one two\n")));
}

TEST(RunProgramDeathTest, SaysThatASignalEndsIt) {
  const auto run = [] {
    CLI::App app("An app.", "program");
    std::string name = "program";
    char* arguments[] = {name.data()};
    RunProgram(&app, 1, arguments, [] { std::raise(SIGTERM); });
  };
  EXPECT_EXIT(run(), ::testing::KilledBySignal(SIGTERM), "program: error: ended by SIGTERM\n");
}

TEST(Require, GivesTheValueOrSaysWhyThereIsNone) {
  EXPECT_EQ(Require(Result<int>(3)), 3);
  EXPECT_EQ(RunWith({}, [](int) { Require(Result<int>(Status(ErrorCode::kIo, "x: gone {}"))); }),
            std::pair(1, std::string("program: error: x: gone {}\n")));
}

}  // namespace
}  // namespace kvmix::tools
