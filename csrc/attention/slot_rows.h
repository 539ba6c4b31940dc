// Which sequence each row of a forward attends to, in arrays that hold several.
#pragma once

#include <cstdint>

namespace ktrt {

// Addresses that are read whenever a forward runs: a recorded step runs again for other numbers.
struct SlotRows {
  const std::int64_t* slots = nullptr;    // [rows]
  const std::int64_t* lengths = nullptr;  // [rows] tokens; 0: the row's output is zeros
  std::int64_t rows = 0;
  // The arrays are [slot_count, heads, capacity, size].
  std::int64_t slot_count = 0;
  std::int64_t capacity = 0;
  // The last tokens that a row attends to; 0: all. Token t lies at t % capacity, so a length may
  // pass the capacity where the window does not, and the capacity is whole blocks.
  std::int64_t window = 0;
};

// Whether a ring of `tokens` cuts none of the attention's blocks.
bool is_ring(std::int64_t tokens);

// Throws std::invalid_argument: sizes below 1, addresses that cannot be. What they hold is checked
// by slot_row().
void check_slot_rows(const SlotRows& rows);

// Tokens [start, length) of a slot.
struct SlotRow {
  std::int64_t slot = 0;
  std::int64_t start = 0;
  std::int64_t length = 0;
};
// Throws std::invalid_argument unless there are such a slot and length; of length 0, any slot is
// slot 0.
SlotRow slot_row(const SlotRows& rows, std::int64_t row);

}  // namespace ktrt
