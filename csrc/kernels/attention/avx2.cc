// Attention of one token on AVX2. Register blocks: 4 heads × 2 tokens; 4 heads × 16 numbers.
#include <immintrin.h>
#include <string.h>

#include "kernels/attention/body.h"

namespace ktrt {
namespace {

struct Vector {
  using Floats = __m256;
  using Pairs = __m256i;
  static constexpr int kLanes = 8;
  static constexpr int kWidth = 2 * kLanes;
  static constexpr int kHeads = 4;
  static constexpr int kTotals = 4;
  static constexpr int tokens_beside(int heads) { return heads > 2 ? 2 : 4; }
  static constexpr int pairs_beside(int heads) { return heads > 2 ? 1 : 2; }

  static Floats zero() { return _mm256_setzero_ps(); }
  static Floats value(float v) { return _mm256_set1_ps(v); }
  static Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
  static void store_floats(float* p, Floats v) { _mm256_storeu_ps(p, v); }
  static Floats broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  // b if either is NaN.
  static Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
  static float largest(Floats v) {
    const __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(half, _mm_permute_ps(half, 0x4e));
    return _mm_cvtss_f32(_mm_max_ps(two, _mm_permute_ps(two, 0xb1)));
  }
  static Floats rounded(Floats v) {
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Floats times_power(Floats v, Floats n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  static Floats zero_below(Floats x, Floats least, Floats v) {
    return _mm256_and_ps(_mm256_cmp_ps(x, least, _CMP_NLT_UQ), v);
  }
  static Pairs load(const uint16_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Pairs load_tail(const uint16_t* p, int count) {
    uint16_t padded[kWidth] = {};
    memcpy(padded, p, sizeof(uint16_t) * static_cast<size_t>(count));
    return load(padded);
  }
  static Floats even(Pairs pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
  static Floats odd(Pairs pairs) {
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, mask));
  }
  static float total(Floats v) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(half, _mm_permute_ps(half, 0x4e));
    return _mm_cvtss_f32(_mm_add_ps(two, _mm_permute_ps(two, 0xb1)));
  }
  // By the same additions: halves, lanes two apart, neighbours.
  static void store_totals(Floats a, Floats b, Floats c, Floats d, float* out) {
    const __m256 ac =
        _mm256_add_ps(_mm256_permute2f128_ps(a, c, 0x20), _mm256_permute2f128_ps(a, c, 0x31));
    const __m256 bd =
        _mm256_add_ps(_mm256_permute2f128_ps(b, d, 0x20), _mm256_permute2f128_ps(b, d, 0x31));
    // a0+a2, a1+a3, b0+b2, b1+b3 │ the same of c and d
    const __m256 two =
        _mm256_add_ps(_mm256_shuffle_ps(ac, bd, 0x44), _mm256_shuffle_ps(ac, bd, 0xee));
    const __m256 one = _mm256_add_ps(two, _mm256_permute_ps(two, 0xb1));
    const __m128 low = _mm256_castps256_ps128(one);
    const __m128 high = _mm256_extractf128_ps(one, 1);
    _mm_storeu_ps(out, _mm_shuffle_ps(low, high, 0x88));
  }
};

}  // namespace

extern const AttentionKernel attention_avx2;
const AttentionKernel attention_avx2 = {"avx2",         Vector::kWidth,  pack<Vector>,
                                        scores<Vector>, softmax<Vector>, values<Vector>,
                                        merge<Vector>,  nullptr};

}  // namespace ktrt
