#include "lib/cache/newest.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <utility>

#include "lib/cache/cache_impl.h"
#include "lib/cache/own.h"
#include "lib/cache/round.h"
#include "lib/plan/plan.h"

namespace kvmix::internal {
namespace {

constexpr float kLargestHalf = 65504.0f;

// A row beyond f16's range: halves, and the power of two that they are multiplied with.
float KeepLarge(const float* row, std::size_t dim, Half* to) {
  float largest = 0.0f;
  for (std::size_t c = 0; c < dim; ++c) {
    if (std::isfinite(row[c])) largest = std::max(largest, std::fabs(row[c]));
  }
  const int exponent = std::max(0, std::ilogb(largest / kLargestHalf) + 1);
  for (std::size_t c = 0; c < dim; ++c) {
    float x = std::isnan(row[c]) ? 0.0f : row[c];
    if (std::isinf(x)) x = std::copysign(kLargestHalf, x);  // as all storages have it
    to[c] = FloatToHalf(std::ldexp(x, -exponent));
  }
  return std::ldexp(1.0f, exponent);
}

// The tokens of a run that lie in one stretch.
template <class F>
void ForStretches(std::size_t stretch, std::size_t first, std::size_t count, const F& f) {
  for (std::size_t cell = first, n; cell < first + count; cell += n) {
    n = std::min(first + count, (cell / stretch + 1) * stretch) - cell;
    f(cell / stretch, cell, n);
  }
}

// Gives back the pages of the stretches that `gone` names.
template <class F>
void Drop(CacheImpl& c, std::size_t layer, const F& gone) {
  std::erase_if(c.layers[layer].newest.stretches, [&](const Stretch& s) {
    if (!gone(s)) return false;
    c.pool->memory->Release(s.page);
    return true;
  });
}

struct Coded {
  std::vector<float> numbers, scales;
  std::vector<std::uint8_t> rows;
};

// Encodes one head's K or V of a stretch from its exact rows.
std::uint64_t Encode(CacheImpl& c, std::size_t layer, Tensor t, std::size_t head,
                     const Stretch& s) {
  const PoolLayer& shape = c.pool->layers[layer];
  const CompiledCodec& codec = shape.heads(t)[head];
  const std::size_t n = shape.stretch, dim = shape.shape.dim(t), cell = s.index * n;
  const Own<Coded> coded;
  coded->numbers.resize(n * dim);
  coded->scales.resize(n);
  coded->rows.resize(n * codec.row_bytes());
  RowsOf(shape, s, head).Get(shape.f16(t)[head], t, 0, n, coded->numbers.data());
  std::uint64_t clamped = 0;
  if (codec.own_centre()) {
    const std::size_t first = c.pool->plan.exact_first;
    clamped = codec.EncodeAround(coded->numbers.data(), n, first > cell ? first - cell : 0,
                                 CentreOf(c, layer, head, cell), coded->rows.data(),
                                 coded->scales.data());
  } else {
    const RowsView view = RowsView::F32(coded->numbers.data(), n, 1, dim);
    clamped = codec.Encode(TokenRows(view, 0, 0, n), coded->rows.data(), coded->scales.data());
  }
  StoreRows(c, layer, t, head, cell, n, coded->rows.data(), coded->scales.data());
  return clamped;
}

// The layer's encoded tokens of a stretch, into its exact rows.
void DecodeInto(const CacheImpl& c, std::size_t layer, const Stretch& s) {
  const PoolLayer& shape = c.pool->layers[layer];
  const CacheLayer& at = c.layers[layer];
  const std::size_t first = std::max(at.forgotten, s.index * shape.stretch),
                    last = std::min(at.tokens, (s.index + 1) * shape.stretch);
  if (first >= last) return;
  std::vector<float> rows((last - first) * std::max(shape.shape.k_dim, shape.shape.v_dim));
  for (std::size_t h = 0; h < shape.formats.size(); ++h) {
    for (const Tensor t : {KVMIX_K, KVMIX_V}) {
      DecodeCodes(c, layer, t, h, first, last - first, rows.data());
      const RowsView view = RowsView::F32(rows.data(), last - first, 1, shape.shape.dim(t));
      RowsOf(shape, s, h)
          .Keep(shape.f16(t)[h], t, first % shape.stretch, TokenRows(view, 0, 0, last - first));
    }
  }
}

}  // namespace

std::size_t ExactRows::HeadBytes(const LayerShape& shape, std::size_t tokens) {
  return RoundUp(tokens * (2 * sizeof(float) + (shape.k_dim + shape.v_dim) * sizeof(Half)), 64);
}

void ExactRows::Keep(const CompiledCodec& f16, Tensor t, std::size_t at,
                     const kernels::RowsIn& rows) const {
  Half* const to = this->rows(t) + at * rows.dim;
  std::fill_n(factors(t) + at, rows.count, 1.0f);
  if (f16.Encode(rows, reinterpret_cast<std::uint8_t*>(to), nullptr) == 0) return;
  float row[kMaxHeadDim];
  for (std::size_t r = 0; r < rows.count; ++r) {
    f16.ToFloat(rows.From(r, 1), row);
    factors(t)[at + r] = KeepLarge(row, rows.dim, to + r * rows.dim);
  }
}

void ExactRows::Clear() const { std::fill_n(factors(KVMIX_K), 2 * tokens_, 0.0f); }

void ExactRows::Get(const CompiledCodec& f16, Tensor t, std::size_t at, std::size_t count,
                    float* to) const {
  const std::size_t dim = f16.format().dim;
  f16.Decode(rows(t) + at * dim, nullptr, count, to, dim);
  for (std::size_t r = 0; r < count; ++r) {
    const float factor = factors(t)[at + r];
    if (factor == 1.0f) continue;
    for (std::size_t c = r * dim; c < (r + 1) * dim; ++c) to[c] *= factor;
  }
}

ExactRows RowsOf(const PoolLayer& layer, const Stretch& stretch, std::size_t head) {
  return {stretch.page->memory, layer.shape, layer.stretch, head};
}

const Stretch* Newest::Find(std::size_t index) const {
  const auto at = std::ranges::lower_bound(stretches, index, {}, &Stretch::index);
  return at != stretches.end() && at->index == index ? &*at : nullptr;
}

void ReleaseStretches(CacheImpl& c, std::size_t layer, std::size_t most) {
  const std::size_t tokens = c.pool->layers[layer].stretch;
  Newest& newest = c.layers[layer].newest;
  const bool attended = newest.attended.set.exchange(false, std::memory_order_relaxed);
  const std::size_t left = attended ? 1 : std::max<std::size_t>(1, most / tokens);
  const auto encoded = std::ranges::count_if(newest.stretches, &Stretch::whole);
  if (static_cast<std::size_t>(encoded) <= left) return;
  const auto age = [](const Stretch& s) { return std::pair(s.turn, s.index); };
  std::vector<std::pair<std::uint64_t, std::size_t>> ages;
  for (const Stretch& s : newest.stretches) {
    if (s.whole) ages.push_back(age(s));
  }
  const auto oldest_left = ages.begin() + static_cast<std::ptrdiff_t>(left - 1);
  std::ranges::nth_element(ages, oldest_left, std::greater<>());
  Drop(c, layer, [&](const Stretch& s) { return s.whole && age(s) < *oldest_left; });
}

Status OpenStretches(CacheImpl& c, std::size_t layer, std::size_t first, std::size_t count) {
  const PoolLayer& shape = c.pool->layers[layer];
  CacheLayer& at = c.layers[layer];
  std::vector<Stretch>& all = at.newest.stretches;
  PageList fresh{*c.pool->memory};
  std::size_t missing = 0;
  ForStretches(shape.stretch, first, count, [&](std::size_t index, std::size_t, std::size_t) {
    const Stretch* const s = at.newest.Find(index);
    missing += s == nullptr || !IsOwn(s->page);
  });
  all.reserve(all.size() + missing);
  for (; missing > 0; --missing) {
    Page* const page = c.pool->memory->Get(shape.exact_kind);
    if (page == nullptr) return NoPage(c, layer, first, count);
    page->next = std::exchange(fresh.first, page);
  }
  const auto take = [&] { return std::exchange(fresh.first, fresh.first->next); };
  const std::size_t bytes = shape.exact_bytes();
  ForStretches(shape.stretch, first, count, [&](std::size_t index, std::size_t cell, std::size_t) {
    Stretch* s = at.newest.Find(index);
    const bool reopens = s == nullptr ? index * shape.stretch < at.tokens : s->whole;
    if (s == nullptr) {
      const auto place = std::ranges::upper_bound(all, index, {}, &Stretch::index);
      s = &*all.insert(place, {.index = index, .page = take()});
      for (std::size_t h = 0; h < shape.formats.size(); ++h) RowsOf(shape, *s, h).Clear();
      if (reopens) DecodeInto(c, layer, *s);
    } else if (!IsOwn(s->page)) {
      Page* const own = take();
      std::memcpy(own->memory, s->page->memory, bytes);
      c.pool->memory->Release(std::exchange(s->page, own));
    }
    if (!reopens) return;
    s->written.reset();
    s->whole = false;
    for (std::size_t i = 0; i < cell % shape.stretch; ++i) s->written.set(i);
  });
  return {};
}

void MarkStretches(CacheImpl& c, std::size_t layer, std::size_t first, std::size_t count) {
  const std::size_t tokens = c.pool->layers[layer].stretch;
  Newest& newest = c.layers[layer].newest;
  ++newest.turn;
  ForStretches(tokens, first, count, [&](std::size_t index, std::size_t cell, std::size_t n) {
    Stretch& s = *newest.Find(index);
    s.turn = newest.turn;
    for (std::size_t i = 0; i < n; ++i) s.written.set(cell % tokens + i);
    s.whole = s.written.count() == tokens;
  });
}

std::uint64_t StoreExact(CacheImpl& c, std::size_t layer, Tensor t, std::size_t head,
                         const kvmix_rows& x, std::size_t first, std::size_t count,
                         std::size_t cell) {
  const PoolLayer& shape = c.pool->layers[layer];
  const Newest& newest = c.layers[layer].newest;
  std::uint64_t clamped = 0;
  ForStretches(shape.stretch, cell, count, [&](std::size_t index, std::size_t at, std::size_t n) {
    const Stretch& s = *newest.Find(index);
    RowsOf(shape, s, head)
        .Keep(shape.f16(t)[head], t, at % shape.stretch, TokenRows(x, head, first + at - cell, n));
    if (s.whole) clamped += Encode(c, layer, t, head, s);
  });
  return clamped;
}

void CutStretches(CacheImpl& c, std::size_t layer, std::size_t tokens) {
  const std::size_t n = c.pool->layers[layer].stretch;
  Drop(c, layer, [&](const Stretch& s) { return s.index * n >= tokens; });
  for (Stretch& s : c.layers[layer].newest.stretches) {
    for (std::size_t i = tokens - s.index * n; i < n; ++i) s.written.reset(i);
    s.whole = s.written.count() == n;
  }
}

void ForgetStretches(CacheImpl& c, std::size_t layer, std::size_t first) {
  const std::size_t n = c.pool->layers[layer].stretch;
  Drop(c, layer, [&](const Stretch& s) { return (s.index + 1) * n <= first; });
}

std::uint8_t* CentreOf(const CacheImpl& c, std::size_t layer, std::size_t head, std::size_t cell) {
  const kernels::BlockFormat& format = c.pool->layers[layer].formats[head];
  if (format.stretch == 0) return nullptr;
  return c.layers[layer].blocks_of(head)[cell / kernels::kBlockTokens] + format.centres_offset +
         cell % kernels::kBlockTokens / format.stretch * kernels::CentreBytes(format);
}

}  // namespace kvmix::internal
