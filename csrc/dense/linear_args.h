// What the linears, and attention, check and convert of their arguments.
#pragma once

#include <cstdint>
#include <optional>

#include "base/aligned_buffer.h"
#include "base/tensor_view.h"

namespace ktrt {

// Refuses what is no matrix of BF16 with sizes from 1 to 2^30 whose rows lie one after the other.
// Throws std::invalid_argument naming found and expected.
void check_weight(const TensorView& weight);

// float32 [padded] of `values` [count] in any float dtype, zeros after them; empty without values.
// Throws std::invalid_argument.
AlignedBuffer copy_floats(const std::optional<TensorView>& values, std::int64_t count,
                          std::int64_t padded);

// a [rank, in] and b [out, rank] in float32, rank at most `max_rank`. Throws std::invalid_argument.
void check_lora(const TensorView& a, const TensorView& b, std::int64_t in, std::int64_t out,
                int max_rank);

// Rows that x, `x_count` elements, and out hold. Throws std::invalid_argument if they do not fit.
std::int64_t check_rows(const void* x, std::int64_t x_count, const void* out,
                        std::int64_t out_count, std::int64_t in_features,
                        std::int64_t out_features);

}  // namespace ktrt
