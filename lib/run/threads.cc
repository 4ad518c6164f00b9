// A pool of threads. A call opens a gate; whoever comes through it takes parts until there are none
// left; the caller, who takes parts as well, closes the gate and waits for those inside. A thread
// that wakes up late finds the gate closed, and nobody has waited for it.
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "kvmix/kvmix.h"
#include "lib/files/machine.h"

namespace {

using Clock = std::chrono::steady_clock;
using Part = void (*)(void* job, std::size_t index);

// The gate: the number of times that it was opened or closed (odd: it is open), and how many
// threads are inside.
constexpr std::uint64_t kTurn = std::uint64_t{1} << 32;
constexpr std::uint64_t kInside = kTurn - 1;
// Of the time that a thread spins, where calls come seldom.
constexpr int kSeldom = 8;

void Pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Looks for at most so long. Whether it is true.
template <class IsTrue>
bool Spin(Clock::duration time, const IsTrue& is_true) {
  if (is_true()) return true;
  if (time == time.zero()) return false;
  const Clock::time_point end = Clock::now() + time;
  do {
    for (int i = 0; i < 32; ++i) {
      if (is_true()) return true;
      Pause();
    }
  } while (Clock::now() < end);
  return false;
}

}  // namespace

// Everything atomic is read and written in one order (seq_cst): who sleeps has been counted before
// he looks at the gate for the last time, and who moves the gate looks at the count afterwards.
struct kvmix_threads {
 public:
  explicit kvmix_threads(Clock::duration spin) : spin_(spin) {}
  ~kvmix_threads();
  void Start(std::size_t workers);  // throws what std::thread does
  void Run(std::size_t parts, Part part, void* job);
  void Lend();
  void Recall();
  std::size_t threads() const { return workers_.size() + 1 + lent_; }
  bool is_child() const { return getpid() != process_; }

 private:
  template <class IsOver>
  void Work(const IsOver& is_over);
  template <class IsTrue>
  void Sleep(std::atomic<std::size_t>& sleepers, std::condition_variable& wake,
             const IsTrue& is_true);
  void Wake(std::size_t most);
  void TakeParts();
  void Leave();

  const pid_t process_ = getpid();
  const Clock::duration spin_;
  std::vector<std::thread> workers_;

  std::atomic<bool> busy_{false};  // with a call, which is:
  Part part_ = nullptr;
  void* job_ = nullptr;
  std::size_t parts_ = 0;
  alignas(64) std::atomic<std::size_t> next_{0};
  alignas(64) std::atomic<std::uint64_t> gate_{0};
  alignas(64) std::atomic<std::size_t> sleepers_{0};
  std::atomic<std::size_t> sleeping_callers_{0};
  std::mutex mutex_;  // of what follows, and of the moments before a sleep
  std::condition_variable call_, done_, left_;
  std::atomic<std::size_t> recalls_{0};
  std::atomic<bool> ending_{false};
  std::atomic<std::size_t> lent_{0};
};

void kvmix_threads::Start(std::size_t workers) {
  workers_.reserve(workers);
  while (workers_.size() < workers) {
    workers_.emplace_back([this] { Work([this] { return ending_.load(); }); });
  }
}

kvmix_threads::~kvmix_threads() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  Recall();
  for (std::thread& worker : workers_) worker.join();
  std::unique_lock lock(mutex_);
  left_.wait(lock, [this] { return lent_ == 0; });
}

void kvmix_threads::TakeParts() {
  for (std::size_t p = next_++; p < parts_; p = next_++) part_(job_, p);
}

template <class IsTrue>
void kvmix_threads::Sleep(std::atomic<std::size_t>& sleepers, std::condition_variable& wake,
                          const IsTrue& is_true) {
  ++sleepers;
  {
    std::unique_lock lock(mutex_);
    wake.wait(lock, is_true);
  }
  --sleepers;
}

