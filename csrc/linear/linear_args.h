// Checks of the arrays that a linear layer multiplies.
#pragma once

#include <cstdint>

#include "lora/lora_table.h"

namespace ktrt {

// Rows that x, `x_count` elements, and out hold. Throws std::invalid_argument if they do not fit.
std::int64_t check_rows(const void* x, std::int64_t x_count, const void* out,
                        std::int64_t out_count, std::int64_t in_features,
                        std::int64_t out_features);

// Throws std::invalid_argument for an array that no process has.
void check_adapter_ids(const AdapterIds& adapters);

}  // namespace ktrt
