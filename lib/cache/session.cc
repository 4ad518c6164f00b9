#include "lib/cache/session.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <new>
#include <vector>

#include <fmt/format.h>

#include "lib/cache/cache_impl.h"
#include "lib/cache/round.h"
#include "lib/cache/sight.h"
#include "lib/files/file.h"
#include "lib/plan/plan.h"

namespace kvmix::internal {
namespace {

static_assert(std::endian::native == std::endian::little, "sessions are little-endian");

constexpr std::array<char, 8> kMagic = {'k', 'v', 'm', 'i', 'x', 's', 'e', 's'};
constexpr std::uint32_t kVersion = 2;  // 1: no factors of exact rows
constexpr std::size_t kRowsAtATime = 256;
constexpr std::size_t kLongestName = 4096;

// Everything before a checksum, since the last one.
class Hash {
 public:
  Hash() { XXH3_64bits_reset(&state_); }
  void Add(const void* data, std::size_t bytes) { XXH3_64bits_update(&state_, data, bytes); }
  std::uint64_t Take() {
    const std::uint64_t hash = XXH3_64bits_digest(&state_);
    XXH3_64bits_reset(&state_);
    return hash;
  }

 private:
  XXH3_state_t state_;
};

class Writer {
 public:
  explicit Writer(const Sink& sink) : sink_(sink) {}
  bool good() const { return good_; }
  void Bytes(const void* data, std::size_t bytes) {
    if (bytes == 0) return;  // data may be null
    good_ = good_ && sink_(data, bytes);
    hash_.Add(data, bytes);
  }
  template <typename T>
  void Number(T x) {
    Bytes(&x, sizeof(T));
  }
  void Checksum() {
    const std::uint64_t hash = hash_.Take();
    good_ = good_ && sink_(&hash, sizeof(hash));
  }

 private:
  const Sink& sink_;
  bool good_ = true;
  Hash hash_;
};

class Reader {
 public:
  explicit Reader(const Source& source) : source_(source) {}
  bool Bytes(void* data, std::size_t bytes) {
    if (!source_(data, bytes)) return false;
    hash_.Add(data, bytes);
    return true;
  }
  template <typename T>
  bool Number(T* x) {
    return Bytes(x, sizeof(T));
  }
  bool Checksum() {
    const std::uint64_t expected = hash_.Take();
    std::uint64_t found = 0;
    return source_(&found, sizeof(found)) && found == expected;
  }

 private:
  const Source& source_;
  Hash hash_;
};

Status Damaged(const std::string& what, const std::string& expected) {
  return {ErrorCode::kCorrupt,
          fmt::format("session: {}: expected {}, found damage or the end", what, expected)};
}

std::string Named(const std::string& model, std::uint64_t fingerprint) {
  return fmt::format("the plan {:016x} of {}", fingerprint,
                     model.empty() ? "a model without a name" : model);
}

// f(tensor, KV head) for every tensor of a layer, until one fails.
template <class F>
Status ForTensors(const PoolLayer& layer, const F& f) {
  for (std::size_t h = 0; h < layer.formats.size(); ++h) {
    for (const Tensor t : {KVMIX_K, KVMIX_V}) {
      if (Status s = f(t, h); !s.ok()) return s;
    }
  }
  return {};
}

// f(cell) for the first token of every whole stretch of tokens [first, last), while it is true.
template <class F>
bool ForCentres(const PoolLayer& layer, std::size_t first, std::size_t last, const F& f) {
  for (std::size_t cell = first / layer.stretch * layer.stretch; cell + layer.stretch <= last;
       cell += layer.stretch) {
    if (!f(cell)) return false;
  }
  return true;
}

// Canonical rows of one tensor on their way.
struct Rows {
  std::vector<std::uint8_t> rows;
  std::vector<float> scales;