void kvmix_threads::Wake(std::size_t most) {
  const std::size_t sleepers = sleepers_;
  if (sleepers == 0) return;
  { const std::lock_guard lock(mutex_); }  // who has looked at the gate is asleep by now
  if (most >= sleepers) return call_.notify_all();
  for (std::size_t i = 0; i < most; ++i) call_.notify_one();
}

void kvmix_threads::Leave() {
  if ((--gate_ & kInside) != 0 || sleeping_callers_ == 0) return;
  { const std::lock_guard lock(mutex_); }
  done_.notify_one();
}

void kvmix_threads::Run(std::size_t parts, Part part, void* job) {
  if (parts < 2 || is_child() || busy_.exchange(true)) {
    for (std::size_t p = 0; p < parts; ++p) part(job, p);
    return;
  }
  part_ = part;
  job_ = job;
  parts_ = parts;
  next_ = 0;
  gate_ += kTurn;
  Wake(parts - 1);
  TakeParts();
  gate_ += kTurn;
  const auto is_done = [this] { return (gate_ & kInside) == 0; };
  if (!Spin(spin_, is_done)) Sleep(sleeping_callers_, done_, is_done);
  busy_ = false;
}

// Until it is over: waits for a call, and takes parts of it.
template <class IsOver>
void kvmix_threads::Work(const IsOver& is_over) {
  std::uint64_t joined = 0;  // the last turn of the gate in which this thread was inside
  const auto is_open = [&](std::uint64_t gate) {
    return gate / kTurn % 2 == 1 && gate / kTurn != joined;
  };
  const auto is_time = [&] { return is_open(gate_) || is_over(); };
  bool is_often = true;
  for (;;) {
    const Clock::time_point since = Clock::now();
    if (!Spin(is_often ? spin_ : spin_ / kSeldom, is_time)) Sleep(sleepers_, call_, is_time);
    is_often = Clock::now() - since < spin_;
    if (is_over()) return;
    for (std::uint64_t gate = gate_; is_open(gate);) {
      if (!gate_.compare_exchange_weak(gate, gate + 1)) continue;
      joined = gate / kTurn;
      TakeParts();
      Leave();
      break;
    }
  }
}

void kvmix_threads::Lend() {
  std::unique_lock lock(mutex_);
  if (ending_) return;
  ++lent_;
  const std::size_t recalls = recalls_;
  lock.unlock();
  Work([&] { return recalls_ != recalls; });
  lock.lock();
  --lent_;
  left_.notify_all();  // under the lock: the pool may be gone after it
}

void kvmix_threads::Recall() {
  {
    const std::lock_guard lock(mutex_);
    ++recalls_;
  }
  call_.notify_all();
}

kvmix_threads* kvmix_threads_create(std::size_t threads, unsigned spin_us) {
  const std::size_t usable = static_cast<std::size_t>(kvmix::internal::UsableThreads());
  if (threads == 0) threads = usable;
  kvmix_threads* pool = nullptr;
  try {
    pool = new kvmix_threads(std::chrono::microseconds(threads <= usable ? spin_us : 0));
    pool->Start(threads - 1);
    return pool;
  } catch (...) {  // of memory, of threads
    delete pool;
    return nullptr;
  }
}

// In the child of a fork nobody is there to be joined, and the mutex may be locked for ever: the
// memory stays.
void kvmix_threads_destroy(kvmix_threads* threads) {
  if (threads != nullptr && !threads->is_child()) delete threads;
}

kvmix_runner kvmix_threads_runner(kvmix_threads* threads) {
  const auto run = [](void* self, std::size_t parts, Part part, void* job) {
    static_cast<kvmix_threads*>(self)->Run(parts, part, job);
  };
  if (threads == nullptr) return {nullptr, nullptr, 1};
  return {run, threads, threads->threads()};
}

void kvmix_threads_lend(kvmix_threads* threads) {
  if (threads != nullptr && !threads->is_child()) threads->Lend();
}

void kvmix_threads_recall(kvmix_threads* threads) {
  if (threads != nullptr && !threads->is_child()) threads->Recall();
}
