// What tests ask of an error.
#ifndef KVMIX_TESTS_EXPECT_ERROR_H_
#define KVMIX_TESTS_EXPECT_ERROR_H_

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "kvmix/status.h"

namespace kvmix::testing {

// An error of this kind, on one line, that names all of `parts`.
inline void ExpectError(const Status& s, ErrorCode code, const std::vector<std::string>& parts) {
  EXPECT_EQ(s.code(), code) << s.message();
  EXPECT_EQ(s.message().find('\n'), std::string::npos) << s.message();
  for (const std::string& part : parts) {
    EXPECT_NE(s.message().find(part), std::string::npos)
        << "\"" << s.message() << "\" does not name " << part;
  }
}

}  // namespace kvmix::testing

#endif  // KVMIX_TESTS_EXPECT_ERROR_H_
