// How the sums of gate and up become one intermediate activation: plain data, read by the
// kernels.
#pragma once

namespace ktrt {

enum class ActivationKind {
  kSilu,         // x · sigmoid(alpha · x)
  kGelu,         // x · Φ(x)
  kGeluTanh,     // its tanh approximation
  kRelu,         // max(x, 0)
  kRelu2,        // max(x, 0)²
  kSoftcapSilu,  // tanh(x / gate_limit) · gate_limit · sigmoid(x)
};

// f(min(gate, gate_limit)) · (clamp(up, ± up_limit) + up_offset), f being the kind's function;
// f(up) alone where experts have no gate. kSoftcapSilu bends gate and up towards the limits
// instead: tanh(up / up_limit) · up_limit. f(0) is 0 for every kind, so padding stays 0.
struct Activation {
  static constexpr float kNoLimit = __builtin_inff();

  ActivationKind kind = ActivationKind::kSilu;
  float alpha = 1.0f;  // kSilu only
  float gate_limit = kNoLimit;
  float up_limit = kNoLimit;
  float up_offset = 0.0f;

  // silu(gate) · up, which has its own kernel.
  constexpr bool is_silu_mul() const {
    return kind == ActivationKind::kSilu && alpha == 1.0f && gate_limit == kNoLimit &&
           up_limit == kNoLimit && up_offset == 0.0f;
  }
};

}  // namespace ktrt
