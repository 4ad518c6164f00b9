// Errors and tables of them that agree in every bit.
#ifndef KVMIX_TESTS_SAME_ERRORS_H_
#define KVMIX_TESTS_SAME_ERRORS_H_

#include <gtest/gtest.h>

#include <cstddef>

#include "kvmix/tune/steps.h"

namespace kvmix::testing {

inline void ExpectSame(const tune::AttentionError& a, const tune::AttentionError& b) {
  EXPECT_EQ(a.sum_squared_error, b.sum_squared_error);
  EXPECT_EQ(a.sum_squared_output, b.sum_squared_output);
  EXPECT_EQ(a.sum_cosine, b.sum_cosine);
  EXPECT_EQ(a.rows, b.rows);
}

inline void ExpectSame(const tune::ErrorTable& a, const tune::ErrorTable& b) {
  EXPECT_EQ(a.model, b.model);
  EXPECT_EQ(a.dumps, b.dumps);
  EXPECT_EQ(a.model_name, b.model_name);
  EXPECT_EQ(a.tokens, b.tokens);
  EXPECT_EQ(a.longest_prompt, b.longest_prompt);
  ASSERT_EQ(a.heads.size(), b.heads.size());
  for (std::size_t i = 0; i < a.heads.size(); ++i) {
    const tune::HeadErrors &x = a.heads[i], &y = b.heads[i];
    EXPECT_EQ(x.layer, y.layer);
    EXPECT_EQ(x.kv_head, y.kv_head);
    EXPECT_EQ(x.tensor, y.tensor);
    EXPECT_EQ(x.max_abs, y.max_abs);
    ASSERT_EQ(x.candidates.size(), y.candidates.size());
    for (std::size_t c = 0; c < x.candidates.size(); ++c) {
      EXPECT_EQ(x.candidates[c].codec, y.candidates[c].codec);
      EXPECT_EQ(x.candidates[c].values.sum_squared_error, y.candidates[c].values.sum_squared_error);
      ASSERT_EQ(x.candidates[c].queries.size(), y.candidates[c].queries.size());
      for (std::size_t q = 0; q < x.candidates[c].queries.size(); ++q)
        ExpectSame(x.candidates[c].queries[q], y.candidates[c].queries[q]);
    }
  }
}

}  // namespace kvmix::testing

#endif  // KVMIX_TESTS_SAME_ERRORS_H_
