// Files as the library uses them: read piece by piece, written whole or not at all; and the forms
// that its errors take.
#ifndef KVMIX_LIB_FILES_FILE_H_
#define KVMIX_LIB_FILES_FILE_H_

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include <fmt/format.h>

#include "kvmix/status.h"

namespace kvmix::internal {

template <class... Args>
Status Error(ErrorCode code, fmt::format_string<Args...> message, Args&&... args) {
  return {code, fmt::format(message, std::forward<Args>(args)...)};
}

// Text of unknown origin as it may stand in a one-line message: control characters become '?',
// bytes that are no UTF-8 U+FFFD; more than `limit` bytes are cut.
std::string OneLine(std::string_view text, std::size_t limit = 200);
// The same in double quotes, short.
std::string Quoted(std::string_view text);

// "PATH: WHAT: expected EXPECTED, found FOUND" (without WHAT where it is empty). FOUND is whatever
// fmt prints.
Status FileError(ErrorCode code, const std::string& path, std::string_view what,
                 std::string_view expected, const auto& found) {
  return Error(code, "{}: {}{}expected {}, found {}", OneLine(path, 4096), what,
               what.empty() ? "" : ": ", expected, found);
}

// The last part of a path: "dump" of "/data/dump/".
std::string FileName(const std::string& path);

// A regular file that is read piece by piece into the caller's memory. A file that another program
// cuts or overwrites meanwhile is an error; it would be a SIGBUS if the file were mapped. Copies
// share the descriptor. Threads may read at the same time.
class File {
 public:
  static Result<File> Open(const std::string& path);
  const std::string& path() const { return path_; }
  std::uint64_t size() const { return size_; }
  // Fills `to` from this byte on. kIo: the file has fewer bytes, or another size or time of its
  // last change than when it was opened.
  Status Read(std::uint64_t first, std::span<char> to) const;

 private:
  std::string path_;
  std::shared_ptr<const int> descriptor_;
  std::uint64_t size_ = 0;
  std::int64_t changed_[2] = {};  // seconds, nanoseconds
};

// All of a regular file of at most `most` bytes; a larger one is kCorrupt.
Result<std::string> ReadFile(const std::string& path, std::uint64_t most = UINT64_MAX);

// The name that a path leads to through any symbolic links; the last one may lead to nothing yet.
std::string RealPath(const std::string& path);

// `path` with `end` behind its name, of which only so many bytes stay: names may have 255 bytes.
inline constexpr std::size_t kNameBesideBytes = 200;
std::string NameBeside(const std::string& path, std::string_view end);

// Whether a path leads to /dev/null or to a device node that does the same.
bool IsNullDevice(const std::string& path);

// Writes a temporary file beside the file that `path` leads to, flushes it to the disk and renames
// it: the file is then whole, or as it was. It keeps its mode and, where the system permits, its
// owner and group; a symbolic link stays one. A path that is no regular file (a device, a pipe) is
// written to directly. An error leaves nothing behind.
Status WriteFileAtomically(const std::string& path, std::string_view text);
// The same, with what `write` writes; it returns false where that fails. `expected` is what an
// error says was hoped for.
using FileWriter = std::function<bool(std::FILE* file)>;
Status WriteFileAtomically(const std::string& path, std::string_view expected,
                           const FileWriter& write);

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_FILES_FILE_H_
