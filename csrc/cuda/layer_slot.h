// A slot of one MoE layer: its arrays in pinned memory and the forward from one to the other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/tensor_view.h"
#include "cuda/stream_signals.h"
#include "moe/moe_layer.h"

namespace ktrt {

struct LayerSlot {
  // Arrays for `tokens` rows, nowhere yet. Throws std::invalid_argument: sizes, dtype.
  LayerSlot(std::shared_ptr<MoeLayer> layer, int tokens, int top_k, DType dtype);
  LayerSlot(const LayerSlot&) = delete;
  LayerSlot& operator=(const LayerSlot&) = delete;

  std::size_t pinned_bytes() const;
  void place(std::byte* memory);
  void forward();

  const std::shared_ptr<MoeLayer> layer;
  TensorView hidden_states;    // [tokens, hidden_size]
  TensorView expert_ids;       // [tokens, top_k], int64
  TensorView routing_weights;  // [tokens, top_k], float32
  TensorView out;              // [tokens, hidden_size]
  SignalledSlot signalled{};

 private:
  // The ids that a forward works on: where it was given up, the stream goes on and may write the
  // next layer's ids into the pinned ones, and a plan must not change while it is made.
  std::vector<std::int64_t> ids_;
};

// Size of a compact array.
std::size_t bytes_of(const TensorView& view);

}  // namespace ktrt
