// INT4 GEMM in plain C++: exact int32 sums, scaled as kt_kernel does.
#include <string.h>

#include "kernels/scalar.h"
#include "kernels/strip.h"

namespace ktrt {
namespace {

constexpr int kBlockBytes = 3584 / 2;

// sums[n] += Σ_v x[v] · codes[4 n + v] of 16 outputs.
void multiply_group(const int8_t* x, const int8_t* codes, int32_t* sums) {
  for (int n = 0; n < 16; ++n) {
    int32_t sum = 0;
    for (int v = 0; v < 4; ++v) sum += x[v] * codes[n * 4 + v];
    sums[n] += sum;
  }
}

// A nibble becomes the signed byte 16 · code.
void accumulate_row(const GemmArgs& g, const int8_t* a, int32_t* acc) {
  for_each_tile<kBlockBytes>(g, g.k / 2, false, [&](const uint8_t* w, int byte) {
    const int8_t* x = a + 2 * byte;
    for (int half = 0; half < 2; ++half) {
      for (int group = 0; group < 16; ++group) {
        int8_t low[64];
        int8_t high[64];
        for (int i = 0; i < 64; ++i) {
          const uint8_t both = w[half * kTileHalf + group * 64 + i];
          low[i] = static_cast<int8_t>(both << 4);
          high[i] = static_cast<int8_t>(both & 0xf0);
        }
        multiply_group(x + group * 4, low, acc + half * 16);
        multiply_group(x + 64 + group * 4, high, acc + half * 16);
      }
    }
  });
}

void strip(const GemmArgs& g) {
  for (int r = 0; r < g.rows; ++r) {
    int32_t acc[kStripColumns] = {};
    accumulate_row(g, reinterpret_cast<const int8_t*>(g.a + r * g.a_stride), acc);
    float* c = g.c + static_cast<int64_t>(r) * kStripColumns;
    for (int n = 0; n < kStripColumns; ++n) {
      c[n] = (g.a_scale[r] * g.w_scale[n]) * static_cast<float>(acc[n]);
    }
    if (g.lora_b != nullptr) expand_row(g, r, c);
  }
}

}  // namespace

extern const GemmKernel gemm_int4_portable;
const GemmKernel gemm_int4_portable = {"portable", strip, 0};

}  // namespace ktrt
