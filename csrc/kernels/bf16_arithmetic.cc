#include "kernels/bf16_arithmetic.h"

#include <algorithm>
#include <string_view>

#include "kernels/peak.h"

namespace ktrt {

namespace {

// Known processors are at 0.5 and at 2: a start that other programs disturb must not
// change the choice.
constexpr double kLeastGain = 1.4;
constexpr int kRuns = 8;
constexpr double kSeconds = 1e-5;  // one run of a loop

Bf16Arithmetic measure() {
  const CpuFeatures& features = cpu_features();
  if (!features.avx512_bf16) return Bf16Arithmetic::kFloat32;
  const PeakLoop* float32 = nullptr;
  const PeakLoop* dot = nullptr;
  for (const PeakLoop* loop : peak_loops(Isa::kAvx512, features)) {
    if (std::string_view(loop->name) == "avx512") float32 = loop;
    if (std::string_view(loop->name) == "avx512_bf16") dot = loop;
  }
  double float32_rate = 0;
  double dot_rate = 0;
  for (int run = 0; run < kRuns; ++run) {
    float32_rate = std::max(float32_rate, measure_peak(*float32, kSeconds));
    dot_rate = std::max(dot_rate, measure_peak(*dot, kSeconds));
  }
  return float32_rate > kLeastGain * dot_rate ? Bf16Arithmetic::kFloat32 : Bf16Arithmetic::kDot;
}

}  // namespace

Bf16Arithmetic faster_bf16_arithmetic() {
  static const Bf16Arithmetic faster = measure();
  return faster;
}

Bf16Arithmetic active_bf16_arithmetic() {
  const std::optional<Bf16Arithmetic> wanted = bf16_override();
  return wanted ? *wanted : faster_bf16_arithmetic();
}

}  // namespace ktrt
