// Bugs stop the program with a line that says which, also where NDEBUG is set.
#undef NDEBUG
#define NDEBUG
#include "lib/files/check.h"

#include <gtest/gtest.h>

#include <string>
#include <utility>

#include "dump_files.h"
#include "kvmix/status.h"
#include "kvmix/tune/dump.h"

namespace kvmix {
namespace {

TEST(CheckDeathTest, PrintsBothValuesAndThePlace) {
  int evaluated = 0;
  KVMIX_CHECK(++evaluated, <, 2);
  EXPECT_EQ(evaluated, 1);
  const int seven = 7;
  EXPECT_DEATH(KVMIX_CHECK(seven, <, 3 + 4),
               "check_test.cc:[0-9]+: expected seven < 3 . 4, found 7 and 7\n");
  EXPECT_DEATH(KVMIX_CHECK(std::string("a"), ==, "b"), "found a and b\n");
}

TEST(ResultDeathTest, HasNoValueWhereThereIsAnError) {
  const Result<int> value(3), error(Status(ErrorCode::kIo, "file: no luck"));
  EXPECT_EQ(*value, 3);
  EXPECT_DEATH((void)error.value(), "expected a value, found the error \"file: no luck\"");
  EXPECT_DEATH((void)*error, "file: no luck");
  EXPECT_DEATH((void)Result<int>(Status()), "a Status that is ok");
}

TEST(DumpDeathTest, HasNoLayersBeyondItsLast) {
  const testing::TempFolder folder;
  testing::WriteBytes(folder.file("dump"), testing::DumpParts().Bytes());
  const tune::Dump dump = std::move(tune::Dump::Open(folder.file("dump")).value());
  EXPECT_NE(dump.Load(1)->k.data, nullptr);
  EXPECT_DEATH((void)dump.Load(2)->k, "found 2 and 2\n");
  EXPECT_DEATH(dump.Load(0)->head(2, KVMIX_V), "expected kv_head < .*found 2 and 2\n");
  EXPECT_DEATH((void)dump.Load(5).status(), "found 5 and 2\n");
}

}  // namespace
}  // namespace kvmix
