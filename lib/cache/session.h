// Sessions: kvmix/session.h.
#ifndef KVMIX_LIB_CACHE_SESSION_H_
#define KVMIX_LIB_CACHE_SESSION_H_

#include <cstddef>
#include <functional>
#include <string>

#include "kvmix/status.h"
#include "lib/cache/cache_impl.h"

namespace kvmix::internal {

// They take, or give, all bytes; false where they cannot.
using Sink = std::function<bool(const void* data, std::size_t bytes)>;
using Source = std::function<bool(void* data, std::size_t bytes)>;

Status SaveSession(const CacheImpl& cache, const Sink& sink);
Status SaveSession(const CacheImpl& cache, const std::string& path);
// is_end: asked after the last layer; more than that is damage.
Status LoadSession(CacheImpl& cache, const Source& source, const std::function<bool()>& is_end);
Status LoadSession(CacheImpl& cache, const std::string& path);

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_CACHE_SESSION_H_
