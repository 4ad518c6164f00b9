// Runners: OpenMP's threads, the pool, and what every runner keeps.
#include "kvmix/runner.h"

#include <gtest/gtest.h>
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <ctime>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "expect_error.h"
#include "lib/files/machine.h"
#include "tests/runners.h"

namespace kvmix::testing {
namespace {

using namespace std::chrono_literals;

void Sleep(std::chrono::milliseconds time) { std::this_thread::sleep_for(time); }

Threads Pool(int threads, unsigned spin_us = KVMIX_SPIN_US) {
  return std::move(*Threads::Create(threads, spin_us));
}

// How often each part of one call ran.
std::vector<int> Counts(const Runner& runner, std::size_t parts) {
  std::vector<std::atomic<int>> counts(parts);
  runner.Run(parts, [&](std::size_t p) { ++counts[p]; });
  return {counts.begin(), counts.end()};
}

void ExpectEachOnce(const Runner& runner, const std::string& name) {
  for (const std::size_t parts : {0, 1, 2, 3, 17, 1000}) {
    for (int call = 0; call < 20; ++call) {
      ASSERT_EQ(Counts(runner, parts), std::vector<int>(parts, 1)) << name << ", " << parts;
    }
  }
}

// Whether two parts of a call are ever under way at once.
bool RunsSideBySide(const Runner& runner) {
  std::atomic<int> inside{0};
  std::atomic<bool> met{false};
  runner.Run(2, [&](std::size_t) {
    ++inside;
    for (int i = 0; i < 2000 && !met; ++i) {
      if (inside == 2) met = true;
      Sleep(1ms);
    }
    --inside;
  });
  return met;
}

// f(), in a child of this process: whether it came true before ten seconds had passed.
bool InChild(const std::function<bool()>& f) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(10);
    _exit(f() ? 0 : 1);
  }
  int status = -1;
  return waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

double CpuSeconds() {
  timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

TEST(Runner, EachPartOnce) {
  const Threads one = Pool(1), two = Pool(2), five = Pool(5), sleepy = Pool(2, 0);
  OrderRunner backwards;
  ExpectEachOnce(Runner::Here(), "here");
  ExpectEachOnce(0, "OpenMP");
  ExpectEachOnce(3, "3 of OpenMP");
  ExpectEachOnce(one.runner(), "a pool of 1");
  ExpectEachOnce(two.runner(), "a pool of 2");
  ExpectEachOnce(five.runner(), "a pool of 5");
  ExpectEachOnce(sleepy.runner(), "a pool that does not spin");
  ExpectEachOnce(backwards, "backwards");
  ExpectEachOnce(EngineThreads(3), "an engine's");
}

TEST(Runner, NumbersOfThreads) {
  EXPECT_EQ(Runner(1).get(), nullptr);
  EXPECT_EQ(Runner(1).threads(), 1u);
  EXPECT_EQ(Runner::Here().get(), nullptr);
  EXPECT_EQ(Runner(static_cast<const kvmix_runner*>(nullptr)).get(), nullptr);
  if (kvmix_has_openmp()) {
    EXPECT_EQ(Runner(7).threads(), 7u);
    EXPECT_TRUE(RunsSideBySide(2));
  } else {
    EXPECT_EQ(Runner(7).get(), nullptr);
  }
  EXPECT_LE(Runner(0).threads(), static_cast<std::size_t>(internal::UsableThreads()));
  EXPECT_TRUE(Runner(0).Check().ok());
  ExpectError(Runner(-3).Check(), ErrorCode::kInvalidArgument,
              {"num_threads", "expected 0 or more", "-3"});
}

TEST(Runner, CallersGetWhatAPartThrows) {
  const Threads pool = Pool(3);
  for (const Runner& runner : {Runner::Here(), Runner(2), pool.runner(), EngineThreads(2)}) {
    EXPECT_THROW(runner.Run(50,
                            [](std::size_t p) {
                              if (p % 7 == 3) throw std::runtime_error("part");
                            }),
                 std::runtime_error);
    ExpectEachOnce(runner, "after");
  }
}

TEST(Threads, AreMadeOrRefused) {
  EXPECT_EQ(Pool(4).runner().threads(), 4u);
  EXPECT_EQ(Pool(0).runner().threads(), static_cast<std::size_t>(internal::UsableThreads()));
  EXPECT_TRUE(RunsSideBySide(Pool(2).runner()));
  EXPECT_TRUE(RunsSideBySide(Pool(2, 0).runner()));
  ExpectError(Threads::Create(-1).status(), ErrorCode::kInvalidArgument, {"num_threads", "-1"});
  EXPECT_EQ(kvmix_threads_create(std::numeric_limits<std::size_t>::max(), 0), nullptr);
  kvmix_threads_destroy(nullptr);
#ifdef __GLIBC__
  pthread_attr_t usual, huge;
  ASSERT_EQ(pthread_getattr_default_np(&usual), 0);
  pthread_attr_init(&huge);
  pthread_attr_setstacksize(&huge, std::size_t{1} << 50);  // no machine has such a stack
  if (pthread_setattr_default_np(&huge) == 0) {
    ExpectError(Threads::Create(3).status(), ErrorCode::kOutOfMemory, {"3 threads"});
    ASSERT_EQ(pthread_setattr_default_np(&usual), 0);
  }
#endif
}

// The same pool for threads that know nothing of each other, as fast as they can.
TEST(Threads, ManyCallersAtATime) {
  const Threads pool = Pool(3);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&, i] {
      for (int call = 0; call < 500; ++call) {
        const std::size_t parts = static_cast<std::size_t>(1 + (call + i) % 9);
        if (Counts(pool.runner(), parts) != std::vector<int>(parts, 1)) ++wrong;
      }
    });
  }
  for (std::thread& t : callers) t.join();
  EXPECT_EQ(wrong, 0);
}

