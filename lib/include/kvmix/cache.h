// A KV cache stored as a plan says. Rows go in as f16, bf16 or f32; inside, every KV head is a list
// of blocks of 256 tokens in tiles made for this CPU (docs/formats.md). Attention
// (kvmix/attention.h) reads the tiles; rows can be decoded, exported and imported.
//
// A Cache is one sequence. Many sequences share the memory of a Pool, and pages of it after a Fork.
#ifndef KVMIX_CACHE_H_
#define KVMIX_CACHE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kvmix/kvmix.h"
#include "kvmix/model.h"
#include "kvmix/plan.h"
#include "kvmix/rope.h"
#include "kvmix/rows.h"
#include "kvmix/runner.h"
#include "kvmix/status.h"

namespace kvmix {

using Sight = kvmix_sight;

class Pool;

struct PoolOptions {
  std::size_t bytes = 0;    // of pages in use, at most; 0: as much memory as this process may have
  std::string target = {};  // the instruction set, a name of Targets(); "": the best of this CPU
  // Tokens beyond its window that a layer keeps, so that Truncate can take back as many that were
  // appended one by one. (The tokens of the last call can always be taken back.)
  std::size_t rollback = 0;
  // Another pool, for instance of another model, whose memory this one takes, and whose bound on
  // bytes: both count what is in use together.
  const Pool* beside = nullptr;
};

// Memory for caches of one model and plan: pages of 256 tokens of a layer, or of a few times as
// many further back. A cache takes a page when it writes there first, and gives it back when it has
// no token left on it. A handle: copies name the same pool, which lives as long as its caches.
// Thread-safe.
class Pool {
 public:
  // Errors: an invalid plan, an unknown target.
  static Result<Pool> Create(const Plan& plan, const PoolOptions& options = {}) {
    const Result<internal::PlanHandle> handle = internal::HandleOf(plan);
    if (!handle.ok()) return handle.status();
    const kvmix_pool_options view = View(options);
    kvmix_pool* made = nullptr;
    internal::CallError error;
    const Status s = error.Of(kvmix_pool_create(handle->get(), &view, &made, error));
    if (!s.ok()) return s;
    return Pool(made, plan);
  }

  const Plan& plan() const { return *plan_; }
  // The instruction set whose kernels and tiles its caches use, "AVX2".
  const char* target() const { return kvmix_pool_target(get()); }
  // Pages in use, shared ones counted once, and those of pools beside.
  std::size_t bytes() const { return kvmix_pool_bytes(get()); }
  std::size_t most_bytes() const { return kvmix_pool_max_bytes(get()); }

  const kvmix_pool* get() const { return handle_.get(); }

 private:
  friend class Cache;
  Pool(kvmix_pool* handle, const Plan& plan)
      : handle_(handle, kvmix_pool_destroy), plan_(std::make_shared<const Plan>(plan)) {}
  static kvmix_pool_options View(const PoolOptions& o) {
    return {sizeof(kvmix_pool_options), o.bytes, o.rollback, o.target.c_str(),
            o.beside != nullptr ? o.beside->get() : nullptr};
  }

  std::shared_ptr<const kvmix_pool> handle_;
  std::shared_ptr<const Plan> plan_;
};

// Movable; a cache that was moved from refuses every call. Different caches, also of one pool, and
// different layers may be written and attended over by different threads at a time. One layer may
// be read by many threads as long as none writes it.
class Cache {
 public:
  // Room for `capacity` tokens in every layer, in a pool of its own. Memory is taken as tokens
  // come. Errors: an invalid plan; an unknown target; more memory than this process may use.
  static Result<Cache> Create(const Plan& plan, std::size_t capacity,
                              const PoolOptions& options = {}) {
    const Result<internal::PlanHandle> handle = internal::HandleOf(plan);
    if (!handle.ok()) return handle.status();
    const kvmix_pool_options view = Pool::View(options);
    return Make(std::make_shared<const Plan>(plan), [&](kvmix_cache** out, kvmix_error* error) {
      return kvmix_cache_create_alone(handle->get(), capacity, &view, out, error);
    });
  }
  // The same in a pool, for as many caches as there is room for.
  static Result<Cache> Create(const Pool& pool, std::size_t capacity) {
    return Make(pool.plan_, [&](kvmix_cache** out, kvmix_error* error) {
      return kvmix_cache_create(pool.get(), capacity, out, error);
    });
  }

