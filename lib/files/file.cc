#include "lib/files/file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <filesystem>
#include <system_error>
#include <utility>

namespace kvmix::internal {

namespace {

// Closes on destruction, for the paths that end early.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() { Close(); }
  int get() const { return fd_; }
  bool ok() const { return fd_ >= 0; }
  int Close() { return fd_ >= 0 ? close(std::exchange(fd_, -1)) : 0; }

 private:
  int fd_;
};

Status SystemError(const std::string& path, std::string_view expected, int error) {
  const bool missing = error == ENOENT || error == ENOTDIR;
  return FileError(missing ? ErrorCode::kNotFound : ErrorCode::kIo, path, "", expected,
                   std::generic_category().message(error));
}

bool WriteAll(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = write(fd, text.data(), text.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return false;
    text.remove_prefix(static_cast<std::size_t>(written));
  }
  return true;
}

Status WriteDirectly(const std::string& path, std::string_view text) {
  Descriptor file(open(path.c_str(), O_WRONLY | O_CLOEXEC));
  if (!file.ok() || !WriteAll(file.get(), text) || file.Close() != 0)
    return SystemError(path, "a file that can be written", errno);
  return {};
}

// Creates a file of a name that nothing has yet.
int CreateBeside(const std::string& path, std::string* name) {
  static std::atomic<unsigned> counter{0};
  int fd = -1;
  do {
    *name = fmt::format("{}.{}-{}.tmp", path, getpid(), counter++);
    fd = open(name->c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  } while (fd < 0 && errno == EEXIST);
  return fd;
}

// Bytes of the UTF-8 character that `text` begins with; 0 where it begins with none.
std::size_t CharacterLength(std::string_view text) {
  const auto byte = [&](std::size_t i) {
    return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u;
  };
  if (byte(0) < 0x80u) return 1;
  const std::size_t length = byte(0) >= 0xF0u ? 4 : byte(0) >= 0xE0u ? 3 : 2;
  std::uint32_t code = byte(0) & (0x7Fu >> length);
  for (std::size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xC0u) != 0x80u) return 0;
    code = code << 6 | (byte(i) & 0x3Fu);
  }
  constexpr std::uint32_t kLeast[] = {0, 0, 0x80u, 0x800u, 0x10000u};
  const bool surrogate = code >= 0xD800u && code < 0xE000u;
  return byte(0) < 0xC0u || byte(0) >= 0xF8u || code < kLeast[length] || code > 0x10FFFFu ||
                 surrogate
             ? 0
             : length;
}

}  // namespace

Status FileError(ErrorCode code, const std::string& path, std::string_view what,
                 std::string_view expected, std::string_view found) {
  return Status(code, fmt::format("{}: {}{}expected {}, found {}", OneLine(path, 4096), what,
                                  what.empty() ? "" : ": ", expected, found));
}

std::string OneLine(std::string_view text, std::size_t limit) {
  std::string line;
  std::size_t i = 0;
  while (i < text.size()) {
    const std::size_t length = CharacterLength(text.substr(i));
    if (i + std::max<std::size_t>(length, 1) > limit) return line + "...";
    const bool control =
        length == 1 && (static_cast<unsigned char>(text[i]) < 0x20u || text[i] == 0x7F);
    line += length == 0 || control ? "?" : text.substr(i, length);
    i += std::max<std::size_t>(length, 1);
  }
  return line;
}

std::string Quoted(std::string_view text) { return '"' + OneLine(text, 60) + '"'; }

std::string FileName(const std::string& path) {
  const std::size_t end = path.find_last_not_of('/');
  const std::size_t slash = path.find_last_of('/', end);
  return path.substr(slash + 1, end - slash);  // npos + 1 is 0
}

Result<MappedFile> MappedFile::Open(const std::string& path) {
  const Descriptor file(
      open(path.c_str(),
           O_RDONLY | O_CLOEXEC | O_NONBLOCK));  // O_NONBLOCK: do not wait for a pipe's writer
  struct stat info {};
  if (!file.ok() || fstat(file.get(), &info) != 0)
    return SystemError(path, "a readable file", errno);
  if (!S_ISREG(info.st_mode))
    return FileError(ErrorCode::kIo, path, "", "a regular file",
                     S_ISDIR(info.st_mode) ? "a folder" : "something else");
  if (info.st_size == 0) return MappedFile(nullptr, 0);
  const auto size = static_cast<std::size_t>(info.st_size);
  char last = 0;  // Touching a mapping past the real end would kill the process: see that the last
                  // byte is there.
  if (pread(file.get(), &last, 1, info.st_size - 1) != 1) {
    return FileError(ErrorCode::kIo, path, "",
                     fmt::format("{} bytes, as the file system says", size), "fewer when read");
  }
  void* data = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (data == MAP_FAILED) return SystemError(path, "a file that can be mapped into memory", errno);
  return MappedFile(static_cast<const char*>(data), size);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<char*>(data_), size_);
}

void ReleasePages(const void* data, std::size_t size) {
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<std::uintptr_t>(data) + page - 1) / page * page;
  const auto end = (reinterpret_cast<std::uintptr_t>(data) + size) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

Status WriteFileAtomically(const std::string& path, std::string_view text) {
  struct stat info {};
  const bool exists = stat(path.c_str(), &info) == 0;
  if (exists && S_ISDIR(info.st_mode))
    return FileError(ErrorCode::kIo, path, "", "a file to write to", "a folder");
  if (exists && !S_ISREG(info.st_mode)) return WriteDirectly(path, text);
  std::error_code error;
  std::string target = path;  // a link stays a link: its target is replaced
  if (exists) target = std::filesystem::canonical(path, error).string();
  if (error) return SystemError(path, "a file that can be written", error.value());

  std::string temporary;
  Descriptor file(CreateBeside(target, &temporary));
  if (!file.ok()) return SystemError(path, "a folder that a file can be created in", errno);
  if (!WriteAll(file.get(), text) || file.Close() != 0 ||
      rename(temporary.c_str(), target.c_str()) != 0) {
    const int failure = errno;
    unlink(temporary.c_str());
    return SystemError(
        path, fmt::format("room for {} bytes and the right to write them", text.size()), failure);
  }
  return {};
}

}  // namespace kvmix::internal
