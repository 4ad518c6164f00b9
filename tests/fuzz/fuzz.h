// What the fuzz targets share. A target is one file: it reads any bytes as one kind of file
// (LLVMFuzzerTestOneInput, libFuzzer's entry point), aborts where a promise of the reader does not
// hold, and gives good files to begin with (Seeds).
#ifndef KVMIX_TESTS_FUZZ_FUZZ_H_
#define KVMIX_TESTS_FUZZ_FUZZ_H_

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
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

// A file of its own, for readers that take a path; writers may replace it.
class TemporaryFile {
 public:
  TemporaryFile() : path_((std::filesystem::temp_directory_path() / "kvmix-fuzz-XXXXXX").string()) {
    const int file = mkstemp(path_.data());
    Require(file >= 0, "a temporary file");
    close(file);
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  ~TemporaryFile() { unlink(path_.c_str()); }

  const std::string& path() const { return path_; }

  void Write(std::string_view bytes) {
    std::ofstream file(path_, std::ios::binary | std::ios::trunc);
    Require(bool(file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()))),
            "a temporary file that can be written");
  }

  std::string Read() const {
    std::ifstream file(path_, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }

 private:
  std::string path_;
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
