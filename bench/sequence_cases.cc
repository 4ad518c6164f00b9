// The calls of engines with many sequences: attend_batch, store, fork, shift.
//
// attend_batch: one decode step of a layer for all sequences in one call. 16x2k: 16 sequences of 2k
// tokens, held against 16 calls. 64x4k+64: 64 sequences that share 4k tokens and have 64 of their
// own, held against the same without sharing. store: a token into a cell anywhere, held against
// append. fork: a sequence of 4k tokens forked, and its first token appended (a page is copied),
// for one layer. shift: a layer of 4k tokens, of which 256 go.
#include <fmt/format.h>

#include <numeric>
#include <random>

#include "bench/workload.h"
#include "kvmix/attention.h"
#include "kvmix/cache.h"
#include "lib/tune/random_halves.h"
#include "tools/console.h"

namespace kvmix::bench {
namespace {

using tools::Require;
using tune::RandomHalves;

const HeadCodec kCodec{{KVMIX_STORAGE_I8, KVMIX_SCALE_TOKEN}};
constexpr const char* kCodecName = "k=i8-token,v=i8-token";
constexpr std::size_t kTokens = 4096, kChunk = 64;

struct Batch {
  std::size_t sequences, shared, own;
  const char* name;
};
constexpr Batch kBatches[] = {{16, 0, 2048, "16x2k"}, {64, 4096, 64, "64x4k+64"}};

Plan PlanOf(const Shape& shape) {
  const Geometry geometry{1, shape.kv_heads, shape.query_heads, shape.head_dim};
  return UniformPlan(geometry, kCodec, kCodec);
}

Pool MakePool(const Shape& shape, const char* target) {
  return Require(Pool::Create(PlanOf(shape), {.target = target}));
}

// Random rows, the same kChunk tokens over and over.
class Rows {
 public:
  explicit Rows(const Shape& shape)
      : shape_(shape), halves_(RandomHalves(2 * kChunk * shape.kv_heads * shape.head_dim)) {}
  RowsView k() const { return View(0); }
  RowsView v() const { return View(halves_.size() / 2); }
  void Fill(Cache& cache, std::size_t tokens) const {
    for (std::size_t t = 0; t < tokens; t += kChunk) Require(cache.Append(0, k(), v()));
  }

