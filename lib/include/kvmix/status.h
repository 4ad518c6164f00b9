// Errors as values: bad input never throws across the library's border and never aborts. A Status
// says what went wrong and what it concerns (the file, what was expected, what was found) in one
// line that a tool can print as it stands.
#ifndef KVMIX_STATUS_H_
#define KVMIX_STATUS_H_

#include <optional>
#include <string>
#include <utility>

#include "kvmix/export.h"

namespace kvmix {

enum class ErrorCode {
  kOk,
  kInvalidArgument,  // a parameter outside its documented range
  kNotFound,         // no such file, tensor, layer
  kIo,               // reading or writing failed
  kCorrupt,          // a file that breaks its own format
  kVersion,          // a file of a newer major version
  kMismatch,         // two things that should agree do not (geometry, shapes)
  kNonFinite,        // NaN or Inf in the data
  kOutOfMemory,      // more memory asked for than there is, or past a cache's capacity
  kInfeasible,       // no plan holds the constraints
  kCancelled,        // the caller's progress callback stopped the work
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(ErrorCode code, std::string message) : code_(code), message_(std::move(message)) {}
  bool ok() const { return code_ == ErrorCode::kOk; }
  ErrorCode code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  ErrorCode code_ = ErrorCode::kOk;
  std::string message_;
};

namespace internal {
// Says what was taken for a value, or for an error, and aborts.
[[noreturn]] KVMIX_API void WrongResult(const Status& status);
}  // namespace internal

// Either a value or the error that prevented it. To take the value where there is none is a bug in
// the program, and stops it.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}
  Result(Status error) : status_(std::move(error)) {
    if (status_.ok()) internal::WrongResult(status_);
  }
  bool ok() const { return value_.has_value(); }
  const Status& status() const { return status_; }
  T& value() {
    if (!ok()) internal::WrongResult(status_);
    return *value_;
  }
  const T& value() const {
    if (!ok()) internal::WrongResult(status_);
    return *value_;
  }
  T& operator*() { return value(); }
  const T& operator*() const { return value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

 private:
  Status status_;
  std::optional<T> value_;
};

}  // namespace kvmix

#endif  // KVMIX_STATUS_H_
