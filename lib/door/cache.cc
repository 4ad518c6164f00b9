// Pools, caches, sessions and attention through the waist.
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "lib/cache/attend_call.h"
#include "lib/cache/cache_impl.h"
#include "lib/cache/own.h"
#include "lib/cache/session.h"
#include "lib/door/door.h"

struct kvmix_pool
    : kvmix::door::Handle<std::shared_ptr<kvmix::internal::PoolImpl>, 0x6c6f6f70> {  // "pool"
  using Handle::Handle;
};
struct kvmix_cache
    : kvmix::door::Handle<std::unique_ptr<kvmix::internal::CacheImpl>, 0x68636163> {  // "cach"
  using Handle::Handle;
};

namespace kvmix::door {
namespace {

using internal::CacheImpl;
using internal::PoolImpl;
using PoolPointer = std::shared_ptr<PoolImpl>;
using CachePointer = std::unique_ptr<CacheImpl>;

Result<PoolPointer> NewPool(const kvmix_plan* plan, const kvmix_pool_options* options) {
  if (!IsLive(plan)) return NotLive(plan);
  internal::PoolSettings settings;
  if (options != nullptr) {
    if (Status s = CheckStruct(options, "pool options"); !s.ok()) return s;
    const Result<std::string_view> target = TextOf(options->target, "target");
    if (!target.ok()) return target.status();
    settings = {options->bytes, *target, options->rollback};
    if (options->beside != nullptr) {
      if (!IsLive(options->beside)) return NotLive(options->beside);
      settings.beside = (*options->beside->body)->memory;
    }
  }
  return internal::MakePool(*plan->body, settings);
}

bool IsRunner(const kvmix_runner* runner) {
  return runner == nullptr || runner->run != nullptr || runner->self == nullptr;
}

Status CheckRunner(const kvmix_runner* runner) {
  if (IsRunner(runner)) return {};
  return Error(ErrorCode::kInvalidArgument, "runner: expected a function run, found null");
}

Status CheckBoth(const kvmix_rows* k, const kvmix_rows* v) {
  return k != nullptr && v != nullptr ? Status() : IsNull(k == nullptr ? "k" : "v");
}

Status InBatch(const Status& status, std::size_t i, std::size_t count) {
  if (count == 1) return status;
  return Error(status.code(), "request {} of {}: {}", i, count, status.message());
}

Status Attend(const kvmix_attend_request* requests, std::size_t count, std::size_t layer,
              const kvmix_sight* sight, const kvmix_runner* runner) {
  if (Status s = CheckRunner(runner); !s.ok()) return s;
  if (Status s = CheckArray(requests, count, "requests"); !s.ok()) return s;
  if (sight != nullptr) {
    if (Status s = CheckStruct(sight, "sight"); !s.ok()) return s;
  }
  const internal::Own<internal::AttendCall> call;
  for (std::size_t i = 0; i < count; ++i) {
    const kvmix_attend_request& r = At(requests, i);
    Status s = IsLive(r.cache) ? Status() : NotLive(r.cache);
    if (s.ok() && i == 0) {
      if (s = call->Begin(**r.cache->body, layer, sight); !s.ok()) return s;
    }
    if (s.ok()) s = call->Add(**r.cache->body, r);
    if (!s.ok()) return InBatch(s, i, count);
  }
  if (count != 0) call->Run(Runner(runner));
  return {};
}

Status Append(const kvmix_append_request* requests, std::size_t count, std::size_t layer,
              const kvmix_runner* runner) {
  if (Status s = CheckRunner(runner); !s.ok()) return s;
  if (Status s = CheckArray(requests, count, "requests"); !s.ok()) return s;
  std::vector<internal::AppendPart> parts;
  for (std::size_t i = 0; i < count; ++i) {
    const kvmix_append_request& r = At(requests, i);
    if (!IsLive(r.cache)) {
      return Error(ErrorCode::kInvalidArgument, "request {} of {}: {}", i, count,
                   NotLive(r.cache).message());
    }
    parts.push_back({r.cache->body->get(), r.k, r.v});
  }
  return internal::AppendAll(parts, layer, Runner(runner));
}

Result<std::vector<Rope>> RopesOf(const kvmix_rope* ropes, std::size_t count) {
  if (count > kMaxCount) {
    return Error(ErrorCode::kInvalidArgument, "ropes: expected one, or one a layer, found {}",
                 count);
  }
  if (Status s = CheckArray(ropes, count, "ropes"); !s.ok()) return s;
  std::vector<Rope> values;
  for (std::size_t i = 0; i < count; ++i) {
    const kvmix_rope& r = At(ropes, i);
    if (r.frequencies_size != 0 && r.frequencies == nullptr) return IsNull("rope: frequencies");
    if (r.frequencies_size > kMaxHeadDim || (r.neighbours != 0 && r.neighbours != 1)) {
      return Error(ErrorCode::kInvalidArgument,
                   "rope: expected at most {} frequencies, and neighbours 0 or 1, found {} and {}",
                   kMaxHeadDim, r.frequencies_size, r.neighbours);
    }
    values.push_back({r.neighbours != 0 ? Rope::Pairs::kNeighbours : Rope::Pairs::kHalves, r.dims,
                      r.theta, std::vector(r.frequencies, r.frequencies + r.frequencies_size)});
  }
  return values;
}

}  // namespace
}  // namespace kvmix::door

