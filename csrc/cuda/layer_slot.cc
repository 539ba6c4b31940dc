#include "cuda/layer_slot.h"

#include <cstring>

#include "base/aligned_buffer.h"
#include "base/check.h"
#include "engine/engine.h"

namespace ktrt {
namespace {

constexpr std::size_t kArrayAlignment = 256;

TensorView compact(const char* name, DType dtype, std::int64_t rows, std::int64_t columns) {
  TensorView view;
  view.name = name;
  view.dtype = dtype;
  view.ndim = 2;
  view.shape = {rows, columns};
  view.stride = {columns, 1};
  return view;
}

}  // namespace

std::size_t bytes_of(const TensorView& view) {
  return static_cast<std::size_t>(view.shape[0] * view.shape[1]) * size_of(view.dtype);
}

LayerSlot::LayerSlot(std::shared_ptr<MoeLayer> layer_, int tokens, int top_k, DType dtype,
                     bool adapters)
    : layer(std::move(layer_)) {
  const int max_qlen = layer->engine().max_qlen();
  KTRT_CHECK(tokens >= 1 && tokens <= max_qlen,
             "tokens is " << tokens << ", expected 1 to max_qlen (" << max_qlen << ")");
  const MoeShape& shape = layer->shape();
  KTRT_CHECK(top_k >= 1 && top_k <= shape.top_k,
             "top_k is " << top_k << ", expected 1 to the layer's (" << shape.top_k << ")");
  hidden_states = compact("hidden_states", dtype, tokens, shape.hidden_size);
  hidden_states.expect_float();
  expert_ids = compact("expert_ids", DType::kInt64, tokens, top_k);
  routing_weights = compact("routing_weights", DType::kFloat32, tokens, top_k);
  out = compact("out", dtype, tokens, shape.hidden_size);
  ids_.resize(static_cast<std::size_t>(tokens) * static_cast<std::size_t>(top_k));
  if (!adapters) return;
  adapter_ids = compact("adapter_ids", DType::kInt32, tokens, 1);
  adapters_.resize(static_cast<std::size_t>(tokens));
}

std::vector<TensorView*> LayerSlot::arrays() {
  std::vector<TensorView*> all = {&hidden_states, &expert_ids, &routing_weights, &out};
  if (adapter_ids) all.push_back(&*adapter_ids);
  return all;
}

std::size_t LayerSlot::pinned_bytes() {
  std::size_t sum = 0;
  for (const TensorView* view : arrays()) sum += round_up(bytes_of(*view), kArrayAlignment);
  return sum;
}

void LayerSlot::place(std::byte* memory) {
  for (TensorView* view : arrays()) {
    view->data = memory;
    memory += round_up(bytes_of(*view), kArrayAlignment);
  }
}

void LayerSlot::forward() {
  std::memcpy(ids_.data(), expert_ids.data, bytes_of(expert_ids));
  TensorView ids = expert_ids;
  ids.data = reinterpret_cast<std::byte*>(ids_.data());
  std::optional<TensorView> adapters;
  if (adapter_ids) {
    std::memcpy(adapters_.data(), adapter_ids->data, bytes_of(*adapter_ids));
    adapters = *adapter_ids;
    adapters->data = reinterpret_cast<std::byte*>(adapters_.data());
    adapters->ndim = 1;
  }
  layer->forward(hidden_states, ids, routing_weights, out, adapters);
}

}  // namespace ktrt
