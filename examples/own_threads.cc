// An engine that has threads of its own: kvmix runs the parts of its calls on them, through one
// function (kvmix_runner). What is computed does not depend on the threads.
//   c++ -std=c++20 own_threads.cc $(pkg-config --cflags --libs kvmix) -pthread -o own_threads
#include <condition_variable>
#include <cstddef>
#include <cstdio>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include <kvmix/attention.h>
#include <kvmix/cache.h>
#include <kvmix/plan.h>
#include <kvmix/runner.h>

namespace {

// The engine's threads. They take one job at a time; whoever brings it works with them.
class EngineThreads {
 public:
  explicit EngineThreads(std::size_t threads) {
    while (threads_.size() + 1 < threads) threads_.emplace_back([this] { Loop(); });
  }
  ~EngineThreads() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    work_.notify_all();
    for (std::thread& t : threads_) t.join();
  }

  // What kvmix asks for: part(job, 0), ..., part(job, parts - 1), each once, on any threads.
  kvmix_runner runner() { return {&Run, this, threads_.size() + 1}; }

 private:
  static void Run(void* self, std::size_t parts, void (*part)(void* job, std::size_t index),
                  void* job) {
    EngineThreads& e = *static_cast<EngineThreads*>(self);
    std::unique_lock lock(e.mutex_);
    e.part_ = part;
    e.job_ = job;
    e.parts_ = parts;
    e.next_ = e.done_ = 0;
    e.work_.notify_all();
    e.TakeParts(lock);
    e.all_done_.wait(lock, [&] { return e.done_ == e.parts_; });
  }
  void Loop() {
    std::unique_lock lock(mutex_);
    while (true) {
      work_.wait(lock, [&] { return stop_ || next_ < parts_; });
      if (stop_) return;
      TakeParts(lock);
    }
  }
  void TakeParts(std::unique_lock<std::mutex>& lock) {
    while (next_ < parts_) {
      const std::size_t index = next_++;
      lock.unlock();
      part_(job_, index);
      lock.lock();
      if (++done_ == parts_) all_done_.notify_all();
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable work_, all_done_;
  void (*part_)(void* job, std::size_t index) = nullptr;
  void* job_ = nullptr;
  std::size_t parts_ = 0, next_ = 0, done_ = 0;
  bool stop_ = false;
};

// Appends the rows, then attends with the same rows as queries.
kvmix::Status Layer(const kvmix::Plan& plan, const kvmix::RowsView& rows,
                    const kvmix::Runner& runner, std::vector<float>* out) {
  kvmix::Result<kvmix::Cache> cache = kvmix::Cache::Create(plan, rows.tokens);
  if (!cache.ok()) return cache.status();
  const kvmix::Status done = cache->Append(0, rows, rows, runner);
  return done.ok() ? kvmix::Attend(*cache, 0, rows, out->data(), runner) : done;
}

}  // namespace

int main() {
  constexpr std::size_t kTokens = 600, kHeads = 4, kDim = 64;
  const kvmix::HeadCodec int8{kvmix::ParseCodecKind("i8-token").value()};
  const kvmix::Plan plan = kvmix::UniformPlan(kvmix::Geometry{1, kHeads, kHeads, kDim}, int8, int8);
  std::vector<float> x(kTokens * kHeads * kDim), alone(x.size()), together(x.size());
  std::minstd_rand random(1);
  for (float& number : x) number = std::uniform_real_distribution<float>(-1.0f, 1.0f)(random);
  const kvmix::RowsView rows = kvmix::RowsView::F32(x.data(), kTokens, kHeads, kDim);

  EngineThreads engine(3);
  kvmix::Status done = Layer(plan, rows, kvmix::Runner::Here(), &alone);
  if (done.ok()) done = Layer(plan, rows, engine.runner(), &together);
  if (!done.ok() || alone != together) {
    std::fprintf(stderr, "%s\n", done.ok() ? "other numbers" : done.message().c_str());
    return 1;
  }
  std::printf("%zu tokens, the same bits on 1 and 3 threads, last output %.4f\n", kTokens,
              static_cast<double>(together.back()));
}
