#include "lib/files/machine.h"

#include <sched.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <vector>

#include <fmt/format.h>

#include "lib/files/parse_number.h"

namespace kvmix::internal {
namespace {

namespace fs = std::filesystem;

constexpr std::uint64_t kNoLimit = std::numeric_limits<std::uint64_t>::max();
constexpr int kMaxThreads = std::numeric_limits<int>::max();

// The whole numbers that a file begins with; "max" and -1 are none.
std::vector<std::uint64_t> Numbers(const std::string& path) {
  std::vector<std::uint64_t> numbers;
  std::ifstream file(path);
  for (std::string word; file >> word;) {
    const auto number = ParseNumber<std::uint64_t>(word);
    if (!number) break;
    numbers.push_back(*number);
  }
  return numbers;
}

std::uint64_t MemoryLimit(const std::string& group) {
  for (const char* file : {"/memory.max", "/memory.limit_in_bytes"})
    if (const auto bytes = Numbers(group + file); !bytes.empty()) return bytes[0];
  return kNoLimit;
}

std::uint64_t CpuLimit(const std::string& group) {
  std::vector<std::uint64_t> time = Numbers(group + "/cpu.max");  // quota, period
  if (time.empty())
    for (const char* file : {"/cpu.cfs_quota_us", "/cpu.cfs_period_us"})
      for (const std::uint64_t number : Numbers(group + file)) time.push_back(number);
  if (time.size() != 2 || time[1] == 0) return kNoLimit;
  return std::max<std::uint64_t>(1, time[0] / time[1] + (time[0] % time[1] != 0));
}

// The least `limit` of this process's control group and of those around it. In a container the
// group's own folder may be out of sight; what is mounted in its place is then the container's.
std::uint64_t LeastLimit(const std::string& root, const std::string& controller,
                         const std::function<std::uint64_t(const std::string& group)>& limit) {
  std::uint64_t least = kNoLimit;
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // "4:cpu,cpuacct:/a/b", version 2: "0::/a"
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == line.npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    std::vector<std::string> mounts;
    if (controllers == ",,") mounts = {"", "/unified"};
    if (controllers.find("," + controller + ",") != controllers.npos) mounts = {"/" + controller};
    for (const std::string& mount : mounts) {
      for (fs::path group = line.substr(second + 1);; group = group.parent_path()) {
        least = std::min(least,
                         limit(fmt::format("{}/sys/fs/cgroup{}{}", root, mount, group.string())));
        if (!group.has_relative_path()) break;
      }
    }
  }
  return least;
}

// A thread that OpenMP has bound to a place has one CPU, the process more: there OpenMP knows best.
int AllowedCpus() {
#ifdef _OPENMP
  return std::max(1, omp_get_num_procs());
#else
  cpu_set_t cpus;
  const bool is_known = sched_getaffinity(0, sizeof cpus, &cpus) == 0;
  return std::max(1, is_known ? CPU_COUNT(&cpus) : static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN)));
#endif
}

int Quota(const std::string& root) {
  return static_cast<int>(std::min<std::uint64_t>(LeastLimit(root, "cpu", CpuLimit), kMaxThreads));
}

// What the C library knows, if it knows such things at all.
#ifdef _SC_LEVEL1_DCACHE_SIZE
constexpr int kKnown[] = {_SC_LEVEL1_DCACHE_SIZE, _SC_LEVEL2_CACHE_SIZE, _SC_LEVEL3_CACHE_SIZE};
#else
constexpr int kKnown[] = {-1, -1, -1};
#endif

// Bytes of the cache of data at `level` of the first CPU; `usual` where nobody knows.
std::size_t CacheBytes(const std::string& root, int level, std::size_t usual) {
  for (int index = 0; index < 8; ++index) {
    const std::string folder =
        fmt::format("{}/sys/devices/system/cpu/cpu0/cache/index{}/", root, index);
    int found = 0;
    std::string type;
    std::size_t kib = 0;  // "1024K"
    std::ifstream(folder + "level") >> found;
    std::ifstream(folder + "type") >> type;
    std::ifstream(folder + "size") >> kib;
    if (found == level && type != "Instruction" && kib != 0) return kib << 10;
  }
  const long known = sysconf(kKnown[level - 1]);
  return known > 0 ? static_cast<std::size_t>(known) : usual;
}

}  // namespace

std::string CpuName(const std::string& root) {
  std::string implementer, part;
  std::ifstream cpuinfo(root + "/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    const std::size_t colon = line.find(": ");
    if (colon == line.npos) continue;
    std::string value = line.substr(colon + 2);
    if (line.starts_with("model name")) return value;
    if (line.starts_with("CPU implementer")) implementer = value;
    if (line.starts_with("CPU part")) part = value;
    if (!implementer.empty() && !part.empty())
      return fmt::format("Arm {} part {}", implementer, part);
  }
  return "unknown";
}

int UsableThreads(const std::string& root) { return std::min(AllowedCpus(), Quota(root)); }

std::size_t MemoryBytes(const std::string& root) {
  const std::uint64_t physical = static_cast<std::uint64_t>(sysconf(_SC_PHYS_PAGES)) *
                                 static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
  return static_cast<std::size_t>(std::min(physical, LeastLimit(root, "memory", MemoryLimit)));
}

CacheSizes Caches(const std::string& root) {
  CacheSizes sizes{CacheBytes(root, 1, std::size_t{32} << 10),
                   CacheBytes(root, 2, std::size_t{512} << 10),
                   CacheBytes(root, 3, std::size_t{32} << 20)};
  sizes.last = std::max(sizes.last, sizes.l2);
  return sizes;
}

}  // namespace kvmix::internal
