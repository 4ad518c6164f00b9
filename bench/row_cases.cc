// quantize_token, quantize_head, dequantize_f32, dequantize_f16: rows <-> codes and scales, one
// thread, over a working set (input and output together) of SIZE bytes, held against a plain copy
// of as many bytes. 24k and 128k are gone over again and again; 256m is one of several such sets in
// rotation, so that it comes from DRAM whatever the last cache.
//
// append, append_rotated, append_i4, append_shaped: 1 or 64 tokens at a time, K and V of every KV
// head, into a cache of i8-token, i8-token-bf16+hadamard or i4-token-bf16+hadamard codecs, of the
// last with K's codes shaped; held against memcpy of the same fp16 rows to where a cache of rows
// would keep them, whose runs alternate with it.
#include <cstring>

#include <fmt/format.h>

#include "bench/workload.h"
#include "kvmix/cache.h"
#include "lib/tune/random_halves.h"
#include "tools/console.h"

namespace kvmix::bench {
namespace {

using tune::kHeadScale;
using tune::RandomHalves;

struct Size {
  std::size_t bytes;
  const char* name;
  bool cold;
};
constexpr Size kSizes[] = {{std::size_t{24} << 10, "24k", false},
                           {std::size_t{128} << 10, "128k", false},
                           {std::size_t{256} << 20, "256m", true}};

// One head of a working set. wide: halves, or the floats that dequantize_f32 writes.
struct Rows {
  void* wide;
  std::uint8_t* codes;
  float* scales;
  std::size_t tokens, head_dim;

