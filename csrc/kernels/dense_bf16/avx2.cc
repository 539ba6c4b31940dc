// Dense BF16 on AVX2: values are widened to float32 by a shift and a mask. Register block: 2 rows
// of X × 4 of W, 8 sums.
#include <immintrin.h>
#include <string.h>

#include "kernels/dense_bf16/body.h"
#include "kernels/scalar_bf16.h"

namespace ktrt {
namespace {

struct Vector {
  using Value = uint16_t;
  struct Values {
    __m256 even, odd;
  };
  using Sum = __m256;
  using Outputs = __m256;
  static constexpr int kWidth = 16;
  static constexpr int kBlockRows = 2;
  static constexpr int kStreams = 1;
  static constexpr int kOutputs = 8;

  static Sum zero() { return _mm256_setzero_ps(); }
  static Values widen(__m256i pairs) {
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(pairs, mask))};
  }
  static __m256i load_bytes(const void* p, int bytes) {
    if (bytes == 32) return _mm256_loadu_si256(static_cast<const __m256i*>(p));
    uint8_t padded[32] = {};
    memcpy(padded, p, static_cast<size_t>(bytes));
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(padded));
  }
  static Values load(const uint16_t* p) { return widen(load_bytes(p, 32)); }
  static Values load_tail(const uint16_t* p, int count) { return widen(load_bytes(p, 2 * count)); }
  static Sum add(Sum sum, const Values& w, const Values& x) {
    return _mm256_fmadd_ps(w.odd, x.odd, _mm256_fmadd_ps(w.even, x.even, sum));
  }
  static float total(Sum v) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(half, _mm_permute_ps(half, 0x4e));
    return _mm_cvtss_f32(_mm_add_ps(two, _mm_permute_ps(two, 0xb1)));
  }
  static void store_totals(Sum a, Sum b, Sum c, Sum d, float* out) {
    out[0] = total(a);
    out[1] = total(b);
    out[2] = total(c);
    out[3] = total(d);
  }

  static __m256 load_floats(const float* p, int count) {
    return _mm256_castsi256_ps(load_bytes(p, 4 * count));
  }
  static __m256 add_floats(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
  static __m256 expand(__m256 sum, const uint16_t* b, const uint16_t* t, int count) {
    int pair;
    memcpy(&pair, t, 4);
    return add(sum, widen(load_bytes(b, 4 * count)), widen(_mm256_set1_epi32(pair)));
  }
  static void store_bf16(__m256 sum, uint16_t* out, int count) {
    float values[kOutputs];
    _mm256_storeu_ps(values, sum);
    for (int i = 0; i < count; ++i) out[i] = bf16_bits(values[i]);
  }
};

}  // namespace

extern const DenseKernel dense_bf16_avx2;
const DenseKernel dense_bf16_avx2 = {"avx2", Vector::kBlockRows, dot<Vector>, finish<Vector>};

}  // namespace ktrt
