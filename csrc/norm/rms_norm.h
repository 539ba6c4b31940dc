// RMSNorm of BF16 rows on the calling thread: a few rows are done sooner than another thread wakes.
#pragma once

#include <cstdint>

#include "base/tensor_view.h"
#include "kernels/kernel_table.h"

namespace ktrt {

class RmsNorm {
 public:
  // x / √(mean(x²) + eps) · (weight + offset). rounds_twice: the normed x is rounded to BF16 before
  // it is multiplied. weight: [size], BF16 or float32, borrowed for the object's life; the kernels
  // too. Throws std::invalid_argument.
  RmsNorm(const ElementwiseKernels& kernels, const TensorView& weight, float eps, float offset,
          bool rounds_twice);

  std::int64_t size() const { return args_.size; }

  // x: `rows` rows, `row_stride` elements apart, in x_count elements; out: [rows, size] in
  // out_count, which may be x where the rows are contiguous. Throws std::invalid_argument.
  void forward(const std::uint16_t* x, std::int64_t x_count, std::int64_t rows,
               std::int64_t row_stride, std::uint16_t* out, std::int64_t out_count) const;

 private:
  const ElementwiseKernels& kernels_;
  RmsNormArgs args_{};
};

}  // namespace ktrt
