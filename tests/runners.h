// Runners of a test's own.
#ifndef KVMIX_TESTS_RUNNERS_H_
#define KVMIX_TESTS_RUNNERS_H_

#include <algorithm>
#include <cstddef>
#include <functional>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "kvmix/runner.h"

namespace kvmix::testing {

// Calls the parts on this thread, from the last to the first or, with a seed, shuffled.
class OrderRunner {
 public:
  explicit OrderRunner(unsigned seed = 0) : seed_(seed) {}
  operator Runner() { return kvmix_runner{Run, this, 1}; }

  std::size_t parts = 0;                 // of the last call
  std::function<void()> before = [] {};  // every part

 private:
  static void Run(void* self, std::size_t parts, void (*part)(void* job, std::size_t), void* job) {
    OrderRunner& r = *static_cast<OrderRunner*>(self);
    r.parts = parts;
    std::vector<std::size_t> order(parts);
    std::iota(order.rbegin(), order.rend(), std::size_t{0});
    if (r.seed_ != 0) std::shuffle(order.begin(), order.end(), std::mt19937(r.seed_));
    for (const std::size_t p : order) {
      r.before();
      part(job, p);
    }
  }

  unsigned seed_;
};

// Threads of an engine: thread i takes parts i, i + n, ..., the last of them first.
inline Runner EngineThreads(std::size_t n) {
  const auto run = [](void* self, std::size_t parts, void (*part)(void* job, std::size_t),
                      void* job) {
    const std::size_t threads = reinterpret_cast<std::uintptr_t>(self);
    std::vector<std::thread> pool;
    for (std::size_t i = 0; i < threads; ++i) {
      pool.emplace_back([=] {
        for (std::size_t p = parts; p-- > 0;) {
          if (p % threads == i) part(job, p);
        }
      });
    }
    for (std::thread& t : pool) t.join();
  };
  return kvmix_runner{run, reinterpret_cast<void*>(n), n};
}

}  // namespace kvmix::testing

#endif  // KVMIX_TESTS_RUNNERS_H_
