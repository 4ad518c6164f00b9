// Errors as values: bad input never throws across the library's border and never aborts. A Status
// says what went wrong and what it concerns (the file, what was expected, what was found) in one
// line that a tool can print as it stands.
#ifndef KVMIX_STATUS_H_
#define KVMIX_STATUS_H_

#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string>
#include <utility>

#include "kvmix/kvmix.h"

namespace kvmix {

// kvmix_code, number by number.
enum class ErrorCode : int {
  kOk = KVMIX_OK,
  kInvalidArgument = KVMIX_INVALID_ARGUMENT,
  kNotFound = KVMIX_NOT_FOUND,
  kIo = KVMIX_IO,
  kCorrupt = KVMIX_CORRUPT,
  kVersion = KVMIX_NEWER_VERSION,
  kMismatch = KVMIX_MISMATCH,
  kNonFinite = KVMIX_NON_FINITE,
  kOutOfMemory = KVMIX_OUT_OF_MEMORY,
  kPoolFull = KVMIX_POOL_FULL,
  kPastCapacity = KVMIX_PAST_CAPACITY,
  kInfeasible = KVMIX_INFEASIBLE,
  kCancelled = KVMIX_CANCELLED,
  kInternal = KVMIX_INTERNAL,
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

// A bug of the program that calls: says what was expected and found, and aborts.
[[noreturn]] inline void Stop(const std::string& expected, const std::string& found) {
  std::fprintf(stderr, "kvmix: expected %s, found %s\n", expected.c_str(), found.c_str());
  std::abort();
}
[[noreturn]] inline void WrongResult(const Status& status) {
  if (status.ok()) Stop("a value or an error", "a Status that is ok");
  Stop("a value", "the error \"" + status.message() + '"');
}

// The text that a C function writes: f(text, size) returns the length of the whole.
template <class F>
std::string TextOf(const F& f) {
  std::string text(256, '\0');
  const std::size_t length = f(text.data(), text.size());
  const bool whole = length < text.size();
  text.resize(length + (whole ? 0 : 1));
  if (!whole) f(text.data(), text.size());
  text.resize(length);
  return text;
}

// Room for the error of a C function, and the Status that it becomes:
//   CallError error;
//   return error.Of(kvmix_cache_truncate(cache, tokens, error));
class CallError {
 public:
  operator kvmix_error*() { return &error_; }
  Status Of(kvmix_code code) const {
    return code == KVMIX_OK ? Status() : Status(static_cast<ErrorCode>(code), error_.text);
  }

 private:
  kvmix_error error_;
};

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
  T& value() & { return *Checked().value_; }
  const T& value() const& { return *Checked().value_; }
  T&& value() && { return std::move(*Checked().value_); }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T&& operator*() && { return std::move(value()); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

 private:
  Result& Checked() {
    if (!ok()) internal::WrongResult(status_);
    return *this;
  }
  const Result& Checked() const {
    if (!ok()) internal::WrongResult(status_);
    return *this;
  }

  Status status_;
  std::optional<T> value_;
};

}  // namespace kvmix

#endif  // KVMIX_STATUS_H_
