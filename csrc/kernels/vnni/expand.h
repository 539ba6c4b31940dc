// The LoRA expand into C in memory on AVX-512, with and without BF16 dot products. Included by the
// kernels' ISA files only.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "kernels/kernel_table.h"

namespace ktrt {
namespace {

// BF16 pairs by float32 multiply-adds: Cascade Lake, Ice Lake.
struct Float32Expand {
  static __m512 low(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
  static __m512 high(__m512i pairs) {
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, mask));
  }
  static __m512 multiply(__m512 sum, __m512i b, __m512i a) {
    return _mm512_fmadd_ps(high(a), high(b), _mm512_fmadd_ps(low(a), low(b), sum));
  }
};

#if defined(__AVX512BF16__)

// By VDPBF16PS: Cooper Lake, Sapphire Rapids, Zen 4 on.
struct Bf16Expand {
  static __m512 multiply(__m512 sum, __m512i b, __m512i a) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(b), reinterpret_cast<__m512bh>(a));
  }
};

#endif

constexpr int kColumns = 32;  // of a strip

inline __m512i broadcast_word(const uint8_t* p) {
  int word;
  memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}

// c [kRows][32] in the L1 cache += the LoRA expand; Expand::multiply adds one k pair
// of 16 outputs.
template <class Expand, int kRows>
inline void expand_lora(const ExpandArgs& g, const uint16_t* t, float* c) {
  __m512 acc[kRows][2];
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i) {
    acc[i][0] = _mm512_loadu_ps(c + i * kColumns);
    acc[i][1] = _mm512_loadu_ps(c + i * kColumns + 16);
  }
  for (int pair = 0; pair < g.rank_pairs; ++pair) {
    const __m512i b0 = _mm512_loadu_si512(g.lora_b + pair * 64);
    const __m512i b1 = _mm512_loadu_si512(g.lora_b + pair * 64 + 32);
    const uint8_t* x = reinterpret_cast<const uint8_t*>(t + 2 * pair);
#pragma GCC unroll 14
    for (int i = 0; i < kRows; ++i) {
      const __m512i a = broadcast_word(x + i * g.t_stride * 2);
      acc[i][0] = Expand::multiply(acc[i][0], b0, a);
      acc[i][1] = Expand::multiply(acc[i][1], b1, a);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i) {
    _mm512_storeu_ps(c + i * kColumns, acc[i][0]);
    _mm512_storeu_ps(c + i * kColumns + 16, acc[i][1]);
  }
}

// Blocks of four rows share the loads of B.
template <class Expand>
void expand_rows(const ExpandArgs& g) {
  int row = 0;
  for (; row + 4 <= g.rows; row += 4) {
    expand_lora<Expand, 4>(g, g.t + row * g.t_stride, g.c + static_cast<int64_t>(row) * kColumns);
  }
  for (; row < g.rows; ++row) {
    expand_lora<Expand, 1>(g, g.t + row * g.t_stride, g.c + static_cast<int64_t>(row) * kColumns);
  }
}

}  // namespace
}  // namespace ktrt