  explicit Rows(const CompiledCodec& codec)
      : rows(kRowsAtATime * codec.row_bytes()), scales(codec.stores_scales() ? kRowsAtATime : 0) {}
  void Clear(std::size_t row) {
    const std::size_t bytes = rows.size() / kRowsAtATime;
    std::fill_n(rows.begin() + static_cast<std::ptrdiff_t>(row * bytes), bytes, std::uint8_t{0});
    if (!scales.empty()) scales[row] = 0.0f;
  }
};

// The stretches of a layer that travel: those that are open, and the newest of the others.
std::vector<const Stretch*> Travellers(const CacheLayer& held) {
  std::vector<const Stretch*> all;
  const Stretch* newest = nullptr;
  for (const Stretch& s : held.newest.stretches) {
    if (!s.whole) continue;
    if (newest == nullptr || s.turn >= newest->turn) newest = &s;
  }
  for (const Stretch& s : held.newest.stretches) {
    if (!s.whole || &s == newest) all.push_back(&s);
  }
  return all;
}

// Exact rows, and the centres of encoded ones.
void SaveStretches(const CacheImpl& c, std::size_t layer, Writer& out) {
  const PoolLayer& shape = c.pool->layers[layer];
  const CacheLayer& held = c.layers[layer];
  if (shape.stretch == 0) return;
  const std::vector<const Stretch*> all = Travellers(held);
  out.Number<std::uint64_t>(all.size());
  for (const Stretch* s : all) {
    out.Number<std::uint64_t>(s->index);
    for (std::size_t i = 0; i < shape.stretch; ++i) out.Number<std::uint8_t>(s->written[i]);
    out.Bytes(s->page->memory, shape.exact_bytes());
  }
  for (std::size_t h = 0; h < shape.formats.size(); ++h) {
    if (!shape.k[h].own_centre()) continue;
    ForCentres(shape, held.forgotten, held.tokens, [&](std::size_t cell) {
      out.Bytes(CentreOf(c, layer, h, cell), kernels::CentreBytes(shape.formats[h]));
      return true;
    });
  }
}

bool AreFinite(const Half* rows, std::size_t count) {
  return std::none_of(rows, rows + count, [](Half x) { return (x & 0x7C00) == 0x7C00; });
}

// As ExactRows::Keep makes them.
bool AreExact(const PoolLayer& shape, std::uint8_t* memory, std::size_t tokens) {
  for (std::size_t h = 0; h < shape.formats.size(); ++h) {
    const ExactRows rows(memory, shape.shape, tokens, h);
    for (const Tensor t : {KVMIX_K, KVMIX_V}) {
      const float* const factors = rows.factors(t);
      const bool good = std::all_of(factors, factors + tokens, [](float f) {
        return f == 0.0f || (f >= 1.0f && std::isfinite(f));
      });
      if (!good || !AreFinite(rows.rows(t), tokens * shape.shape.dim(t))) return false;
    }
  }
  return true;
}

Status LoadStretches(CacheImpl& c, std::size_t layer, Reader& in) {
  const PoolLayer& shape = c.pool->layers[layer];
  CacheLayer& held = c.layers[layer];
  const std::string name = fmt::format("layer {}", layer);
  std::uint64_t count = 0;
  if (shape.stretch == 0) return {};
  if (!in.Number(&count)) return Damaged(name, "a number of stretches");
  for (std::uint64_t index = 0, before = 0; count > 0; --count, before = index + 1) {
    if (!in.Number(&index) || index < before || index >= CeilDiv(held.tokens, shape.stretch)) {
      return Damaged(name, "the places of stretches");
    }
    Page* const page = c.pool->memory->Get(shape.exact_kind);
    if (page == nullptr) return NoPage(c, layer, index * shape.stretch, shape.stretch);
    held.newest.stretches.push_back({.index = index, .page = page});
    Stretch& s = held.newest.stretches.back();
    std::uint8_t written = 0;
    for (std::size_t i = 0; i < shape.stretch; ++i) {
      if (!in.Number(&written) || written > 1) return Damaged(name, "a stretch");
      s.written[i] = written != 0;
    }
    s.whole = s.written.count() == shape.stretch;
    if (!in.Bytes(page->memory, shape.exact_bytes()) ||
        !AreExact(shape, page->memory, shape.stretch)) {
      return Damaged(name, "the exact rows of a stretch");
    }
  }
  for (std::size_t h = 0; h < shape.formats.size(); ++h) {
    if (!shape.k[h].own_centre()) continue;
    const bool good = ForCentres(shape, held.forgotten, held.tokens, [&](std::size_t cell) {
      std::uint8_t* const centre = CentreOf(c, layer, h, cell);
      float scale;
      const bool read = in.Bytes(centre, kernels::CentreBytes(shape.formats[h]));
      std::memcpy(&scale, centre, sizeof(scale));
      return read && std::isfinite(scale) && scale >= 0.0f;
    });
    if (!good) return Damaged(name, "finite centres");
  }
  return {};
}

void SaveLayer(const CacheImpl& c, std::size_t layer, Writer& out) {
  const PoolLayer& shape = c.pool->layers[layer];
  const CacheLayer& held = c.layers[layer];
  out.Number<std::uint64_t>(held.forgotten);
  out.Number<std::uint64_t>(held.tokens);
  if (held.tokens != 0) out.Bytes(held.exact.data(), held.exact.size());
  SaveStretches(c, layer, out);
  (void)ForTensors(shape, [&](Tensor t, std::size_t h) {
    Rows buffer(shape.heads(t)[h]);
    for (std::size_t at = held.forgotten; at < held.tokens; at += kRowsAtATime) {
      const std::size_t n = std::min(kRowsAtATime, held.tokens - at);
      LoadRows(c, layer, t, h, at, n, buffer.rows.data(), buffer.scales.data());
      for (std::size_t i = 0; shape.stretch != 0 && i < n; ++i) {  // nothing is encoded there yet
        const Stretch* const s = held.newest.Find((at + i) / shape.stretch);
        if (s != nullptr && !s->whole) buffer.Clear(i);
      }
      out.Bytes(buffer.rows.data(), n * shape.heads(t)[h].row_bytes());
      if (!buffer.scales.empty()) out.Bytes(buffer.scales.data(), n * sizeof(float));
    }
    return Status();
  });
  out.Checksum();
}

Status LoadLayer(CacheImpl& c, std::size_t layer, Reader& in) {
  const PoolLayer& shape = c.pool->layers[layer];
  CacheLayer& held = c.layers[layer];
  const std::string name = fmt::format("layer {}", layer);
  std::uint64_t forgotten = 0, tokens = 0;
  if (!in.Number(&forgotten) || !in.Number(&tokens)) return Damaged(name, "its number of tokens");
  if (forgotten > tokens) return Damaged(name, "fewer forgotten tokens than tokens");
  if (tokens > c.capacity) {
    return {
        ErrorCode::kPastCapacity,
        fmt::format("session: {} has {} tokens, the cache room for {}", name, tokens, c.capacity)};
  }
  if (Status s = MakeWritable(c, layer, forgotten, tokens - forgotten); !s.ok()) return s;
  held.forgotten = forgotten;
  held.tokens = tokens;
  // The file does not say why tokens are gone. A window alone never takes what the next query sees.
  const bool by_window = shape.window != 0 && HasPast(shape.window, forgotten, 0, tokens);
  held.dropped = by_window ? 0 : forgotten;
  if (tokens != 0) {  // also where all of them are forgotten, and nothing made room
    const std::size_t exact = c.pool->plan.exact_first;
    held.exact.resize(shape.shape.kv_heads * ExactRows::HeadBytes(shape.shape, exact));
    if (!in.Bytes(held.exact.data(), held.exact.size()) ||
        !AreExact(shape, held.exact.data(), exact)) {
      return Damaged(name, "the first tokens' exact rows");
    }
  }
  Status s = LoadStretches(c, layer, in);
  if (!s.ok()) return s;
  s = ForTensors(shape, [&](Tensor t, std::size_t h) {
    Rows buffer(shape.heads(t)[h]);
    for (std::size_t at = forgotten; at < tokens; at += kRowsAtATime) {
      const std::size_t n = std::min<std::size_t>(kRowsAtATime, tokens - at);
      if (!in.Bytes(buffer.rows.data(), n * shape.heads(t)[h].row_bytes()) ||
          (!buffer.scales.empty() && !in.Bytes(buffer.scales.data(), n * sizeof(float)))) {
        return Damaged(name, fmt::format("the rows of {} tokens", tokens - forgotten));
      }
      const float* const scales = buffer.scales.empty() ? nullptr : buffer.scales.data();
      if (Status bad = shape.heads(t)[h].CheckCoded(buffer.rows.data(), scales, n); !bad.ok()) {
        return Damaged(fmt::format("{}, KV head {}", name, h), "rows that an encoder makes");
      }
      StoreRows(c, layer, t, h, at, n, buffer.rows.data(), scales);
    }
    return Status();
  });
  if (!s.ok()) return s;
  return in.Checksum() ? Status() : Damaged(name, "a checksum that fits");
}

Status LoadHeader(const CacheImpl& c, Reader& in) {
  std::array<char, 8> magic{};
  std::uint32_t version = 0, name_bytes = 0;
  std::uint64_t fingerprint = 0;
  if (!in.Bytes(magic.data(), magic.size()) || magic != kMagic) {
    return {ErrorCode::kCorrupt, "session: expected a kvmix session, found something else"};
  }
  if (!in.Number(&version)) return Damaged("header", "a version");
  if (version != kVersion) {
    return {ErrorCode::kVersion,
            fmt::format("session: expected version {}, found {}", kVersion, version)};
  }
  if (!in.Number(&fingerprint) || !in.Number(&name_bytes) || name_bytes > kLongestName) {
    return Damaged("header", "a plan");
  }
  std::string name(name_bytes, '\0');
  if (!in.Bytes(name.data(), name.size()) || !in.Checksum()) {
    return Damaged("header", "a checksum that fits");
  }
  const std::uint64_t own = internal::Fingerprint(c.pool->plan);
  if (fingerprint == own) return {};
  return {ErrorCode::kMismatch,
          fmt::format("session: expected {}, found one of {}",
                      Named(c.pool->plan.provenance.model, own), Named(name, fingerprint))};
}

bool Save(const CacheImpl& c, const Sink& sink) {
  Writer out(sink);
  const std::string name = c.pool->plan.provenance.model.substr(0, kLongestName);
  out.Bytes(kMagic.data(), kMagic.size());
  out.Number(kVersion);
  out.Number(internal::Fingerprint(c.pool->plan));
  out.Number(static_cast<std::uint32_t>(name.size()));
  out.Bytes(name.data(), name.size());
  out.Checksum();
  for (std::size_t layer = 0; out.good() && layer < c.layers.size(); ++layer) {
    if (c.pool->layers[layer].shape.owns_kv()) SaveLayer(c, layer, out);
  }
  return out.good();
}

}  // namespace

Status SaveSession(const CacheImpl& c, const Sink& sink) {
  if (Save(c, sink)) return {};
  return {ErrorCode::kIo, "session: the stream does not take what is written"};
}

Status SaveSession(const CacheImpl& c, const std::string& path) {
  return WriteFileAtomically(path, "room for the session and the right to write it",
                             [&](std::FILE* file) {
                               return Save(c, [&](const void* data, std::size_t bytes) {
                                 return std::fwrite(data, 1, bytes, file) == bytes;
                               });
                             });
}

// What is loaded takes the place of what is there once all of it is good.
Status LoadSession(CacheImpl& c, const Source& source, const std::function<bool()>& is_end) try {
  Reader in(source);
  if (Status s = LoadHeader(c, in); !s.ok()) return s;
  CacheImpl loaded(c.pool, c.capacity);
  for (std::size_t layer = 0; layer < c.layers.size(); ++layer) {
    if (!c.pool->layers[layer].shape.owns_kv()) continue;
    if (Status s = LoadLayer(loaded, layer, in); !s.ok()) return s;
  }
  if (!is_end()) return Damaged("end", "nothing after the last layer");
  std::swap(c.layers, loaded.layers);
  return {};
} catch (const std::bad_alloc&) {
  return {ErrorCode::kOutOfMemory, "session: expected one that fits into memory"};
}

Status LoadSession(CacheImpl& c, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return {ErrorCode::kIo, fmt::format("{}: expected a file that can be read", path)};
  const auto source = [&](void* data, std::size_t bytes) {
    return file.read(static_cast<char*>(data), static_cast<std::streamsize>(bytes)).good();
  };
  const auto is_end = [&] { return file.peek() == std::ifstream::traits_type::eof(); };
  const Status s = LoadSession(c, source, is_end);
  return s.ok() ? s : Status(s.code(), fmt::format("{}: {}", path, s.message()));
}

}  // namespace kvmix::internal
