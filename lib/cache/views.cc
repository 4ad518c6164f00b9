#include "lib/cache/views.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "lib/files/file.h"

namespace kvmix::internal {
namespace {

// Distances in bytes from a view's first number to its lowest, and to the one after its highest.
struct Extent {
  std::ptrdiff_t low = 0, high = 0;
};

// False where a distance is too large for memory.
bool Measure(const RowsView& x, Extent* extent) {
  const std::ptrdiff_t bytes = static_cast<std::ptrdiff_t>(x.element_bytes());
  std::size_t numbers = 0;
  bool bad = __builtin_mul_overflow(x.tokens, x.heads, &numbers) ||
             __builtin_mul_overflow(numbers, x.head_dim * sizeof(float), &numbers) ||
             numbers > PTRDIFF_MAX;
  for (const auto& [count, stride] :
       {std::pair{x.tokens, x.token_stride}, {x.heads, x.head_stride}}) {
    std::ptrdiff_t span = 0;
    std::ptrdiff_t* const end = stride < 0 ? &extent->low : &extent->high;
    bad |= __builtin_mul_overflow(count - 1, stride, &span) ||
           __builtin_mul_overflow(span, bytes, &span) || __builtin_add_overflow(*end, span, end);
  }
  std::ptrdiff_t row = 0;
  bad |= __builtin_mul_overflow(x.head_dim, bytes, &row) ||
         __builtin_add_overflow(extent->high, row, &extent->high);
  return !bad;
}

// The rows have a type, and memory that has addresses.
Status CheckPlace(const RowsView& rows, const char* name) {
  const std::size_t bytes = rows.element_bytes();
  if (bytes == 0) {
    return Error(ErrorCode::kInvalidArgument, "{}: expected f16, bf16 or f32, found dtype {}", name,
                 static_cast<int>(rows.dtype));
  }
  if (rows.tokens == 0 || rows.heads == 0 || rows.head_dim == 0) return {};
  if (rows.data == nullptr) {
    return Error(ErrorCode::kInvalidArgument, "{}: expected {} rows, found null", name,
                 rows.tokens * rows.heads);
  }
  if (reinterpret_cast<std::uintptr_t>(rows.data) % bytes != 0) {
    return Error(ErrorCode::kInvalidArgument, "{}: expected data at a multiple of {} bytes", name,
                 bytes);
  }
  Extent extent;
  if (Measure(rows, &extent)) return {};
  return Error(ErrorCode::kInvalidArgument,
               "{}: expected rows that fit into memory, found {} x {} x {} with strides {} and {}",
               name, rows.tokens, rows.heads, rows.head_dim, rows.token_stride, rows.head_stride);
}

// Whether one of the strides is larger than all that the other spans.
bool IsNested(const RowsView& x) {
  std::pair<std::size_t, std::ptrdiff_t> inner{x.heads, std::abs(x.head_stride)},
      outer{x.tokens, std::abs(x.token_stride)};
  if (inner.second > outer.second) std::swap(inner, outer);
  const std::ptrdiff_t dim = static_cast<std::ptrdiff_t>(x.head_dim);
  if (inner.first <= 1) return outer.first <= 1 || outer.second >= dim;
  const std::ptrdiff_t span = static_cast<std::ptrdiff_t>(inner.first - 1) * inner.second + dim;
  return inner.second >= dim && (outer.first <= 1 || outer.second >= span);
}

}  // namespace

Status CheckRowsSlowly(const kvmix_rows& rows, const char* name, std::size_t heads,
                       std::size_t head_dim) {
  if (rows.heads != heads || rows.head_dim != head_dim) {
    return Error(ErrorCode::kMismatch, "{}: expected {} heads x {}, found {} x {}", name, heads,
                 head_dim, rows.heads, rows.head_dim);
  }
  return CheckPlace(rows, name);
}

Result<OutRows> OutRows::Make(const kvmix_out& out, std::size_t tokens, std::size_t heads,
                              std::size_t dim) {
  RowsView rows = RowsView::Dense(out.data, out.dtype, tokens, heads, dim);
  if (out.token_stride != 0 || out.head_stride != 0) {
    rows.token_stride = out.token_stride;
    rows.head_stride = out.head_stride;
  }
  if (Status s = CheckPlace(rows, "out"); !s.ok()) return s;
  if (tokens == 0 || heads == 0 || IsNested(rows)) return OutRows(rows);
  return Error(ErrorCode::kInvalidArgument,
               "out: expected strides that keep {} x {} rows of {} apart, found {} and {}", tokens,
               heads, dim, rows.token_stride, rows.head_stride);
}

Status OutRows::CheckApart(const RowsView& read) const {
  Extent to, from;
  if (!Measure(rows_, &to) || !Measure(read, &from)) return {};  // said before
  if (rows_.tokens == 0 || read.tokens == 0) return {};
  const char* const out = static_cast<const char*>(rows_.data);
  const char* const in = static_cast<const char*>(read.data);
  const std::ptrdiff_t begin = (out + to.low) - (in + from.low), end = begin + to.high - to.low;
  if (begin >= from.high - from.low || end <= 0) return {};
  // Rows of one tensor, each token's output after (or before) what is read of it.
  const auto bytes = [](const RowsView& x, std::ptrdiff_t stride) {
    return stride * static_cast<std::ptrdiff_t>(x.element_bytes());
  };
  const auto token = [&](const RowsView& x) {
    return bytes(x, static_cast<std::ptrdiff_t>(x.heads - 1) * x.head_stride +
                        static_cast<std::ptrdiff_t>(x.head_dim));
  };
  const std::ptrdiff_t stride = bytes(rows_, rows_.token_stride);
  if (stride > 0 && stride == bytes(read, read.token_stride) && rows_.head_stride >= 0 &&
      read.head_stride >= 0) {
    const std::ptrdiff_t after = ((out - in) % stride + stride) % stride;
    if (after >= token(read) && after + token(rows_) <= stride) return {};
  }
  return Error(ErrorCode::kInvalidArgument, "out: expected a place that does not overlap q");
}

void OutRows::Put(std::size_t token, std::size_t head, const float* row) const {
  void* const to = Place(token, head);
  const float* const end = row + rows_.head_dim;
  switch (rows_.dtype) {
    case KVMIX_F32:
      std::copy(row, end, static_cast<float*>(to));
      break;
    case KVMIX_F16:
      std::transform(row, end, static_cast<Half*>(to), FloatToHalf);
      break;
    case KVMIX_BF16:
      std::transform(row, end, static_cast<std::uint16_t*>(to), FloatToBFloat);
      break;
  }
}

}  // namespace kvmix::internal
