// Dense float32 on AVX2. Register block: 2 rows of X × 4 of W, 8 sums.
#include <immintrin.h>
#include <string.h>

#include "kernels/dense_bf16/body.h"

namespace ktrt {
namespace {

struct Vector {
  using Value = float;
  using Sum = __m256;
  using Values = __m256;
  static constexpr int kWidth = 8;
  static constexpr int kBlockRows = 2;
  static constexpr int kStreams = 1;

  static Sum zero() { return _mm256_setzero_ps(); }
  static Values load(const float* p) { return _mm256_loadu_ps(p); }
  static Values load_tail(const float* p, int count) {
    float padded[kWidth] = {};
    memcpy(padded, p, static_cast<size_t>(count) * sizeof(float));
    return _mm256_loadu_ps(padded);
  }
  static Sum add(Sum sum, Values w, Values x) { return _mm256_fmadd_ps(w, x, sum); }
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
};

}  // namespace

extern const DenseF32Kernel dense_f32_avx2;
const DenseF32Kernel dense_f32_avx2 = {"avx2", Vector::kBlockRows, dot<Vector>};

}  // namespace ktrt
