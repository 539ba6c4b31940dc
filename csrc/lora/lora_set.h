// The LoRAs that a layer holds by number, and which of them act with what weights.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "base/tensor_view.h"
#include "lora/expert_lora.h"

namespace ktrt {

// One factor for every value of a shrunk row: scale and choice of LoRAs without touching A and B.
struct LoraFactors {
  std::vector<float> input;  // [input_shrink().width()]
  std::vector<float> down;   // [down_shrink().width()]
};

// The LoRA that forwards apply: one, or several side by side whose ranks `factors` weigh.
// Immutable.
struct ActiveLora {
  std::vector<int> ids;
  std::vector<float> weights;
  std::shared_ptr<const ExpertLora> lora;
  // A token's factors: [0] all LoRAs at their weights; [1 + i] only ids[i]; the last one none.
  std::vector<LoraFactors> factors;

  // Whether all weights are 1.
  bool plain() const;
  // Whether all weights are 0.
  bool silent() const;
};

class LoraSet {
 public:
  // Adds or replaces a LoRA; one that is active is replaced there too. Throws
  // std::invalid_argument for a negative number.
  void put(const MoeShape& shape, int id, std::shared_ptr<const ExpertLora> lora);
  // Throws std::invalid_argument if there is none, or if it is active.
  void remove(int id);
  void clear();

  // The sum of these LoRAs, each times its weight; none: the base. Several are laid side by side
  // once, which is kept until others are. Throws std::invalid_argument: a number that is not held
  // or given twice, a weight that is not finite, ranks beyond what kernels take; what was active
  // then stays so. Returns whether anything changed.
  bool activate(const MoeShape& shape, std::span<const int> ids, std::span<const float> weights);

  // Null: the base.
  const std::shared_ptr<const ActiveLora>& active() const { return active_; }
  std::size_t size() const { return loras_.size(); }

  // For every token the index of its factors; `adapter_ids` [qlen] int32 or int64, -1 for none.
  // Throws std::invalid_argument for a number that is not active.
  std::span<const int> choose(const TensorView& adapter_ids);

 private:
  std::shared_ptr<const ExpertLora> combine(const MoeShape& shape, std::span<const int> ids);
  std::vector<std::shared_ptr<const ExpertLora>> members(std::span<const int> ids) const;

  std::map<int, std::shared_ptr<const ExpertLora>> loras_;
  std::shared_ptr<const ActiveLora> active_;
  std::vector<int> combined_ids_;
  std::shared_ptr<const ExpertLora> combined_;
  std::vector<int> choice_;  // kept for its memory
};

}  // namespace ktrt
