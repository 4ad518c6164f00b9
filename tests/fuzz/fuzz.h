// What the fuzz targets share. A target is one file: it reads any bytes as one kind of file
// (LLVMFuzzerTestOneInput, libFuzzer's entry point), aborts where a promise of the reader does not
// hold, and gives good files to begin with (Seeds).
#ifndef KVMIX_TESTS_FUZZ_FUZZ_H_
#define KVMIX_TESTS_FUZZ_FUZZ_H_

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "kvmix/status.h"

namespace kvmix::fuzz {

// Files that the reader accepts, and some that it refuses late.
std::vector<std::string> Seeds();

inline void Require(bool holds, const char* promise, const Status& status = {}) {
  if (holds) return;
  std::fprintf(stderr, "fuzz: does not hold: %s\n%s\n", promise, status.message().c_str());
  std::abort();
}

// A file in memory, for readers that take a path.
class MemoryFile {
 public:
  MemoryFile() : fd_(memfd_create("kvmix-fuzz", MFD_CLOEXEC)) {
    Require(fd_ >= 0, "a file in memory");
  }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  ~MemoryFile() { close(fd_); }

  std::string path() const { return "/proc/self/fd/" + std::to_string(fd_); }

  void Write(std::string_view bytes) {
    const auto size = static_cast<off_t>(bytes.size());
    Require(ftruncate(fd_, size) == 0 && pwrite(fd_, bytes.data(), bytes.size(), 0) == size,
            "a file in memory that can be written");
  }

  std::string Read() const {
    std::string bytes(static_cast<std::size_t>(lseek(fd_, 0, SEEK_END)), '\0');
    Require(pread(fd_, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()),
            "a file in memory that can be read");
    return bytes;
  }

 private:
  int fd_;
};

// An error is one line that begins with the file's name and says what was expected and found.
inline void RequireGoodError(const Status& status, const std::string& path) {
  const std::string& m = status.message();
  Require(!status.ok() && m.starts_with(path + ": ") && m.find('\n') == m.npos &&
              m.find("expected") != m.npos && m.find("found") != m.npos,
          "an error of one line with expected and found", status);
}

}  // namespace kvmix::fuzz

#endif  // KVMIX_TESTS_FUZZ_FUZZ_H_
