/* Who runs the parts of a call. An append or an attention is cut into parts that know nothing of
 * threads; a runner calls every part, on threads of its own. The library brings three: this thread
 * alone, OpenMP's threads, and a pool. An engine with threads of its own writes a fourth: one
 * function. C11, and C++20 below. */
#ifndef KVMIX_RUNNER_H_
#define KVMIX_RUNNER_H_

#include <stddef.h>

#include "kvmix/export.h"

#ifdef __cplusplus
extern "C" {
#endif

/* run: calls part(job, 0), ..., part(job, parts - 1), each once, on any threads, in any order, and
 * returns when all of them have returned. A part neither throws nor waits for another part. Where
 * run is null, or a pointer to a runner is, the calling thread does everything.
 * threads: how many parts run at a time, about. The library gives each thread neighbouring work by
 * it; no result depends on it. */
typedef struct kvmix_runner {
  void (*run)(void* self, size_t parts, void (*part)(void* job, size_t index), void* job);
  void* self;
  size_t threads;
} kvmix_runner;

/* OpenMP's threads; 0: OpenMP's default (OMP_NUM_THREADS, say), but no more than the CPUs that this
 * process may use. A part that calls this runner runs everything itself. So does the child of a
 * fork, where OpenMP's threads are gone. (A child cannot know what it inherits if its parent used
 * OpenMP, but never this runner.) In a library that was built without OpenMP: this thread. */
KVMIX_API kvmix_runner kvmix_openmp_runner(size_t threads);
/* Whether the library was built with OpenMP. */
KVMIX_API int kvmix_has_openmp(void);

/* A pool of threads, which sleep between calls. Many threads may use one pool at a time: the pool
 * works for one call, and a call that comes meanwhile, or from inside a part, runs on the thread
 * that made it. So does every call in the child of a fork. */
typedef struct kvmix_threads kvmix_threads;

/* Microseconds that a thread of a pool looks for the next call before it sleeps, as long as calls
 * keep coming within that time; where they do not, an eighth of it. */
enum { KVMIX_SPIN_US = 100 };

/* `threads` threads, the caller of a run being one of them; 0: as many as this process may use.
 * Where threads outnumber the CPUs, nobody spins. Null: the system does not give so many. */
KVMIX_API kvmix_threads* kvmix_threads_create(size_t threads, unsigned spin_us);
/* Recalls lent threads, and returns when all have left. No call may be under way. Null: nothing. */
KVMIX_API void kvmix_threads_destroy(kvmix_threads* threads);
/* Valid as long as the pool. Its `threads` counts the threads that are lent at this moment. */
KVMIX_API kvmix_runner kvmix_threads_runner(kvmix_threads* threads);
/* The calling thread works in the pool, and returns after the next recall. */
KVMIX_API void kvmix_threads_lend(kvmix_threads* threads);
/* Threads that are lent now return when they have finished their part; nobody waits for that. */
KVMIX_API void kvmix_threads_recall(kvmix_threads* threads);

#ifdef __cplusplus
} /* extern "C" */

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <string>

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
#endif  // __cplusplus

#endif /* KVMIX_RUNNER_H_ */
