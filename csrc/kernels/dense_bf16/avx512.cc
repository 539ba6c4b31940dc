// Dense BF16 on AVX-512 without BF16 instructions: values are widened to float32 by a shift and a
// mask. Register block: 4 rows of X × 4 of W, 16 sums.
#include <immintrin.h>
#include <string.h>

#include "kernels/dense_bf16/avx512_common.h"
#include "kernels/dense_bf16/body.h"

namespace ktrt {
namespace {

struct Vector : Outputs512 {
  using Value = uint16_t;
  struct Values {
    __m512 even, odd;
  };
  using Sum = __m512;
  static constexpr int kWidth = 32;
  static constexpr int kBlockRows = 4;
  static constexpr int kStreams = 8;

  static Sum zero() { return _mm512_setzero_ps(); }
  static Values widen(__m512i pairs) { return {even_values(pairs), odd_values(pairs)}; }
  static Values load(const uint16_t* p) { return widen(_mm512_loadu_si512(p)); }
  static Values load_tail(const uint16_t* p, int count) {
    return widen(_mm512_maskz_loadu_epi16((1u << count) - 1, p));
  }
  static Sum add(Sum sum, const Values& w, const Values& x) {
    return _mm512_fmadd_ps(w.odd, x.odd, _mm512_fmadd_ps(w.even, x.even, sum));
  }
  static float total(Sum sum) { return lane_sum(sum); }
  static void store_totals(Sum a, Sum b, Sum c, Sum d, float* out) {
    store_lane_sums(a, b, c, d, out);
  }

  static __m512 expand(__m512 sum, const uint16_t* b, const uint16_t* t, int count) {
    int pair;
    memcpy(&pair, t, 4);
    return add(sum, widen(load_pairs(b, count)), widen(_mm512_set1_epi32(pair)));
  }
  static void store_bf16(__m512 sum, uint16_t* out, int count) {
    // Round to nearest even; a NaN stays a quiet NaN.
    const __m512i bits = _mm512_castps_si512(sum);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q);
    const __m512i high = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16);
    _mm256_mask_storeu_epi16(out, first_lanes(count), _mm512_cvtepi32_epi16(high));
  }
};

}  // namespace

extern const DenseKernel dense_bf16_avx512;
const DenseKernel dense_bf16_avx512 = {"avx512", Vector::kBlockRows, dot<Vector>, finish<Vector>};

}  // namespace ktrt
