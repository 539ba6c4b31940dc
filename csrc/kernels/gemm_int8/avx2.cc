// INT8 GEMM on AVX2. VPMADDUBSW would saturate, so bytes are widened to int16 and VPMADDWD sums
// exact int32 pairs; a last horizontal add joins the two pairs of a group of four k.
// Register block: up to 2 rows × half a strip (16 outputs).
#include <immintrin.h>
#include <string.h>

#include "kernels/avx2_expand.h"
#include "kernels/strip.h"

namespace ktrt {
namespace {

constexpr int kMaxRows = 2;
constexpr int kBlockBytes = 3584;

// Four k of one row, widened to int16 and repeated for four outputs.
inline __m256i broadcast_group(const uint8_t* x) {
  int word;
  memcpy(&word, x, 4);
  return _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(word)));
}

// acc[i][q]: outputs 4q … 4q + 3 as adjacent int32 pairs still to be added.
template <int kRows>
inline void half_tile(const uint8_t* w, const uint8_t* x, int64_t x_stride,
                      __m256i (&acc)[kRows][4]) {
  for (int group = 0; group < 16; ++group) {
    __m256i a[kRows];
    for (int i = 0; i < kRows; ++i) a[i] = broadcast_group(x + i * x_stride + group * 4);
    for (int q = 0; q < 4; ++q) {
      const __m128i bytes =
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + group * 64 + q * 16));
      const __m256i wide = _mm256_cvtepi8_epi16(bytes);
      for (int i = 0; i < kRows; ++i) {
        acc[i][q] = _mm256_add_epi32(acc[i][q], _mm256_madd_epi16(a[i], wide));
      }
    }
  }
}

// The 8 sums of two accumulators of adjacent pairs, in output order.
inline __m256i join_pairs(__m256i first, __m256i second) {
  return _mm256_permute4x64_epi64(_mm256_hadd_epi32(first, second), 0xd8);
}

template <int kRows>
void row_block(const GemmArgs& g, int first_row, bool first) {
  __m256 c[kRows][4];
  const uint8_t* a = g.a + first_row * g.a_stride;
  for (int half = 0; half < 2; ++half) {
    __m256i acc[kRows][4];
    for (int i = 0; i < kRows; ++i) {
      for (int q = 0; q < 4; ++q) acc[i][q] = _mm256_setzero_si256();
    }
    for_each_tile<kBlockBytes>(g, g.k, first && half == 0, [&](const uint8_t* w, int byte) {
      half_tile<kRows>(w + half * kTileHalf, a + byte, g.a_stride, acc);
    });
    for (int i = 0; i < kRows; ++i) {
      const __m256 scale = _mm256_set1_ps(g.a_scale[first_row + i]);
      for (int p = 0; p < 2; ++p) {
        const __m256i sum = join_pairs(acc[i][2 * p], acc[i][2 * p + 1]);
        const __m256 w_scale = _mm256_loadu_ps(g.w_scale + half * 16 + p * 8);
        c[i][half * 2 + p] = _mm256_mul_ps(_mm256_mul_ps(scale, w_scale), _mm256_cvtepi32_ps(sum));
      }
    }
  }
  if (g.lora_b != nullptr) expand_lora<kRows>(g, first_row, c);
  float* out = g.c + static_cast<int64_t>(first_row) * kStripColumns;
  for (int i = 0; i < kRows; ++i) {
    for (int q = 0; q < 4; ++q) _mm256_storeu_ps(out + i * kStripColumns + q * 8, c[i][q]);
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

extern const GemmKernel gemm_int8_avx2;
const GemmKernel gemm_int8_avx2 = {"avx2", strip, expand_rows, 0};

}  // namespace ktrt
