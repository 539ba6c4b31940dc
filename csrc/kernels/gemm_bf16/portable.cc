// BF16 GEMM in plain C++: the kernel of last resort, and the one that is easiest to read.
#include <string.h>

#include "kernels/scalar.h"
#include "kernels/strip.h"

namespace ktrt {
namespace {

constexpr int kBlockBytes = 1792 * 2;

void row(const GemmArgs& g, const uint8_t* a, float* c) {
  for (int n = 0; n < kStripColumns; ++n) c[n] = 0.0f;
  const int row_bytes = g.k * 2;
  for_each_tile<kBlockBytes>(g, row_bytes, false, [&](const uint8_t* w, int byte) {
    for (int pair = 0; pair < 16; ++pair) {
      uint16_t x[2];
      memcpy(x, a + byte + pair * 4, 4);
      for (int half = 0; half < 2; ++half) {
        uint16_t pairs[32];
        memcpy(pairs, w + half * kTileHalf + pair * 64, 64);
        multiply_pairs(pairs, x, c + half * 16);
      }
    }
  });
}

void strip(const GemmArgs& g) {
  for (int r = 0; r < g.rows; ++r) {
    float* c = g.c + static_cast<int64_t>(r) * kStripColumns;
    row(g, g.a + r * g.a_stride, c);
    if (g.lora_b != nullptr) expand_row(g, r, c);
  }
}

}  // namespace

extern const GemmKernel gemm_bf16_portable;
const GemmKernel gemm_bf16_portable = {"portable", strip, expand_rows, 0};

}  // namespace ktrt
