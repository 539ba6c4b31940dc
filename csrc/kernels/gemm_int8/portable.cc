// INT8 GEMM in plain C++.
#include <string.h>

#include "kernels/scalar_integer.h"

namespace ktrt {
namespace {

constexpr int kBlockBytes = 3584;

void accumulate_row(const GemmArgs& g, const int8_t* a, int32_t* acc) {
  for_each_tile<kBlockBytes>(g, g.k, false, [&](const uint8_t* w, int byte) {
    const int8_t* x = a + byte;
    for (int half = 0; half < 2; ++half) {
      for (int group = 0; group < 16; ++group) {
        int8_t codes[64];
        memcpy(codes, w + half * kTileHalf + group * 64, 64);
        multiply_group(x + group * 4, codes, acc + half * 16);
      }
    }
  });
}

}  // namespace

extern const GemmKernel gemm_int8_portable;
const GemmKernel gemm_int8_portable = {"portable", integer_strip<accumulate_row>, expand_rows, 0};

}  // namespace ktrt
