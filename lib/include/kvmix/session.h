// Sessions: a cache's tokens, saved and loaded. docs/formats.md has the bytes.
//
// Rows are saved in their canonical form, so that a session from one CPU loads on any other. A
// session belongs to a plan: it carries the plan's fingerprint (kvmix/plan.h), and a cache of
// another plan refuses it.
#ifndef KVMIX_SESSION_H_
#define KVMIX_SESSION_H_

#include <cstddef>
#include <istream>
#include <ostream>
#include <string>

#include "kvmix/cache.h"
#include "kvmix/kvmix.h"
#include "kvmix/status.h"

namespace kvmix {
namespace internal {

// Keeps a stream from throwing for as long as this object lives: every failure is a Status,
// whatever exceptions the caller asked the stream for.
class Quiet {
 public:
  explicit Quiet(std::ios& stream) : stream_(stream), asked_(stream.exceptions()) {
    stream.exceptions(std::ios::goodbit);
  }
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;
  ~Quiet() {
    try {
      stream_.exceptions(asked_);  // is taken over, and throws if the stream has failed
    } catch (...) {                // NOLINT(bugprone-empty-catch)
    }
  }

 private:
  std::ios& stream_;
  const std::ios::iostate asked_;
};

}  // namespace internal

// A stream that throws when it fails does not throw here; it keeps its exception mask and its
// state.

// Writes all that the cache holds. The file form writes a temporary file beside `path` and renames
// it, so that `path` is whole or untouched.
inline Status SaveSession(const Cache& cache, std::ostream& out) {
  const internal::Quiet quiet(out);
  const auto write = [](void* self, const void* data, std::size_t bytes) {
    std::ostream& to = *static_cast<std::ostream*>(self);
    return to.write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes)) ? 0 : 1;
  };
  internal::CallError error;
  Status s = error.Of(kvmix_cache_write(cache.get(), write, &out, error));
  if (s.ok() && !out.flush()) return Status(ErrorCode::kIo, "session: the stream is not flushed");
  return s;
}
inline Status SaveSession(const Cache& cache, const std::string& path) {
  internal::CallError error;
  return error.Of(kvmix_cache_save(cache.get(), path.c_str(), error));
}

// Puts what was saved in the place of what the cache holds. Errors leave the cache as it was: a
// session of another version or plan (both are named), more tokens than the capacity, a full pool,
// and damage of any kind, which checksums find. What follows a session in a stream is not read; the
// file form takes it for damage.
inline Status LoadSession(Cache& cache, std::istream& in) {
  const internal::Quiet quiet(in);
  const auto read = [](void* self, void* data, std::size_t bytes) {
    std::istream& from = *static_cast<std::istream*>(self);
    return from.read(static_cast<char*>(data), static_cast<std::streamsize>(bytes)) ? 0 : 1;
  };
  internal::CallError error;
  return error.Of(kvmix_cache_read(cache.get(), read, &in, error));
}
inline Status LoadSession(Cache& cache, const std::string& path) {
  internal::CallError error;
  return error.Of(kvmix_cache_load(cache.get(), path.c_str(), error));
}

}  // namespace kvmix

#endif  // KVMIX_SESSION_H_
