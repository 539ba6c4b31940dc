// Dense BF16 on AVX-512 BF16. Register block: 6 rows of X × 4 of W, 24 sums.
#include <immintrin.h>
#include <string.h>

#include "kernels/dense_bf16/avx512_common.h"
#include "kernels/dense_bf16/body.h"

namespace ktrt {
namespace {

inline __m512bh as_bf16(__m512i v) { return reinterpret_cast<__m512bh>(v); }

struct Vector : Outputs512 {
  using Value = uint16_t;
  using Sum = __m512;
  using Values = __m512bh;
  static constexpr int kWidth = 32;
  static constexpr int kBlockRows = 6;
  static constexpr int kStreams = 8;

  static Sum zero() { return _mm512_setzero_ps(); }
  static Values load(const uint16_t* p) { return as_bf16(_mm512_loadu_si512(p)); }
  static Values load_tail(const uint16_t* p, int count) {
    return as_bf16(_mm512_maskz_loadu_epi16((1u << count) - 1, p));
  }
  static Sum add(Sum sum, Values w, Values x) { return _mm512_dpbf16_ps(sum, w, x); }
  static float total(Sum sum) { return lane_sum(sum); }
  static void store_totals(Sum a, Sum b, Sum c, Sum d, float* out) {
    store_lane_sums(a, b, c, d, out);
  }

  static __m512 expand(__m512 sum, const uint16_t* b, const uint16_t* t, int count) {
    int pair;
    memcpy(&pair, t, 4);
    return _mm512_dpbf16_ps(sum, as_bf16(load_pairs(b, count)), as_bf16(_mm512_set1_epi32(pair)));
  }
  static void store_bf16(__m512 sum, uint16_t* out, int count) {
    _mm256_mask_storeu_epi16(out, first_lanes(count),
                             reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum)));
  }
};

}  // namespace

extern const DenseKernel dense_bf16_avx512_bf16;
const DenseKernel dense_bf16_avx512_bf16 = {"avx512_bf16", Vector::kBlockRows, dot<Vector>,
                                            finish<Vector>};

}  // namespace ktrt
