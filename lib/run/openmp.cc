// OpenMP's threads as a runner.
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "kvmix/kvmix.h"
#include "lib/files/machine.h"

#ifdef _OPENMP
namespace {

// The process that made the first runner: its children have none of its threads, and OpenMP would
// wait for them.
std::atomic<pid_t> process{0};

void Run(void* self, std::size_t parts, void (*part)(void* job, std::size_t index), void* job) {
  const int threads =
      static_cast<int>(std::min<std::size_t>(reinterpret_cast<std::uintptr_t>(self), parts));
  if (threads < 2 || getpid() != process.load(std::memory_order_relaxed)) {
    for (std::size_t p = 0; p < parts; ++p) part(job, p);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (std::size_t p = 0; p < parts; ++p) part(job, p);
}

// OpenMP knows nothing of a control group's quota, which is read once: this is asked for every
// token and layer.
std::size_t UsualThreads() {
  static const int usable = kvmix::internal::UsableThreads();
  return static_cast<std::size_t>(std::min({omp_get_max_threads(), omp_get_num_procs(), usable}));
}

}  // namespace

kvmix_runner kvmix_openmp_runner(std::size_t threads) {
  threads = threads == 0 ? UsualThreads() : std::min(threads, std::size_t{INT32_MAX});
  if (threads <= 1) return {nullptr, nullptr, 1};
  if (pid_t none = 0; process.load(std::memory_order_relaxed) == none) {
    process.compare_exchange_strong(none, getpid());
  }
  return {Run, reinterpret_cast<void*>(threads), threads};
}

int kvmix_has_openmp(void) { return 1; }
#else
kvmix_runner kvmix_openmp_runner(std::size_t) { return {nullptr, nullptr, 1}; }

int kvmix_has_openmp(void) { return 0; }
#endif