  // Another sequence that begins with the same tokens. Pages are shared until one of the two writes
  // them; so a fork costs no memory, and the bits are the same.
  Result<Cache> Fork() const {
    return Make(plan_, [&](kvmix_cache** out, kvmix_error* error) {
      return kvmix_cache_fork(get(), out, error);
    });
  }

  // Appends k.tokens tokens to a layer. k: [tokens, kv_heads, k_dim], v: [tokens, kv_heads, v_dim];
  // kvmix/quantize.h says what becomes of NaN, infinities and huge values. kPastCapacity,
  // kPoolFull: nothing is appended. runner: a number of OpenMP's threads, or any other
  // (kvmix/runner.h); the bytes do not depend on it. A layer with a window forgets what no query
  // of these tokens sees: attend over them before the next Append.
  Status Append(std::size_t layer, const RowsView& k, const RowsView& v,
                const Runner& runner = Runner::Here()) {
    if (runner.refused()) return runner.Check();
    internal::CallError error;
    return error.Of(kvmix_cache_append(get(), layer, &k, &v, runner.get(), error));
  }
  // Writes rows into cells, token t of k and v into cells[t], below the capacity: for engines that
  // place tokens themselves and say with a mask (kvmix/attention.h) who sees what. Cells may be
  // written again; what a never written cell holds is finite and means nothing. tokens() becomes
  // the cell after the last one ever written. With Plan::exact_newest a stretch stays in f16 until
  // all of its cells have been written; a cell that is written again opens its stretch, until the
  // cells after it have been written as well. A cell past the capacity: kInvalidArgument; a full
  // pool: kPoolFull; nothing is written then.
  Status Store(std::size_t layer, std::span<const std::int64_t> cells, const RowsView& k,
               const RowsView& v) {
    internal::CallError error;
    return error.Of(kvmix_cache_store(get(), layer, cells.data(), cells.size(), &k, &v, error));
  }
  // Drops all but the first `tokens` tokens of every layer, and gives back pages that hold nothing
  // else. More than a layer holds, or so few that the next query would see tokens that left with
  // the window: kInvalidArgument, and nothing is dropped. (The next token that is appended has its
  // whole window; attention of the last token that is left may be refused, because its window
  // begins one token earlier.) With Plan::exact_newest a stretch that is cut is exact again: as it
  // was, if its rows are still kept, as those of the last two stretches are; else as it is decoded.
  // That takes a page; kPoolFull, and nothing is dropped, if there is none.
  Status Truncate(std::size_t tokens) {
    internal::CallError error;
    return error.Of(kvmix_cache_truncate(get(), tokens, error));
  }
  // No query sees a layer's tokens before `first` again, which is no error. Pages that hold no
  // other tokens go back.
  Status Forget(std::size_t layer, std::size_t first) {
    internal::CallError error;
    return error.Of(kvmix_cache_forget(get(), layer, first, error));
  }
  // Forgets tokens [keep, keep + drop) of every layer, and moves those after them `drop` positions
  // back: V's rows as they are, K's decoded, turned and encoded again. ropes: one for all layers,
  // or one for each of the model. The error of K becomes about that of two encodings
  // (docs/numerics.md has it measured); a codec's mean does not turn, so a centred head loses more,
  // the further its tokens move. Kept tokens that a layer's window had let go stay unseen, as
  // dropped ones do. Fewer tokens in a layer than keep + drop: kInvalidArgument, and nothing moves.
  // With Plan::exact_newest the tokens come into other stretches: all that move are decoded and
  // appended to a fork, which takes memory for them until it takes their place (kPoolFull).
  Status Shift(std::size_t keep, std::size_t drop, std::span<const Rope> ropes) {
    std::vector<kvmix_rope> views;
    for (const Rope& rope : ropes) views.push_back(internal::ViewOf(rope));
    internal::CallError error;
    return error.Of(kvmix_cache_shift(get(), keep, drop, views.data(), views.size(), error));
  }

  // The numbers that a layer's rows stand for, as attention sees them: tokens [first, first +
  // count) of K or V, to out [count, kv_heads, channels]. Errors: a layer without K and V of its
  // own; tokens that the layer does not hold. Nothing is written then.
  Status Decode(std::size_t layer, Tensor tensor, std::size_t first, std::size_t count,
                const OutView& out) const {
    internal::CallError error;
    return error.Of(kvmix_cache_decode(get(), layer, tensor, first, count, &out, error));
  }

