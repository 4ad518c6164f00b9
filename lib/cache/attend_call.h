// One call of attention: what it asks, and how it is cut. attend_call.cc checks and cuts it;
// attend_part.cc runs a part through the kernels, and merges the parts of a row.
#ifndef KVMIX_LIB_CACHE_ATTEND_CALL_H_
#define KVMIX_LIB_CACHE_ATTEND_CALL_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "lib/cache/cache_impl.h"
#include "lib/cache/schedule.h"
#include "lib/cache/views.h"

namespace kvmix::internal {

// Grows, never shrinks; contents are not kept.
class Scratch {
 public:
  std::uint8_t* Get(std::size_t bytes) {
    if (bytes + 64 > memory_.size()) memory_.resize(bytes + 64);
    return memory_.data() + (64 - reinterpret_cast<std::uintptr_t>(memory_.data()) % 64);
  }

 private:
  std::vector<std::uint8_t> memory_;
};

// The outputs of a part for its rows; see kernels::AttendTask.
struct Outputs {
  float* out;  // [rows, padded]
  float* max;
  float* sum;

  static std::size_t RowBytes(std::size_t padded) { return (padded + 2) * sizeof(float); }
  static Outputs At(std::uint8_t* memory, std::size_t rows, std::size_t padded) {
    float* const floats = reinterpret_cast<float*>(memory);
    return {floats, floats + rows * padded, floats + rows * (padded + 1)};
  }
  Outputs From(std::size_t row, std::size_t padded) const {
    return {out + row * padded, max + row, sum + row};
  }
};

// A layer's own sight.
kvmix_sight SightOf(const LayerShape& shape);

// Begin, Add every request, then Run.
struct AttendCall {
  // Caches of the first one's pool. asked: null for the layer's own sight.
  Status Begin(const CacheImpl& first, std::size_t at_layer, const kvmix_sight* asked);
  Status Add(const CacheImpl& cache, const kvmix_attend_request& asked);
  void Run(const Runner& runner);

  // A request, with its mask as the kernels want it.
  struct Request {
    const CacheLayer* held;
    RowsView q;
    OutRows out;
    float* log_sum_exp;
    kernels::Mask mask;
    bool masked;
    RowsView numbers;  // of the mask, [queries][1][cells]
  };

  const PoolImpl* pool = nullptr;
  const PoolLayer* layer = nullptr;   // whose K and V are read
  const LayerShape* shape = nullptr;  // of the layer that was asked for
  std::size_t at_layer = 0;
  kvmix_sight sight;
  std::vector<Request> requests;
  std::vector<Sequence> sequences;
  std::vector<kernels::MaskRange> ranges;  // of all masks
  std::vector<std::size_t> order;          // of requests, for Share
  Schedule schedule;
  std::size_t exact = 0;     // the plan's exact_first
  std::size_t padded = 0;    // floats of an output row
  bool from_memory = false;  // rather than from L2
  Scratch outputs_memory;
  std::uint8_t* outputs = nullptr;
  std::vector<std::atomic<std::uint32_t>> done;  // parts done, [units]

  // In attend_call.cc.
  Status Scan(const kvmix_mask& mask, const CacheImpl& cache);
  void Cut();
  void Share();
  bool IsFromMemory() const;
  // In attend_part.cc.
  void RunPart(std::size_t part);
  const std::uint8_t* BlockAfter(std::size_t part) const;
  void GatherQueries(const Unit& unit, float* rows) const;
  kernels::AttendTask TaskOf(const Part& part, std::span<const std::uint32_t> units,
                             kernels::Mask& mask) const;
  Outputs AttendExact(const Unit& unit, const float* bias) const;
  void AddToScores(const Unit& unit, const float* bias, std::size_t first, std::size_t last,
                   float* added) const;
  static float MaskNumber(const Request& request, std::size_t query, std::size_t token,
                          std::size_t query_head);
  void Merge(const Unit& unit, const float* bias, const Outputs* own) const;
  void MergeRow(const Unit& unit, std::size_t r, float bias, const Outputs* own,
                const Outputs* exact_first, float* to) const;
};

// kvmix_merge_outputs.
void MergeOutputs(float* out, float* log_sum_exp, const float* other_out,
                  const float* other_log_sum_exp, std::size_t rows, std::size_t dim);

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_CACHE_ATTEND_CALL_H_
