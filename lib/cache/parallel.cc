#include "lib/cache/parallel.h"

#include <fmt/format.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>

#include "lib/files/machine.h"

namespace kvmix::internal {
namespace {

std::atomic<bool> in_child = false;
// Before main, or when the library is loaded: a process that forks later is seen.
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { in_child.store(true, std::memory_order_relaxed); });

}  // namespace

Status CheckThreads(int num_threads) {
  if (num_threads >= 0) return {};
  return {ErrorCode::kInvalidArgument,
          fmt::format("num_threads: expected 0 or more, found {}", num_threads)};
}

int ThreadsFor(int num_threads, std::size_t parts) {
  if (num_threads == 1 || parts <= 1 || in_child.load(std::memory_order_relaxed)) return 1;
  return static_cast<int>(std::min(static_cast<std::size_t>(Threads(num_threads)), parts));
}

}  // namespace kvmix::internal
