// The LoRA expand of the VNNI GEMMs, with and without BF16 dot products. Included by the kernels'
// ISA files only.
#pragma once

#include <immintrin.h>

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

}  // namespace
}  // namespace ktrt
