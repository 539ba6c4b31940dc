// INT4 GEMM on AVX2. VPMADDUBSW multiplies unsigned activations (offset 128) by signed codes in
// [-8, 7]; eight such pairs fit int16 (8 · 2 · 255 · 8 < 2^15), so that only every eighth sum is
// widened, once in a burst. Register block of many rows: up to 4 rows × half a strip.
#include "kernels/avx2/integer.h"
#include "kernels/avx2/products.h"
#include "kernels/bursts.h"
#include "kernels/few_or_many.h"

namespace ktrt {
namespace {

constexpr int kMaxRows = 4;
constexpr int kBlockBytes = 3584 / 2;
constexpr uint8_t kActivationOffset = 128;

// Bytes of two nibbles to the signed codes of each.
struct Codes {
  __m256i low;
  __m256i high;
  KTRT_INLINE explicit Codes(const uint8_t* w) {
    const __m256i mask = _mm256_set1_epi8(0x0f);
    const __m256i table = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1,
                                           0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    const __m256i both = load_256(w);
    low = _mm256_shuffle_epi8(table, _mm256_and_si256(both, mask));
    high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(both, 4), mask));
  }
};

struct Burst {
  // A tile has 128 columns.
  static constexpr int first_byte(int step) { return step / 16 * 128 + step % 16 * 4; }

  // acc[i][h] += the products of row i with 8 outputs, of 4 · 4 low and 4 · 4 high nibbles.
  template <int kRows>
  static KTRT_INLINE void add(const uint8_t* w, const uint8_t* x, int64_t x_stride,
                              __m256i (&acc)[kRows][2]) {
    __m256i sums[kRows][2];
    unrolled<kRows>([&](auto i) KTRT_LAMBDA { sums[i][0] = sums[i][1] = _mm256_setzero_si256(); });
    unrolled<kBurstVectors>([&](auto v) KTRT_LAMBDA {
      const Codes codes[2] = {Codes(w + v * 64), Codes(w + v * 64 + 32)};
      unrolled<kRows>([&](auto i) KTRT_LAMBDA {
        const uint8_t* row = x + i * x_stride + v * 4;
        const __m256i low = Vectors256::broadcast(row);
        const __m256i high = Vectors256::broadcast(row + 64);
        unrolled<2>([&](auto h) KTRT_LAMBDA {
          sums[i][h] = _mm256_add_epi16(sums[i][h], _mm256_maddubs_epi16(low, codes[h].low));
          sums[i][h] = _mm256_add_epi16(sums[i][h], _mm256_maddubs_epi16(high, codes[h].high));
        });
      });
    });
    const __m256i ones = _mm256_set1_epi16(1);
    unrolled<kRows>([&](auto i) KTRT_LAMBDA {
      unrolled<2>([&](auto h) KTRT_LAMBDA {
        acc[i][h] = _mm256_add_epi32(acc[i][h], _mm256_madd_epi16(sums[i][h], ones));
      });
    });
  }
};

// Sums of kRows rows over all of k, half a strip after the other.
template <int kRows>
void row_block(const GemmArgs& g, int first_row, bool first) {
  const uint8_t* a = g.a + first_row * g.a_stride;
  for (int half = 0; half < 2; ++half) {
    __m256i acc[kRows][2];
    unrolled<kRows>([&](auto i) { acc[i][0] = acc[i][1] = _mm256_setzero_si256(); });
    const auto multiply = [&](const uint8_t* w, int byte, const uint8_t* ahead) KTRT_LAMBDA {
      for (int vector = 0; vector < 16; vector += kBurstVectors) {
        if (ahead != nullptr) {
          for (int i = 0; i < 512; i += 64) __builtin_prefetch(ahead + vector * 128 + i, 0, 2);
        }
        Burst::add<kRows>(w + half * kTileHalf + vector * 64, a + 2 * byte + vector * 4, g.a_stride,
                          acc);
      }
    };
    for_each_tile_ahead<kBlockBytes>(g, g.k / 2, first && half == 0, multiply);
    float* c = g.c + static_cast<int64_t>(first_row) * kStripColumns + half * 16;
    unrolled<kRows>([&](auto i) {
      IntegerSums256::store_sum(c + i * kStripColumns, acc[i][0]);
      IntegerSums256::store_sum(c + i * kStripColumns + 8, acc[i][1]);
    });
  }
}

using RowBlock = void (*)(const GemmArgs&, int, bool);
constexpr RowBlock kRowBlocks[kMaxRows + 1] = {nullptr, row_block<1>, row_block<2>, row_block<3>,
                                               row_block<4>};

struct Body {
  static constexpr bool kHasScales = true;
  static constexpr int kSideRows = kMaxSideRows;

  template <int kRows, int kStrips>
  static void few(const GemmArgs* g) {
    burst_sums<IntegerSums256, Burst, kBlockBytes, kRows, kStrips>(g, g->k / 2);
    for (int s = 0; s < kStrips; ++s) finish_sums<true, 4>(g[s]);
  }

  static void many(const GemmArgs& g) {
    for_each_row_block<kMaxRows>(
        g.rows, [&](int first, int rows) { kRowBlocks[rows](g, first, first == 0); });
    finish_sums<true, 4>(g);
  }
};

}  // namespace

extern const GemmKernel gemm_int4_avx2;
const GemmKernel gemm_int4_avx2 = {
    "avx2", one_strip<Body>,           expand_rows, kActivationOffset,
    false,  strips_side_by_side<Body>, kMaxSideRows};

}  // namespace ktrt
