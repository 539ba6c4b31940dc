// The routed experts of one MoE layer: forwards, and the LoRAs that act in them.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "base/tensor_view.h"
#include "engine/engine.h"
#include "lora/expert_lora.h"
#include "lora/lora_table.h"
#include "moe/dispatch_plan.h"
#include "moe/expert_store.h"
#include "moe/forward.h"
#include "moe/row_mixes.h"

namespace ktrt {

// Names of the kernel variants that ran in the last forward; null where the family did not run.
struct KernelsUsed {
  const char* gemm = nullptr;
  const char* gemm_few_rows = nullptr;  // only where few rows have a separate kernel
  const char* lora_shrink = nullptr;
  const char* lora_shrink_few_rows = nullptr;
  const char* elementwise = nullptr;
};

class MoeLayer {
 public:
  // `down_slices`: see ExpertWeights.
  MoeLayer(std::shared_ptr<Engine> engine, const MoeShape& shape, WeightFormat format,
           const Activation& activation = {}, int down_slices = 1);
  MoeLayer(const MoeLayer&) = delete;
  MoeLayer& operator=(const MoeLayer&) = delete;

  const Engine& engine() const { return *engine_; }
  const MoeShape& shape() const { return experts_.shape(); }
  WeightFormat format() const { return experts_.format(); }
  const Activation& activation() const { return activation_; }
  // Weights and biases: loading, images and views.
  ExpertStore& experts() { return experts_; }
  const ExpertStore& experts() const { return experts_; }

  // LoRAs by number, 0 or more; one without any pair acts on nothing. Throws std::invalid_argument.
  void load_lora(int id, const LoraPair& gate, const LoraPair& up, const LoraPair& down);
  void unload_lora(int id);
  // Sets the active sum, see LoraTable. Waits for a forward under way.
  void activate_loras(std::span<const int> ids, std::span<const float> weights);

  // hidden_states, out [qlen, hidden] of one float dtype; expert_ids [qlen, k ≤ top_k] int32 or
  // int64; routing_weights [qlen, k] float. `out` must not overlap `hidden_states`. `adapter_ids`
  // [qlen] int32 or int64: each token's LoRA as LoraTable reads it; missing: the active sum. An
  // idle token adds nothing and costs nothing.
  void forward(const TensorView& hidden_states, const TensorView& expert_ids,
               const TensorView& routing_weights, const TensorView& out,
               const std::optional<TensorView>& adapter_ids = std::nullopt);

  KernelsUsed last_kernels() const;
  // How many experts the last forward read.
  int last_experts() const { return last_experts_.load(std::memory_order_relaxed); }
  // The numbers of the LoRAs that are held, ascending.
  std::vector<int> loras();
  // One of them, kept alive by the pointer. Throws std::invalid_argument if there is none.
  std::shared_ptr<const ExpertLora> share_lora(int id);
  // Numbers and weights, in the order of activate_loras().
  std::vector<std::pair<int, float>> active_loras();
  // Changes whenever a LoRA is loaded, replaced or unloaded, or others or other weights are active.
  int lora_version() const { return lora_version_.load(std::memory_order_relaxed); }

 private:
  void release();
  void check_forward(const TensorView& hidden_states, const TensorView& expert_ids,
                     const TensorView& routing_weights, const TensorView& out) const;
  void name_kernels(const ForwardTask& task);

  const std::shared_ptr<Engine> engine_;
  const Activation activation_;
  ExpertStore experts_;
  LoraTable<ExpertLora> loras_;
  std::atomic<int> lora_version_{0};
  std::atomic<int> last_experts_{0};
  std::optional<Workspace> workspace_;
  RowMixes mixes_;
  DispatchPlan plan_;
  ShrinkQueue shrinks_;
  std::vector<PartQueues> queues_;
  KernelsUsed used_;
  std::optional<Engine::CloseHandler> close_handler_;  // the last member: the first to go
};

}  // namespace ktrt
