// INT8 GEMM on AMX tiles: signed activations times signed weights, exact int32 sums. They are
// scaled, and the LoRA expand (on separate tiles) is added, while the next rows multiply.
#pragma once

#include "kernels/amx/block.h"
#include "kernels/vnni/expand.h"

namespace ktrt {
namespace {

class AmxInt8Gemm {
 public:
  static constexpr int kLayoutBlock = 3584;
  using WeightTiles = TilesInPlace;
  using Multiply = MultiplyInt8;
  static int row_bytes(const GemmArgs& g) { return g.k; }

  explicit AmxInt8Gemm(const GemmArgs& g) : g_(g) {
    prefetch_scales(g);
    if (g.lora_b != nullptr) expand_.build(g);
  }

  template <class Tiles, bool kTwoTiles>
  float* finish(int first_tile) {
    flush();
    first_ = first_tile * g_.tile_rows;
    const int end = first_ + (kTwoTiles ? 2 : 1) * g_.tile_rows;
    coming_end_ = end < g_.rows ? end : g_.rows;
    float* c = g_.c + static_cast<int64_t>(first_) * kStripColumns;
    if (g_.lora_b == nullptr) return c;
    const Turn turn{c, nullptr};
    expand_.multiply<Tiles, kTwoTiles>(g_, first_, &turn);
    return expanded_;
  }
  // The rows that finish() named are stored and may be scaled.
  void stored() {
    if (coming_end_ == 0) return;
    next_ = first_;
    end_ = coming_end_;
    coming_end_ = 0;
  }
  // Scales as many rows as leave nothing to do after `steps` steps.
  void step(int steps) {
    const int count = (2 * kTileRows + steps - 1) / steps;
    const int end = next_ + count < end_ ? next_ + count : end_;
    while (next_ < end) scale(next_++);
  }
  void flush() {
    while (next_ < end_) scale(next_++);
  }

 private:
  // c = (a_scale · w_scale) · sum, as kt_kernel does; the sums lie where c is.
  void scale(int row) {
    float* c = g_.c + static_cast<int64_t>(row) * kStripColumns;
    const __m512 a = _mm512_set1_ps(g_.a_scale[row]);
    for (int half = 0; half < kStripColumns; half += 16) {
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_loadu_si512(c + half));
      const __m512 scale = _mm512_mul_ps(a, _mm512_loadu_ps(g_.w_scale + half));
      __m512 value = _mm512_mul_ps(scale, sum);
      if (g_.lora_b != nullptr) {
        const float* expanded = expanded_ + (row - first_) * kStripColumns + half;
        value = _mm512_add_ps(value, _mm512_load_ps(expanded));
      }
      _mm512_storeu_ps(c + half, value);
    }
  }

  const GemmArgs& g_;
  int first_ = 0;       // the rows whose sums are complete,
  int next_ = 0;        // the first row that is not scaled yet,
  int end_ = 0;         // and their end
  int coming_end_ = 0;  // the same until they are stored, then 0
  ExpandTiles expand_;
  alignas(64) float expanded_[2 * kTileRows * kStripColumns];
};

template <class Tiles, class Gemm>
void tile_strip_then_expand(const GemmArgs& g) {
  GemmArgs base = g;
  base.lora_b = nullptr;
  prefetch_expand(g);
  tile_strip<Tiles, Gemm>(base);
  if (g.lora_b != nullptr) expand_rows<Bf16Expand>(g);
}

}  // namespace
}  // namespace ktrt
