// LoRA shrink in plain C++.
#include "kernels/scalar.h"

namespace ktrt {
namespace {

void run(const ShrinkArgs& s) {
  for (int block = 0; block < s.blocks; ++block) {
    const uint16_t* a = s.a + static_cast<int64_t>(block) * s.k * 16;
    for (int r = 0; r < s.rows; ++r) {
      const uint16_t* x = s.x + r * s.x_stride;
      float sums[16] = {};
      for (int k = 0; k < s.k; k += 2) multiply_pairs(a + k * 16, x + k, sums);
      uint16_t* t = s.t + r * s.t_stride + block * 16;
      for (int n = 0; n < 16; ++n) t[n] = bf16_bits(sums[n]);
    }
  }
}

}  // namespace

extern const ShrinkKernel lora_shrink_portable;
const ShrinkKernel lora_shrink_portable = {"portable", run};

}  // namespace ktrt
