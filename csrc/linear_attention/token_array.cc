#include "linear_attention/token_array.h"

#include "base/address_range.h"
#include "base/check.h"

namespace ktrt {

namespace {

// Takes `steps` strides from `rest`; false if they do not fit. With a stride of 0, any number
// would.
bool take(std::int64_t& rest, std::int64_t stride, std::int64_t steps) {
  if (steps <= 0) return true;
  if (stride <= 0 || stride > rest / steps) return false;
  rest -= stride * steps;
  return true;
}

}  // namespace

void check_counts(std::int64_t sequences, std::int64_t tokens) {
  KTRT_CHECK(
      sequences >= 0 && tokens >= 0 && sequences <= (1 << 20),
      "there are " << sequences << " sequences of " << tokens << " tokens, expected none below 0");
}

void check_token_array(const char* name, const TokenArray& array, const TokenShape& shape) {
  check_address_range(name, array.data, array.count, array.element());
  std::int64_t rest = array.count - shape.size;
  const bool fits = array.data != nullptr && rest >= 0 &&
                    take(rest, array.sequence_stride, shape.sequences - 1) &&
                    take(rest, array.token_stride, shape.tokens - 1) &&
                    take(rest, array.head_stride, shape.heads - 1);
  KTRT_CHECK(fits, name << " has " << array.count << " elements, sequences "
                        << array.sequence_stride << ", tokens " << array.token_stride
                        << " and heads " << array.head_stride << " apart, expected room for ["
                        << shape.sequences << ", " << shape.tokens << ", " << shape.heads << ", "
                        << shape.size << "]");
}

void check_state_array(const StateArray& array, std::int64_t sequences, std::int64_t per_sequence) {
  check_address_range("state", array.data, array.count, sizeof(float));
  std::int64_t rest = array.count - per_sequence;
  const bool apart = sequences == 1 || array.stride >= per_sequence;
  KTRT_CHECK(array.data != nullptr && rest >= 0 && apart && take(rest, array.stride, sequences - 1),
             "state has " << array.count << " elements, sequences " << array.stride
                          << " apart, expected room for [" << sequences << ", " << per_sequence
                          << "]");
}

}  // namespace ktrt