using namespace kvmix::door;  // NOLINT: every function below is a door
using kvmix::Result;
using kvmix::Status;
namespace internal = kvmix::internal;

kvmix_code kvmix_pool_create(const kvmix_plan* plan, const kvmix_pool_options* options,
                             kvmix_pool** out, kvmix_error* error) {
  return Make(out, error, [&] { return NewPool(plan, options); });
}

void kvmix_pool_destroy(kvmix_pool* pool) { Destroy(pool); }

const char* kvmix_pool_target(const kvmix_pool* pool) {
  return Ask(pool, [](const PoolPointer& p) { return p->kernels->target; });
}

size_t kvmix_pool_bytes(const kvmix_pool* pool) {
  return Ask(pool, [](const PoolPointer& p) { return p->memory->used(); });
}

size_t kvmix_pool_max_bytes(const kvmix_pool* pool) {
  return Ask(pool, [](const PoolPointer& p) { return p->memory->most(); });
}

kvmix_code kvmix_cache_create(const kvmix_pool* pool, size_t capacity, kvmix_cache** out,
                              kvmix_error* error) {
  return Make(out, error, [&]() -> Result<CachePointer> {
    if (!IsLive(pool)) return NotLive(pool);
    return std::make_unique<internal::CacheImpl>(*pool->body, capacity);
  });
}

kvmix_code kvmix_cache_create_alone(const kvmix_plan* plan, size_t capacity,
                                    const kvmix_pool_options* options, kvmix_cache** out,
                                    kvmix_error* error) {
  return Make(out, error, [&]() -> Result<CachePointer> {
    const Result<PoolPointer> pool = NewPool(plan, options);
    if (!pool.ok()) return pool.status();
    if (Status s = internal::CheckCapacity(**pool, capacity); !s.ok()) return s;
    return std::make_unique<internal::CacheImpl>(*pool, capacity);
  });
}

kvmix_code kvmix_cache_fork(const kvmix_cache* cache, kvmix_cache** out, kvmix_error* error) {
  return Make(out, error, [&]() -> Result<CachePointer> {
    if (!IsLive(cache)) return NotLive(cache);
    return (*cache->body)->Fork();
  });
}

void kvmix_cache_destroy(kvmix_cache* cache) { Destroy(cache); }

const char* kvmix_cache_target(const kvmix_cache* cache) {
  return Ask(cache, [](const CachePointer& c) { return c->pool->kernels->target; });
}

size_t kvmix_cache_capacity(const kvmix_cache* cache) {
  return Ask(cache, [](const CachePointer& c) { return c->capacity; });
}

