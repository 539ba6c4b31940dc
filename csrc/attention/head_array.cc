#include "attention/head_array.h"

#include <sstream>

#include "base/address_range.h"
#include "base/check.h"

namespace ktrt {

namespace {

// Takes `steps` strides from `rest`; false if they do not fit.
bool take(std::int64_t& rest, std::int64_t stride, std::int64_t steps) {
  if (steps <= 0) return true;
  if (stride > rest / steps) return false;
  rest -= stride * steps;
  return true;
}

bool holds(const HeadArray& array, const HeadShape& shape) {
  std::int64_t rest = array.count - shape.size;
  if (array.data == nullptr || rest < 0) return false;
  // With a stride of 0, any number of tokens would fit.
  if (shape.tokens > 1 && array.token_stride == 0) return false;
  return take(rest, array.slot_stride, shape.slots - 1) &&
         take(rest, array.head_stride, shape.heads - 1) &&
         take(rest, array.token_stride, shape.tokens - 1);
}

}  // namespace

void check_head_array(const char* name, const HeadArray& array, bool any_dtype,
                      const HeadShape& shape) {
  check_address_range(name, array.data, array.count, array.float32 ? 4 : 2);
  KTRT_CHECK(any_dtype || !array.float32, name << " is float32, expected bfloat16");
  KTRT_CHECK(array.slot_stride >= 0, name << " has a stride of " << array.slot_stride
                                          << " between slots, expected none below 0");
  KTRT_CHECK(array.head_stride >= 0 && array.token_stride >= 0,
             name << " has strides " << array.head_stride << " and " << array.token_stride
                  << ", expected none below 0");
  if (holds(array, shape)) return;
  const bool slots = shape.slots > 1;
  std::ostringstream apart;
  std::ostringstream room;
  if (slots) apart << "slots " << array.slot_stride << ", ";
  if (slots) room << shape.slots << ", ";
  KTRT_CHECK(false, name << " has " << array.count << " elements, " << apart.str() << "heads "
                         << array.head_stride << " and tokens " << array.token_stride
                         << " apart, expected room for [" << room.str() << shape.heads << ", "
                         << shape.tokens << ", " << shape.size << "]");
}

}  // namespace ktrt
