// Shared by the INT8 and INT4 GEMMs on AVX-512 VNNI: a register block of up to 14 rows × one
// strip. VPDPBUSD multiplies unsigned by signed bytes, so activations come with an offset of 128
// and 128 · w_sum is taken from every int32 accumulator in the end, which leaves exactly the signed
// sum (|acc| ≤ 255 · 127 · k < 2^31 for k ≤ 65536). Included by the families' bodies only.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "kernels/side_by_side.h"
#include "kernels/strip.h"
#include "kernels/vnni/expand.h"

namespace ktrt {
namespace {

constexpr int kMaxRows = 14;
constexpr uint8_t kActivationOffset = 128;

// acc += four k of each row (x: row 0's) times four k of 32 outputs.
template <int kRows>
inline __attribute__((always_inline)) void multiply_group(const uint8_t* x, int64_t x_stride,
                                                          __m512i w0, __m512i w1,
                                                          __m512i (&acc)[kRows][2]) {
  unrolled<kRows>([&](auto i) {
    const __m512i xi = broadcast_word(x + i * x_stride);
    acc[i][0] = _mm512_dpbusd_epi32(acc[i][0], xi, w0);
    acc[i][1] = _mm512_dpbusd_epi32(acc[i][1], xi, w1);
  });
}

// C of kRows rows from the sums of their products, LoRA included.
template <class Expand, int kRows>
inline void finish(const GemmArgs& g, int first_row, const __m512i (&acc)[kRows][2]) {
  const __m512i offset0 = _mm512_slli_epi32(_mm512_loadu_si512(g.w_sum), 7);
  const __m512i offset1 = _mm512_slli_epi32(_mm512_loadu_si512(g.w_sum + 16), 7);
  const __m512 scale0 = _mm512_loadu_ps(g.w_scale);
  const __m512 scale1 = _mm512_loadu_ps(g.w_scale + 16);
  float* c = g.c + static_cast<int64_t>(first_row) * kStripColumns;
  unrolled<kRows>([&](auto i) {
    const __m512 scale = _mm512_set1_ps(g.a_scale[first_row + i]);
    const __m512 signed0 = _mm512_cvtepi32_ps(_mm512_sub_epi32(acc[i][0], offset0));
    const __m512 signed1 = _mm512_cvtepi32_ps(_mm512_sub_epi32(acc[i][1], offset1));
    _mm512_storeu_ps(c + i * kStripColumns, _mm512_mul_ps(_mm512_mul_ps(scale, scale0), signed0));
    _mm512_storeu_ps(c + i * kStripColumns + 16,
                     _mm512_mul_ps(_mm512_mul_ps(scale, scale1), signed1));
  });
  if (g.lora_b != nullptr) expand_lora<Expand, kRows>(g, g.t + first_row * g.t_stride, c);
}

// Weights::multiply<kRows>(g, a, first, acc) adds the products of a whole strip.
template <class Weights, class Expand, int kRows>
void row_block(const GemmArgs& g, int first_row, bool first) {
  __m512i acc[kRows][2];
  unrolled<kRows>([&](auto i) { acc[i][0] = acc[i][1] = _mm512_setzero_si512(); });
  Weights::template multiply<kRows>(g, g.a + first_row * g.a_stride, first, acc);
  finish<Expand, kRows>(g, first_row, acc);
}

using RowBlock = void (*)(const GemmArgs&, int, bool);
template <class W, class E>
constexpr RowBlock kRowBlocks[kMaxRows + 1] = {nullptr,
                                               row_block<W, E, 1>,
                                               row_block<W, E, 2>,
                                               row_block<W, E, 3>,
                                               row_block<W, E, 4>,
                                               row_block<W, E, 5>,
                                               row_block<W, E, 6>,
                                               row_block<W, E, 7>,
                                               row_block<W, E, 8>,
                                               row_block<W, E, 9>,
                                               row_block<W, E, 10>,
                                               row_block<W, E, 11>,
                                               row_block<W, E, 12>,
                                               row_block<W, E, 13>,
                                               row_block<W, E, 14>};

template <class Weights, class Expand>
void vnni_strip(const GemmArgs& g) {
  prefetch_scales(g);
  prefetch_expand(g);
  for_each_row_block<kMaxRows>(g.rows, [&](int first, int rows) {
    kRowBlocks<Weights, Expand>[rows](g, first, first == 0);
  });
}

}  // namespace
}  // namespace ktrt
