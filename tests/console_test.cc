// How the programs talk to people: the line that says what is under way, wrong arguments.
#include "tools/console.h"

#include <gtest/gtest.h>
#include <CLI/CLI.hpp>

#include <chrono>
#include <new>
#include <string>

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

TEST(Fail, IsOneLine) {
  CaptureStderr();
  EXPECT_EQ(Fail("program", "one\ntwo"), 1);
  EXPECT_EQ(GetCapturedStderr(), "program: error: one two\n");
}

TEST(Parse, SaysWhatIsWrongInOneLine) {
  CLI::App app("An app.", "program");
  int number = 0;
  app.add_option("--number", number);
  const char* good[] = {"program", "--number", "3"};
  EXPECT_FALSE(Parse(&app, 3, const_cast<char**>(good)));
  EXPECT_EQ(number, 3);
  const char* wrong[] = {"program", "--number", "x"};
  CaptureStderr();
  EXPECT_EQ(Parse(&app, 3, const_cast<char**>(wrong)), 1);
  const std::string line = GetCapturedStderr();
  EXPECT_TRUE(line.starts_with("program: error: ")) << line;
  EXPECT_EQ(line.find('\n'), line.size() - 1) << line;
}

TEST(RunProgram, TurnsAnExceptionIntoALine) {
  EXPECT_EQ(RunProgram(
                "program", [](int argc, char**) { return argc; }, 5, nullptr),
            5);
  CaptureStderr();
  EXPECT_EQ(RunProgram(
                "program", [](int, char**) -> int { throw std::bad_alloc(); }, 0, nullptr),
            1);
  EXPECT_EQ(GetCapturedStderr(), "program: error: std::bad_alloc\n");
}

}  // namespace
}  // namespace kvmix::tools
