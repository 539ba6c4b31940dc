// Attention of one token on AVX-512. Register blocks: 8 heads × 2 tokens, 4 heads × 4 tokens; 8
// heads × 32 numbers, 4 heads × 64 numbers.
#include <immintrin.h>

#include "kernels/attention/body.h"
#include "kernels/dense_bf16/avx512_common.h"

namespace ktrt {
namespace {

struct Vector {
  using Floats = __m512;
  using Pairs = __m512i;
  static constexpr int kLanes = 16;
  static constexpr int kWidth = 2 * kLanes;
  static constexpr int kHeads = 8;
  static constexpr int tokens_beside(int heads) { return heads > 4 ? 2 : heads > 2 ? 4 : 6; }
  static constexpr int pairs_beside(int heads) { return heads > 4 ? 1 : heads > 2 ? 2 : 4; }

  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static void store_floats(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  static Floats broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
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
};

}  // namespace

extern const AttentionKernel attention_avx512;
const AttentionKernel attention_avx512 = {"avx512", Vector::kWidth, pack<Vector>, scores<Vector>,
                                          softmax,  values<Vector>, merge<Vector>};

}  // namespace ktrt
