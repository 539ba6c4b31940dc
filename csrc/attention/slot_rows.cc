#include "attention/slot_rows.h"

#include <algorithm>

#include "base/address_range.h"
#include "base/check.h"
#include "kernels/attention_args.h"

namespace ktrt {

bool is_ring(std::int64_t tokens) { return tokens > 0 && tokens % kAttentionBlock == 0; }

void check_slot_rows(const SlotRows& rows) {
  KTRT_CHECK(rows.rows >= 1, "rows is " << rows.rows << ", expected at least 1");
  KTRT_CHECK(rows.slot_count >= 1 && rows.capacity >= 1,
             "slot_count and capacity are " << rows.slot_count << " and " << rows.capacity
                                            << ", expected at least 1");
  KTRT_CHECK(rows.window >= 0, "window is " << rows.window << ", expected 0 for none, or more");
  KTRT_CHECK(rows.slots != nullptr && rows.lengths != nullptr,
             "slots or lengths is null, expected addresses");
  check_address_range("slots", rows.slots, rows.rows, sizeof(std::int64_t));
  check_address_range("lengths", rows.lengths, rows.rows, sizeof(std::int64_t));
}

SlotRow slot_row(const SlotRows& rows, std::int64_t row) {
  SlotRow found{rows.slots[row], 0, rows.lengths[row]};
  if (found.length == 0) return {};
  KTRT_CHECK(found.slot >= 0 && found.slot < rows.slot_count,
             "slots[" << row << "] is " << found.slot << ", expected 0 to " << rows.slot_count - 1);
  const bool ring = rows.window > 0 && rows.window <= rows.capacity && is_ring(rows.capacity);
  KTRT_CHECK(found.length >= 0 && (found.length <= rows.capacity || ring),
             "lengths[" << row << "] is " << found.length << ", expected 0 to " << rows.capacity);
  if (rows.window > 0) found.start = std::max<std::int64_t>(0, found.length - rows.window);
  return found;
}

}  // namespace ktrt
