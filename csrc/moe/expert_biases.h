// The biases of one layer's expert projections, float32, as the strips of C that they are added to.
#pragma once

#include <optional>

#include "base/aligned_buffer.h"
#include "base/tensor_view.h"
#include "moe/expert_weights.h"

namespace ktrt {

class ExpertBiases {
 public:
  // float32 gate, up [num_experts, intermediate_size] and down [num_experts, hidden_size]; each may
  // be absent. Throws std::invalid_argument naming the array, found and expected: shape, dtype, a
  // gate where the experts have none, a bias that is not finite.
  ExpertBiases(const MoeShape& shape, const std::optional<TensorView>& gate,
               const std::optional<TensorView>& up, const std::optional<TensorView>& down);

  // [32] of one strip, 0 in its padding; null where the projection has no bias.
  const float* of(int expert, Projection projection, int strip) const {
    const Rows& rows = rows_[static_cast<std::size_t>(projection)];
    if (rows.values.empty()) return nullptr;
    return rows.values.as<float>() +
           static_cast<std::size_t>(expert) * static_cast<std::size_t>(rows.padded) +
           static_cast<std::size_t>(strip) * kStripRows;
  }

  // [num_experts][padded rows], 0 in the padding; empty where the projection has no bias.
  const AlignedBuffer& values(Projection projection) const {
    return rows_[static_cast<std::size_t>(projection)].values;
  }

 private:
  struct Rows {
    int padded = 0;
    AlignedBuffer values;  // [num_experts][padded]
  };
  static Rows make_rows(const MoeShape& shape, int size, const TensorView& biases);

  Rows rows_[kProjections];
};

}  // namespace ktrt
