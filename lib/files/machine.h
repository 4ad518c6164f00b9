// What this process has of the machine: the one place that looks.
#ifndef KVMIX_LIB_FILES_MACHINE_H_
#define KVMIX_LIB_FILES_MACHINE_H_

#include <cstddef>
#include <string>

namespace kvmix::internal {

// `root` stands before every path that is read: tests have a folder that looks like a machine.

// "Intel(R) Xeon(R) Processor"; on Arm, which has no such name, "Arm 0x41 part 0xd0c".
std::string CpuName(const std::string& root = "");

// CPUs that this process may use at a time: those that it may run on, or its control group's quota
// (rounded up) if that is less.
int UsableThreads(const std::string& root = "");

// Bytes that this process may have: of the machine, or of its control group if that is less.
std::size_t MemoryBytes(const std::string& root = "");

struct CacheSizes {
  std::size_t l1, l2;  // bytes, of one core
  std::size_t last;    // bytes, shared
};
CacheSizes Caches(const std::string& root = "");

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_FILES_MACHINE_H_
