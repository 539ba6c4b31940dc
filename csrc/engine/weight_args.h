// Checks and copies of the weights that operators are constructed from.
#pragma once

#include <cstdint>
#include <optional>

#include "base/aligned_buffer.h"
#include "base/tensor_view.h"

namespace ktrt {

// Refuses anything but a contiguous BF16 matrix with sizes from 1 to 2^30. Throws
// std::invalid_argument naming found and expected.
void check_weight(const TensorView& weight);

// float32 [padded] of `values` [count] in any float dtype, zeros after them; empty without values.
// Throws std::invalid_argument.
AlignedBuffer copy_floats(const std::optional<TensorView>& values, std::int64_t count,
                          std::int64_t padded);

}  // namespace ktrt