 private:
  RowsView View(std::size_t at) const {
    return RowsView::F16(halves_.data() + at, kChunk, shape_.kv_heads, shape_.head_dim);
  }
  Shape shape_;
  std::vector<Half> halves_;
};

struct Sequences {
  std::vector<Cache> caches;
  std::vector<AttendRequest> requests;
};

struct BatchData {
  Sequences batch, reference;  // the same tokens; the reference shares nothing
  std::vector<Half> q;
  std::vector<float> out;
};

Sequences MakeSequences(const Shape& shape, const Batch& b, bool share, const Pool& pool,
                        BatchData& data) {
  const Rows rows(shape);
  const std::size_t row = shape.query_heads * shape.head_dim;
  Sequences made;
  for (std::size_t i = 0; i < b.sequences; ++i) {
    if (i == 0 || !share || b.shared == 0) {
      made.caches.push_back(Require(Cache::Create(pool, b.shared + b.own)));
      rows.Fill(made.caches.back(), b.shared);
    } else {
      made.caches.push_back(Require(made.caches[0].Fork()));
    }
  }
  for (std::size_t i = 0; i < b.sequences; ++i) {
    rows.Fill(made.caches[i], b.own);
    made.requests.push_back(
        {&made.caches[i],
         RowsView::F16(data.q.data() + i * row, 1, shape.query_heads, shape.head_dim),
         data.out.data() + i * row});
  }
  return made;
}

Workload PrepareBatch(const Shape& shape, const Batch& b, int threads, Bench& bench) {
  Workload w;
  const std::size_t token = BytesPerToken(PlanOf(shape));
  const std::size_t tokens = b.sequences * (b.shared + b.own);
  Rotate((b.shared != 0 ? 2 : 1) * token * tokens, false, &w);
  if (threads > ThisMachine().cores) w.skip = "more threads than cores";
  if (!w.skip.empty()) return w;
  const std::string key = fmt::format("batch {} {}", shape.name(), b.name);
  const auto data = bench.Data<BatchData>(key, [&] {
    auto made = std::make_shared<BatchData>();
    const std::size_t q = b.sequences * shape.query_heads * shape.head_dim;
    made->q = RandomHalves(q);
    made->out.resize(q);
    const Pool pool = MakePool(shape, bench.kernels.target);
    made->batch = MakeSequences(shape, b, true, pool, *made);
    if (b.shared != 0) made->reference = MakeSequences(shape, b, false, pool, *made);
    return made;
  });
  w.bytes = static_cast<double>(token * (b.shared + b.sequences * b.own));
  w.macs = 2.0 * static_cast<double>(tokens * shape.query_heads * shape.head_dim);
  w.call = [data, threads] { Require(Attend(data->batch.requests, 0, threads)); };
  if (b.shared != 0) {
    w.limit = "unshared";
    w.reference = [data, threads] { Require(Attend(data->reference.requests, 0, threads)); };
  } else {
    w.limit = "one-by-one";
    w.reference = [data, threads] {
      for (const AttendRequest& r : data->batch.requests) {
        Require(Attend({&r, 1}, 0, threads));
      }
    };
  }
  return w;
}

struct CacheData {
  Cache cache, other;
  Rows rows;
  std::vector<std::int64_t> cells;  // all of them, in some order
  std::size_t next = 0;
};

std::shared_ptr<CacheData> FullCaches(const Shape& shape, const char* target) {
  const Pool pool = MakePool(shape, target);
  auto made = std::make_shared<CacheData>(CacheData{Require(Cache::Create(pool, kTokens + 1)),
                                                    Require(Cache::Create(pool, kTokens + 1)),
                                                    Rows(shape),
                                                    {}});
  made->rows.Fill(made->cache, kTokens);
  made->rows.Fill(made->other, kTokens);
  made->cells.resize(kTokens);
  std::iota(made->cells.begin(), made->cells.end(), 0);
  std::shuffle(made->cells.begin(), made->cells.end(), std::mt19937(1));
  return made;
}

// Tokens one by one into cells in any order, against as many at the end.
void Store(CacheData& d) {
  for (std::size_t i = 0; i < kChunk; ++i, ++d.next) {
    Require(d.cache.Store(0, {&d.cells[d.next % kTokens], 1}, d.rows.k().Tokens(i, 1),
                          d.rows.v().Tokens(i, 1)));
  }
}
void AppendInstead(CacheData& d) {
  Require(d.other.Truncate(d.other.tokens(0) >= kTokens ? kTokens / 2 : d.other.tokens(0)));
  for (std::size_t i = 0; i < kChunk; ++i) {
    Require(d.other.Append(0, d.rows.k().Tokens(i, 1), d.rows.v().Tokens(i, 1)));
  }
}
void Fork(CacheData& d) {
  Cache fork = Require(d.cache.Fork());
  Require(fork.Truncate(kTokens - kChunk));
  Require(fork.Append(0, d.rows.k().Tokens(0, 1), d.rows.v().Tokens(0, 1)));
}
void Shift(CacheData& d) {
  const Rope rope;
  Require(d.cache.Shift(0, kTokens / 16, {&rope, 1}));
  d.rows.Fill(d.cache, kTokens / 16);
}
void AppendAll(CacheData& d) {
  Require(d.other.Truncate(0));
  d.rows.Fill(d.other, kTokens);
}

struct Kind {
  const char* name;
  void (*call)(CacheData&);
  std::size_t calls;
  std::size_t tokens;  // of a call
  void (*reference)(CacheData&);
};
constexpr Kind kKinds[] = {{"store", Store, kChunk, 1, AppendInstead},
                           {"fork", Fork, 1, 512, nullptr},
                           {"shift", Shift, 1, kTokens, AppendAll}};

Workload PrepareKind(const Kind& kind, const Shape& shape, Bench& bench) {
  Workload w;
  w.calls = kind.calls;
  w.bytes = static_cast<double>(BytesPerToken(PlanOf(shape)) * kind.tokens);
  const auto data = bench.Data<CacheData>(fmt::format("full {}", shape.name()),
                                          [&] { return FullCaches(shape, bench.kernels.target); });
  w.call = [data, &kind] { kind.call(*data); };
  if (kind.reference != nullptr) {
    w.reference = [data, &kind] { kind.reference(*data); };
    w.limit = "append";
  } else {
    w.Bound(bench.limits.Memory(Access::kCopy, static_cast<std::size_t>(w.bytes), 1), w.bytes);
  }
  return w;
}

}  // namespace

void AddSequenceCases(const char* target, std::vector<Case>* cases) {
  for (const std::size_t s : {kSmallShape, kLargeShape, kMhaShape}) {
    const Shape& shape = kShapes[s];
    for (const Batch& batch : kBatches) {
      for (const int threads : {1, 2}) {
        cases->push_back({fmt::format("attend_batch/{}/{}/{}/{}/t{}", target, kCodecName,
                                      shape.name(), batch.name, threads),
                          s == kLargeShape && threads == 1, [&, threads](Bench& b) {
                            return PrepareBatch(shape, batch, threads, b);
                          }});
      }
    }
    for (const Kind& kind : kKinds) {
      cases->push_back({fmt::format("{}/{}/{}/{}/t1", kind.name, target, shape.name(),
                                    kind.calls == 1 ? "4k" : "1"),
                        s == kLargeShape, [&](Bench& b) { return PrepareKind(kind, shape, b); }});
    }
  }
}

}  // namespace kvmix::bench
