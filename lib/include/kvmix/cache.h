// A KV cache stored as a plan says. Rows go in as f16, bf16 or f32; inside, every KV head is a list
// of blocks of 256 tokens in tiles made for this CPU (docs/formats.md). Attention
// (kvmix/attention.h) reads the tiles; rows can be exported and imported.
//
// A Cache is one sequence. Many sequences share the memory of a Pool, and pages of it after a Fork.
#ifndef KVMIX_CACHE_H_
#define KVMIX_CACHE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "kvmix/export.h"
#include "kvmix/model.h"
#include "kvmix/plan.h"
#include "kvmix/rope.h"
#include "kvmix/rows.h"
#include "kvmix/runner.h"
#include "kvmix/status.h"

namespace kvmix {

namespace internal {
struct CacheImpl;
struct PoolImpl;
struct Access;
}  // namespace internal

struct CacheOptions {
  std::string target = {};  // the instruction set, a name of Targets(); "": the best of this CPU
  // Tokens beyond its window that a layer keeps, so that Truncate can take back as many that were
  // appended one by one. (What one call appended can always be taken back.)
  std::size_t rollback = 0;
};

class Pool;

struct PoolOptions {
  std::size_t bytes = 0;  // of pages in use, at most; 0: as much memory as this process may have
  std::string target = {};
  std::size_t rollback = 0;
  // Another pool, for instance of another model, whose memory this one takes, and whose bound on
  // bytes: both count what is in use together.
  const Pool* beside = nullptr;
};

// Memory for caches of one model and plan: pages of 256 tokens of a layer, or of a few times as
// many further back. A cache takes a page when it writes there first, and gives it back when it has
// no token left on it. A handle: copies name the same pool, which lives as long as its caches.
// Thread-safe.
class KVMIX_API Pool {
 public:
  // Errors: an invalid plan, an unknown target.
  static Result<Pool> Create(const Plan& plan, const PoolOptions& options = {});

  const Plan& plan() const;
  const char* target() const;  // whose kernels and tiles its caches use, "AVX2"
  std::size_t bytes() const;   // of pages in use, shared ones counted once, and of pools beside
  std::size_t most_bytes() const;

 private:
  friend class Cache;
  friend struct internal::Access;
  explicit Pool(std::shared_ptr<internal::PoolImpl> impl) : impl_(std::move(impl)) {}
  std::shared_ptr<internal::PoolImpl> impl_;
};

// Movable. Different caches, also of one pool, and different layers may be written and attended
// over by different threads at a time. One layer may be read by many threads as long as none writes
// it.
class KVMIX_API Cache {
 public:
  // Room for `capacity` tokens in every layer, in a pool of its own. Memory is taken as tokens
  // come. Errors: an invalid plan; a plan of another model; an unknown target; more memory than
  // this process may use.
  static Result<Cache> Create(const Model& model, const Plan& plan, std::size_t capacity,
                              const CacheOptions& options = {});
  // The same in a pool, for as many caches as there is room for.
  static Cache Create(const Pool& pool, std::size_t capacity);
  Cache(Cache&&) noexcept;
  Cache& operator=(Cache&&) noexcept;
  ~Cache();

  // Another sequence that begins with the same tokens. Pages are shared until one of the two writes
  // them; so a fork costs no memory, and the bits are the same.
  Result<Cache> Fork() const;
  // Gives all memory back. Afterwards every call that returns a Status refuses.
  void Release();