TEST(Threads, PartsThatCallTheirRunner) {
  const Threads pool = Pool(3), other = Pool(2);
  for (const Runner& runner : {pool.runner(), Runner(2)}) {
    std::atomic<int> inner{0};
    runner.Run(10, [&](std::size_t) {
      runner.Run(10, [&](std::size_t) { other.runner().Run(3, [&](std::size_t) { ++inner; }); });
    });
    EXPECT_EQ(inner, 300);
  }
}

// Calls after pauses of all lengths: while workers spin, when they fall asleep, and long after.
TEST(Threads, CallsAfterPauses) {
  const Threads pool = Pool(2, 50);
  for (int us = 0; us < 400; ++us) {
    std::this_thread::sleep_for(std::chrono::microseconds(us / 2));
    ASSERT_EQ(Counts(pool.runner(), 5), std::vector<int>(5, 1)) << us;
  }
}

// The threads of OpenMP, from tests before this one, may go on spinning for a while: the calmest of
// some spans of time counts.
TEST(Threads, UseNoTimeBetweenCalls) {
  const Threads pool = Pool(4);
  ExpectEachOnce(pool.runner(), "before");
  Sleep(20ms);
  double least = 1.0;
  for (int span = 0; span < 5 && least >= 0.02; ++span) {
    const double before = CpuSeconds();
    Sleep(200ms);
    least = std::min(least, CpuSeconds() - before);
  }
  EXPECT_LT(least, 0.02);
  ExpectEachOnce(pool.runner(), "after");
}

TEST(Threads, AreLentAndRecalled) {
  Threads pool = Pool(1);
  EXPECT_EQ(pool.runner().threads(), 1u);
  for (int round = 0; round < 3; ++round) {
    std::vector<std::thread> engine;
    for (int i = 0; i < 2; ++i) engine.emplace_back([&] { pool.Lend(); });
    while (pool.runner().threads() != 3) Sleep(1ms);
    EXPECT_TRUE(RunsSideBySide(pool.runner()));
    ExpectEachOnce(pool.runner(), "with lent threads");
    pool.Recall();
    for (std::thread& t : engine) t.join();
    EXPECT_EQ(pool.runner().threads(), 1u);
    ExpectEachOnce(pool.runner(), "without");
  }
}

TEST(Threads, ThatEndGiveBackWhatIsLent) {
  auto pool = std::make_unique<Threads>(Pool(2));
  std::thread engine([&p = *pool] { p.Lend(); });
  while (pool->runner().threads() != 3) Sleep(1ms);
  ExpectEachOnce(pool->runner(), "with a lent thread");
  pool.reset();
  engine.join();
}

// Threads do not survive a fork: the child runs everything itself, also where the fork was in the
// middle of a call.
TEST(Threads, AForkedChildGoesOn) {
  const Threads pool = Pool(3);
  ExpectEachOnce(pool.runner(), "parent");
  Threads mine = Pool(2);
  const auto goes_on = [&] {
    std::vector<int> once(9, 1);
    mine.Recall();
    mine.Lend();
#ifndef __SANITIZE_THREAD__
    mine = Pool(2);  // one of its own, which works; ThreadSanitizer forbids it
#endif
    return Counts(pool.runner(), 9) == once && Counts(mine.runner(), 9) == once &&
           Counts(2, 9) == once;
  };
  EXPECT_EQ(Counts(2, 9), std::vector<int>(9, 1));
  EXPECT_TRUE(InChild(goes_on));
  std::atomic<int> children{0};
  pool.runner().Run(3, [&](std::size_t) {
    if (InChild([&] { return Counts(pool.runner(), 9) == std::vector<int>(9, 1); })) ++children;
  });
  EXPECT_EQ(children, 3);
  ExpectEachOnce(pool.runner(), "parent, afterwards");
}

}  // namespace
}  // namespace kvmix::testing
