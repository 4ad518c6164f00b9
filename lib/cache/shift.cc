// Cache::Shift: tokens in the middle go, those after them move back, and so do their keys' angles.
#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "lib/cache/cache_impl.h"

namespace kvmix::internal {
namespace {

using kernels::kBlockTokens;

constexpr std::size_t kRowsAtATime = 16;

// A rotation back by some positions: cosine and sine of every pair.
class Turn {
 public:
  Turn(const Rope& rope, std::size_t dim, std::size_t positions)
      : dims_(rope.dims != 0 ? rope.dims : dim),
        neighbours_(rope.pairs == Rope::Pairs::kNeighbours) {
    for (std::size_t p = 0; p < dims_ / 2; ++p) {
      const double exponent = -2.0 * static_cast<double>(p) / static_cast<double>(dims_);
      const double frequency =
          rope.frequencies.empty() ? std::pow(rope.theta, exponent) : rope.frequencies[p];
      const double angle = static_cast<double>(positions) * frequency;
      cos_.push_back(static_cast<float>(std::cos(angle)));
      sin_.push_back(static_cast<float>(std::sin(angle)));
    }
  }
  void Apply(float* row) const {
    const std::size_t half = dims_ / 2;
    for (std::size_t p = 0; p < half; ++p) {
      float& a = row[neighbours_ ? 2 * p : p];
      float& b = row[neighbours_ ? 2 * p + 1 : p + half];
      const float x = a, y = b;
      a = x * cos_[p] + y * sin_[p];
      b = y * cos_[p] - x * sin_[p];
    }
  }

