#include "base/check.h"

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>

namespace ktrt {
namespace {

TEST(Check, ThrowsWithTheValues) {
  const int qlen = 7;
  try {
    KTRT_CHECK(qlen <= 4, "qlen is " << qlen << ", at most " << 4 << " expected");
    FAIL() << "nothing thrown";
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(), "qlen is 7, at most 4 expected");
  }
}

TEST(Check, EvaluatesTheConditionOnceAndTheMessageOnlyOnFailure) {
  int conditions = 0;
  int messages = 0;
  const auto message = [&] { return std::to_string(++messages); };
  KTRT_CHECK(++conditions == 1, message());
  EXPECT_EQ(conditions, 1);
  EXPECT_EQ(messages, 0);
  EXPECT_THROW(KTRT_CHECK(++conditions == 1, message()), std::invalid_argument);
  EXPECT_EQ(conditions, 2);
  EXPECT_EQ(messages, 1);
}

TEST(Check, IsOneStatement) {
  bool reached = false;
  if (reached)
    KTRT_CHECK(false, "not reached");
  else
    reached = true;
  EXPECT_TRUE(reached);
}

}  // namespace
}  // namespace ktrt
