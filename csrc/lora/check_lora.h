// Checks of the LoRA of one linear layer.
#pragma once

#include <cstdint>

#include "base/tensor_view.h"

namespace ktrt {

// a [rank, in] and b [out, rank] in float32, rank at most `max_rank`. Throws std::invalid_argument.
void check_lora(const TensorView& a, const TensorView& b, std::int64_t in, std::int64_t out,
                int max_rank);

}  // namespace ktrt
