// Tensors that a caller hands in: checked before anything is read or written.
#ifndef KVMIX_LIB_CACHE_VIEWS_H_
#define KVMIX_LIB_CACHE_VIEWS_H_

#include <cstddef>
#include <cstdint>

#include "kvmix/rows.h"
#include "kvmix/status.h"

namespace kvmix::internal {

// Numbers below it can be multiplied two by two, and be bytes, without overflow.
constexpr std::size_t kPlainLimit = std::size_t{1} << 28;

// The whole check of CheckRows.
Status CheckRowsSlowly(const kvmix_rows& rows, const char* name, std::size_t heads,
                       std::size_t head_dim);

// True for most rows of this many heads and this head_dim that CheckRows lets through.
inline bool ArePlain(const kvmix_rows& rows, std::size_t heads, std::size_t head_dim) {
  const auto size = [](std::ptrdiff_t x) {
    const std::size_t bits = static_cast<std::size_t>(x);
    return x < 0 ? 0 - bits : bits;
  };
  const std::size_t bytes = kvmix_dtype_bytes(rows.dtype);
  return bytes != 0 && rows.data != nullptr &&
         (reinterpret_cast<std::uintptr_t>(rows.data) & (bytes - 1)) == 0 &&
         (rows.tokens | size(rows.token_stride) | size(rows.head_stride)) < kPlainLimit &&
         rows.heads == heads && rows.head_dim == head_dim;
}

// Rows of this many heads and this head_dim, of a type that exists, all in memory that has
// addresses.
inline Status CheckRows(const kvmix_rows& rows, const char* name, std::size_t heads,
                        std::size_t head_dim) {
  if (ArePlain(rows, heads, head_dim)) return {};
  return CheckRowsSlowly(rows, name, heads, head_dim);
}

// Where rows [tokens, heads, dim] go.
class OutRows {
 public:
  // Errors: no place, rows that overlap each other, a type that does not exist.
  static Result<OutRows> Make(const kvmix_out& out, std::size_t tokens, std::size_t heads,
                              std::size_t dim);
  // An error where they overlap rows that are read.
  Status CheckApart(const RowsView& read) const;

  // A row's own place, if it is f32; else null, and Put takes the row.
  float* Direct(std::size_t token, std::size_t head) const {
    return rows_.dtype == KVMIX_F32 ? static_cast<float*>(Place(token, head)) : nullptr;
  }
  void Put(std::size_t token, std::size_t head, const float* row) const;

 private:
  explicit OutRows(const RowsView& rows) : rows_(rows) {}
  void* Place(std::size_t token, std::size_t head) const {
    return const_cast<void*>(rows_.row(token, head));
  }
  RowsView rows_;  // the same places
};

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_CACHE_VIEWS_H_
