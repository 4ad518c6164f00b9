// Whole numbers, rounded up.
#ifndef KVMIX_LIB_CACHE_ROUND_H_
#define KVMIX_LIB_CACHE_ROUND_H_

#include <cstddef>

namespace kvmix::internal {

constexpr std::size_t CeilDiv(std::size_t a, std::size_t b) { return a / b + (a % b != 0); }
constexpr std::size_t RoundUp(std::size_t n, std::size_t to) { return CeilDiv(n, to) * to; }

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_CACHE_ROUND_H_
