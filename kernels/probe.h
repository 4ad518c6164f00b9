// What this machine can do at most: loops that do nothing but read, copy, or multiply-add, to hold
// the kernels against. A library of its own: kvmix-bench links it, libkvmix does not.
#ifndef KVMIX_KERNELS_PROBE_H_
#define KVMIX_KERNELS_PROBE_H_

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace kvmix::kernels {

struct ProbeKernels {
  // Memory: n bytes, a multiple of 1024, 64-byte aligned. What is returned keeps the loads alive.
  std::uint64_t (*read)(const std::uint8_t* from, std::size_t n);
  std::uint64_t (*read_prefetch)(const std::uint8_t* from, std::size_t n);  // into L2
  void (*copy)(const std::uint8_t* from, std::size_t n, std::uint8_t* to);
  void (*copy_stream)(const std::uint8_t* from, std::size_t n, std::uint8_t* to);  // non-temporal
  // Arithmetic on registers: `rounds` rounds; each returns the multiply-adds done.
  double (*fma_f32)(std::size_t rounds);
  double (*widening_i16)(std::size_t rounds);  // i16 x i16 pairs -> i32, accumulated
  // u8 x i8 quads -> i32; null where the target has no instruction for it.
  double (*dot_u8i8)(std::size_t rounds);
};

// Of a target that AllKernels() lists, by its name.
ProbeKernels ProbeKernelsFor(std::string_view target);

}  // namespace kvmix::kernels

#endif  // KVMIX_KERNELS_PROBE_H_
