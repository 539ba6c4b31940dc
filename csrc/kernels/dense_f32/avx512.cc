// Dense float32 on AVX-512. Register block: 6 rows of X × 4 of W, 24 sums.
#include <immintrin.h>

#include "kernels/dense_bf16/avx512_common.h"
#include "kernels/dense_bf16/body.h"

namespace ktrt {
namespace {

struct Vector {
  using Value = float;
  using Sum = __m512;
  using Values = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kBlockRows = 6;
  static constexpr int kStreams = 8;

  static Sum zero() { return _mm512_setzero_ps(); }
  static Values load(const float* p) { return _mm512_loadu_ps(p); }
  static Values load_tail(const float* p, int count) {
    return _mm512_maskz_loadu_ps(first_lanes(count), p);
  }
  static Sum add(Sum sum, Values w, Values x) { return _mm512_fmadd_ps(w, x, sum); }
  static float total(Sum sum) { return lane_sum(sum); }
  static void store_totals(Sum a, Sum b, Sum c, Sum d, float* out) {
    store_lane_sums(a, b, c, d, out);
  }
};

}  // namespace

extern const DenseF32Kernel dense_f32_avx512;
const DenseF32Kernel dense_f32_avx512 = {"avx512", Vector::kBlockRows, dot<Vector>};

}  // namespace ktrt