  kernels::RowsIn halves() const {
    const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(head_dim);
    return {wide, KVMIX_F16, stride, tokens, head_dim};
  }
  kernels::RowFormat per_token() const {
    return {KVMIX_STORAGE_I8, kernels::ScaleStore::kF32, 1.0f, head_dim};
  }
  kernels::RowFormat per_head(float scale) const {
    return {KVMIX_STORAGE_I8, kernels::ScaleStore::kConstant, scale, head_dim};
  }
};

struct Kind {
  const char* name;
  std::size_t wide_bytes;  // of one element
  void (*run)(const kernels::EncodeKernels& encode, const Rows& rows);
};
constexpr Kind kKinds[] = {
    {"quantize_token", 2,
     [](const kernels::EncodeKernels& encode, const Rows& r) {
       encode.encode({r.halves(), {}, r.per_token(), r.codes, r.head_dim, r.scales});
     }},
    {"quantize_head", 2,
     [](const kernels::EncodeKernels& encode, const Rows& r) {
       r.scales[0] = encode.head_scale(r.halves(), {});
       encode.encode({r.halves(), {}, r.per_head(r.scales[0]), r.codes, r.head_dim, nullptr});
     }},
    {"dequantize_f32", 4,
     [](const kernels::EncodeKernels& encode, const Rows& r) {
       encode.decode_f32({r.per_token(), {}, r.codes, r.head_dim, r.scales, r.tokens},
                         static_cast<float*>(r.wide), r.head_dim);
     }},
    {"dequantize_f16", 2,
     [](const kernels::EncodeKernels& encode, const Rows& r) {
       encode.decode_f16({r.per_token(), {}, r.codes, r.head_dim, r.scales, r.tokens},
                         static_cast<Half*>(r.wide), r.head_dim);
     }},
};

// A head's fp16 rows at a time, so that quantize_head's second pass finds them in L2.
constexpr std::size_t kHeadBytes = std::size_t{512} << 10;

struct RowSets {
  std::shared_ptr<std::uint8_t[]> memory;
  std::vector<std::vector<Rows>> sets;  // [sets][heads]
  std::size_t next = 0;
};

// Codes are any bytes but -128, scales any numbers: no kernel's speed depends on them.
void Fill(const Rows& rows, const std::vector<Half>& random, std::size_t wide_bytes) {
  for (std::size_t t = 0; t < rows.tokens; ++t) {
    const Half* const from = random.data() + t % 256 * rows.head_dim;
    if (wide_bytes == sizeof(Half))
      std::memcpy(static_cast<Half*>(rows.wide) + t * rows.head_dim, from,
                  rows.head_dim * sizeof(Half));
    for (std::size_t i = 0; i < rows.head_dim; ++i)
      rows.codes[t * rows.head_dim + i] = static_cast<std::uint8_t>(from[i] % 255 - 127);
    rows.scales[t] = kHeadScale;
  }
}

std::shared_ptr<RowSets> MakeRowSets(std::size_t head_dim, std::size_t wide_bytes,
                                     std::size_t tokens, std::size_t sets) {
  const auto padded = [](std::size_t bytes) { return (bytes + 63) / 64 * 64; };
  const std::size_t values = tokens * head_dim;
  const std::size_t wide = padded(values * wide_bytes), codes = padded(values),
                    scales = padded(tokens * sizeof(float));
  const std::size_t set_bytes = wide + codes + scales;
  auto made = std::make_shared<RowSets>(RowSets{AllocatePages(sets * set_bytes), {}});
  std::memset(made->memory.get(), 0, sets * set_bytes);  // touched, before it is timed
  const std::vector<Half> random = RandomHalves(256 * head_dim);
  const std::size_t head_tokens = std::min(tokens, kHeadBytes / (head_dim * sizeof(Half)));
  for (std::size_t s = 0; s < sets; ++s) {
    std::uint8_t* const at = made->memory.get() + s * set_bytes;
    made->sets.emplace_back();
    for (std::size_t t = 0; t < tokens; t += head_tokens) {
      made->sets.back().push_back({at + t * head_dim * wide_bytes, at + wide + t * head_dim,
                                   reinterpret_cast<float*>(at + wide + codes) + t,
                                   std::min(head_tokens, tokens - t), head_dim});
      Fill(made->sets.back().back(), random, wide_bytes);
    }
  }
  return made;
}

Workload PrepareRows(const Kind& kind, const Shape& shape, const Size& size, Bench& bench) {
  const std::size_t token_bytes = shape.head_dim * (kind.wide_bytes + 1) + sizeof(float),
                    tokens = size.bytes / token_bytes;
  Workload w;
  const std::size_t sets = Rotate(size.bytes, size.cold, &w);
  if (!w.skip.empty()) return w;
  w.bytes = static_cast<double>(tokens * token_bytes);
  const std::size_t hot_or_cold = size.cold ? kCold : size.bytes;
  w.Bound(bench.limits.Memory(Access::kCopy, hot_or_cold, 1), w.bytes);
  // Nothing is held against it: for the list of limits.
  if (size.cold) bench.limits.Memory(Access::kStreamCopy, kCold, 1);
  const auto data = bench.Data<RowSets>(
      fmt::format("rows d{} {} {}", shape.head_dim, kind.wide_bytes, size.name),
      [&] { return MakeRowSets(shape.head_dim, kind.wide_bytes, tokens, sets); });
  w.call = [data, run = kind.run, &encode = bench.kernels.encode] {
    for (const Rows& rows : data->sets[data->next]) run(encode, rows);
    data->next = (data->next + 1) % data->sets.size();
  };
  return w;
}

// ---- append

struct AppendData {
  Cache cache;
  std::vector<Half> rows;       // [tokens][K, V][kv_heads, head_dim]
  std::vector<Half> row_cache;  // [K, V][kv_heads][capacity, head_dim]
  std::size_t row_tokens = 0;   // in row_cache
};
constexpr std::size_t kAppendCapacity = 4096, kAppendTokens = 64;

void AppendTokens(const Shape& shape, std::size_t at_a_time, AppendData& data) {
  const std::size_t row = shape.kv_heads * shape.head_dim;
  if (data.cache.tokens(0) == kAppendCapacity && !data.cache.Truncate(0).ok()) return;
  for (std::size_t t = 0; t < kAppendTokens; t += at_a_time) {
    RowsView k =
        RowsView::F16(data.rows.data() + t * 2 * row, at_a_time, shape.kv_heads, shape.head_dim);
    k.token_stride = static_cast<std::ptrdiff_t>(2 * row);
    RowsView v = k;
    v.data = data.rows.data() + t * 2 * row + row;
    if (!data.cache.Append(0, k, v).ok()) return;
  }
}

void CopyTokens(const Shape& shape, AppendData& data) {
  const std::size_t row = shape.kv_heads * shape.head_dim;
  data.row_tokens %= kAppendCapacity;
  for (std::size_t t = 0; t < kAppendTokens; ++t, ++data.row_tokens) {
    for (std::size_t head = 0; head < 2 * shape.kv_heads; ++head) {
      std::memcpy(
          data.row_cache.data() + (head * kAppendCapacity + data.row_tokens) * shape.head_dim,
          data.rows.data() + t * 2 * row + head * shape.head_dim, shape.head_dim * sizeof(Half));
    }
  }
}

struct AppendKind {
  const char *name, *codec;  // null: a DefaultPlan
  bool shape;                // K's codes
};
constexpr AppendKind kAppendKinds[] = {{"append", "i8-token", false},
                                       {"append_rotated", "i8-token-bf16+hadamard", false},
                                       {"append_i4", "i4-token-bf16+hadamard", false},
                                       {"append_shaped", "i4-token-bf16+hadamard", true},
                                       {"append_newest", nullptr, false}};
constexpr std::size_t kAtATime[] = {1, kAppendTokens};

// With a matrix that moves a little of every error everywhere: its numbers do not decide the time.
HeadCodec ShapedCodec(HeadCodec codec, std::size_t dim) {
  CodecVectors vectors;
  vectors.shaping.resize(dim * dim);
  for (std::size_t i = 0; i < dim; ++i) {
    for (std::size_t j = 0; j <= i; ++j) vectors.shaping[i * dim + j] = i == j ? 1.0f : 0.01f;
  }
  codec.kind.shape = true;
  codec.vectors = std::make_shared<const CodecVectors>(std::move(vectors));
  return codec;
}

Plan PlanOf(const AppendKind& kind, const Shape& shape) {
  const Geometry model{1, shape.kv_heads, shape.query_heads, shape.head_dim};
  if (kind.codec == nullptr) return DefaultPlan(model);
  const HeadCodec v{tools::Require(ParseCodecKind(kind.codec))};
  return UniformPlan(model, kind.shape ? ShapedCodec(v, shape.head_dim) : v, v);
}

Workload PrepareAppend(const AppendKind& kind, const Shape& shape, std::size_t at_a_time,
                       Bench& bench) {
  const Plan plan = PlanOf(kind, shape);
  Result<Cache> cache = Cache::Create(plan, kAppendCapacity, {.target = bench.kernels.target});
  Workload w;
  if (!cache.ok()) {
    w.skip = cache.status().message();
    return w;
  }
  const std::size_t row = shape.kv_heads * shape.head_dim;
  const auto data = bench.Data<AppendData>(fmt::format("{} {}", kind.name, shape.name()), [&] {
    return std::make_shared<AppendData>(AppendData{std::move(*cache),
                                                   RandomHalves(kAppendTokens * 2 * row),
                                                   std::vector<Half>(2 * kAppendCapacity * row)});
  });
  w.calls = kAppendTokens;
  w.bytes = static_cast<double>(2 * row * sizeof(Half) + BytesPerToken(plan));
  w.call = [shape, at_a_time, data] { AppendTokens(shape, at_a_time, *data); };
  w.reference = [shape, data] { CopyTokens(shape, *data); };
  w.limit = "row-copy";
  return w;
}

}  // namespace

void AddRowCases(const char* target, std::vector<Case>* cases) {
  for (const Kind& kind : kKinds) {
    for (const Shape& shape : kShapes) {
      if (shape.v_dim != shape.head_dim) continue;  // rows are K's or V's
      for (const Size& size : kSizes) {
        const bool quick = (&shape == &kShapes[kSmallShape] || &shape == &kShapes[kLargeShape]) &&
                           &size != &kSizes[0];
        cases->push_back({fmt::format("{}/{}/{}/{}/t1", kind.name, target, shape.name(), size.name),
                          quick, [&kind, &shape, &size](Bench& bench) {
                            return PrepareRows(kind, shape, size, bench);
                          }});
      }
    }
  }
  for (const Shape& shape : kShapes) {
    if (shape.v_dim != shape.head_dim) continue;
    for (const AppendKind& kind : kAppendKinds) {
      for (const std::size_t n : kAtATime) {
        cases->push_back(
            {fmt::format("{}/{}/{}/{}/t1", kind.name, target, shape.name(), n),
             &kind == &kAppendKinds[0] && &shape == &kShapes[kLargeShape] && n == 1,
             [&kind, &shape, n](Bench& bench) { return PrepareAppend(kind, shape, n, bench); }});
      }
    }
  }
}

}  // namespace kvmix::bench
