// Files as the library uses them: mapped for reading, written whole or not at all; and the forms
// that its errors take.
#ifndef KVMIX_LIB_FILES_FILE_H_
#define KVMIX_LIB_FILES_FILE_H_

#include <cstddef>
#include <cstdio>
#include <functional>
#include <memory>
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

// A whole regular file, read-only. Copies share the mapping. The file must not shrink while it is
// mapped.
class MappedFile {
 public:
  static Result<MappedFile> Open(const std::string& path);
  std::string_view bytes() const { return bytes_; }  // starts on a page

 private:
  std::shared_ptr<const void> mapping_;
  std::string_view bytes_;
};

// Tells the kernel that the whole pages inside `bytes` of a MappedFile are not needed for now; they
// stay readable.
void ReleasePages(std::string_view bytes);

// Writes a temporary file beside `path` and renames it: `path` is then whole, or as it was. A path
// that is no regular file (a device, a pipe) is written to directly. On an error nothing is left
// behind.
Status WriteFileAtomically(const std::string& path, std::string_view text);
// The same, with what `write` writes; it returns false where that fails. `expected` is what an
// error says was hoped for.
using FileWriter = std::function<bool(std::FILE* file)>;
Status WriteFileAtomically(const std::string& path, std::string_view expected,
                           const FileWriter& write);

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_FILES_FILE_H_
