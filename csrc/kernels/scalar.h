// Scalar pieces that the portable kernels share. Included by kernels' ISA files only.
#pragma once

#include <stdint.h>

#include "kernels/kernel_table.h"
#include "kernels/scalar_bf16.h"

namespace ktrt {
namespace {

// c[0..15] += x[0] · pairs[2n] + x[1] · pairs[2n + 1], one k pair of 16 outputs.
inline void multiply_pairs(const uint16_t* pairs, const uint16_t* x, float* c) {
  const float x0 = bf16_value(x[0]);
  const float x1 = bf16_value(x[1]);
  for (int n = 0; n < 16; ++n) {
    c[n] += x0 * bf16_value(pairs[2 * n]);
    c[n] += x1 * bf16_value(pairs[2 * n + 1]);
  }
}

// The LoRA expand of row `r` into c[0..31].
inline void expand_row(const ExpandArgs& g, int r, float* c) {
  const uint16_t* t = g.t + r * g.t_stride;
  for (int pair = 0; pair < g.rank_pairs; ++pair) {
    multiply_pairs(g.lora_b + pair * 64, t + 2 * pair, c);
    multiply_pairs(g.lora_b + pair * 64 + 32, t + 2 * pair, c + 16);
  }
}

inline void expand_rows(const ExpandArgs& g) {
  for (int r = 0; r < g.rows; ++r) expand_row(g, r, g.c + static_cast<int64_t>(r) * 32);
}

}  // namespace
}  // namespace ktrt
