#include "moe/expert_biases.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"

namespace ktrt {

ExpertBiases::ExpertBiases(const MoeShape& shape, const std::optional<TensorView>& gate,
                           const std::optional<TensorView>& up,
                           const std::optional<TensorView>& down) {
  KTRT_CHECK(shape.has_gate || !gate, gate->name << " is given, but the experts have no gate");
  if (gate) rows_[0] = make_rows(shape, shape.intermediate_size, *gate);
  if (up) rows_[1] = make_rows(shape, shape.intermediate_size, *up);
  if (down) rows_[2] = make_rows(shape, shape.hidden_size, *down);
}

ExpertBiases::Rows ExpertBiases::make_rows(const MoeShape& shape, int size,
                                           const TensorView& biases) {
  KTRT_CHECK(biases.dtype == DType::kFloat32,
             biases.name << " is " << name_of(biases.dtype) << ", expected float32");
  biases.expect_shape({shape.num_experts, size});
  Rows rows;
  rows.padded = round_up(size, kStripRows);
  rows.values = AlignedBuffer(static_cast<std::size_t>(shape.num_experts) *
                              static_cast<std::size_t>(rows.padded) * sizeof(float));
  for (int e = 0; e < shape.num_experts; ++e) {
    float* row = rows.values.as<float>() + static_cast<std::ptrdiff_t>(e) * rows.padded;
    std::copy_n(reinterpret_cast<const float*>(biases.row(e)), size, row);
    KTRT_CHECK(
        std::all_of(row, row + size, [](float value) { return std::isfinite(value); }),
        biases.name << " of expert " << e << " holds NaN or infinity; the weights are damaged");
  }
  return rows;
}

}  // namespace ktrt
