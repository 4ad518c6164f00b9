// The newest tokens of a layer, exact: f16 rows beside the tiles, stretch by stretch (kvmix/plan.h,
// exact_newest). A stretch is open while tokens of it are to come; its rows are then the only ones.
// When the last token has come it is encoded, around its own centre where K's codec wants that, and
// its rows stay a while for queries that stand in it.
//
// A token that is written into an encoded stretch opens it again, from that token on: the tokens
// before it, and those after it until they are written, are decoded.
#ifndef KVMIX_LIB_CACHE_NEWEST_H_
#define KVMIX_LIB_CACHE_NEWEST_H_

#include <atomic>
#include <bitset>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/formats.h"
#include "kvmix/half.h"
#include "kvmix/model.h"
#include "kvmix/status.h"
#include "lib/cache/head.h"
#include "lib/cache/pages.h"

namespace kvmix::internal {

struct CacheImpl;
struct PoolImpl;
struct PoolLayer;

// One KV head's exact rows of `tokens` tokens: f16, and for rows beyond its range a factor, a power
// of two. Memory: K's factors | V's factors | K's rows | V's rows, in whole lines.
class ExactRows {
 public:
  ExactRows(std::uint8_t* memory, const LayerShape& shape, std::size_t tokens, std::size_t head)
      : memory_(memory + head * HeadBytes(shape, tokens)), tokens_(tokens), k_dim_(shape.k_dim) {}
  static std::size_t HeadBytes(const LayerShape& shape, std::size_t tokens);

  float* factors(Tensor t) const {
    return reinterpret_cast<float*>(memory_) + (t == KVMIX_K ? 0 : tokens_);
  }
  Half* rows(Tensor t) const {
    return reinterpret_cast<Half*>(memory_ + 2 * tokens_ * sizeof(float)) +
           (t == KVMIX_K ? 0 : tokens_ * k_dim_);
  }
  // Rows become rows [at, at + rows.count). f16: the codec of that name.
  void Keep(const CompiledCodec& f16, Tensor t, std::size_t at, const kernels::RowsIn& rows) const;
  // All rows become zeros: whatever the halves are that the memory's last user left, they are
  // finite.
  void Clear() const;
  // Rows [at, at + count), back to f32.
  void Get(const CompiledCodec& f16, Tensor t, std::size_t at, std::size_t count, float* to) const;

 private:
  std::uint8_t* memory_;
  std::size_t tokens_, k_dim_;
};

// Tokens [index * n, (index + 1) * n) of a layer, n of a stretch.
struct Stretch {
  std::size_t index = 0;
  Page* page = nullptr;  // ExactRows of every head
  std::bitset<KVMIX_LONGEST_STRETCH> written = {};
  bool whole = false;      // all tokens are written: it is encoded; else it is open
  std::uint64_t turn = 0;  // of the write that it was touched by last
};

// The stretches of a layer whose exact rows are there.
struct Newest {
  std::vector<Stretch> stretches;  // by index
  std::uint64_t turn = 0;          // of writes
  // Set by attention, which many threads may do at a time.
  struct Flag {
    mutable std::atomic<bool> set{false};
    Flag() = default;
    Flag(const Flag& other) : set(other.set.load(std::memory_order_relaxed)) {}
    Flag& operator=(const Flag& other) {
      set.store(other.set.load(std::memory_order_relaxed), std::memory_order_relaxed);
      return *this;
    }
  } attended;

  const Stretch* Find(std::size_t index) const;
  Stretch* Find(std::size_t index) {
    return const_cast<Stretch*>(static_cast<const Newest*>(this)->Find(index));
  }
};

// Of encoded stretches gives back the rows that no query needs: all but those of the newest, if
// the layer was attended over since it was written; else all beyond `most` tokens.
void ReleaseStretches(CacheImpl& cache, std::size_t layer, std::size_t most);
// Rows of cells [first, first + count) can be written then: there are their stretches' pages, and
// no other cache shares them. kPoolFull, and nothing has changed, if there is no page.
Status OpenStretches(CacheImpl& cache, std::size_t layer, std::size_t first, std::size_t count);
// The cells are about to be written, by StoreExact of every head's K and V, which encodes stretches
// that are whole now.
void MarkStretches(CacheImpl& cache, std::size_t layer, std::size_t first, std::size_t count);
// Tokens [first, first + count) of x into cells from `cell` on. Returns the clamped values.
std::uint64_t StoreExact(CacheImpl& cache, std::size_t layer, Tensor tensor, std::size_t head,
                         const kvmix_rows& x, std::size_t first, std::size_t count,
                         std::size_t cell);
// A layer is about to be cut to `tokens` tokens, or to lose those before `first`: drops stretches.
// Cut: the stretch that is cut must be open (OpenStretches).
void CutStretches(CacheImpl& cache, std::size_t layer, std::size_t tokens);
void ForgetStretches(CacheImpl& cache, std::size_t layer, std::size_t first);

// One head's exact rows of a stretch.
ExactRows RowsOf(const PoolLayer& layer, const Stretch& stretch, std::size_t head);
// The place of an own centre in its block.
std::uint8_t* CentreOf(const CacheImpl& cache, std::size_t layer, std::size_t head,
                       std::size_t cell);

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_CACHE_NEWEST_H_
