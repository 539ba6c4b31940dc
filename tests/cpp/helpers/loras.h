// Short calls of the LoRA interface that layers, linears and latent attention share.
#pragma once

#include <span>
#include <vector>

namespace ktrt::testing {

// Forwards apply this LoRA alone.
void apply_lora(auto& holder, int number = 0) {
  holder.activate_loras(std::vector<int>{number}, std::vector<float>{1.0f});
}

void apply_no_lora(auto& holder) {
  holder.activate_loras(std::span<const int>{}, std::span<const float>{});
}

}  // namespace ktrt::testing
