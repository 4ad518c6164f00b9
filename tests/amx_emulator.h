// Does the instructions of Intel's AMX on CPUs without it, so that the code that compilers made of
// kernels/amx_tiles-inl.h runs and is checked everywhere: the CPU refuses such an instruction
// (SIGILL), this reads it and does it. Not where a CPU has AMX that a process may not use: some of
// the instructions then run. Linux, x86-64; one thread.
#ifndef KVMIX_TESTS_AMX_EMULATOR_H_
#define KVMIX_TESTS_AMX_EMULATOR_H_

#if defined(__x86_64__) && defined(__linux__)

#include <ucontext.h>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace kvmix::testing {

class AmxEmulator {
 public:
  AmxEmulator() {
    struct sigaction action {};
    action.sa_sigaction = &Refused;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, &before_);
  }
  ~AmxEmulator() { sigaction(SIGILL, &before_, nullptr); }
  AmxEmulator(const AmxEmulator&) = delete;
  AmxEmulator& operator=(const AmxEmulator&) = delete;

  static std::size_t done() { return done_; }
  static bool configured() { return configured_; }

 private:
  static constexpr std::size_t kRows = 16, kBytes = 64;

  // VEX.128.pp.0F38.W0 opcode modrm [sib [disp]].
  static void Refused(int, siginfo_t*, void* context) {
    greg_t* const regs = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    const auto* code = reinterpret_cast<const std::uint8_t*>(regs[REG_RIP]);
    if (code[0] != 0xC4 || (code[1] & 0x1F) != 2) std::abort();
    const bool x = (code[1] & 0x40) == 0, b = (code[1] & 0x20) == 0;
    const unsigned pp = code[2] & 3, v = ~code[2] >> 3 & 15;
    if ((code[2] & 0x84) != 0) std::abort();  // W, L
    const unsigned opcode = code[3], modrm = code[4];
    const unsigned mod = modrm >> 6, reg = modrm >> 3 & 7, rm = modrm & 7;
    std::size_t length = 5;
    const auto address = [&](std::uint64_t* stride) -> std::uint8_t* {
      static constexpr int kRegs[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                      REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                      REG_R12, REG_R13, REG_R14, REG_R15};
      unsigned base = rm;
      *stride = 0;
      if (rm == 4) {
        const unsigned sib = code[length++], index = (sib >> 3 & 7) + (x ? 8 : 0);
        base = sib & 7;
        if (index != 4) *stride = static_cast<std::uint64_t>(regs[kRegs[index]]) << (sib >> 6);
      }
      std::int64_t displacement = 0;
      if (mod == 1) {
        displacement = static_cast<std::int8_t>(code[length]);
        length += 1;
      } else if (mod == 2 || (mod == 0 && base == 5)) {
        std::int32_t d;
        std::memcpy(&d, code + length, 4);
        displacement = d;
        length += 4;
      }
      std::uint64_t at = 0;
      if (mod == 0 && base == 5) {
        if (rm == 4) std::abort();
        at = reinterpret_cast<std::uint64_t>(code) + length;  // relative to the next instruction
      } else {
        at = static_cast<std::uint64_t>(regs[kRegs[base + (b ? 8 : 0)]]);
      }
      return reinterpret_cast<std::uint8_t*>(at + static_cast<std::uint64_t>(displacement));
    };

    std::uint64_t stride;
    if (opcode == 0x49 && pp == 0 && mod == 3 && reg == 0 && rm == 0) {  // tilerelease
      configured_ = false;
    } else if (opcode == 0x49 && pp == 0 && mod != 3 && reg == 0) {  // ldtilecfg
      const std::uint8_t* config = address(&stride);
      if (config[0] != 1 || config[1] != 0) std::abort();
      for (std::size_t t = 0; t < 8; ++t) {
        if (config[16 + 2 * t] != kBytes || config[17 + 2 * t] != 0) std::abort();
        if (config[48 + t] != kRows) std::abort();
      }
      configured_ = true;
      std::memset(tiles_, 0, sizeof(tiles_));
    } else if (!configured_) {
      std::abort();
    } else if (opcode == 0x49 && pp == 3 && mod == 3 && rm == 0) {  // tilezero
      std::memset(tiles_[reg], 0, sizeof(tiles_[reg]));
    } else if (opcode == 0x4B && (pp == 2 || pp == 3) && mod != 3 && rm == 4) {
      std::uint8_t* at = address(&stride);
      for (std::size_t row = 0; row < kRows; ++row, at += stride) {
        pp == 3 ? std::memcpy(tiles_[reg] + row * kBytes, at, kBytes)   // tileloadd
                : std::memcpy(at, tiles_[reg] + row * kBytes, kBytes);  // tilestored
      }
    } else if (opcode == 0x5E && (pp == 1 || pp == 2) && mod == 3) {
      pp == 1 ? Multiply<std::uint8_t, std::int8_t>(reg, rm, v)   // tdpbusd
              : Multiply<std::int8_t, std::uint8_t>(reg, rm, v);  // tdpbsud
    } else {
      std::abort();
    }
    ++done_;
    regs[REG_RIP] += static_cast<greg_t>(length);
  }

  template <class A, class B>
  static void Multiply(unsigned c, unsigned a, unsigned b) {
    if (a == b || a == c || b == c || b >= 8) std::abort();
    for (std::size_t m = 0; m < kRows; ++m) {
      for (std::size_t n = 0; n < kBytes / 4; ++n) {
        std::uint8_t* const at = tiles_[c] + m * kBytes + 4 * n;
        std::uint32_t sum;
        std::memcpy(&sum, at, 4);
        for (std::size_t k = 0; k < kBytes; ++k) {
          sum +=
              static_cast<std::uint32_t>(static_cast<A>(tiles_[a][m * kBytes + k]) *
                                         static_cast<B>(tiles_[b][k / 4 * kBytes + 4 * n + k % 4]));
        }
        std::memcpy(at, &sum, 4);
      }
    }
  }

  struct sigaction before_ {};
  static inline std::uint8_t tiles_[8][kRows * kBytes];
  static inline bool configured_ = false;
  static inline std::size_t done_ = 0;
};

}  // namespace kvmix::testing

#endif  // x86-64, Linux
#endif  // KVMIX_TESTS_AMX_EMULATOR_H_
