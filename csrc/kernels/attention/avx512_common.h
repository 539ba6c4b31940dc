// Vectors of both AVX-512 files of attention. Register blocks: 8 heads × 2 tokens, 4 heads × 4
// tokens; 8 heads × 32 numbers, 4 heads × 64 numbers.
#pragma once

#include <immintrin.h>

#include "kernels/attention/body.h"
#include "kernels/dense_bf16/avx512_common.h"

namespace ktrt {
namespace {

struct Avx512 {
  using Floats = __m512;
  using Pairs = __m512i;
  static constexpr int kLanes = 16;
  static constexpr int kWidth = 2 * kLanes;
  static constexpr int kHeads = 8;
  static constexpr int kTotals = 16;
  static constexpr int tokens_beside(int heads) { return heads > 4 ? 2 : heads > 2 ? 4 : 6; }
  static constexpr int pairs_beside(int heads) { return heads > 4 ? 1 : heads > 2 ? 2 : 4; }

  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats value(float v) { return _mm512_set1_ps(v); }
  static Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static void store_floats(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  static Floats broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  // b if either is NaN.
  static Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static float largest(Floats v) { return _mm512_reduce_max_ps(v); }
  static Floats rounded(Floats v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT); }
  static Floats times_power(Floats v, Floats n) { return _mm512_scalef_ps(v, n); }
  static Floats zero_below(Floats x, Floats least, Floats v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ), v);
  }
  static Pairs load(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static Pairs load_tail(const uint16_t* p, int count) {
    return _mm512_maskz_loadu_epi16((1u << count) - 1, p);
  }
  static Floats even(Pairs pairs) { return even_values(pairs); }
  static Floats odd(Pairs pairs) { return odd_values(pairs); }
  static float total(Floats v) { return lane_sum(v); }
  static void store_totals(Floats a, Floats b, Floats c, Floats d, float* out) {
    store_lane_sums(a, b, c, d, out);
  }
  // 16 totals by the same additions. In each step the lanes of a that `mask` has meet b's others.
  static void store_many_totals(const Floats* sums, float* out) {
    const auto blend = [](__mmask16 mask, Floats a, Floats b) {
      return _mm512_mask_blend_ps(mask, a, b);
    };
    Floats half[8], quarter[4], two[2];
    for (int i = 0; i < 8; ++i) {
      const Floats a = sums[i];
      const Floats b = sums[i + 8];
      half[i] = _mm512_add_ps(blend(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
    }
    for (int i = 0; i < 4; ++i) {
      const Floats rest = blend(0xf0f0, half[i + 4], half[i]);
      quarter[i] = _mm512_add_ps(blend(0xf0f0, half[i], half[i + 4]),
                                 _mm512_shuffle_f32x4(rest, rest, 0xb1));
    }
    for (int i = 0; i < 2; ++i) {
      const Floats a = quarter[i];
      const Floats b = quarter[i + 2];
      two[i] = _mm512_add_ps(blend(0xcccc, a, b), _mm512_shuffle_ps(a, b, 0x4e));
    }
    const Floats rest = blend(0xaaaa, two[1], two[0]);
    _mm512_storeu_ps(out,
                     _mm512_add_ps(blend(0xaaaa, two[0], two[1]), _mm512_permute_ps(rest, 0xb1)));
  }
};

}  // namespace
}  // namespace ktrt
