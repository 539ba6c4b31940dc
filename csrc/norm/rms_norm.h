// RMSNorm of BF16 rows: a few on the calling thread, which is done sooner than another one wakes,
// many on the engine's threads.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>

#include "base/tensor_view.h"
#include "engine/engine.h"
#include "kernels/kernel_table.h"

namespace ktrt {

class RmsNorm {
 public:
  // x / √(mean(x²) + eps) · (weight + offset). rounds_twice: the normed x is rounded to BF16 before
  // it is multiplied. weight: [size], BF16 or float32, borrowed for the object's life; the kernels
  // too. Without an engine the calling thread does all rows. Throws std::invalid_argument.
  RmsNorm(const ElementwiseKernels& kernels, const TensorView& weight, float eps, float offset,
          bool rounds_twice, std::shared_ptr<Engine> engine = nullptr);

  std::int64_t size() const { return args_.size; }

  // x: `rows` rows, `row_stride` elements apart, in x_count elements; out: [rows, size] in
  // out_count, which may be x where the rows are contiguous. Throws std::invalid_argument; with
  // many rows std::runtime_error once the engine is closed.
  void forward(const std::uint16_t* x, std::int64_t x_count, std::int64_t rows,
               std::int64_t row_stride, std::uint16_t* out, std::int64_t out_count) const;
  // Whether forward() shares this number of rows among the engine's threads.
  bool shares(std::int64_t rows) const;

 private:
  const ElementwiseKernels& kernels_;
  RmsNormArgs args_{};
  const std::shared_ptr<Engine> engine_;
};

}  // namespace ktrt
