// Text for error lines, and files that are replaced whole or not at all.
#include "lib/files/file.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <filesystem>
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
