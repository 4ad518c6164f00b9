// Text for error lines, and files that are replaced whole or not at all.
#include "lib/files/file.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <functional>
#include <string>

#include "dump_files.h"

namespace kvmix {
namespace {

using testing::ExpectGoodMessage;
using testing::TempFolder;

TEST(OneLine, IsOneShortLine) {
  EXPECT_EQ(internal::OneLine("a\nb\x7F\tc"), "a?b??c");
  EXPECT_EQ(internal::OneLine("abcdef", 3), "abc...");
  EXPECT_EQ(internal::OneLine("ab\u00e9f", 3), "ab...");  // no half of a character
  EXPECT_EQ(internal::OneLine("ab\u00e9", 4), "ab\u00e9");
  const std::string stray = "\uFFFD";  // stray, cut, a surrogate, overlong
  EXPECT_EQ(internal::OneLine("a\xF9 \xC3(\xED\xA0\x80\xC0\xAF"),
            "a" + stray + " " + stray + "(" + stray + stray + stray + stray + stray);
  EXPECT_EQ(internal::Quoted(""), "\"\"");
}

TEST(FileName, IsTheLastPart) {
  EXPECT_EQ(internal::FileName("dump"), "dump");
  EXPECT_EQ(internal::FileName("/data/dump.x"), "dump.x");
  EXPECT_EQ(internal::FileName("../data/dump//"), "dump");
}

TEST(WriteFile, ReplacesWholeFilesOnly) {
  const TempFolder folder;
  const std::string path = folder.file("file");
  EXPECT_TRUE(internal::WriteFileAtomically(path, "first").ok());
  EXPECT_TRUE(internal::WriteFileAtomically(path, "second").ok());
  EXPECT_EQ(testing::ReadBytes(path), "second");
  std::filesystem::create_symlink(path, folder.file("link"));
  EXPECT_TRUE(internal::WriteFileAtomically(folder.file("link"), "third").ok());
  EXPECT_TRUE(std::filesystem::is_symlink(folder.file("link")));
  EXPECT_EQ(testing::ReadBytes(path), "third");
  EXPECT_EQ(folder.entries(), 2u);
}

TEST(WriteFile, KeepsModeAndGroup) {
  const TempFolder folder;
  const std::string path = folder.file("file");
  testing::WriteBytes(path, "first");
  ASSERT_EQ(chmod(path.c_str(), 0640), 0);
  const bool is_root = geteuid() == 0;
  if (is_root) {
    ASSERT_EQ(chown(path.c_str(), 65534, 65533), 0);
  }
  ASSERT_TRUE(internal::WriteFileAtomically(path, "second").ok());
  struct stat info {};
  ASSERT_EQ(stat(path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777u, 0640u);
  EXPECT_EQ(info.st_uid, is_root ? 65534u : geteuid());
  EXPECT_EQ(info.st_gid, is_root ? 65533u : getegid());
  EXPECT_EQ(testing::ReadBytes(path), "second");
}

TEST(WriteFile, FollowsLinksThatLeadToNothing) {
  const TempFolder folder;
  std::filesystem::create_directory(folder.file("real"));
  std::filesystem::create_symlink("real/file", folder.file("near"));
  std::filesystem::create_symlink(folder.file("near"), folder.file("far"));
  EXPECT_EQ(internal::RealPath(folder.file("far")), folder.file("real/file"));
  ASSERT_TRUE(internal::WriteFileAtomically(folder.file("far"), "text").ok());
  EXPECT_EQ(testing::ReadBytes(folder.file("real/file")), "text");
  EXPECT_TRUE(std::filesystem::is_symlink(folder.file("far")));
  EXPECT_TRUE(std::filesystem::is_symlink(folder.file("near")));

  std::filesystem::create_symlink("circle", folder.file("circle"));
  ExpectGoodMessage(internal::WriteFileAtomically(folder.file("circle"), "x"),
                    folder.file("circle"));
  EXPECT_EQ(folder.entries(), 4u);
}

TEST(WriteFile, TakesTheLongestName) {
  const TempFolder folder;
  for (const std::size_t length : {245, 255}) {
    const std::string path = folder.file(std::string(length, 'n'));
    const Status s = internal::WriteFileAtomically(path, "text");
    EXPECT_TRUE(s.ok()) << s.message();
    EXPECT_EQ(testing::ReadBytes(path), "text");
  }
  EXPECT_FALSE(internal::WriteFileAtomically(folder.file(std::string(256, 'n')), "text").ok());
  EXPECT_EQ(folder.entries(), 2u);
}

// A file that another program changes between opening and reading is an error that names it.
TEST(File, ThatChangesIsAnError) {
  const TempFolder folder;
  const std::string path = folder.file("file"), text(10000, 'x');
  const std::function<void()> changes[] = {
      [&] { std::filesystem::resize_file(path, 100); },
      [&] { std::filesystem::resize_file(path, 20000); },
      [&] { testing::WriteBytes(path, std::string(10000, 'y')); }};  // as cp does
  for (const auto& change : changes) {
    testing::WriteBytes(path, text);
    const timespec long_ago[] = {{1000, 0}, {1000, 0}};  // whatever the clock's steps are
    ASSERT_EQ(utimensat(AT_FDCWD, path.c_str(), long_ago, 0), 0);
    const internal::File file = internal::File::Open(path).value();
    EXPECT_EQ(file.size(), 10000u);
    std::string bytes(4000, ' ');
    ASSERT_TRUE(file.Read(6000, bytes).ok());
    EXPECT_EQ(bytes, text.substr(6000));
    change();
    const Status s = file.Read(6000, bytes);
    EXPECT_EQ(s.code(), ErrorCode::kIo);
    ExpectGoodMessage(s, path);
  }
  // A file that is replaced as a whole can be read to its end.
  testing::WriteBytes(path, text);
  const internal::File file = internal::File::Open(path).value();
  ASSERT_TRUE(internal::WriteFileAtomically(path, "another").ok());
  std::string bytes(10000, ' ');
  EXPECT_TRUE(file.Read(0, bytes).ok());
  EXPECT_EQ(bytes, text);
  EXPECT_EQ(internal::ReadFile(path).value(), "another");
  EXPECT_EQ(internal::ReadFile(path, 6).status().code(), ErrorCode::kCorrupt);
}

TEST(WriteFile, ErrorsLeaveNothing) {
  const TempFolder folder;
  const std::string path = folder.file("file");
  ASSERT_TRUE(internal::WriteFileAtomically(path, "before").ok());
  // A disk that is full: no file may grow beyond 1000 bytes.
  rlimit old{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{1000, old.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const Status full = internal::WriteFileAtomically(path, std::string(2000, 'x'));
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &old), 0);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(full.code(), ErrorCode::kIo);
  ExpectGoodMessage(full, path);
  EXPECT_EQ(testing::ReadBytes(path), "before");
  EXPECT_EQ(folder.entries(), 1u);

  ExpectGoodMessage(internal::WriteFileAtomically(folder.file("no/file"), "x"),
                    folder.file("no/file"));
  ExpectGoodMessage(internal::WriteFileAtomically(folder.path(), "x"), folder.path());
  ExpectGoodMessage(internal::WriteFileAtomically("", "x"), "");
  EXPECT_EQ(folder.entries(), 1u);
  if (std::filesystem::exists("/dev/full")) {
    ExpectGoodMessage(internal::WriteFileAtomically("/dev/full", "x"), "/dev/full");
    EXPECT_TRUE(std::filesystem::is_character_file("/dev/full"));
  }
}

}  // namespace
}  // namespace kvmix
