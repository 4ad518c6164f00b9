#include "engines/common/mirror.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <vector>

#include <fmt/format.h>

namespace kvmix::engine {
namespace {

// Cells whose rows every call compares with their hashes, in turn: a change of all rows (a context
// shift) is found at once, and then all rows are compared.
constexpr std::size_t kProbes = 4;
// Rows that are kept for the next call, where a write itself has not more; and rows that are read
// from the engine at a time.
constexpr std::size_t kMostPending = 4096;
constexpr std::size_t kReadRows = 256;
// Rows whose memory is kept for the next call.
constexpr std::size_t kKeptRows = 16;

std::uint64_t HashOf(const EngineRows& rows, std::size_t cell) {
  return XXH3_64bits(static_cast<const std::uint8_t*>(rows.data) + cell * rows.stride, rows.bytes);
}

// Rows that were told of and not yet encoded.
struct Pending {
  std::vector<std::int64_t> cells;
  std::vector<float> rows;  // [cells][heads][channels]
};

struct Stream {
  Cache cache;
  // Of the engine's rows of K and of V when they were encoded; `fresh` cells have none yet, for the
  // engine writes its rows only after the mirror has taken them.
  enum class State : std::uint8_t { kNever, kFresh, kHashed };
  std::vector<State> state;
  std::vector<std::size_t> fresh;  // cells that became so, some of them perhaps no longer
  std::vector<std::uint64_t> k_hash, v_hash;
  std::vector<std::uint8_t> seen;  // by the last call
  // Where the rows of the last write went, if they were told of together: the cells of the queries
  // that come with them.
  std::vector<std::int64_t> last;
  std::size_t probe = 0;
  bool unread = true;  // cells, perhaps, that only the engine has; of a mirror that is alone
};

}  // namespace

struct Mirror::Impl {
  explicit Impl(const Pool& of) : pool(of) {}

  Pool pool;
  LayerShape shape;
  std::size_t cells = 0;  // of a stream
  bool alone = false;
  Status lost;  // why rows are gone: of a mirror that is alone
  std::vector<Stream> streams;
  Pending pending[2];  // K, V
  MirrorCounts counts;
  std::vector<std::int64_t> changed;
  std::vector<float> k_rows, v_rows;
  std::vector<AttendRequest> requests;