 private:
  std::size_t dims_;
  bool neighbours_;
  std::vector<float> cos_, sin_;
};

Status CheckRope(const Rope& rope, std::size_t layer, std::size_t dim) {
  const std::size_t dims = rope.dims != 0 ? rope.dims : dim;
  if (dims > dim || dims % 2 != 0) {
    return {ErrorCode::kInvalidArgument,
            fmt::format("rope of layer {}: expected an even number of dims up to {}, found {}",
                        layer, dim, dims)};
  }
  if (!rope.frequencies.empty() && rope.frequencies.size() != dims / 2) {
    return {ErrorCode::kInvalidArgument,
            fmt::format("rope of layer {}: expected {} frequencies, found {}", layer, dims / 2,
                        rope.frequencies.size())};
  }
  if (std::ranges::all_of(rope.frequencies, [](double f) { return std::isfinite(f); }) &&
      std::isfinite(rope.theta) && rope.theta > 0.0) {
    return {};
  }
  return {ErrorCode::kInvalidArgument,
          fmt::format("rope of layer {}: expected finite frequencies and a theta > 0", layer)};
}

// What a layer still has of the tokens that move.
std::size_t FirstMoved(const CacheLayer& layer, std::size_t keep, std::size_t drop) {
  return std::min(layer.tokens, std::max(layer.forgotten, keep + drop));
}

// Token `at`, which says where tokens are gone, after a shift.
std::size_t Moved(std::size_t at, std::size_t keep, std::size_t drop) {
  return at <= keep ? at : std::max(keep, at - std::min(at, drop));
}

// Where tokens of `from` are gone, `to` after a shift; they may be the same. Kept tokens that left
// with the window stay unseen, though queries come nearer to them.
void MoveGone(const CacheLayer& from, std::size_t keep, std::size_t drop, CacheLayer& to) {
  to.dropped = std::max(Moved(from.dropped, keep, drop), std::min(from.forgotten, keep));
  to.forgotten = Moved(from.forgotten, keep, drop);
}

// Tokens from `first` on, `drop` cells down. In ascending order, so that none is overwritten before
// it has moved. Returns the clamped values.
std::uint64_t MoveLayer(CacheImpl& c, std::size_t layer, std::size_t first, std::size_t drop,
                        const Turn& turn) {
  const PoolLayer& shape = c.pool->layers[layer];
  const std::size_t dim = shape.shape.k_dim;
  std::vector<std::uint8_t> rows(kRowsAtATime * kMaxHeadDim * sizeof(Half));
  std::vector<float> scales(kRowsAtATime), keys(kRowsAtATime * dim);
  std::uint64_t clamped = 0;
  for (std::size_t h = 0; h < shape.formats.size(); ++h) {
    for (std::size_t t = first; t < c.layers[layer].tokens; t += kRowsAtATime) {
      const std::size_t n = std::min(kRowsAtATime, c.layers[layer].tokens - t);
      const CompiledCodec& codec = shape.k[h];
      LoadRows(c, layer, KVMIX_K, h, t, n, rows.data(), scales.data());
      codec.Decode(rows.data(), scales.data(), n, keys.data(), dim);
      for (std::size_t r = 0; r < n; ++r) turn.Apply(keys.data() + r * dim);
      const RowsView view = RowsView::F32(keys.data(), n, 1, dim);
      KeepExact(c, layer, KVMIX_K, h, t - drop, TokenRows(view, 0, 0, n));
      clamped += codec.Encode(TokenRows(view, 0, 0, n), rows.data(), scales.data());
      StoreRows(c, layer, KVMIX_K, h, t - drop, n, rows.data(), scales.data());
      LoadRows(c, layer, KVMIX_V, h, t, n, rows.data(), scales.data());
      StoreRows(c, layer, KVMIX_V, h, t - drop, n, rows.data(), scales.data());
      KeepExactOf(c, layer, KVMIX_V, h, t - drop, n, rows.data(), scales.data());
    }
  }
  return clamped;
}

// Tokens from `first` on, read from `from` and appended to `to`, which ends where they shall be:
// they stand in other stretches there.
Status AppendMoved(const CacheImpl& from, std::size_t layer, std::size_t first, const Turn& turn,
                   CacheImpl& to) {
  const LayerShape& shape = from.pool->layers[layer].shape;
  const std::size_t tokens = from.layers[layer].tokens, heads = shape.kv_heads;
  std::vector<float> k(kBlockTokens * heads * shape.k_dim), v(kBlockTokens * heads * shape.v_dim);
  for (std::size_t t = first, n; t < tokens; t += n) {
    n = std::min(kBlockTokens, tokens - t);
    Status s = from.Decode(layer, KVMIX_K, t, n, {k.data(), KVMIX_F32, 0, 0});
    if (s.ok()) s = from.Decode(layer, KVMIX_V, t, n, {v.data(), KVMIX_F32, 0, 0});
    for (std::size_t r = 0; r < n * heads; ++r) turn.Apply(k.data() + r * shape.k_dim);
    if (s.ok()) {
      s = to.Append(layer, RowsView::F32(k.data(), n, heads, shape.k_dim),
                    RowsView::F32(v.data(), n, heads, shape.v_dim), Runner::Here());
    }
    if (!s.ok()) return s;
  }
  return {};
}

// The whole shift of a cache with stretches: a fork is cut and filled again, and takes its place.
template <class RopeOf>
Status ShiftStretches(CacheImpl& c, std::size_t keep, std::size_t drop, const RopeOf& rope_of) {
  const std::unique_ptr<CacheImpl> moved = c.Fork();
  for (std::size_t layer = 0; layer < c.layers.size(); ++layer) {
    const PoolLayer& shape = c.pool->layers[layer];
    if (!shape.shape.owns_kv()) continue;
    const CacheLayer& held = c.layers[layer];
    CacheLayer& to = moved->layers[layer];
    const std::size_t first = FirstMoved(held, keep, drop);
    if ((first - drop) % shape.stretch != 0 && first - drop > held.forgotten) {
      if (Status s = OpenStretches(*moved, layer, first - drop, 1); !s.ok()) return s;
    }
    to.tokens = first - drop;
    MoveGone(held, keep, drop, to);
    DropUnused(*moved, layer);
    const Turn turn(rope_of(layer), shape.shape.k_dim, drop);
    if (Status s = AppendMoved(c, layer, first, turn, *moved); !s.ok()) return s;
  }
  c.saturated += moved->saturated;
  std::swap(c.layers, moved->layers);
  return {};
}

}  // namespace

Status CacheImpl::Shift(std::size_t keep, std::size_t drop, std::span<const Rope> ropes) {
  CacheImpl& c = *this;
  const std::vector<PoolLayer>& shapes = c.pool->layers;
  if (ropes.size() != 1 && ropes.size() != shapes.size()) {
    return {ErrorCode::kInvalidArgument,
            fmt::format("ropes: expected one, or one for each of {} layers, found {}",
                        shapes.size(), ropes.size())};
  }
  const auto rope_of = [&](std::size_t layer) -> const Rope& {
    return ropes[ropes.size() == 1 ? 0 : layer];
  };
  for (std::size_t layer = 0; layer < shapes.size(); ++layer) {
    if (!shapes[layer].shape.owns_kv()) continue;
    const CacheLayer& held = c.layers[layer];
    if (keep > held.tokens || drop > held.tokens - keep) {
      return {ErrorCode::kInvalidArgument,
              fmt::format("shift: keep {} tokens and drop {}: layer {} holds {}", keep, drop, layer,
                          held.tokens)};
    }
    if (Status s = CheckRope(rope_of(layer), layer, shapes[layer].shape.k_dim); !s.ok()) return s;
  }
  if (drop == 0) return {};  // K is as it should be, and another encoding would only lose
  if (c.pool->plan.exact_newest != 0) return ShiftStretches(c, keep, drop, rope_of);
  for (std::size_t layer = 0; layer < shapes.size(); ++layer) {
    if (!shapes[layer].shape.owns_kv()) continue;
    const CacheLayer& held = c.layers[layer];
    const std::size_t first = FirstMoved(held, keep, drop);
    if (Status s = MakeWritable(c, layer, first - drop, held.tokens - first); !s.ok()) {
      for (std::size_t ready = 0; ready < layer; ++ready) DropUnused(c, ready);
      return s;
    }
  }
  for (std::size_t layer = 0; layer < shapes.size(); ++layer) {
    if (!shapes[layer].shape.owns_kv()) continue;
    CacheLayer& held = c.layers[layer];
    const std::size_t first = FirstMoved(held, keep, drop);
    const Turn turn(rope_of(layer), shapes[layer].shape.k_dim, drop);
    c.saturated += MoveLayer(c, layer, first, drop, turn);
    MoveGone(held, keep, drop, held);
    held.tokens -= drop;
    DropUnused(c, layer);
  }
  return {};
}

}  // namespace kvmix::internal
