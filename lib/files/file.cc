#include "lib/files/file.h"

#include <fcntl.h>
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

// Waits until the disk has it. File systems that cannot say so are believed.
bool Flush(int descriptor) {
  return fsync(descriptor) == 0 || errno == EINVAL || errno == ENOTSUP || errno == ENOSYS;
}

// A rename is on the disk once its folder is.
void FlushFolderOf(const std::string& path) {
  const fs::path folder = fs::path(path).parent_path();
  const int descriptor =
      open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) return;  // the file is there all the same
  Flush(descriptor);
  close(descriptor);
}

// Creates a file of a name that nothing has yet.
std::FILE* CreateBeside(const std::string& path, std::string* name) {
  static std::atomic<unsigned> counter{0};
  std::FILE* file = nullptr;
  do {
    *name = NameBeside(path, fmt::format(".{}-{}.tmp", getpid(), counter++));
    file = std::fopen(name->c_str(), "wxe");
  } while (file == nullptr && errno == EEXIST);
  return file;
}

// Gives a new file what the file that it replaces has: owner and group, as far as this process may,
// and its mode.
void CopyOwnerAndMode(const struct stat& from, int to) {
  if (fchown(to, from.st_uid, from.st_gid) != 0 &&
      fchown(to, static_cast<uid_t>(-1), from.st_gid) != 0)
    errno = 0;  // it stays this process's
  fchmod(to, from.st_mode & 07777);
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

Result<File> File::Open(const std::string& path) {
  // O_NONBLOCK: do not wait for a pipe's writer.
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) return SystemError(path, "a readable file", errno);
  File file;
  file.path_ = path;
  file.descriptor_ = std::shared_ptr<const int>(new int(descriptor), [](const int* owned) {
    close(*owned);
    delete owned;
  });
  struct stat info {};
  if (fstat(descriptor, &info) != 0) return SystemError(path, "a readable file", errno);
  if (!S_ISREG(info.st_mode)) {
    return FileError(ErrorCode::kIo, path, "", "a regular file",
                     S_ISDIR(info.st_mode) ? "a folder" : "something else");
  }
  file.size_ = static_cast<std::uint64_t>(info.st_size);
  file.changed_[0] = info.st_mtim.tv_sec;
  file.changed_[1] = info.st_mtim.tv_nsec;
  return file;
}

Status File::Read(std::uint64_t first, std::span<char> to) const {
  while (!to.empty()) {
    const ssize_t n = pread(*descriptor_, to.data(), to.size(), static_cast<off_t>(first));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return SystemError(path_, "a file that can be read", errno);
    if (n == 0) {
      return FileError(ErrorCode::kIo, path_, "",
                       fmt::format("{} bytes, as when it was opened", size_),
                       fmt::format("its end at byte {}", first));
    }
    first += static_cast<std::uint64_t>(n);
    to = to.subspan(static_cast<std::size_t>(n));
  }
  struct stat info {};
  if (fstat(*descriptor_, &info) != 0) return SystemError(path_, "a readable file", errno);
  if (static_cast<std::uint64_t>(info.st_size) == size_ && info.st_mtim.tv_sec == changed_[0] &&
      info.st_mtim.tv_nsec == changed_[1])
    return {};
  return FileError(
      ErrorCode::kIo, path_, "", "a file that stays as it is while it is read",
      fmt::format("that another program changed it ({} bytes, {} before)", info.st_size, size_));
}

Result<std::string> ReadFile(const std::string& path, std::uint64_t most) {
  const Result<File> file = File::Open(path);
  if (!file.ok()) return file.status();
  if (file->size() > most) {
    return FileError(ErrorCode::kCorrupt, path, "", fmt::format("at most {} bytes", most),
                     file->size());
  }
  std::string bytes(file->size(), '\0');
  if (Status s = file->Read(0, bytes); !s.ok()) return s;
  return bytes;
}

std::string RealPath(const std::string& path) {
  constexpr int kMostLinks = 40;  // as many as Linux follows
  fs::path real = path;
  std::error_code error;
  for (int links = 0; links < kMostLinks && fs::is_symlink(fs::symlink_status(real, error));
       ++links)
    real = real.parent_path() / fs::read_symlink(real, error);  // an absolute one stands alone
  return real.string();
}

std::string NameBeside(const std::string& path, std::string_view end) {
  const fs::path whole(path);
  const std::string begin = whole.filename().string().substr(0, kNameBesideBytes);
  return (whole.parent_path() / (begin + std::string(end))).string();
}

bool IsNullDevice(const std::string& path) {
  struct stat device {
  }, null{};
  return stat(path.c_str(), &device) == 0 && stat("/dev/null", &null) == 0 &&
         S_ISCHR(device.st_mode) && S_ISCHR(null.st_mode) && device.st_rdev == null.st_rdev;
}

Status WriteFileAtomically(const std::string& path, std::string_view expected,
                           const FileWriter& write) {
  std::error_code error;
  const fs::file_status now = fs::status(path, error);
  if (now.type() == fs::file_type::none)  // links in a circle, say
    return SystemError(path, "a file that can be written", error.value());
  if (fs::is_directory(now))
    return FileError(ErrorCode::kIo, path, "", "a file to write to", "a folder");
  if (fs::is_other(now)) {
    std::FILE* file = std::fopen(path.c_str(), "we");
    if (file != nullptr && WriteAndClose(file, write)) return {};
    return SystemError(path, "a file that can be written", errno);
  }
  const std::string target = RealPath(path);
  std::string temporary;
  std::FILE* file = CreateBeside(target, &temporary);
  if (file == nullptr) return SystemError(path, "a folder that a file can be created in", errno);
  struct stat before {};
  if (stat(target.c_str(), &before) == 0) CopyOwnerAndMode(before, fileno(file));
  const auto write_and_flush = [&](std::FILE* to) {
    return write(to) && std::fflush(to) == 0 && Flush(fileno(to));
  };
  if (!WriteAndClose(file, write_and_flush) ||
      std::rename(temporary.c_str(), target.c_str()) != 0) {
    const int failure = errno;
    unlink(temporary.c_str());
    return SystemError(path, std::string(expected), failure);
  }
  FlushFolderOf(target);
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
