// A KV cache stored as a plan says. Rows go in as f16, bf16 or f32; inside, every KV head is a
// sequence of blocks of 256 tokens in tiles made for this CPU (docs/formats.md). Attention
// (kvmix/attention.h) reads the tiles; rows can be exported and imported.
#ifndef KVMIX_CACHE_H_
#define KVMIX_CACHE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "kvmix/export.h"
#include "kvmix/plan.h"
#include "kvmix/rows.h"
#include "kvmix/status.h"

namespace kvmix {

class AppendJob;
class AttendJob;

namespace internal {
struct CacheImpl;
}

struct CacheOptions {
  std::string target;  // the instruction set, a name of Targets(); "": the best of this CPU
};

// Movable, owns its memory. Different layers may be appended to and attended over by different
// threads at a time. One layer may be read by many threads as long as none writes it.
class KVMIX_API Cache {
 public:
  // Room for `capacity` tokens in every layer of the model `geometry`. Errors: an invalid plan; a
  // plan of another geometry; an unknown target; more memory than this process may use.
  static Result<Cache> Create(const Geometry& geometry, const Plan& plan, std::size_t capacity,
                              const CacheOptions& options = {});
  Cache(Cache&&) noexcept;
  Cache& operator=(Cache&&) noexcept;
  ~Cache();

  // Appends k.tokens tokens to a layer. k, v: [tokens, kv_heads, head_dim]; what becomes of NaN,
  // infinities and huge values: kvmix/quantize.h. Past the capacity: kOutOfMemory, and nothing is
  // appended. num_threads: OpenMP threads, 0 for as many as this process may use; the bytes do not
  // depend on it. An engine with threads of its own takes an AppendJob.
  Status Append(std::size_t layer, const RowsView& k, const RowsView& v, int num_threads = 1);
  // Drops all but the first `tokens` tokens of every layer. More than a layer holds:
  // kInvalidArgument, and nothing is dropped.
  Status Truncate(std::size_t tokens);

  // The canonical rows of one KV head's K or V, tokens [first, first + count): codes
  // [count][RowBytes] and stored scales ([count] f32; not touched unless the codec stores a scale
  // per token). The same bytes on every CPU.
  Status ExportRows(std::size_t layer, std::size_t kv_head, Tensor tensor, std::size_t first,
                    std::size_t count, void* codes, float* scales) const;
  // The inverse: appends rows exported from a cache of the same plan to every KV head of a layer.
  // k_codes etc.: [kv_heads] pointers.
  Status ImportRows(std::size_t layer, std::size_t count, const void* const* k_codes,
                    const float* const* k_scales, const void* const* v_codes,
                    const float* const* v_scales);
  // Bytes of one canonical row, without its scale.
  std::size_t RowBytes(std::size_t layer, std::size_t kv_head, Tensor tensor) const;

  const Plan& plan() const;
  const Geometry& geometry() const { return plan().geometry; }
  std::size_t capacity() const;
  std::size_t tokens(std::size_t layer) const;  // 0 for a layer that is none
  // Memory that the tiles take when the cache is full: whole blocks of 256 tokens, padded rows. For
  // capacities of many blocks a little above capacity * BytesPerToken(plan).
  std::size_t bytes() const;
  // Values that were beyond what their format holds (a head's scale; f16's range) and were clamped,
  // since Create.
  std::uint64_t saturated() const;
  // The instruction set whose kernels and tiles this cache uses, "AVX2".
  const char* target() const;

 private:
  friend class AppendJob;
  friend class AttendJob;
  explicit Cache(std::unique_ptr<internal::CacheImpl> impl);
  std::unique_ptr<internal::CacheImpl> impl_;
};

// Append, part by part, for an engine with a thread pool of its own (no OpenMP inside):
//   AppendJob job;                                   // keep it: its memory is reused
//   job.Start(cache, layer, k, v);
//   for each p in [0, job.parts()): on any thread, in any order, each once: job.RunPart(p);
// The layer holds the new tokens when all calls have returned. Between Start and then nobody else
// may write or read the layer.
class KVMIX_API AppendJob {
 public:
  AppendJob();
  AppendJob(AppendJob&&) noexcept;
  AppendJob& operator=(AppendJob&&) noexcept;
  ~AppendJob();

  Status Start(Cache& cache, std::size_t layer, const RowsView& k, const RowsView& v);
  std::size_t parts() const;
  void RunPart(std::size_t part);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvmix

#endif  // KVMIX_CACHE_H_
