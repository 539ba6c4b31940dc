// Arrays that attention reads and writes: numbers of heads and tokens in borrowed memory.
#pragma once

#include <cstdint>

namespace ktrt {

// Numbers [heads, tokens, size], BF16 or float32.
struct HeadArray {
  void* data = nullptr;
  std::int64_t count = 0;  // elements from data on that may be touched
  std::int64_t head_stride = 0;
  std::int64_t token_stride = 0;
  bool float32 = false;
};

// Whether [heads, tokens, size] lies within the array, in BF16 or, where `any_dtype`, float32.
// Throws std::invalid_argument naming `name`, found and expected.
void check_head_array(const char* name, const HeadArray& array, bool any_dtype, std::int64_t heads,
                      std::int64_t tokens, std::int64_t size);

inline const std::uint16_t* bf16_at(const HeadArray& array, std::int64_t head, std::int64_t token) {
  return static_cast<const std::uint16_t*>(array.data) + head * array.head_stride +
         token * array.token_stride;
}

}  // namespace ktrt
