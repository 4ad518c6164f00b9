// Who runs the parts of a call (kvmix/kvmix.h, kvmix_runner): this thread, OpenMP's threads, a pool
// of threads, or an engine's own.
#ifndef KVMIX_RUNNER_H_
#define KVMIX_RUNNER_H_

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <string>

#include "kvmix/kvmix.h"
#include "kvmix/status.h"

namespace kvmix {

// A runner as a value. A number of threads is one: those of OpenMP.
class Runner {
 public:
  // As kvmix_openmp_runner(). 1: this thread. Whoever is given a negative number refuses it.
  Runner(int num_threads) : refused_(std::min(num_threads, 0)) {
    if (num_threads != 1 && refused_ == 0) {
      runner_ = kvmix_openmp_runner(static_cast<std::size_t>(num_threads));
    }
  }
  Runner(const kvmix_runner& runner) : runner_(runner) {}
  // Null: this thread.
  explicit Runner(const kvmix_runner* runner) : Runner(runner ? *runner : kvmix_runner{}) {}
  static Runner Here() { return kvmix_runner{}; }

  // Null: this thread.
  const kvmix_runner* get() const { return runner_.run != nullptr ? &runner_ : nullptr; }
  std::size_t threads() const { return std::max<std::size_t>(1, runner_.threads); }
  bool refused() const { return refused_ != 0; }
  Status Check() const {
    if (refused_ == 0) return {};
    return {ErrorCode::kInvalidArgument,
            "num_threads: expected 0 or more, found " + std::to_string(refused_)};
  }

  // f(0), ..., f(parts - 1). Where one of them throws, some of the others may be left out, and the
  // caller gets what was thrown.
  template <class F>
  void Run(std::size_t parts, const F& f) const {
    if (runner_.run == nullptr || parts < 2) {
      for (std::size_t p = 0; p < parts; ++p) f(p);
      return;
    }
    struct Job {
      const F& f;
      std::atomic<bool> failed{false};
      std::exception_ptr error = nullptr;
    } job{f};
    const auto part = [](void* of, std::size_t p) {
      Job& j = *static_cast<Job*>(of);
      if (j.failed.load(std::memory_order_relaxed)) return;
      try {
        j.f(p);
      } catch (...) {
        if (!j.failed.exchange(true)) j.error = std::current_exception();
      }
    };
    runner_.run(runner_.self, parts, part, &job);
    if (job.error != nullptr) std::rethrow_exception(job.error);
  }

 private:
  kvmix_runner runner_{};
  int refused_ = 0;
};

// A pool of threads that ends with its owner. Movable; see kvmix_threads.
class Threads {
 public:
  // Errors: a negative number; threads that the system does not give.
  static Result<Threads> Create(int num_threads = 0, unsigned spin_us = KVMIX_SPIN_US) {
    const std::string asked = std::to_string(num_threads);
    if (num_threads < 0) {
      return Status(ErrorCode::kInvalidArgument, "num_threads: expected 0 or more, found " + asked);
    }
    Threads made(kvmix_threads_create(static_cast<std::size_t>(num_threads), spin_us));
    if (made.threads_ != nullptr) return made;
    return Status(ErrorCode::kOutOfMemory,
                  "a pool of " + asked + " threads: the system does not give so many");
  }

  Runner runner() const { return kvmix_threads_runner(threads_.get()); }
  void Lend() { kvmix_threads_lend(threads_.get()); }
  void Recall() { kvmix_threads_recall(threads_.get()); }

 private:
  struct Destroy {
    void operator()(kvmix_threads* threads) const { kvmix_threads_destroy(threads); }
  };
  explicit Threads(kvmix_threads* threads) : threads_(threads) {}
  std::unique_ptr<kvmix_threads, Destroy> threads_;
};

}  // namespace kvmix

#endif  // KVMIX_RUNNER_H_
