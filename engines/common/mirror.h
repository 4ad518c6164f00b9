// A mirror of one layer of an engine's own KV cache, for engines that kvmix is loaded into.
//
// The engine goes on writing K and V into cells of its own tensors. The mirror is told of every
// write that can be seen, and keeps the cells in codecs; attention reads these. What the engine
// changed behind the mirror's back (a context shift, a restored state) is found by hashes of the
// engine's rows, and read again.
//
// A mirror that is alone takes the place of these rows: the engine gives their memory back. What
// reads or writes them all the same goes through Holds, Decode and Changed.
#ifndef KVMIX_ENGINES_COMMON_MIRROR_H_
#define KVMIX_ENGINES_COMMON_MIRROR_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "kvmix/attention.h"
#include "kvmix/cache.h"
#include "kvmix/plan.h"
#include "kvmix/rows.h"
#include "kvmix/status.h"

namespace kvmix::engine {

// The engine's rows of K or V of one stream: cell c has its heads' channels side by side at
// data + c * stride.
struct EngineRows {
  const void* data = nullptr;
  std::size_t stride = 0;  // bytes
  std::size_t bytes = 0;   // of a cell
  // Of a cell's bytes to its numbers, as f32.
  void (*to_float)(const void* row, float* out, std::int64_t count) = nullptr;
};

// One stream's part of a call. A cell is seen by the mask alone. Queries stand in the cells that
// were written to last, if these are as many (Plan::exact_newest).
struct MirrorRequest {
  std::size_t stream = 0;
  RowsView q;
  float* out = nullptr;
  MaskView mask;
  // [mask.cells] not 0 where any query sees the cell: SeenCells(mask).
  const std::uint8_t* seen = nullptr;
  EngineRows k, v;  // as they are now
};

// What the mirror did, since it was made.
struct MirrorCounts {
  std::uint64_t written = 0;  // cells, told of by Write
  std::uint64_t read = 0;     // cells that were read from the engine's rows
};

struct MirrorOptions {
  PoolOptions pool = {};
  // The engine keeps no rows of its own. An Attend reads all cells of its streams that the engine
  // wrote without telling; after it nothing of these streams' rows is needed.
  bool alone = false;
};

// cells[c] <- whether any query sees it. [mask.cells]
void SeenCells(const MaskView& mask, std::uint8_t* cells);

// Movable. One thread at a time.
class Mirror {
 public:
  // plan: of a model of one layer. Every stream has `cells` cells.
  static Result<Mirror> Create(const Plan& plan, std::size_t streams, std::size_t cells,
                               const MirrorOptions& options = {});
  Mirror(Mirror&&) noexcept;
  Mirror& operator=(Mirror&&) noexcept;
  ~Mirror();

  // The engine writes rows of K or V: token t into cell cells[t], counted over all streams. The
  // numbers are kept until the next Attend, which takes those of K and of V together, or until they
  // are too many. The engine's own cells have them when their stream is attended to next. Errors:
  // rows of another shape, cells that are none; nothing is written then.
  Status Write(Tensor tensor, std::span<const std::int64_t> cells, const RowsView& rows);
  // Attention of all requests, after the cells that they see are as the engine has them. A mirror
  // that is alone reads rows of all of the streams' cells. kPoolFull: a pool that is full.
  Status Attend(std::span<const MirrorRequest> requests, const Sight& sight, const Runner& runner);

  // The engine's rows of these cells, counted over all streams, are now what the cells hold: for
  // writes that are told late, and without numbers. All cells: the codes' memory goes back.
  void Changed(std::size_t first, std::size_t count);
  // Of a mirror that is alone. Whether the cell's numbers are here; otherwise they are the
  // engine's.
  bool Holds(std::size_t cell);
  // Numbers of `count` cells that are here, all of one stream: [count][kv_heads][channels].
  void Decode(Tensor tensor, std::size_t first, std::size_t count, float* rows);

  const Pool& pool() const;  // for mirrors of other layers to be beside
  const LayerShape& shape() const;
  Sight sight() const;  // the layer's own
  const MirrorCounts& counts() const;
  std::size_t bytes() const;  // of the codes

 private:
  struct Impl;
  explicit Mirror(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvmix::engine

#endif  // KVMIX_ENGINES_COMMON_MIRROR_H_
