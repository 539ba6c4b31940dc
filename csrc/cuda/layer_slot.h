// A slot of one MoE layer: its arrays in pinned memory and the forward from one to the other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/tensor_view.h"
#include "cuda/stream_signals.h"
#include "moe/moe_layer.h"

namespace ktrt {

struct LayerSlot {
  // Arrays for `tokens` rows, nowhere yet; without `adapters` all rows have the active LoRAs.
  // Throws std::invalid_argument: sizes, dtype.
  LayerSlot(std::shared_ptr<MoeLayer> layer, int tokens, int top_k, DType dtype, bool adapters);
  LayerSlot(const LayerSlot&) = delete;
  LayerSlot& operator=(const LayerSlot&) = delete;

  std::size_t pinned_bytes();
  void place(std::byte* memory);
  void forward();

  const std::shared_ptr<MoeLayer> layer;
  TensorView hidden_states;               // [tokens, hidden_size]
  TensorView expert_ids;                  // [tokens, top_k], int64
  TensorView routing_weights;             // [tokens, top_k], float32
  TensorView out;                         // [tokens, hidden_size]
  std::optional<TensorView> adapter_ids;  // [tokens, 1], int32
  SignalledSlot signalled{};

 private:
  std::vector<TensorView*> arrays();

  // The ids that a forward works on: where it was given up, the stream goes on and may write the
  // next layer's ids into the pinned ones, and a plan must not change while it is made.
  std::vector<std::int64_t> ids_;
  std::vector<std::int32_t> adapters_;
};

// Size of a compact array.
std::size_t bytes_of(const TensorView& view);

}  // namespace ktrt
