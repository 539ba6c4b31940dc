// INT4 GEMM on AVX2. VPMADDUBSW multiplies unsigned activations (offset 128) by signed codes in
// [-7, 7]; eight such pairs fit int16 (8 · 2 · 255 · 7 < 2^15), so that only every eighth sum is
// widened. Register block: up to 4 rows × half a strip (16 outputs).
#include <immintrin.h>
#include <string.h>

#include "kernels/avx2_expand.h"
#include "kernels/strip.h"

namespace ktrt {
namespace {

constexpr int kMaxRows = 4;
constexpr int kBlockBytes = 3584 / 2;
constexpr int kChunkGroups = 4;  // groups of low and of high nibbles that one int16 sum takes
constexpr uint8_t kActivationOffset = 128;

inline __m256i broadcast_group(const uint8_t* x) {
  int word;
  memcpy(&word, x, 4);
  return _mm256_set1_epi32(word);
}

// Bytes of two nibbles to the signed codes of each.
struct Codes {
  __m256i low;
  __m256i high;
  explicit Codes(const uint8_t* w) {
    const __m256i mask = _mm256_set1_epi8(0x0f);
    const __m256i table = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1,
                                           0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    const __m256i both = load_256(w);
    low = _mm256_shuffle_epi8(table, _mm256_and_si256(both, mask));
    high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(both, 4), mask));
  }
};

// acc[i][h] += the products of row i with 8 outputs, over the 128 columns of a half tile.
template <int kRows>
inline void half_tile(const uint8_t* w, const uint8_t* x, int64_t x_stride,
                      __m256i (&acc)[kRows][2]) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int first = 0; first < 16; first += kChunkGroups) {
    __m256i sums[kRows][2];
    for (int i = 0; i < kRows; ++i) sums[i][0] = sums[i][1] = _mm256_setzero_si256();
    for (int group = first; group < first + kChunkGroups; ++group) {
      const Codes w0(w + group * 64);
      const Codes w1(w + group * 64 + 32);
      for (int i = 0; i < kRows; ++i) {
        const uint8_t* row = x + i * x_stride + group * 4;
        const __m256i a = broadcast_group(row);
        sums[i][0] = _mm256_add_epi16(sums[i][0], _mm256_maddubs_epi16(a, w0.low));
        sums[i][1] = _mm256_add_epi16(sums[i][1], _mm256_maddubs_epi16(a, w1.low));
        const __m256i b = broadcast_group(row + 64);
        sums[i][0] = _mm256_add_epi16(sums[i][0], _mm256_maddubs_epi16(b, w0.high));
        sums[i][1] = _mm256_add_epi16(sums[i][1], _mm256_maddubs_epi16(b, w1.high));
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int h = 0; h < 2; ++h) {
        acc[i][h] = _mm256_add_epi32(acc[i][h], _mm256_madd_epi16(sums[i][h], ones));
      }
    }
  }
}

// c[i][h] of 8 outputs each: 16 · sum without the offset's part, scaled.
template <int kRows>
inline void store_half(const GemmArgs& g, int first_row, int half, const __m256i (&acc)[kRows][2]) {
  for (int h = 0; h < 2; ++h) {
    const int column = half * 16 + h * 8;
    const __m256i offset = _mm256_slli_epi32(load_256(g.w_sum + column), 7);
    const __m256 w_scale = _mm256_loadu_ps(g.w_scale + column);
    for (int i = 0; i < kRows; ++i) {
      const int row = first_row + i;
      const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(g.a_scale[row]), w_scale);
      const __m256i sum = _mm256_sub_epi32(_mm256_slli_epi32(acc[i][h], 4), offset);
      _mm256_storeu_ps(g.c + static_cast<int64_t>(row) * kStripColumns + column,
                       _mm256_mul_ps(scale, _mm256_cvtepi32_ps(sum)));
    }
  }
}

template <int kRows>
void row_block(const GemmArgs& g, int first_row, bool first) {
  const uint8_t* a = g.a + first_row * g.a_stride;
  for (int half = 0; half < 2; ++half) {
    __m256i acc[kRows][2];
    for (int i = 0; i < kRows; ++i) acc[i][0] = acc[i][1] = _mm256_setzero_si256();
    for_each_tile<kBlockBytes>(g, g.k / 2, first && half == 0, [&](const uint8_t* w, int byte) {
      half_tile<kRows>(w + half * kTileHalf, a + 2 * byte, g.a_stride, acc);
    });
    store_half<kRows>(g, first_row, half, acc);
  }
  if (g.lora_b == nullptr) return;
  // The expand has registers for two rows.
  int row = 0;
  for (; row + 2 <= kRows; row += 2) add_lora<2>(g, first_row + row);
  if (row < kRows) add_lora<1>(g, first_row + row);
}

using RowBlock = void (*)(const GemmArgs&, int, bool);
constexpr RowBlock kRowBlocks[kMaxRows + 1] = {nullptr, row_block<1>, row_block<2>, row_block<3>,
                                               row_block<4>};

void strip(const GemmArgs& g) {
  prefetch_scales(g);
  prefetch_expand(g);
  for_each_row_block<kMaxRows>(
      g.rows, [&](int first, int rows) { kRowBlocks[rows](g, first, first == 0); });
}

}  // namespace

extern const GemmKernel gemm_int4_avx2;
const GemmKernel gemm_int4_avx2 = {"avx2", strip, expand_rows, kActivationOffset};

}  // namespace ktrt
