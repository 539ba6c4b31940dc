// INT8 GEMM on AMX tiles: signed activations times signed weights, exact int32 sums. They are
// scaled, and the LoRA expand (on separate tiles) is added, while the next rows multiply.
#pragma once

#include "kernels/amx/scaled_sums.h"

namespace ktrt {
namespace {

// c = (a_scale · w_scale) · sum, as kt_kernel does.
class RowAndOutputScale {
 public:
  RowAndOutputScale(const GemmArgs& g, int row) : g_(g), a_(_mm512_set1_ps(g.a_scale[row])) {}
  __m512 apply(const float* sums, int half) const {
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums));
    const __m512 scale = _mm512_mul_ps(a_, _mm512_loadu_ps(g_.w_scale + half));
    return _mm512_mul_ps(scale, sum);
  }

 private:
  const GemmArgs& g_;
  const __m512 a_;
};

class AmxInt8Gemm : public ScaledSums<RowAndOutputScale> {
 public:
  static constexpr int kLayoutBlock = 3584;
  using WeightTiles = TilesInPlace;
  using Multiply = MultiplyInt8;
  static int row_bytes(const GemmArgs& g) { return g.k; }

  explicit AmxInt8Gemm(const GemmArgs& g) : ScaledSums(g) { prefetch_scales(g); }
};

}  // namespace
}  // namespace ktrt
