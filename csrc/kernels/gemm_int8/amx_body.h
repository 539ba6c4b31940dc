// INT8 GEMM on AMX tiles: signed activations times signed weights, exact int32 sums. They are
// scaled in the L1 cache and taken back into tiles only where there is LoRA to add.
#pragma once

#include "kernels/amx/block.h"

namespace ktrt {
namespace {

template <class Tiles>
struct AmxInt8Gemm {
  static constexpr int kBlockBytes = 3584;

  // c[r][n] = (a_scale · w_scale) · sum, as kt_kernel does; the sums lie where c is.
  static void scale(const GemmArgs& g, int first_row, int rows) {
    float* c = g.c + static_cast<int64_t>(first_row) * kStripColumns;
    const __m512 w0 = _mm512_loadu_ps(g.w_scale);
    const __m512 w1 = _mm512_loadu_ps(g.w_scale + 16);
    for (int r = 0; r < rows; ++r, c += kStripColumns) {
      const __m512 a = _mm512_set1_ps(g.a_scale[first_row + r]);
      const __m512 sum0 = _mm512_cvtepi32_ps(_mm512_loadu_si512(c));
      const __m512 sum1 = _mm512_cvtepi32_ps(_mm512_loadu_si512(c + 16));
      _mm512_storeu_ps(c, _mm512_mul_ps(_mm512_mul_ps(a, w0), sum0));
      _mm512_storeu_ps(c + 16, _mm512_mul_ps(_mm512_mul_ps(a, w1), sum1));
    }
  }

  template <bool kTwoTiles>
  static void block(const GemmArgs& g, int first_row, int rows) {
    zero_c<Tiles, kTwoTiles>();
    multiply_strip<Tiles, MultiplyInt8, kBlockBytes, kTwoTiles>(g, first_row, g.k);
    finish<kTwoTiles>(g, first_row, rows);
  }

  // From the sums in the tiles to C, with LoRA.
  template <bool kTwoTiles>
  static void finish(const GemmArgs& g, int first_row, int rows) {
    float* c = g.c + static_cast<int64_t>(first_row) * kStripColumns;
    store_c<Tiles, kTwoTiles>(c);
    scale(g, first_row, rows);
    if (g.lora_b == nullptr) return;
    load_c<Tiles, kTwoTiles>(c);
    expand_lora<Tiles, kTwoTiles>(g, first_row, rows);
    store_c<Tiles, kTwoTiles>(c);
  }
};

}  // namespace
}  // namespace ktrt