  // Appends k.tokens tokens to a layer. k: [tokens, kv_heads, k_dim], v: [tokens, kv_heads, v_dim];
  // what becomes of NaN, infinities and huge values: kvmix/quantize.h. Past the capacity, or where
  // the pool is full: kOutOfMemory, and nothing is appended. runner: a number of OpenMP's threads,
  // or any other (kvmix/runner.h); the bytes do not depend on it. A layer with a window forgets
  // what no query of these tokens sees: attend over them before the next Append.
  Status Append(std::size_t layer, const RowsView& k, const RowsView& v,
                const Runner& runner = Runner::Here());
  // Writes rows into cells, token t of k and v into cells[t], below the capacity: for engines that
  // place tokens themselves and say with a mask (kvmix/attention.h) who sees what. Cells may be
  // written again; what a never written cell holds is finite and means nothing. tokens() becomes
  // the cell after the last one ever written. A cell past the capacity: kInvalidArgument; a pool
  // that is full: kOutOfMemory; nothing is written then.
  Status Store(std::size_t layer, std::span<const std::int64_t> cells, const RowsView& k,
               const RowsView& v);
  // Drops all but the first `tokens` tokens of every layer, and gives back pages that hold nothing
  // else. More than a layer holds, or so few that the next query would see tokens that left with
  // the window: kInvalidArgument, and nothing is dropped. (The next token that is appended has its
  // whole window; attention of the last token that is left may be refused, because its window
  // begins one token earlier.)
  Status Truncate(std::size_t tokens);
  // No query sees a layer's tokens before `first` again, which is no error. Pages that hold no
  // other tokens go back.
  Status Forget(std::size_t layer, std::size_t first);
  // Forgets tokens [keep, keep + drop) of every layer, and moves those after them `drop` positions
  // back: V's rows as they are, K's decoded, turned and encoded again. ropes: one for all layers,
  // or one for each of the model. The error of K becomes about that of two encodings
  // (docs/numerics.md has it measured); a codec's mean does not turn, so a centred head loses more,
  // the further its tokens move. Kept tokens that a layer's window had let go stay unseen, as
  // dropped ones do. Fewer tokens in a layer than keep + drop: kInvalidArgument, and nothing moves.
  Status Shift(std::size_t keep, std::size_t drop, std::span<const Rope> ropes);

  // The canonical rows of one KV head's K or V, tokens [first, first + count): codes
  // [count][RowBytes] and stored scales ([count] f32; not touched unless the codec stores a scale
  // per token). The same bytes on every CPU.
  Status ExportRows(std::size_t layer, std::size_t kv_head, Tensor tensor, std::size_t first,
                    std::size_t count, void* codes, float* scales) const;
  // The inverse: appends rows exported from a cache of the same plan to every KV head of a layer.
  // k_codes etc.: [kv_heads] pointers. Rows that no encoder makes (a code of -128, a scale or a
  // half that is not finite) are refused, and nothing is appended.
  Status ImportRows(std::size_t layer, std::size_t count, const void* const* k_codes,
                    const float* const* k_scales, const void* const* v_codes,
                    const float* const* v_scales);
  // Bytes of one canonical row, without its scale.
  std::size_t RowBytes(std::size_t layer, std::size_t kv_head, Tensor tensor) const;

  const Plan& plan() const;
  const Model& model() const;
  std::size_t capacity() const;
  std::size_t tokens(std::size_t layer) const;     // 0 for a layer that is none
  std::size_t forgotten(std::size_t layer) const;  // tokens before this one are gone
  // Memory of the pages that hold this cache's tokens, those shared with others included: whole
  // blocks of 256 tokens, padded rows.
  std::size_t bytes() const;
  // Values that were beyond what their format holds (a head's scale; f16's range) and were clamped,
  // since Create.
  std::uint64_t saturated() const;
  // The instruction set whose kernels and tiles this cache uses, "AVX2".
  const char* target() const;

 private:
  friend struct internal::Access;
  explicit Cache(std::unique_ptr<internal::CacheImpl> impl);
  std::unique_ptr<internal::CacheImpl> impl_;
};

// One sequence's part in a batch.
struct AppendRequest {
  Cache* cache = nullptr;
  RowsView k, v;
};

// Appends to one layer of many caches, each named once; an error names the request, and nothing is
// appended then.
KVMIX_API Status Append(std::span<const AppendRequest> requests, std::size_t layer,
                        const Runner& runner = Runner::Here());

}  // namespace kvmix

#endif  // KVMIX_CACHE_H_
