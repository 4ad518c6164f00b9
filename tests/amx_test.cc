// Whether a process may use tiles: every answer and its reason.
#include "kernels/amx.h"

#include <cerrno>

#include <gtest/gtest.h>

#include "kernels/kernels.h"

namespace kvmix::kernels {
namespace {

constexpr std::uint32_t kTilesOfCpu = 3u << 24;
constexpr std::uint64_t kKept = std::uint64_t{3} << 17;

int requests = 0;
long Grant() {
  ++requests;
  return 0;
}
template <int kErrno>
long Refuse() {
  ++requests;
  errno = kErrno;
  return -1;
}

AmxQuestion Question() { return {true, kTilesOfCpu, kKept, "16", &Grant}; }

TEST(Amx, GrantedOnce) {
  requests = 0;
  const AmxAnswer answer = Ask(Question());
  EXPECT_TRUE(answer.yes);
  EXPECT_EQ(answer.why_not, "");
  EXPECT_EQ(answer.fewest_rows, 16u);
  EXPECT_EQ(requests, 1);
}

// Nothing is asked of an operating system where something else is missing.
TEST(Amx, NotAskedInVain) {
  requests = 0;
  for (const std::uint32_t cpu : {0u, 1u << 24, 1u << 25}) {
    AmxQuestion q = Question();
    q.leaf7_edx = cpu;
    EXPECT_FALSE(Ask(q).yes);
    EXPECT_EQ(Ask(q).why_not, "") << "a CPU without tiles is nothing to speak of";
  }
  AmxQuestion q = Question();
  q.avx3_dl = false;
  EXPECT_EQ(Ask(q).why_not, "AVX-512 with VNNI is not there or not compiled in");
  for (const std::uint64_t kept :
       {std::uint64_t{0}, std::uint64_t{1} << 17, std::uint64_t{1} << 18}) {
    q = Question();
    q.xcr0 = kept;
    EXPECT_EQ(Ask(q).why_not, "the operating system does not keep tiles");
  }
  q = Question();
  q.variable = "0";
  EXPECT_EQ(Ask(q).why_not, "KVMIX_AMX=0");
  for (const char* const unset : {static_cast<const char*>(nullptr), ""}) {
    q.variable = unset;
    EXPECT_FALSE(Ask(q).yes) << "off until it is measured";
    EXPECT_NE(Ask(q).why_not.find("KVMIX_AMX=16 turns them on"), std::string::npos);
  }
  for (const char* const wrong : {"yes", "-1", "4x", " 4", "99999999999999999999999"}) {
    q.variable = wrong;
    EXPECT_FALSE(Ask(q).yes);
    EXPECT_EQ(Ask(q).why_not, std::string("KVMIX_AMX: expected a number, found '") + wrong + "'");
  }
  EXPECT_EQ(requests, 0);
}

TEST(Amx, Refused) {
  AmxQuestion q = Question();
  q.request = &Refuse<EINVAL>;  // a kernel that does not know the question
  EXPECT_FALSE(Ask(q).yes);
  EXPECT_EQ(Ask(q).why_not, "the operating system refuses: Invalid argument");
  q.request = &Refuse<ENOSPC>;  // an alternate signal stack that is too small
  EXPECT_EQ(Ask(q).why_not, "the operating system refuses: No space left on device");
}

TEST(Amx, RowsByTheVariable) {
  AmxQuestion q = Question();
  q.variable = "4";
  EXPECT_TRUE(Ask(q).yes);
  EXPECT_EQ(Ask(q).fewest_rows, 4u);
}

// The list of targets says what the answer was.
TEST(Amx, IsATargetWhereItMayBe) {
  EXPECT_EQ(FindKernels("AMX") != nullptr, Amx().yes);
  if (!Amx().yes)
    GTEST_SKIP() << "no AMX here" << (Amx().why_not.empty() ? "" : ": ") << Amx().why_not;
  EXPECT_EQ(FindKernels("AMX"), &AllKernels().front());
}

}  // namespace
}  // namespace kvmix::kernels
