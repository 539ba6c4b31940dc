// The LoRAs that a linear layer or latent attention holds by number, of which at most one acts.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <utility>

#include "base/check.h"

namespace ktrt {

// Calls as LoraSet's, for operators whose kernels take no factors of ranks: the caller adds several
// adapters up, weights folded into B, and loads the sum.
template <class Lora>
class OneOfLoras {
 public:
  // Adds or replaces; acts at once where the number is active. Throws std::invalid_argument for a
  // negative number.
  void put(int id, std::shared_ptr<const Lora> lora) {
    KTRT_CHECK(id >= 0, "the LoRA's number is " << id << ", expected 0 or more");
    loras_[id] = std::move(lora);
    if (id == active_id_) active_ = loras_[id];
  }

  // Throws std::invalid_argument if there is none, or if it is active.
  void remove(int id) {
    KTRT_CHECK(loras_.count(id) > 0, "there is no LoRA " << id);
    KTRT_CHECK(id != active_id_,
               "LoRA " << id << " is active; activate another, or none, before it is removed");
    loras_.erase(id);
  }

  // One LoRA at weight 1, or none. Throws std::invalid_argument; what was active then stays so.
  void activate(std::span<const int> ids, std::span<const float> weights) {
    KTRT_CHECK(ids.size() == weights.size() && ids.size() <= 1,
               "there are " << ids.size() << " LoRAs and " << weights.size()
                            << " weights, expected one of each, or none");
    if (ids.empty()) {
      active_id_ = kNone;
      active_.reset();
      return;
    }
    KTRT_CHECK(weights[0] == 1.0f,
               "the weight of LoRA " << ids[0] << " is " << weights[0] << ", expected 1");
    const auto found = loras_.find(ids[0]);
    KTRT_CHECK(found != loras_.end(),
               "there is no LoRA " << ids[0] << "; " << loras_.size() << " are loaded");
    active_id_ = ids[0];
    active_ = found->second;
  }

  // Null: none.
  const Lora* active() const { return active_.get(); }

 private:
  static constexpr int kNone = -1;

  std::map<int, std::shared_ptr<const Lora>> loras_;
  int active_id_ = kNone;
  std::shared_ptr<const Lora> active_;
};

}  // namespace ktrt
