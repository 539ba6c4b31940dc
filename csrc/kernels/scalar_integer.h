// Shared by the INT8 and INT4 GEMMs in plain C++: exact int32 sums, scaled as kt_kernel does.
// Included by kernels' ISA files only.
#pragma once

#include <stdint.h>

#include "kernels/scalar.h"
#include "kernels/strip.h"

namespace ktrt {
namespace {

// sums[n] += Σ_v x[v] · codes[4 n + v] of 16 outputs.
inline void multiply_group(const int8_t* x, const int8_t* codes, int32_t* sums) {
  for (int n = 0; n < 16; ++n) {
    int32_t sum = 0;
    for (int v = 0; v < 4; ++v) sum += x[v] * codes[n * 4 + v];
    sums[n] += sum;
  }
}

// One strip; kAccumulateRow(g, a, acc) adds the products of one row of A to acc [32].
template <void (*kAccumulateRow)(const GemmArgs&, const int8_t*, int32_t*)>
void integer_strip(const GemmArgs& g) {
  for (int r = 0; r < g.rows; ++r) {
    int32_t acc[kStripColumns] = {};
    kAccumulateRow(g, reinterpret_cast<const int8_t*>(g.a + r * g.a_stride), acc);
    float* c = g.c + static_cast<int64_t>(r) * kStripColumns;
    for (int n = 0; n < kStripColumns; ++n) {
      c[n] = (g.a_scale[r] * g.w_scale[n]) * static_cast<float>(acc[n]);
    }
    if (g.lora_b != nullptr) expand_row(g, r, c);
  }
}

}  // namespace
}  // namespace ktrt
