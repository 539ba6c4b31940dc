// Arrays that attention reads and writes: numbers of heads and tokens in borrowed memory.
#pragma once

#include <cstdint>

namespace ktrt {

// Numbers [heads, tokens, size], or [slots, heads, tokens, size], BF16 or float32.
struct HeadArray {
  void* data = nullptr;
  std::int64_t count = 0;  // elements from data on that may be touched
  std::int64_t head_stride = 0;
  std::int64_t token_stride = 0;
  bool float32 = false;
  std::int64_t slot_stride = 0;
};

// The sizes of a HeadArray.
struct HeadShape {
  std::int64_t heads = 0;
  std::int64_t tokens = 0;
  std::int64_t size = 0;
  std::int64_t slots = 1;
};

// Whether an array of this shape lies within the memory, in BF16 or, where `any_dtype`, float32.
// Throws std::invalid_argument naming `name`, found and expected.
void check_head_array(const char* name, const HeadArray& array, bool any_dtype,
                      const HeadShape& shape);

inline const std::uint16_t* bf16_at(const HeadArray& array, std::int64_t head, std::int64_t token,
                                    std::int64_t slot = 0) {
  return static_cast<const std::uint16_t*>(array.data) + slot * array.slot_stride +
         head * array.head_stride + token * array.token_stride;
}

}  // namespace ktrt
