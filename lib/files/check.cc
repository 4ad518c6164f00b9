#include "lib/files/check.h"

#include <cstdio>
#include <cstdlib>

namespace kvmix::internal {

void CheckFailed(const std::string& place, const std::string& expected, const std::string& found) {
  std::fputs(fmt::format("kvmix: {}: expected {}, found {}\n", place, expected, found).c_str(),
             stderr);
  std::abort();
}

}  // namespace kvmix::internal
