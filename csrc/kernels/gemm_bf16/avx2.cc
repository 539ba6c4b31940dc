// BF16 GEMM on AVX2. Each 32-byte vector holds one k pair of 8 outputs; the two values of a pair
// are widened to float32 by a shift and a mask. Register block: up to 2 rows × one strip (4 ymm
// each).
#include <immintrin.h>
#include <string.h>

#include "kernels/avx2_expand.h"
#include "kernels/strip.h"

namespace ktrt {
namespace {

constexpr int kMaxRows = 2;
constexpr int kBlockBytes = 1792 * 2;

template <int kRows>
void row_block(const GemmArgs& g, int first_row, bool first) {
  __m256 acc[kRows][4];
  for (int i = 0; i < kRows; ++i) {
    for (int q = 0; q < 4; ++q) acc[i][q] = _mm256_setzero_ps();
  }
  const uint8_t* a = g.a + first_row * g.a_stride;
  const int row_bytes = g.k * 2;
  for_each_tile<kBlockBytes>(g, row_bytes, first, [&](const uint8_t* w, int byte) {
    const uint8_t* x = a + byte;
    for (int pair = 0; pair < 16; ++pair) {
      multiply_pairs<kRows>(w + pair * 64, w + kTileHalf + pair * 64, x + pair * 4, g.a_stride,
                            acc);
    }
  });
  if (g.lora_b != nullptr) expand_lora<kRows>(g, first_row, acc);
  float* c = g.c + static_cast<int64_t>(first_row) * kStripColumns;
  for (int i = 0; i < kRows; ++i) {
    for (int q = 0; q < 4; ++q) _mm256_storeu_ps(c + i * kStripColumns + q * 8, acc[i][q]);
  }
}

void strip(const GemmArgs& g) {
  prefetch_expand(g);
  for_each_row_block<kMaxRows>(g.rows, [&](int first, int rows) {
    if (rows == 2) {
      row_block<2>(g, first, first == 0);
    } else {
      row_block<1>(g, first, first == 0);
    }
  });
}

}  // namespace

extern const GemmKernel gemm_bf16_avx2;
const GemmKernel gemm_bf16_avx2 = {"avx2", strip, expand_rows, 0};

}  // namespace ktrt
