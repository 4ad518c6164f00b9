// What the benchmark must know of the machine: cache sizes decide what is "hot" and "cold", memory
// how much it may take.
#ifndef KVMIX_BENCH_MACHINE_H_
#define KVMIX_BENCH_MACHINE_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

namespace kvmix::bench {

inline constexpr const char* kProgram = "kvmix-bench";

struct Machine {
  std::string cpu;
  int cores = 1;               // that this process may use at a time
  std::size_t l1 = 0, l2 = 0;  // bytes, of one core
  std::size_t last_cache = 0;  // bytes, shared
  std::size_t memory = 0;      // bytes that this process may have

  std::size_t most_memory() const { return memory / 4; }
  // Data that is to come from DRAM rotates through this much: twice the last cache, or what memory
  // allows.
  std::size_t cold_wanted() const { return 2 * last_cache; }
  std::size_t cold_bytes() const { return std::min(cold_wanted(), most_memory()); }
};

const Machine& ThisMachine();

// "2 MiB", "1.4 GiB"
std::string SizeText(std::size_t bytes);

// What a label says where memory allows less than cold_wanted().
std::string ColdSetNote(std::size_t bytes);

// Ends the benchmark with one line that says why.
[[noreturn]] void Die(const std::string& message);

// Zeroed memory, 64-byte aligned, in huge pages where the system gives them (a cache's memory is
// the same).
class Buffer {
 public:
  explicit Buffer(std::size_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  std::uint8_t* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  std::uint8_t* data_;
  std::size_t size_;
};

}  // namespace kvmix::bench

#endif  // KVMIX_BENCH_MACHINE_H_
