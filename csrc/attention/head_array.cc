#include "attention/head_array.h"

#include "base/address_range.h"
#include "base/check.h"

namespace ktrt {

namespace {

bool holds(const HeadArray& array, std::int64_t heads, std::int64_t tokens, std::int64_t size) {
  std::int64_t rest = array.count - size;
  if (array.data == nullptr || rest < 0) return false;
  // With a stride of 0, any number of tokens would fit.
  if (tokens > 1 && array.token_stride == 0) return false;
  if (heads > 1) {
    if (array.head_stride > rest / (heads - 1)) return false;
    rest -= array.head_stride * (heads - 1);
  }
  return tokens <= 1 || array.token_stride <= rest / (tokens - 1);
}

}  // namespace

void check_head_array(const char* name, const HeadArray& array, bool any_dtype, std::int64_t heads,
                      std::int64_t tokens, std::int64_t size) {
  check_address_range(name, array.data, array.count, array.float32 ? 4 : 2);
  KTRT_CHECK(any_dtype || !array.float32, name << " is float32, expected bfloat16");
  KTRT_CHECK(array.head_stride >= 0 && array.token_stride >= 0,
             name << " has strides " << array.head_stride << " and " << array.token_stride
                  << ", expected none below 0");
  KTRT_CHECK(holds(array, heads, tokens, size),
             name << " has " << array.count << " elements, heads " << array.head_stride
                  << " and tokens " << array.token_stride << " apart, expected room for [" << heads
                  << ", " << tokens << ", " << size << "]");
}

}  // namespace ktrt