size_t kvmix_cache_tokens(const kvmix_cache* cache, size_t layer) {
  return Ask(cache, [&](const CachePointer& c) -> size_t {
    return layer < c->layers.size() ? c->held(layer).tokens : 0;
  });
}

size_t kvmix_cache_forgotten(const kvmix_cache* cache, size_t layer) {
  return Ask(cache, [&](const CachePointer& c) -> size_t {
    return layer < c->layers.size() ? c->held(layer).forgotten : 0;
  });
}

size_t kvmix_cache_bytes(const kvmix_cache* cache) {
  return Ask(cache, [](const CachePointer& c) { return c->bytes(); });
}

uint64_t kvmix_cache_saturated(const kvmix_cache* cache) {
  return Ask(cache, [](const CachePointer& c) -> uint64_t {
    return c->saturated.load(std::memory_order_relaxed);
  });
}

kvmix_code kvmix_cache_append(kvmix_cache* cache, size_t layer, const kvmix_rows* k,
                              const kvmix_rows* v, const kvmix_runner* runner, kvmix_error* error) {
  return With(cache, error, [&](const CachePointer& c) {
    // A decode step has no time for more than one Status.
    if (k == nullptr || v == nullptr) return CheckBoth(k, v);
    if (!IsRunner(runner)) return CheckRunner(runner);
    return c->Append(layer, *k, *v, kvmix::Runner(runner));
  });
}

kvmix_code kvmix_cache_store(kvmix_cache* cache, size_t layer, const int64_t* cells, size_t count,
                             const kvmix_rows* k, const kvmix_rows* v, kvmix_error* error) {
  return With(cache, error, [&](const CachePointer& c) {
    if (cells == nullptr && count != 0) return IsNull("cells");
    if (Status s = CheckBoth(k, v); !s.ok()) return s;
    return c->Store(layer, {cells, count}, *k, *v);
  });
}

kvmix_code kvmix_cache_truncate(kvmix_cache* cache, size_t tokens, kvmix_error* error) {
  return With(cache, error, [&](const CachePointer& c) { return c->Truncate(tokens); });
}

kvmix_code kvmix_cache_forget(kvmix_cache* cache, size_t layer, size_t first, kvmix_error* error) {
  return With(cache, error, [&](const CachePointer& c) { return c->Forget(layer, first); });
}

kvmix_code kvmix_cache_shift(kvmix_cache* cache, size_t keep, size_t drop, const kvmix_rope* ropes,
                             size_t count, kvmix_error* error) {
  return With(cache, error, [&](const CachePointer& c) {
    const Result<std::vector<kvmix::Rope>> values = RopesOf(ropes, count);
    return values.ok() ? c->Shift(keep, drop, *values) : values.status();
  });
}

kvmix_code kvmix_cache_decode(const kvmix_cache* cache, size_t layer, kvmix_tensor tensor,
                              size_t first, size_t count, const kvmix_out* out,
                              kvmix_error* error) {
  return With(cache, error, [&](const CachePointer& c) {
    if (out == nullptr) return IsNull("out");
    if (Status s = CheckTensor(tensor); !s.ok()) return s;
    return c->Decode(layer, tensor, first, count, *out);
  });
}

size_t kvmix_cache_row_bytes(const kvmix_cache* cache, size_t layer, size_t kv_head,
                             kvmix_tensor tensor) {
  if (!CheckTensor(tensor).ok()) return 0;
  return Ask(cache, [&](const CachePointer& c) { return c->RowBytes(layer, kv_head, tensor); });
}

kvmix_code kvmix_cache_export(const kvmix_cache* cache, size_t layer, size_t kv_head,
                              kvmix_tensor tensor, size_t first, size_t count, void* codes,
                              float* scales, kvmix_error* error) {
  return With(cache, error, [&](const CachePointer& c) {
    if (Status s = CheckTensor(tensor); !s.ok()) return s;
    return c->ExportRows(layer, kv_head, tensor, first, count, codes, scales);
  });
}

