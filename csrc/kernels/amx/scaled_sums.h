// The end of GEMMs whose sums are scaled once they are complete, while the next rows multiply; the
// LoRA expand, on separate tiles, is added then.
#pragma once

#include "kernels/amx/block.h"
#include "kernels/vnni/expand.h"

namespace ktrt {
namespace {

// A Gemm of TileStrip but for what reads W. Scale(g, row).apply(sums, half) makes 16 values of the
// row's sums, as the tiles left them.
template <class Scale>
class ScaledSums {
 public:
  explicit ScaledSums(const GemmArgs& g) : g_(g) {
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
  // Scales as many rows a step as leave nothing to do after `count` steps.
  struct Steps {
    const ScaledSums& sums;
    int next;
    int end;
    int rows;
    void step() {
      const int until = next + rows < end ? next + rows : end;
      for (; next < until; ++next) sums.scale(next);
    }
  };
  Steps steps(int count) { return {*this, next_, end_, (2 * kTileRows + count - 1) / count}; }
  void stepped(const Steps& steps) { next_ = steps.next; }
  void flush() {
    while (next_ < end_) scale(next_++);
  }

 private:
  void scale(int row) const {
    float* c = g_.c + static_cast<int64_t>(row) * kStripColumns;
    const Scale scale(g_, row);
    for (int half = 0; half < kStripColumns; half += 16) {
      __m512 value = scale.apply(c + half, half);
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
