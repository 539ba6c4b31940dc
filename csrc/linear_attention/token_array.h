// Arrays that layers with a state read and write: numbers of tokens in borrowed memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ktrt {

// Numbers [sequences, tokens, heads, size], BF16 or float32, or none (data null).
struct TokenArray {
  void* data = nullptr;
  std::int64_t count = 0;  // elements from data on that may be touched
  std::int64_t sequence_stride = 0;
  std::int64_t token_stride = 0;
  std::int64_t head_stride = 0;
  bool float32 = false;

  std::size_t element() const { return float32 ? 4 : 2; }
  void* at(std::int64_t sequence, std::int64_t token, std::int64_t head = 0,
           std::int64_t index = 0) const {
    const std::int64_t offset =
        sequence * sequence_stride + token * token_stride + head * head_stride + index;
    return static_cast<std::byte*>(data) + offset * static_cast<std::int64_t>(element());
  }
};

struct TokenShape {
  std::int64_t sequences = 0;
  std::int64_t tokens = 0;
  std::int64_t heads = 1;
  std::int64_t size = 1;
};

// Whether a forward may have these. Throws std::invalid_argument.
void check_counts(std::int64_t sequences, std::int64_t tokens);

// Whether an array of this shape lies within the memory. Throws std::invalid_argument naming
// `name`, found and expected.
void check_token_array(const char* name, const TokenArray& array, const TokenShape& shape);

// Floats [sequences, per_sequence] that lie `stride` apart, in `count` elements.
struct StateArray {
  float* data = nullptr;
  std::int64_t count = 0;
  std::int64_t stride = 0;

  float* at(std::int64_t sequence) const { return data + sequence * stride; }
};
void check_state_array(const StateArray& array, std::int64_t sequences, std::int64_t per_sequence);

}  // namespace ktrt
