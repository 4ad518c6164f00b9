// The inner side of kvmix/kvmix.h: handles, the guard that no exception passes, and checks of
// whatever comes in. Nothing is believed: a pointer may be null, a handle destroyed, a struct of
// another version, an enum any number.
#ifndef KVMIX_LIB_DOOR_DOOR_H_
#define KVMIX_LIB_DOOR_DOOR_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "kvmix/kvmix.h"
#include "kvmix/plan.h"
#include "kvmix/status.h"
#include "lib/files/file.h"

namespace kvmix::door {

using internal::Error;

// ---- handles

// The base of a handle. In a build with debug information the shell of a destroyed handle stays, in
// a list, so that a later use finds its mark.
struct Shell {
  std::uint32_t mark;
  Shell* next = nullptr;
};
constexpr std::uint32_t kDestroyed = 0x64616564;  // "dead"
void Keep(Shell* shell);

template <class T, std::uint32_t kMark>
struct Handle : Shell {
  using Body = T;
  static constexpr std::uint32_t kMyMark = kMark;
  explicit Handle(T value) : Shell{kMark}, body(std::move(value)) {}
  std::optional<T> body;
};

template <class H>
bool IsLive(const H* handle) {
  return handle != nullptr && handle->mark == H::kMyMark;
}

Status NotLive(const Shell* handle);
Status IsNull(const char* name);

template <class H>
void Destroy(H* handle) {
  if (!IsLive(handle)) return;
  handle->mark = kDestroyed;
#ifdef KVMIX_KEEP_HANDLES
  handle->body.reset();
  Keep(handle);
#else
  delete handle;
#endif
}

// ---- calls

kvmix_code WriteError(kvmix_error* error, const Status& status);
inline kvmix_code Write(kvmix_error* error, const Status& status) {
  if (!status.ok()) return WriteError(error, status);
  if (error != nullptr) {
    error->code = KVMIX_OK;
    error->text[0] = '\0';
  }
  return KVMIX_OK;
}
// The same for the exception that is being handled.
kvmix_code WriteCaught(kvmix_error* error) noexcept;

// What f, which returns a Status, comes to.
template <class F>
kvmix_code Guarded(kvmix_error* error, const F& f) {
  try {
    return Write(error, f());
  } catch (...) {
    return WriteCaught(error);
  }
}

// The same for a function of a handle's body.
template <class H, class F>
kvmix_code With(H* handle, kvmix_error* error, const F& f) {
  return Guarded(error, [&] { return IsLive(handle) ? f(*handle->body) : NotLive(handle); });
}

// A function that returns no code: f's value, 0 where it throws.
template <class F>
auto Value(const F& f) -> decltype(f()) {
  try {
    return f();
  } catch (...) {
    return {};
  }
}

// The same of a handle's body, 0 where there is none.
template <class H, class F>
auto Ask(const H* handle, const F& f) -> decltype(f(*handle->body)) {
  if (!IsLive(handle)) return {};
  return Value([&] { return f(*handle->body); });
}

// A new handle, of the body that `make` returns as a Result.
template <class H, class F>
kvmix_code Make(H** out, kvmix_error* error, const F& make) {
  return Guarded(error, [&]() -> Status {
    if (out == nullptr) return IsNull("out");
    *out = nullptr;
    Result<typename H::Body> body = make();
    if (body.ok()) *out = new H(std::move(*body));
    return body.status();
  });
}

// ---- structs that can grow

Status CheckSize(std::size_t found, std::size_t known, const unsigned char* beyond,
                 const char* name);

template <class T>
Status CheckStruct(const T* s, const char* name) {
  if (s == nullptr) return IsNull(name);
  if (s->struct_size == sizeof(T)) return {};
  return CheckSize(s->struct_size, sizeof(T), reinterpret_cast<const unsigned char*>(s + 1), name);
}

// A caller's array, whose elements may be longer than ours.
template <class T>
const T& At(const T* first, std::size_t i) {
  return *reinterpret_cast<const T*>(reinterpret_cast<const char*>(first) + i * first->struct_size);
}

template <class T>
Status CheckArray(const T* first, std::size_t count, const char* name) {
  if (count != 0 && first == nullptr) return IsNull(name);
  for (std::size_t i = 0; i < count; ++i) {
    if (Status s = CheckStruct(&At(first, i), name); !s.ok()) return s;
    if (At(first, i).struct_size == first->struct_size) continue;
    return Error(ErrorCode::kInvalidArgument, "{}: expected one struct_size, found {} and {}", name,
                 first->struct_size, At(first, i).struct_size);
  }
  return {};
}

// Fills in a caller's struct; what is beyond ours becomes 0.
template <class T>
Status Fill(T* out, T value, const char* name) {
  if (out == nullptr) return IsNull(name);
  const std::size_t size = value.struct_size = out->struct_size;
  if (size != sizeof(T)) {
    if (Status s = CheckSize(size, sizeof(T), nullptr, name); !s.ok()) return s;
    std::memset(out + 1, 0, size - sizeof(T));
  }
  *out = value;
  return {};
}

// ---- the rest

// A text that ends with a 0 byte within its first 4096; null: "".
Result<std::string_view> TextOf(const char* text, const char* name);
// text, cut to `size` bytes with a 0 at its end. Returns the length of the whole.
std::size_t CopyText(std::string_view text, char* to, std::size_t size);

Status CheckTensor(kvmix_tensor tensor);
// A codec whose pointers can be read. (CheckCodec looks at the rest.)
Status CheckCodecStruct(const kvmix_codec* codec);

}  // namespace kvmix::door

struct kvmix_plan : kvmix::door::Handle<kvmix::Plan, 0x6e616c70> {  // "plan"
  using Handle::Handle;
};

#endif  // KVMIX_LIB_DOOR_DOOR_H_
