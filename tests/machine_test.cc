// A folder that looks like a machine, and what is read from it.
#include "lib/files/machine.h"

#include <gtest/gtest.h>
#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <string>

#include "dump_files.h"
#include "kvmix/runner.h"

namespace kvmix::internal {
namespace {

using kvmix::testing::TempFolder;
using kvmix::testing::WriteBytes;

class MachineTest : public ::testing::Test {
 protected:
  void Write(const std::string& path, const std::string& text) {
    const std::string file = root() + path;
    std::filesystem::create_directories(std::filesystem::path(file).parent_path());
    WriteBytes(file, text + "\n");
  }
  std::string root() const { return folder_.path(); }
  static int Cpus() {
    cpu_set_t cpus;
    return sched_getaffinity(0, sizeof cpus, &cpus) == 0 ? CPU_COUNT(&cpus) : 0;
  }

  const TempFolder folder_;
};

TEST_F(MachineTest, NothingToReadMeansNoLimit) {
  EXPECT_EQ(CpuName(root()), "unknown");
  EXPECT_EQ(UsableThreads(root()), Cpus());
  EXPECT_GE(MemoryBytes(root()), MemoryBytes());
  EXPECT_GT(MemoryBytes(), std::size_t{1} << 20);
  EXPECT_GE(Caches(root()).l1, std::size_t{4} << 10);
}

TEST_F(MachineTest, NamesOfCpus) {
  Write("/proc/cpuinfo", "processor\t: 0\nmodel name\t: Some: CPU @ 2 GHz\nflags\t\t: fpu\n");
  EXPECT_EQ(CpuName(root()), "Some: CPU @ 2 GHz");
  Write("/proc/cpuinfo",
        "processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
        "CPU variant\t: 0x3\nCPU part\t: 0xd0c\nCPU revision\t: 1\n");
  EXPECT_EQ(CpuName(root()), "Arm 0x41 part 0xd0c");
  Write("/proc/cpuinfo", "processor\t: 0\nflags\t:\n");
  EXPECT_EQ(CpuName(root()), "unknown");
}

TEST_F(MachineTest, QuotaOfVersion2) {
  Write("/proc/self/cgroup", "0::/outer/inner");
  const auto with = [&](const std::string& limit) {
    Write("/sys/fs/cgroup/outer/inner/cpu.max", limit);
    return UsableThreads(root());
  };
  EXPECT_EQ(with("max 100000"), Cpus());
  EXPECT_EQ(with("100000 100000"), 1);
  EXPECT_EQ(with("1000 100000"), 1);  // at least one
  EXPECT_EQ(with("100001 100000"), std::min(2, Cpus()));
  EXPECT_EQ(with("99999999 100000"), Cpus());
  EXPECT_EQ(with("100000 0"), Cpus());
  EXPECT_EQ(with("nonsense"), Cpus());
  Write("/sys/fs/cgroup/outer/cpu.max", "50000 100000");  // the group around it counts as well
  EXPECT_EQ(with("max 100000"), 1);
}

TEST_F(MachineTest, QuotaOfVersion1) {
  Write("/proc/self/cgroup", "5:memory:/of/memory\n4:cpuacct,cpu:/of/cpu\n0::/");
  Write("/sys/fs/cgroup/cpu/of/cpu/cpu.cfs_period_us", "100000");
  const auto with = [&](const std::string& limit) {
    Write("/sys/fs/cgroup/cpu/of/cpu/cpu.cfs_quota_us", limit);
    return UsableThreads(root());
  };
  EXPECT_EQ(with("-1"), Cpus());
  EXPECT_EQ(with("30000"), 1);
  EXPECT_EQ(with("130000"), std::min(2, Cpus()));
}

TEST_F(MachineTest, LimitsOfAContainerThatSeesOnlyItsOwnGroup) {
  Write("/proc/self/cgroup", "4:cpu,cpuacct:/docker/0123\n3:memory:/docker/0123");
  Write("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "50000");
  Write("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "50000");
  Write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "12345678");
  EXPECT_EQ(UsableThreads(root()), 1);
  EXPECT_EQ(MemoryBytes(root()), 12345678u);
}

TEST_F(MachineTest, Memory) {
  Write("/proc/self/cgroup", "5:memory:/of/memory\n4:cpu:/of/cpu\n0::/two");
  const std::size_t all = MemoryBytes(root());
  Write("/sys/fs/cgroup/memory/of/memory/memory.limit_in_bytes", "9223372036854771712");
  Write("/sys/fs/cgroup/unified/two/memory.max", "max");
  EXPECT_EQ(MemoryBytes(root()), all);
  Write("/sys/fs/cgroup/memory/of/memory/memory.limit_in_bytes", "4096000");
  EXPECT_EQ(MemoryBytes(root()), 4096000u);
  Write("/sys/fs/cgroup/unified/two/memory.max", "409600");
  EXPECT_EQ(MemoryBytes(root()), 409600u);
  Write("/sys/fs/cgroup/memory/of/cpu/memory.limit_in_bytes", "4096");  // not this process's
  EXPECT_EQ(MemoryBytes(root()), 409600u);
}

TEST_F(MachineTest, CachesOfSys) {
  const char* const caches[][3] = {
      {"1", "Data", "48K"}, {"1", "Instruction", "64K"}, {"2", "Unified", "2048K"}};
  for (int i = 0; i < 3; ++i) {
    const std::string index =
        "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(2 - i) + "/";
    Write(index + "level", caches[i][0]);
    Write(index + "type", caches[i][1]);
    Write(index + "size", caches[i][2]);
  }
  const CacheSizes sizes = Caches(root());
  EXPECT_EQ(sizes.l1, std::size_t{48} << 10);
  EXPECT_EQ(sizes.l2, std::size_t{2} << 20);
  EXPECT_GE(sizes.last, sizes.l2);
}

TEST(MachineDeathTest, NoMoreThreadsThanTheCpusThatTheProcessMayRunOn) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // a new process: OpenMP starts in it anew
  EXPECT_EXIT(
      {
        cpu_set_t one;
        sched_getaffinity(0, sizeof one, &one);
        int cpu = 0;
        while (!CPU_ISSET(cpu, &one)) ++cpu;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        sched_setaffinity(0, sizeof one, &one);
        setenv("OMP_NUM_THREADS", "5", 1);
        std::exit(UsableThreads() == 1 && kvmix_openmp_runner(0).threads == 1 ? 0 : 1);
      },
      ::testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace kvmix::internal
