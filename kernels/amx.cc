#include "kernels/amx.h"

#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <system_error>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/amx.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/highway.h"
#include "kernels/amx-inl.h"
#include "kernels/amx_tiles-inl.h"

#undef KVMIX_HAS_AMX
#if HWY_ARCH_X86_64 && defined(__linux__) && (HWY_TARGETS & HWY_AVX3_DL)
#define KVMIX_HAS_AMX 1
#else
#define KVMIX_HAS_AMX 0
#endif

#if KVMIX_HAS_AMX && HWY_TARGET == HWY_AVX3_DL

HWY_PUSH_ATTRIBUTES(KVMIX_TILE_TARGET)
namespace kvmix::kernels::HWY_NAMESPACE {
namespace {

bool TilesPay(std::size_t rows) { return rows >= Amx().fewest_rows; }

}  // namespace

AttendKernels AmxTable() { return TileKernels<AmxTiles, &TilesPay>(); }

double AmxPeak(std::size_t rounds) {
  AmxTiles tiles;
  tiles.Configure();
  for (std::size_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < 2; ++i) {
      tiles.UnsignedTimesSigned<4, 0, 2>();
      tiles.UnsignedTimesSigned<5, 1, 2>();
      tiles.UnsignedTimesSigned<6, 0, 3>();
      tiles.UnsignedTimesSigned<7, 1, 3>();
    }
  }
  tiles.Release();
  return static_cast<double>(rounds) * 8 * kTileRows * kTileTerms * kLanes;
}

}  // namespace kvmix::kernels::HWY_NAMESPACE
HWY_POP_ATTRIBUTES
#endif  // KVMIX_HAS_AMX && HWY_AVX3_DL

#if HWY_ONCE
#if KVMIX_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kvmix::kernels {

namespace {

// The rows of KVMIX_AMX; why tiles are off, or nothing.
std::string ReadRows(const char* variable, std::size_t* rows) {
  if (variable == nullptr || *variable == '\0') {
    return "tiles are not measured yet, and off: KVMIX_AMX=16 turns them on";
  }
  const char* const end = variable + std::strlen(variable);
  const auto [read_to, error] = std::from_chars(variable, end, *rows);
  if (error != std::errc() || read_to != end) {
    return std::string("KVMIX_AMX: expected a number, found '") + variable + "'";
  }
  return *rows == 0 ? "KVMIX_AMX=0" : "";
}

}  // namespace

AmxAnswer Ask(const AmxQuestion& q) {
  constexpr std::uint32_t kTileAndInt8 = 3u << 24;
  constexpr std::uint64_t kTileState = std::uint64_t{3} << 17;
  AmxAnswer answer;
  const std::string off = ReadRows(q.variable, &answer.fewest_rows);
  if ((q.leaf7_edx & kTileAndInt8) != kTileAndInt8) return answer;
  if (!q.avx3_dl) return {false, "AVX-512 with VNNI is not there or not compiled in"};
  if (!off.empty()) return {false, off};
  if ((q.xcr0 & kTileState) != kTileState) {
    return {false, "the operating system does not keep tiles"};
  }
  if (q.request() != 0) {
    return {false, std::string("the operating system refuses: ") + std::strerror(errno)};
  }
  answer.yes = true;
  return answer;
}

#if KVMIX_HAS_AMX
namespace {

AmxQuestion ThisProcess() {
  AmxQuestion q;
  q.avx3_dl = (hwy::SupportedTargets() & HWY_AVX3_DL) != 0;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0) q.leaf7_edx = edx;
  if (q.avx3_dl) {  // so xgetbv is there
    std::uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    q.xcr0 = std::uint64_t{high} << 32 | low;
  }
  q.variable = std::getenv("KVMIX_AMX");
  q.request = [] {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    return ::syscall(SYS_arch_prctl, kRequestPermission, kTileData);
  };
  return q;
}

}  // namespace

const AmxAnswer& Amx() {
  static const AmxAnswer answer = Ask(ThisProcess());
  return answer;
}
AttendKernels AmxAttendKernels() { return N_AVX3_DL::AmxTable(); }
double AmxDotU8I8(std::size_t rounds) { return N_AVX3_DL::AmxPeak(rounds); }
#else
const AmxAnswer& Amx() {
  static const AmxAnswer answer;
  return answer;
}
AttendKernels AmxAttendKernels() { return {}; }
double AmxDotU8I8(std::size_t) { return 0.0; }
#endif

}  // namespace kvmix::kernels
#endif  // HWY_ONCE
