// A KV cache stored as a plan says. Rows go in as fp16; inside, every KV head is a stream of blocks
// of 256 tokens in tiles made for this CPU (kernels/tiles.h); attention (kvmix/attention.h) reads
// the tiles, and rows can be exported and imported.
#ifndef KVMIX_CACHE_H_
#define KVMIX_CACHE_H_

#include <cstddef>
#include <cstdint>
#include <memory>

#include "kvmix/export.h"
#include "kvmix/half.h"
#include "kvmix/plan.h"
#include "kvmix/status.h"

namespace kvmix {

namespace internal {
struct CacheImpl;
}

// Movable, owns its memory. Different layers may be appended to and attended over by different
// threads at a time; one layer may be read by many threads as long as none writes it.
class KVMIX_API Cache {
 public:
  // Room for `capacity` tokens in every layer of the model `geometry`. Errors: an invalid plan; a
  // plan of another geometry; more memory than this machine has.
  static Result<Cache> Create(const Geometry& geometry, const Plan& plan, std::size_t capacity);
  Cache(Cache&&) noexcept;
  Cache& operator=(Cache&&) noexcept;
  ~Cache();

  // Appends `tokens` rows to a layer. k, v: [tokens, kv_heads, head_dim], no alignment beyond their
  // type's. NaN is stored as 0 and infinities as
  // +-65504, whatever the codec. Past the capacity: kOutOfMemory, and nothing is appended.
  Status Append(std::size_t layer, const Half* k, const Half* v, std::size_t tokens);
  // Drops all but the first `tokens` tokens of every layer; more than a layer holds:
  // kInvalidArgument, and nothing is dropped.
  Status Truncate(std::size_t tokens);

  // The canonical rows of one KV head's K or V, tokens [first, first + count): codes ([count,
  // head_dim], i8 or the halves of f16 storage) and stored scales ([count] f32; untouched unless
  // the codec stores a scale per token). The same bytes on every CPU.
  Status ExportRows(std::size_t layer, std::size_t kv_head, Tensor tensor, std::size_t first,
                    std::size_t count, void* codes, float* scales) const;
  // The inverse: appends rows exported from a cache of the same plan to every KV head of a layer.
  // k_codes etc.: [kv_heads] pointers.
  Status ImportRows(std::size_t layer, std::size_t count, const void* const* k_codes,
                    const float* const* k_scales, const void* const* v_codes,
                    const float* const* v_scales);

  const Plan& plan() const;
  const Geometry& geometry() const { return plan().geometry; }
  std::size_t capacity() const;
  std::size_t tokens(std::size_t layer) const;
  // Memory that the tiles take when the cache is full: a little above capacity *
  // BytesPerToken(plan) (whole blocks, padded rows).
  std::size_t bytes() const;
  // Values that were beyond a fixed scale (ScaleKind::kHead) and were stored as +-127, since
  // Create.
  std::uint64_t saturated() const;
  // The instruction set whose kernels and tiles this cache uses, "AVX2".
  const char* target() const;

  const internal::CacheImpl& impl() const { return *impl_; }

 private:
  explicit Cache(std::unique_ptr<internal::CacheImpl> impl);
  std::unique_ptr<internal::CacheImpl> impl_;
};

}  // namespace kvmix

#endif  // KVMIX_CACHE_H_