kvmix_code kvmix_cache_import(kvmix_cache* cache, size_t layer, size_t count,
                              const void* const* k_codes, const float* const* k_scales,
                              const void* const* v_codes, const float* const* v_scales,
                              kvmix_error* error) {
  return With(cache, error, [&](const CachePointer& c) {
    return c->ImportRows(layer, count, k_codes, k_scales, v_codes, v_scales);
  });
}

kvmix_code kvmix_cache_save(const kvmix_cache* cache, const char* path, kvmix_error* error) {
  return With(cache, error, [&](const CachePointer& c) {
    const Result<std::string_view> text = TextOf(path, "path");
    return text.ok() ? internal::SaveSession(*c, std::string(*text)) : text.status();
  });
}

kvmix_code kvmix_cache_load(kvmix_cache* cache, const char* path, kvmix_error* error) {
  return With(cache, error, [&](const CachePointer& c) {
    const Result<std::string_view> text = TextOf(path, "path");
    return text.ok() ? internal::LoadSession(*c, std::string(*text)) : text.status();
  });
}

kvmix_code kvmix_cache_write(const kvmix_cache* cache,
                             int (*write)(void* self, const void* data, size_t bytes), void* self,
                             kvmix_error* error) {
  return With(cache, error, [&](const CachePointer& c) {
    if (write == nullptr) return IsNull("write");
    const internal::Sink sink = [&](const void* data, size_t bytes) {
      return write(self, data, bytes) == 0;
    };
    return internal::SaveSession(*c, sink);
  });
}

kvmix_code kvmix_cache_read(kvmix_cache* cache, int (*read)(void* self, void* data, size_t bytes),
                            void* self, kvmix_error* error) {
  return With(cache, error, [&](const CachePointer& c) {
    if (read == nullptr) return IsNull("read");
    const internal::Source source = [&](void* data, size_t bytes) {
      return read(self, data, bytes) == 0;
    };
    return internal::LoadSession(*c, source, [] { return true; });
  });
}

kvmix_code kvmix_cache_sight(const kvmix_cache* cache, size_t layer, kvmix_sight* out,
                             kvmix_error* error) {
  return With(cache, error, [&](const CachePointer& c) {
    if (Status s = internal::CheckLayer(*c, layer); !s.ok()) return s;
    return Fill(out, internal::SightOf(c->pool->plan.model.layers[layer]), "sight");
  });
}

kvmix_code kvmix_cache_attend(const kvmix_cache* cache, size_t layer, const kvmix_rows* q,
                              const kvmix_out* out, const kvmix_sight* sight,
                              const kvmix_runner* runner, kvmix_error* error) {
  return Guarded(error, [&] {
    if (q == nullptr || out == nullptr) return IsNull(q == nullptr ? "q" : "out");
    const kvmix_attend_request request{sizeof(request), cache, *q, *out, nullptr, {}, nullptr};
    return Attend(&request, 1, layer, sight, runner);
  });
}

kvmix_code kvmix_attend(const kvmix_attend_request* requests, size_t count, size_t layer,
                        const kvmix_sight* sight, const kvmix_runner* runner, kvmix_error* error) {
  return Guarded(error, [&] { return Attend(requests, count, layer, sight, runner); });
}

kvmix_code kvmix_append(const kvmix_append_request* requests, size_t count, size_t layer,
                        const kvmix_runner* runner, kvmix_error* error) {
  return Guarded(error, [&] { return Append(requests, count, layer, runner); });
}

kvmix_code kvmix_merge_outputs(float* out, float* log_sum_exp, const float* other_out,
                               const float* other_log_sum_exp, size_t rows, size_t dim,
                               kvmix_error* error) {
  return Guarded(error, [&]() -> Status {
    if (rows == 0) return {};
    if (log_sum_exp == nullptr || other_log_sum_exp == nullptr) return IsNull("log_sum_exp");
    if (dim != 0 && (out == nullptr || other_out == nullptr)) return IsNull("out");
    internal::MergeOutputs(out, log_sum_exp, other_out, other_log_sum_exp, rows, dim);
    return {};
  });
}
