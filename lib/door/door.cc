#include "lib/door/door.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <new>
#include <stdexcept>

#include "kernels/kernels.h"
#include "kvmix/version.h"

namespace kvmix::door {

namespace {

// A caller's mistake larger than this is not taken for a struct of the future.
constexpr std::size_t kMostStructBytes = 4096;
constexpr std::size_t kMostTextBytes = 4096;

std::atomic<Shell*> kept{nullptr};

kvmix_code Write(kvmix_error* error, ErrorCode code, std::string_view text) {
  if (error != nullptr) {
    error->code = static_cast<kvmix_code>(code);
    CopyText(text, error->text, sizeof(error->text));
  }
  return static_cast<kvmix_code>(code);
}

}  // namespace

void Keep(Shell* shell) {
  shell->next = kept.load();
  while (!kept.compare_exchange_weak(shell->next, shell)) {
  }
}

Status NotLive(const Shell* handle) {
  return Error(ErrorCode::kInvalidArgument, "handle: expected one that was made here, found {}",
               handle == nullptr            ? "null"
               : handle->mark == kDestroyed ? "one that was destroyed"
                                            : "something else");
}

Status IsNull(const char* name) {
  return Error(ErrorCode::kInvalidArgument, "{}: expected a pointer, found null", name);
}

kvmix_code WriteError(kvmix_error* error, const Status& status) {
  return Write(error, status.code(), status.message());
}

kvmix_code WriteCaught(kvmix_error* error) noexcept {
  try {
    throw;
  } catch (const std::bad_alloc&) {
    return Write(error, ErrorCode::kOutOfMemory, "the system gives no more memory");
  } catch (const std::length_error&) {
    return Write(error, ErrorCode::kOutOfMemory, "expected a size that memory has, found a larger");
  } catch (const std::exception& e) {
    return Write(error, ErrorCode::kInternal, e.what());
  } catch (...) {
    return Write(error, ErrorCode::kInternal, "an exception that is no std::exception");
  }
}

Status CheckSize(std::size_t found, std::size_t known, const unsigned char* beyond,
                 const char* name) {
  if (found < known || found > kMostStructBytes) {
    return Error(ErrorCode::kInvalidArgument, "{}: struct_size: expected {}, found {}", name, known,
                 found);
  }
  if (beyond == nullptr ||
      std::all_of(beyond, beyond + (found - known), [](unsigned char x) { return x == 0; })) {
    return {};
  }
  return Error(ErrorCode::kInvalidArgument,
               "{}: struct_size {}: expected fields that this version knows, {} bytes, found a "
               "later one that is not 0",
               name, found, known);
}

Result<std::string_view> TextOf(const char* text, const char* name) {
  if (text == nullptr) return std::string_view();
  const std::size_t length = strnlen(text, kMostTextBytes);
  if (length < kMostTextBytes) return std::string_view(text, length);
  return Error(ErrorCode::kInvalidArgument,
               "{}: expected a text of less than {} bytes, found no end", name, kMostTextBytes);
}

std::size_t CopyText(std::string_view text, char* to, std::size_t size) {
  if (to == nullptr || size == 0) return text.size();
  std::size_t length = std::min(text.size(), size - 1);
  // A character of UTF-8 is not cut.
  while (length < text.size() && length > 0 && (text[length] & 0xC0) == 0x80) --length;
  if (length != 0) std::memcpy(to, text.data(), length);
  to[length] = '\0';
  return text.size();
}

Status CheckTensor(kvmix_tensor tensor) {
  if (tensor == KVMIX_K || tensor == KVMIX_V) return {};
  return Error(ErrorCode::kInvalidArgument, "tensor: expected {} or {}, found {}",
               static_cast<int>(KVMIX_K), static_cast<int>(KVMIX_V), static_cast<int>(tensor));
}

Status CheckCodecStruct(const kvmix_codec* codec) {
  if (Status s = CheckStruct(codec, "codec"); !s.ok()) return s;
  constexpr std::uint32_t kSteps = KVMIX_STEP_CENTRE | KVMIX_STEP_FOLD | KVMIX_STEP_HADAMARD |
                                   KVMIX_STEP_SHAPE | KVMIX_STEP_OWN_CENTRE;
  if ((codec->steps & ~kSteps) != 0) {
    return Error(ErrorCode::kInvalidArgument, "codec: steps: expected at most {}, found {}", kSteps,
                 codec->steps);
  }
  const struct {
    const char* name;
    const float* data;
    std::size_t size, most;
  } vectors[] = {
      {"codec: mean", codec->mean, codec->mean_size, kMaxHeadDim},
      {"codec: factor", codec->factor, codec->factor_size, kMaxHeadDim},
      {"codec: shaping", codec->shaping, codec->shaping_size, kMaxHeadDim * kMaxHeadDim}};
  for (const auto& [name, data, size, most] : vectors) {
    if (size != 0 && data == nullptr) return IsNull(name);
    if (size <= most) continue;
    return Error(ErrorCode::kInvalidArgument, "{}: expected at most {} numbers, found {}", name,
                 most, size);
  }
  return {};
}

}  // namespace kvmix::door

const char* kvmix_code_name(kvmix_code code) {
  switch (code) {
    case KVMIX_OK:
      return "ok";
    case KVMIX_INVALID_ARGUMENT:
      return "invalid argument";
    case KVMIX_NOT_FOUND:
      return "not found";
    case KVMIX_IO:
      return "reading or writing failed";
    case KVMIX_CORRUPT:
      return "corrupt";
    case KVMIX_NEWER_VERSION:
      return "newer version";
    case KVMIX_MISMATCH:
      return "mismatch";
    case KVMIX_NON_FINITE:
      return "not finite";
    case KVMIX_OUT_OF_MEMORY:
      return "out of memory";
    case KVMIX_POOL_FULL:
      return "pool full";
    case KVMIX_PAST_CAPACITY:
      return "past the capacity";
    case KVMIX_INFEASIBLE:
      return "infeasible";
    case KVMIX_CANCELLED:
      return "cancelled";
    case KVMIX_INTERNAL:
      return "internal error";
  }
  return "unknown code";
}

const char* kvmix_version(void) { return KVMIX_VERSION; }

const char* kvmix_target(size_t i) {
  const auto targets = kvmix::kernels::AllKernels();
  return i < targets.size() ? targets[i].target : nullptr;
}
