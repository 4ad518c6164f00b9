// attend_decode and attend_prefill: attention over a cache full of random rows.
//
// Hot: one layer, again and again. Cold: as many layers in rotation as are twice the last cache, so
// that each comes from DRAM. Bytes: K and V once (codes and scales), q, the output. Multiply-adds:
// QK and PV of the pairs that causality leaves.
#include <fmt/format.h>

#include "bench/workload.h"
#include "kvmix/attention.h"
#include "kvmix/cache.h"
#include "lib/tune/random_halves.h"
#include "tools/console.h"

namespace kvmix::bench {
namespace {

using tools::Require;
using tune::kHeadScale;
using tune::RandomHalves;

struct Context {
  std::size_t tokens;
  const char* name;
  bool cold;
};
constexpr std::size_t kMhaTokens = 8192;  // for kMhaShape only
constexpr Context kContexts[] = {{512, "512", false},
                                 {4096, "4k", false},
                                 {32768, "32k", true},
                                 {131072, "128k", true},
                                 {kMhaTokens, "8k", true}};

struct Codecs {
  const char *k, *v;
};
constexpr Codecs kCodecs[] = {
    {"f16", "f16"},
    {"i8-token", "i8-token"},
    {"i8-head", "i8-token"},
    {"f16", "i8-token"},
    {"i8-token", "f16"},
    {"i8-token+hadamard", "i8-token+hadamard"},
    {"i8-token-bf16", "i8-token-bf16"},
    {"i6-token-bf16", "i6-token-bf16"},
    {"i4-token-bf16", "i4-token-bf16"},
    {"i3-token-bf16", "i3-token-bf16"},
    {"i8x8-token", "i8x8-token"},
    // As DefaultPlan has them, with its exact tokens.
    {"i8-token-bf16+own-centre+hadamard", "i8-token-bf16+hadamard"},
    {"i4-token-bf16+own-centre+hadamard", "i4-token-bf16+hadamard"},
};

constexpr std::size_t kPrefillQueries = 512;

struct AttendCase {
  Shape shape;
  Context context;
  Codecs codecs;
  std::size_t queries;
  int threads;
};

struct CacheSet {
  Cache cache;  // its layers are what rotates
  std::vector<Half> q;
  std::vector<float> out;
  std::size_t next = 0;
};

HeadCodec CodecNamed(const char* name) {
  const CodecKind kind = Require(ParseCodecKind(name));
  return {kind, kind.scale == KVMIX_SCALE_HEAD ? kHeadScale : 0.0f, nullptr};
}

Plan PlanOf(const AttendCase& c, std::size_t layers) {
  const LayerShape layer{c.shape.kv_heads, c.shape.query_heads, c.shape.head_dim, c.shape.v_dim};
  const Model model(std::vector(layers, layer));
  const HeadCodec k = CodecNamed(c.codecs.k);
  return k.kind.own_centre ? DefaultPlan(model, k.kind.storage)
                           : UniformPlan(model, k, CodecNamed(c.codecs.v));
}

// Every layer gets the same 256 random tokens over and over: what rotates must be distinct memory,
// not distinct data.
std::shared_ptr<CacheSet> FilledCaches(const AttendCase& c, std::size_t layers,
                                       const char* target) {
  constexpr std::size_t kTokens = 256;
  const Plan plan = PlanOf(c, layers);
  Cache cache = Require(Cache::Create(plan, c.context.tokens, {.target = target}));
  const std::size_t row = c.shape.kv_heads * c.shape.head_dim;
  const std::vector<Half> rows = RandomHalves(2 * kTokens * row);
  const RowsView k = RowsView::F16(rows.data(), kTokens, c.shape.kv_heads, c.shape.head_dim);
  const RowsView v =
      RowsView::F16(rows.data() + kTokens * row, kTokens, c.shape.kv_heads, c.shape.v_dim);
  Runner(0).Run(layers, [&](std::size_t layer) {
    for (std::size_t t = 0; t < c.context.tokens; t += kTokens) Require(cache.Append(layer, k, v));
  });
  const std::size_t q = kPrefillQueries * c.shape.query_heads * c.shape.head_dim;
  return std::make_shared<CacheSet>(
      CacheSet{std::move(cache), RandomHalves(q), std::vector<float>(q)});
}

// K's and V's products are half of the work each, and may run at different peaks.
Limit Arithmetic(Limits& limits, const AttendCase& c) {
  const Limit k = limits.TileMacs(CodecNamed(c.codecs.k).kind, c.threads),
              v = limits.TileMacs(CodecNamed(c.codecs.v).kind, c.threads);
  return {k.name == v.name ? k.name : "mixed-macs", 2 / (1 / k.per_second + 1 / v.per_second),
          true};
}

Workload Prepare(const AttendCase& c, Bench& bench) {
  const Machine& machine = ThisMachine();
  const std::size_t layer_bytes = BytesPerToken(PlanOf(c, 1)) * c.context.tokens;
  Workload w;
  const std::size_t layers = Rotate(layer_bytes, c.context.cold, &w);
  if (c.threads > machine.cores)
    w.skip = fmt::format("{} threads on {} core", c.threads, machine.cores);
  if (!w.skip.empty()) return w;
  const double pairs = static_cast<double>(c.queries) * (static_cast<double>(c.context.tokens) -
                                                         static_cast<double>(c.queries - 1) / 2);
  const std::size_t rows = c.queries * c.shape.query_heads;
  w.bytes = static_cast<double>(
      layer_bytes + rows * (c.shape.head_dim * sizeof(Half) + c.shape.v_dim * sizeof(float)));
  w.macs = pairs * static_cast<double>(c.shape.query_heads * (c.shape.head_dim + c.shape.v_dim));
  w.Bound(bench.limits.Memory(Access::kRead, c.context.cold ? kCold : layer_bytes, c.threads),
          w.bytes);
  w.Bound(Arithmetic(bench.limits, c), w.macs);

  const std::string key =
      fmt::format("k={},v={}/{}/{}", c.codecs.k, c.codecs.v, c.shape.name(), c.context.name);
  const auto set =
      bench.Data<CacheSet>(key, [&] { return FilledCaches(c, layers, bench.kernels.target); });
  Residence residence = KVMIX_RESIDENCE_AUTO;
  if (c.queries == 1) {
    const bool in_l2 = !c.context.cold && layer_bytes <= machine.caches.l2;
    residence = in_l2 ? KVMIX_RESIDENCE_L2 : KVMIX_RESIDENCE_MEMORY;
  }
  const Shape& shape = c.shape;
  w.call = [set, residence, shape, queries = c.queries, threads = c.threads, layers] {
    const RowsView q = RowsView::F16(set->q.data(), queries, shape.query_heads, shape.head_dim);
    Sight sight = set->cache.sight(set->next);
    sight.residence = residence;
    Require(Attend(set->cache, set->next, q, set->out.data(), sight, threads));
    set->next = (set->next + 1) % layers;
  };
  return w;
}

bool IsQuick(const AttendCase& c, const Shape& shape, const Codecs& codecs) {
  const auto is = [&](std::size_t i) { return &shape == &kShapes[i]; };
  const bool i8 = &codecs == &kCodecs[1], f16 = &codecs == &kCodecs[0];
  if (is(kMhaShape))
    return i8 && c.queries == 1 && c.threads == 1 && c.context.tokens == kMhaTokens;
  if (!is(kSmallShape) && !is(kLargeShape)) return false;
  if (c.queries > 1) return i8 && c.threads == 1 && c.context.tokens == 4096;
  return (i8 || (f16 && c.threads == 1)) && (c.context.tokens == 4096 || c.context.tokens == 32768);
}

}  // namespace

void AddAttendCases(const char* target, std::vector<Case>* cases) {
  const auto add = [&](const AttendCase& c, bool quick) {
    cases->push_back({fmt::format("{}/{}/k={},v={}/{}/{}{}/t{}",
                                  c.queries == 1 ? "attend_decode" : "attend_prefill", target,
                                  c.codecs.k, c.codecs.v, c.shape.name(),
                                  c.queries == 1 ? "" : fmt::format("{}x", c.queries),
                                  c.context.name, c.threads),
                      quick, [c](Bench& bench) { return Prepare(c, bench); }});
  };
  for (const std::size_t queries : {std::size_t{1}, kPrefillQueries}) {
    for (const Shape& shape : kShapes) {
      for (const Codecs& codecs : kCodecs) {
        for (const Context& context : kContexts) {
          if (queries > 1 && context.cold) continue;
          if (context.tokens == kMhaTokens && &shape != &kShapes[kMhaShape]) continue;
          for (const int threads : {1, 2}) {
            const AttendCase c{shape, context, codecs, queries, threads};
            add(c, IsQuick(c, shape, codecs));
          }
        }
      }
    }
  }
}

}  // namespace kvmix::bench