  std::size_t Channels(Tensor t) const { return shape.kv_heads * shape.dim(t); }
  RowsView View(Tensor t, const float* rows, std::size_t tokens) const {
    return RowsView::F32(rows, tokens, shape.kv_heads, shape.dim(t));
  }
  void StorePending();
  Status Follow(const MirrorRequest& r);
  void FindUnread(const MirrorRequest& r, Stream& s);
  void FindChanged(const MirrorRequest& r, Stream& s);
  Status Read(const MirrorRequest& r, Stream& stream);
};

// K and V of the same cells go into the cache, stream by stream.
void Mirror::Impl::StorePending() {
  Pending &k = pending[0], &v = pending[1];
  const bool together = k.cells == v.cells;
  const std::size_t k_row = Channels(KVMIX_K), v_row = Channels(KVMIX_V);
  for (std::size_t i = 0, n; together && i < k.cells.size(); i += n) {
    const std::size_t stream = static_cast<std::size_t>(k.cells[i]) / cells;
    const std::int64_t first = static_cast<std::int64_t>(stream * cells);
    n = 0;
    while (i + n < k.cells.size() && static_cast<std::size_t>(k.cells[i + n]) / cells == stream) {
      k.cells[i + n] -= first;
      ++n;
    }
    Stream& to = streams[stream];
    const std::span<const std::int64_t> at(k.cells.data() + i, n);
    // A pool that is full: those who see the cells read them, and are told.
    const Status status = to.cache.Store(0, at, View(KVMIX_K, k.rows.data() + i * k_row, n),
                                         View(KVMIX_V, v.rows.data() + i * v_row, n));
    const bool stored = status.ok();
    to.last.assign(at.begin(), at.end());
    if (!stored && alone) lost = status;
    for (const std::int64_t cell : at) {
      const std::size_t c = static_cast<std::size_t>(cell);
      to.state[c] = stored ? Stream::State::kFresh : Stream::State::kNever;
      if (stored && !alone) to.fresh.push_back(c);
    }
    if (stored) counts.written += n;
  }
  // Of K or of V alone: what was there is no longer true, and is read from the engine.
  if (!together && alone) {
    lost = {ErrorCode::kMismatch, "a mirror's write: expected K and V of the same cells"};
  }
  for (Pending* p : {&k, &v}) {
    for (const std::int64_t cell : p->cells) {
      if (together) break;
      const std::size_t at = static_cast<std::size_t>(cell);
      streams[at / cells].state[at % cells] = Stream::State::kNever;
    }
    // A prompt's rows would stay as large as they are in every layer's mirror.
    if (p->cells.size() > kKeptRows) p->rows = std::vector<float>();
    p->cells.clear();
    p->rows.clear();
  }
}

// Makes the cells that a request sees what the engine's rows are.
Status Mirror::Impl::Follow(const MirrorRequest& r) {
  Stream& s = streams[r.stream];
  changed.clear();
  if (alone) {
    FindUnread(r, s);
  } else {
    FindChanged(r, s);
  }
  return changed.empty() ? Status() : Read(r, s);
}

// Cells that only the engine has: those with any bit set, and those that are seen.
void Mirror::Impl::FindUnread(const MirrorRequest& r, Stream& s) {
  const auto is_zero = [](const EngineRows& rows, std::size_t cell) {
    const std::uint8_t* const row =
        static_cast<const std::uint8_t*>(rows.data) + cell * rows.stride;
    return std::all_of(row, row + rows.bytes, [](std::uint8_t b) { return b == 0; });
  };
  const std::size_t all = s.unread ? cells : r.mask.cells;
  for (std::size_t c = 0; c < all; ++c) {
    if (s.state[c] != Stream::State::kNever) continue;
    const bool seen = c < r.mask.cells && r.seen[c] != 0;
    if (seen || (s.unread && !(is_zero(r.k, c) && is_zero(r.v, c)))) {
      changed.push_back(static_cast<std::int64_t>(c));
    }
  }
  s.unread = false;
}

void Mirror::Impl::FindChanged(const MirrorRequest& r, Stream& s) {
  const auto same = [&](std::size_t c) {
    return s.k_hash[c] == HashOf(r.k, c) && s.v_hash[c] == HashOf(r.v, c);
  };
  const auto check = [&](std::size_t c) {
    if (s.state[c] == Stream::State::kNever || !same(c)) {
      changed.push_back(static_cast<std::int64_t>(c));
    }
  };
  // What was just written is now in the engine's rows as well, whether a query sees it or not: a
  // later change is found by its hash. Rows past the mask may not be there to read.
  for (const std::size_t c : s.fresh) {
    if (s.state[c] != Stream::State::kFresh) continue;
    s.state[c] = Stream::State::kNever;
    if (c >= r.mask.cells) continue;
    s.k_hash[c] = HashOf(r.k, c);
    s.v_hash[c] = HashOf(r.v, c);
    s.state[c] = Stream::State::kHashed;
  }
  s.fresh.clear();
  // Cells that come into sight, or are not what the engine has.
  std::size_t seen = 0, left = 0;
  for (std::size_t c = 0; c < r.mask.cells; ++c) {
    left += s.seen[c] != 0 && r.seen[c] == 0;
    if (r.seen[c] == 0) continue;
    ++seen;
    if (s.seen[c] == 0 || s.state[c] != Stream::State::kHashed) check(c);
  }
  // And a few of those that were in sight before; all where more cells left sight than a window
  // leaves behind: a context shift drops the tokens before those that it moves.
  bool all = left > r.mask.queries;
  for (std::size_t i = 0, probes = 0; i < r.mask.cells && probes < kProbes && seen != 0; ++i) {
    s.probe = s.probe + 1 < r.mask.cells ? s.probe + 1 : 0;
    if (r.seen[s.probe] == 0 || s.state[s.probe] != Stream::State::kHashed) continue;
    ++probes;
    all |= !same(s.probe);
  }
  if (all) {
    changed.clear();
    for (std::size_t c = 0; c < r.mask.cells; ++c) {
      if (r.seen[c] != 0) check(c);
    }
  }
  std::copy(r.seen, r.seen + r.mask.cells, s.seen.begin());
  std::fill(s.seen.begin() + static_cast<std::ptrdiff_t>(r.mask.cells), s.seen.end(),
            std::uint8_t{0});
}

// The changed cells, from the engine's rows.
Status Mirror::Impl::Read(const MirrorRequest& r, Stream& s) {
  const std::size_t k_row = Channels(KVMIX_K), v_row = Channels(KVMIX_V);
  s.last.clear();  // the cells of the queries may be among those that the engine did not tell of
  for (const std::int64_t c : changed) {  // what is stored is not this, until it is
    s.state[static_cast<std::size_t>(c)] = Stream::State::kNever;
  }
  for (std::size_t first = 0, n; first < changed.size(); first += n) {
    n = std::min(changed.size() - first, kReadRows);
    const std::span<const std::int64_t> now(changed.data() + first, n);
    k_rows.resize(n * k_row);
    v_rows.resize(n * v_row);
    for (std::size_t i = 0; i < n; ++i) {
      const std::size_t c = static_cast<std::size_t>(now[i]);
      const auto row = [&](const EngineRows& rows) {
        return static_cast<const std::uint8_t*>(rows.data) + c * rows.stride;
      };
      r.k.to_float(row(r.k), k_rows.data() + i * k_row, static_cast<std::int64_t>(k_row));
      r.v.to_float(row(r.v), v_rows.data() + i * v_row, static_cast<std::int64_t>(v_row));
      if (alone) continue;
      s.k_hash[c] = HashOf(r.k, c);
      s.v_hash[c] = HashOf(r.v, c);
    }
    const Status status =
        s.cache.Store(0, now, View(KVMIX_K, k_rows.data(), n), View(KVMIX_V, v_rows.data(), n));
    if (!status.ok()) return status;
    for (const std::int64_t c : now) {
      s.state[static_cast<std::size_t>(c)] = Stream::State::kHashed;
    }
    counts.read += n;
  }
  if (changed.size() > kKeptRows) {
    k_rows = std::vector<float>();
    v_rows = std::vector<float>();
  }
  return {};
}

void SeenCells(const MaskView& mask, std::uint8_t* cells) {
  std::fill(cells, cells + mask.cells, std::uint8_t{0});
  const auto add = [&]<typename Bits>(const Bits* values, Bits hidden) {
    // The last query sees the most: few others are looked at.
    for (std::size_t begin = 0, n; begin < mask.cells; begin += n) {
      n = std::min<std::size_t>(mask.cells - begin, 256);
      std::uint8_t* const to = cells + begin;
      for (std::size_t q = mask.queries; q-- > 0;) {
        const Bits* const row = values + static_cast<std::ptrdiff_t>(q) * mask.stride + begin;
        std::uint8_t all = 1;
        for (std::size_t c = 0; c < n; ++c) {
          to[c] = static_cast<std::uint8_t>(to[c] | (row[c] != hidden));
          all &= to[c];
        }
        if (all != 0) break;
      }
    }
  };
  switch (mask.dtype) {  // -inf
    case KVMIX_F32:
      return add(static_cast<const std::uint32_t*>(mask.data), std::uint32_t{0xFF800000});
    case KVMIX_BF16:
      return add(static_cast<const std::uint16_t*>(mask.data), std::uint16_t{0xFF80});
    case KVMIX_F16:
      return add(static_cast<const std::uint16_t*>(mask.data), std::uint16_t{0xFC00});
  }
}

Mirror::Mirror(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Mirror::Mirror(Mirror&&) noexcept = default;
Mirror& Mirror::operator=(Mirror&&) noexcept = default;
Mirror::~Mirror() = default;

Result<Mirror> Mirror::Create(const Plan& plan, std::size_t streams, std::size_t cells,
                              const MirrorOptions& options) {
  const Result<Pool> pool = Pool::Create(plan, options.pool);
  if (!pool.ok()) return pool.status();
  auto impl = std::make_unique<Impl>(*pool);
  const std::size_t compared = options.alone ? 0 : cells;
  for (std::size_t i = 0; i < streams; ++i) {
    impl->streams.push_back({Cache::Create(*pool, cells).value(),
                             std::vector<Stream::State>(cells),
                             {},
                             std::vector<std::uint64_t>(compared),
                             std::vector<std::uint64_t>(compared),
                             std::vector<std::uint8_t>(compared),
                             {}});
  }
  if (streams == 0 || impl->streams[0].cache.model().layers.size() != 1) {
    return Status(ErrorCode::kInvalidArgument,
                  "a mirror: expected a plan of one layer, and one stream or more");
  }
  impl->shape = impl->streams[0].cache.model().layers[0];
  impl->cells = cells;
  impl->alone = options.alone;
  return Mirror(std::move(impl));
}

Status Mirror::Write(Tensor tensor, std::span<const std::int64_t> cells, const RowsView& rows) {
  const std::size_t all = impl_->cells * impl_->streams.size();
  const std::size_t dim = impl_->shape.dim(tensor);
  if (rows.heads != impl_->shape.kv_heads || rows.head_dim != dim || rows.tokens != cells.size()) {
    return {ErrorCode::kMismatch,
            fmt::format("a mirror's write: expected {} rows of {} heads x {}, found {} of {} x {}",
                        cells.size(), impl_->shape.kv_heads, dim, rows.tokens, rows.heads,
                        rows.head_dim)};
  }
  if (std::ranges::any_of(
          cells, [&](std::int64_t c) { return c < 0 || static_cast<std::size_t>(c) >= all; })) {
    return {ErrorCode::kInvalidArgument,
            fmt::format("a mirror's write: expected cells from 0 to below {}", all)};
  }
  Pending& p = impl_->pending[tensor == KVMIX_V];
  // Nobody attends: pairs are stored now, others are read when they are seen.
  if (!p.cells.empty() && p.cells.size() + cells.size() > kMostPending) impl_->StorePending();
  p.cells.insert(p.cells.end(), cells.begin(), cells.end());
  for (std::size_t t = 0; t < rows.tokens; ++t) {
    for (std::size_t h = 0; h < rows.heads; ++h) {
      if (rows.dtype == KVMIX_F32) {
        const float* const row = static_cast<const float*>(rows.row(t, h));
        p.rows.insert(p.rows.end(), row, row + dim);
      } else {
        for (std::size_t c = 0; c < dim; ++c) p.rows.push_back(rows.At(t, h, c));
      }
    }
  }
  return {};
}

Status Mirror::Attend(std::span<const MirrorRequest> requests, const Sight& sight,
                      const Runner& runner) {
  impl_->StorePending();
  if (!impl_->lost.ok()) return impl_->lost;
  impl_->requests.clear();
  for (const MirrorRequest& r : requests) {
    if (r.stream >= impl_->streams.size() || r.mask.cells > impl_->cells) {
      return {ErrorCode::kInvalidArgument,
              fmt::format("a mirror: stream {} with {} cells, of {} with {}", r.stream,
                          r.mask.cells, impl_->streams.size(), impl_->cells)};
    }
    if (r.mask.data == nullptr) {
      return {ErrorCode::kInvalidArgument,
              "a mirror: expected a mask, which says what is seen, found none"};
    }
    if (Status s = impl_->Follow(r); !s.ok()) return s;
    Stream& stream = impl_->streams[r.stream];
    if (stream.last.size() != r.q.tokens) stream.last.assign(r.q.tokens, -1);
    impl_->requests.push_back({&stream.cache, r.q, r.out, nullptr, r.mask, stream.last.data()});
  }
  Sight by_mask = sight;
  by_mask.causal = 0;
  return kvmix::Attend(impl_->requests, 0, by_mask, runner);
}

bool Mirror::Holds(std::size_t cell) {
  impl_->StorePending();
  return impl_->streams[cell / impl_->cells].state[cell % impl_->cells] != Stream::State::kNever;
}

void Mirror::Decode(Tensor tensor, std::size_t first, std::size_t count, float* rows) {
  impl_->StorePending();
  const Status s = impl_->streams[first / impl_->cells].cache.Decode(
      0, tensor, first % impl_->cells, count, rows);
  if (!s.ok()) internal::WrongResult(s);
}

void Mirror::Changed(std::size_t first, std::size_t count) {
  impl_->StorePending();
  const bool all = count == impl_->cells * impl_->streams.size();
  if (all) impl_->lost = {};
  for (std::size_t c = first; c < first + count; ++c) {
    Stream& s = impl_->streams[c / impl_->cells];
    s.state[c % impl_->cells] = Stream::State::kNever;
    s.unread = true;
  }
  for (Stream& s : impl_->streams) {
    if (all) static_cast<void>(s.cache.Truncate(0));  // as many as this can always be dropped
  }
}

const Pool& Mirror::pool() const { return impl_->pool; }
const LayerShape& Mirror::shape() const { return impl_->shape; }
Sight Mirror::sight() const { return impl_->streams[0].cache.sight(0); }
const MirrorCounts& Mirror::counts() const { return impl_->counts; }
std::size_t Mirror::bytes() const {
  std::size_t sum = 0;
  for (const Stream& s : impl_->streams) sum += s.cache.bytes();
  return sum;
}

}  // namespace kvmix::engine
