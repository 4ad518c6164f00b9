// Files as the library uses them: mapped for reading, written whole or not at all; and the one form
// that its errors about files take.
#ifndef KVMIX_LIB_FILES_FILE_H_
#define KVMIX_LIB_FILES_FILE_H_

#include <cstddef>
#include <string>
#include <string_view>

#include "kvmix/status.h"

namespace kvmix::internal {

// "PATH: WHAT: expected EXPECTED, found FOUND" (without WHAT where it is empty).
Status FileError(ErrorCode code, const std::string& path, std::string_view what,
                 std::string_view expected, std::string_view found);

// Text of unknown origin as it may stand in a one-line message: control characters and bytes that
// are no UTF-8 become '?', more than `limit` bytes are cut.
std::string OneLine(std::string_view text, std::size_t limit = 200);
// The same in double quotes, short.
std::string Quoted(std::string_view text);

// The last part of a path: "dump" of "/data/dump/".
std::string FileName(const std::string& path);

// A whole regular file, read-only. Movable, owns the mapping. The file must not shrink while it is
// mapped.
class MappedFile {
 public:
  static Result<MappedFile> Open(const std::string& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::string_view bytes() const { return {data_, size_}; }  // starts on a page

 private:
  MappedFile(const char* data, std::size_t size) : data_(data), size_(size) {}
  const char* data_ = nullptr;
  std::size_t size_ = 0;
};

// Tells the kernel that the whole pages inside [data, data + size) of a MappedFile are not needed
// for now; they stay readable.
void ReleasePages(const void* data, std::size_t size);

// Writes a temporary file beside `path` and renames it: `path` is then whole, or as it was. A path
// that is no regular file (a device, a pipe) is written to directly. On an error nothing is left
// behind.
Status WriteFileAtomically(const std::string& path, std::string_view text);

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_FILES_FILE_H_
