// Sessions: a cache's tokens, saved and loaded. docs/formats.md has the bytes.
//
// Rows are saved in their canonical form, so that a session from one CPU loads on any other. A
// session belongs to a plan: it carries the plan's fingerprint (kvmix/plan.h), and a cache of
// another plan refuses it.
#ifndef KVMIX_SESSION_H_
#define KVMIX_SESSION_H_

#include <iosfwd>
#include <string>

#include "kvmix/cache.h"
#include "kvmix/export.h"
#include "kvmix/status.h"

namespace kvmix {

// A stream that throws when it fails does not throw here; it keeps its exception mask and its state.

// Writes all that the cache holds. The file form writes a temporary file beside `path` and renames
// it, so that `path` is whole or untouched.
KVMIX_API Status SaveSession(const Cache& cache, std::ostream& out);
KVMIX_API Status SaveSession(const Cache& cache, const std::string& path);

// Puts what was saved in the place of what the cache holds. Errors leave the cache as it was: a
// session of another version or plan (both are named), more tokens than the capacity, a full pool,
// and damage of any kind, which checksums find. What follows a session in a stream is not read; the
// file form takes it for damage.
KVMIX_API Status LoadSession(Cache& cache, std::istream& in);
KVMIX_API Status LoadSession(Cache& cache, const std::string& path);

}  // namespace kvmix

#endif  // KVMIX_SESSION_H_