  // The canonical rows of one KV head's K or V, tokens [first, first + count): codes
  // [count][RowBytes] and stored scales ([count] f32; not touched unless the codec stores a scale
  // per token). The same bytes on every CPU. With Plan::exact_newest refused, as ImportRows: rows
  // have no meaning there without their stretch. Sessions take all of it.
  Status ExportRows(std::size_t layer, std::size_t kv_head, Tensor tensor, std::size_t first,
                    std::size_t count, void* codes, float* scales) const {
    internal::CallError error;
    return error.Of(
        kvmix_cache_export(get(), layer, kv_head, tensor, first, count, codes, scales, error));
  }
  // The inverse: appends rows exported from a cache of the same plan to every KV head of a layer.
  // k_codes etc.: [kv_heads] pointers. Rows that no encoder makes (a code of -128, a scale or a
  // half that is not finite) are refused, and nothing is appended.
  Status ImportRows(std::size_t layer, std::size_t count, const void* const* k_codes,
                    const float* const* k_scales, const void* const* v_codes,
                    const float* const* v_scales) {
    internal::CallError error;
    return error.Of(
        kvmix_cache_import(get(), layer, count, k_codes, k_scales, v_codes, v_scales, error));
  }
  // Bytes of one canonical row, without its scale.
  std::size_t RowBytes(std::size_t layer, std::size_t kv_head, Tensor tensor) const {
    return kvmix_cache_row_bytes(get(), layer, kv_head, tensor);
  }

  const Plan& plan() const { return *plan_; }
  const Model& model() const { return plan_->model; }
  // The layer's own, for attention (kvmix/attention.h).
  Sight sight(std::size_t layer) const {
    Sight sight = KVMIX_INIT(kvmix_sight);
    (void)kvmix_cache_sight(get(), layer, &sight, nullptr);
    return sight;
  }
  std::size_t capacity() const { return kvmix_cache_capacity(get()); }
  // 0 for a layer that does not exist.
  std::size_t tokens(std::size_t layer) const { return kvmix_cache_tokens(get(), layer); }
  // Tokens before this one are gone.
  std::size_t forgotten(std::size_t layer) const { return kvmix_cache_forgotten(get(), layer); }
  // Memory of the pages that hold this cache's tokens, those shared with others included: whole
  // blocks of 256 tokens, padded rows.
  std::size_t bytes() const { return kvmix_cache_bytes(get()); }
  // Values that were beyond what their format holds (a head's scale; f16's range) and were clamped,
  // since Create.
  std::uint64_t saturated() const { return kvmix_cache_saturated(get()); }
  // The instruction set whose kernels and tiles this cache uses, "AVX2".
  const char* target() const { return kvmix_cache_target(get()); }

  kvmix_cache* get() const { return handle_.get(); }

 private:
  struct Destroy {
    void operator()(kvmix_cache* cache) const { kvmix_cache_destroy(cache); }
  };
  template <class F>
  static Result<Cache> Make(std::shared_ptr<const Plan> plan, const F& make) {
    kvmix_cache* made = nullptr;
    internal::CallError error;
    const Status s = error.Of(make(&made, error));
    if (!s.ok()) return s;
    Cache cache;
    cache.handle_.reset(made);
    cache.plan_ = std::move(plan);
    return cache;
  }
  Cache() = default;

  std::unique_ptr<kvmix_cache, Destroy> handle_;
  std::shared_ptr<const Plan> plan_;
};

// One sequence's part in a batch.
struct AppendRequest : kvmix_append_request {
  AppendRequest(Cache* to, const RowsView& k_rows, const RowsView& v_rows)
      : kvmix_append_request{sizeof(AppendRequest), to != nullptr ? to->get() : nullptr, k_rows,
                             v_rows} {}
};

// Appends to one layer of many caches, each named once; an error names the request, and nothing is
// appended then.
inline Status Append(std::span<const AppendRequest> requests, std::size_t layer,
                     const Runner& runner = Runner::Here()) {
  if (Status s = runner.Check(); !s.ok()) return s;
  internal::CallError error;
  return error.Of(kvmix_append(requests.data(), requests.size(), layer, runner.get(), error));
}

}  // namespace kvmix

#endif  // KVMIX_CACHE_H_
