#include "lib/files/check.h"

#include <cstdio>
#include <cstdlib>

#include "kvmix/status.h"

namespace kvmix::internal {

void CheckFailed(const std::string& place, const std::string& expected, const std::string& found) {
  std::fputs(fmt::format("kvmix: {}: expected {}, found {}\n", place, expected, found).c_str(),
             stderr);
  std::abort();
}

void WrongResult(const Status& status) {
  if (status.ok()) CheckFailed("Result", "a value or an error", "a Status that is ok");
  CheckFailed("Result", "a value", "the error \"" + status.message() + '"');
}

}  // namespace kvmix::internal
