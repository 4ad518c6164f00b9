#include "lib/files/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <system_error>

#include "lib/files/json_view.h"

namespace kvmix::internal {

namespace {

namespace fs = std::filesystem;

Status SystemError(const std::string& path, std::string_view expected, int error) {
  const bool missing = error == ENOENT || error == ENOTDIR;
  return FileError(missing ? ErrorCode::kNotFound : ErrorCode::kIo, path, "", expected,
                   std::generic_category().message(error));
}

// Closes in any case; where something fails, errno says what.
bool WriteAndClose(std::FILE* file, const FileWriter& write) {
  const bool written = write(file);
  return std::fclose(file) == 0 && written;
}

// Creates a file of a name that nothing has yet.
std::FILE* CreateBeside(const std::string& path, std::string* name) {
  static std::atomic<unsigned> counter{0};
  std::FILE* file = nullptr;
  do {
    *name = fmt::format("{}.{}-{}.tmp", path, getpid(), counter++);
    file = std::fopen(name->c_str(), "wxe");
  } while (file == nullptr && errno == EEXIST);
  return file;
}

}  // namespace

std::string OneLine(std::string_view text, std::size_t limit) {
  std::string line = nlohmann::json::parse(JsonText(text)).get<std::string>();  // now it is UTF-8
  std::ranges::replace_if(
      line, [](unsigned char c) { return c < 0x20 || c == 0x7F; }, '?');
  if (line.size() <= limit) return line;
  while (limit > 0 && (line[limit] & 0xC0) == 0x80) --limit;  // no half of a character
  return line.substr(0, limit) + "...";
}

std::string Quoted(std::string_view text) { return '"' + OneLine(text, 60) + '"'; }

std::string FileName(const std::string& path) {
  const fs::path whole(path);
  return (whole.has_filename() ? whole : whole.parent_path()).filename().string();
}

Result<MappedFile> MappedFile::Open(const std::string& path) {
  struct Descriptor {
    int fd;
    ~Descriptor() { close(fd); }
  };
  // O_NONBLOCK: do not wait for a pipe's writer.
  const Descriptor file{open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  struct stat info {};
  if (file.fd < 0 || fstat(file.fd, &info) != 0) return SystemError(path, "a readable file", errno);
  if (!S_ISREG(info.st_mode))
    return FileError(ErrorCode::kIo, path, "", "a regular file",
                     S_ISDIR(info.st_mode) ? "a folder" : "something else");
  MappedFile mapped;
  if (info.st_size == 0) return mapped;
  // Touching a mapping past the real end would kill the process: see that the last byte is there.
  const auto size = static_cast<std::size_t>(info.st_size);
  char last = 0;
  if (pread(file.fd, &last, 1, info.st_size - 1) != 1)
    return FileError(ErrorCode::kIo, path, "",
                     fmt::format("{} bytes, as the file system says", size), "fewer when read");
  void* data = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.fd, 0);
  if (data == MAP_FAILED)  // NOLINT(performance-no-int-to-ptr): the system's own macro
    return SystemError(path, "a file that can be mapped into memory", errno);
  mapped.mapping_ = std::shared_ptr<void>(data, [size](void* pages) { munmap(pages, size); });
  mapped.bytes_ = {static_cast<const char*>(data), size};
  return mapped;
}

void ReleasePages(std::string_view bytes) {
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto first = reinterpret_cast<std::uintptr_t>(bytes.data());
  const auto begin = (first + page - 1) / page * page, end = (first + bytes.size()) / page * page;
  if (begin >= end) return;
  madvise(const_cast<char*>(bytes.data()) + (begin - first), end - begin, MADV_DONTNEED);
}

Status WriteFileAtomically(const std::string& path, std::string_view expected,
                           const FileWriter& write) {
  std::error_code error;
  const fs::file_status now = fs::status(path, error);
  if (fs::is_directory(now))
    return FileError(ErrorCode::kIo, path, "", "a file to write to", "a folder");
  if (fs::is_other(now)) {
    std::FILE* file = std::fopen(path.c_str(), "we");
    if (file != nullptr && WriteAndClose(file, write)) return {};
    return SystemError(path, "a file that can be written", errno);
  }
  std::string target = path;
  if (fs::exists(now)) target = fs::canonical(path, error).string();  // a link stays a link
  if (target.empty()) return SystemError(path, "a file that can be written", error.value());

  std::string temporary;
  std::FILE* file = CreateBeside(target, &temporary);
  if (file == nullptr) return SystemError(path, "a folder that a file can be created in", errno);
  if (!WriteAndClose(file, write) || std::rename(temporary.c_str(), target.c_str()) != 0) {
    const int failure = errno;
    unlink(temporary.c_str());
    return SystemError(path, std::string(expected), failure);
  }
  return {};
}

Status WriteFileAtomically(const std::string& path, std::string_view text) {
  return WriteFileAtomically(
      path, fmt::format("room for {} bytes and the right to write them", text.size()),
      [&](std::FILE* file) {
        return std::fwrite(text.data(), 1, text.size(), file) == text.size();
      });
}

}  // namespace kvmix::internal
