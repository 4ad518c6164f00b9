// KVMIX_CHECK(a, <, b): stops the program where a < b does not hold, and prints both values and the
// place. For what only a bug can break; bad input is a Status. NDEBUG does not matter.
#ifndef KVMIX_LIB_FILES_CHECK_H_
#define KVMIX_LIB_FILES_CHECK_H_

#include <cstdio>
#include <cstdlib>

#include <fmt/format.h>

#define KVMIX_CHECK(a, op, b)                                                                   \
  ::kvmix::internal::Check([](const auto& x, const auto& y) { return x op y; }, a, b, __FILE__, \
                           __LINE__, #a " " #op " " #b)

namespace kvmix::internal {

template <class Holds, class A, class B>
void Check(Holds holds, const A& a, const B& b, const char* file, int line, const char* text) {
  if (holds(a, b)) return;
  fmt::print(stderr, "kvmix: {}:{}: expected {}, found {} and {}\n", file, line, text, a, b);
  std::abort();
}

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_FILES_CHECK_H_
