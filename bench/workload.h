// One table of benchmarks, one way to time them.
#ifndef KVMIX_BENCH_WORKLOAD_H_
#define KVMIX_BENCH_WORKLOAD_H_

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "bench/machine.h"
#include "kernels/kernels.h"

namespace kvmix::bench {

// A model's attention layer.
struct Shape {
  std::size_t query_heads, kv_heads, head_dim;
  std::size_t v_dim = head_dim;
  std::string name() const;  // "q14kv2d64"; "q16kv16d192x128" where V is narrower than K
};

inline constexpr Shape kShapes[] = {
    {14, 2, 64},         // Qwen2.5-0.5B
    {12, 2, 128},        // Qwen2.5-1.5B
    {32, 8, 128},        // Llama-3-8B
    {4, 1, 256},         // Gemma-3
    {32, 32, 128},       // MHA
    {10, 2, 80},         // awkward: not a multiple of 32
    {24, 4, 256},        // a group of six
    {8, 1, 512},         // the global layers of Gemma 4
    {16, 16, 192, 128},  // V narrower than K, as DeepSeek's without its latent cache
};
// The shapes that --quick keeps.
inline constexpr std::size_t kSmallShape = 0, kLargeShape = 2, kMhaShape = 4;

// Work to be timed, on data that is ready.
struct Workload {
  std::function<void()> call;
  std::size_t calls = 1;           // units of work in one call: the time reported is that of one
  double bytes = 0.0, macs = 0.0;  // of one unit: read and written, multiply-adds
  // The call is held against this: the seconds that a unit takes at least, or a function whose runs
  // alternate with it; and a name for that: "dram-read 19.3 GB/s", "row-copy".
  double ideal = 0.0;
  std::function<void()> reference;
  std::string limit;
  std::string note;  // to be said in the label
  std::string skip;  // why it can't run here; else empty

  // A unit is at least so much work of what `by` limits. The largest bound binds.
  void Bound(const Limit& by, double amount) {
    if (amount / by.per_second <= ideal) return;
    ideal = amount / by.per_second;
    limit = by.label();
  }
};

// The number of copies of data of this size, to be used in rotation: one, or, where it is to come
// from DRAM, as many as are together as large as cold_wanted(). Where memory allows fewer,
// w->note says so, and w->skip where it allows none.
std::size_t Rotate(std::size_t bytes, bool cold, Workload* w);

// The target, the machine's limits, and the data of the last workload: the next one often wants the
// same. Only one set is alive at a time.
class Bench {
 public:
  Bench(const kernels::Kernels& target, double seconds)
      : kernels(target), limits(target, seconds / 4) {}

  const kernels::Kernels& kernels;
  Limits limits;

  template <class T>
  std::shared_ptr<T> Data(const std::string& key, const std::function<std::shared_ptr<T>()>& make) {
    if (key != key_) {
      data_.reset();
      data_ = make();
      key_ = key;
    }
    return std::static_pointer_cast<T>(data_);
  }

 private:
  std::string key_;
  std::shared_ptr<void> data_;
};

struct Case {
  std::string name;
  bool quick;  // --quick runs it
  std::function<Workload(Bench&)> prepare;
};

void AddAttendCases(const char* target, std::vector<Case>* cases);    // attend_cases.cc
void AddRowCases(const char* target, std::vector<Case>* cases);       // row_cases.cc: rows, append
void AddSequenceCases(const char* target, std::vector<Case>* cases);  // sequence_cases.cc

}  // namespace kvmix::bench

#endif  // KVMIX_BENCH_WORKLOAD_H_
