// Arrays that come in as an address and a number of elements. Whether memory is there only the
// caller knows; what no array can be is refused here, so that sizes and offsets computed from the
// number stay below 2^63.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/check.h"

namespace ktrt {

// Processes have addresses below 2^47 (x86-64 with four levels of page tables; mmap gives no higher
// ones unless it is asked to).
inline constexpr std::uint64_t kAddressEnd = std::uint64_t{1} << 47;

// Throws std::invalid_argument naming `name` for a negative count, and for an array that would
// reach past the last address.
inline void check_address_range(const char* name, const void* data, std::int64_t count,
                                std::size_t element_size) {
  KTRT_CHECK(count >= 0, name << " has " << count << " elements, expected at least 0");
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  KTRT_CHECK(begin <= kAddressEnd &&
                 static_cast<std::uint64_t>(count) <= (kAddressEnd - begin) / element_size,
             name << " has " << count << " elements of " << element_size << " bytes at " << data
                  << ", expected an array within the addresses of a process");
}

}  // namespace ktrt
