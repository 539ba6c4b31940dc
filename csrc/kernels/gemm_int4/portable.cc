// INT4 GEMM in plain C++.
#include "kernels/scalar_integer.h"

namespace ktrt {
namespace {

constexpr int kBlockBytes = 3584 / 2;

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

}  // namespace

extern const GemmKernel gemm_int4_portable;
const GemmKernel gemm_int4_portable = {"portable", integer_strip<accumulate_row>, expand_rows, 0};

}  // namespace ktrt
