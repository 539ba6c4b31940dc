// Shared by the two AVX-512 variants: lane sums, loads and stores of 16 floats.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace ktrt {
namespace {

inline __mmask16 first_lanes(int count) { return static_cast<__mmask16>((1u << count) - 1); }

// The lanes' sum: halves, then quarters, then lanes two apart, then neighbours.
inline float lane_sum(__m512 v) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 two = _mm_add_ps(quarter, _mm_permute_ps(quarter, 0x4e));
  return _mm_cvtss_f32(_mm_add_ps(two, _mm_permute_ps(two, 0xb1)));
}

// Four lane_sums, by the same additions.
inline void store_lane_sums(__m512 a, __m512 b, __m512 c, __m512 d, float* out) {
  const __m512 ab =
      _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  const __m512 cd =
      _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  const __m512 quarters =
      _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  const __m512 two = _mm512_add_ps(quarters, _mm512_permute_ps(quarters, 0x4e));
  const __m512 one = _mm512_add_ps(two, _mm512_permute_ps(two, 0xb1));
  // Compressed in a register: to memory it takes 100 cycles and more on some processors.
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, one)));
}

// BF16 pairs to float32: the value with even index, and the one with odd index.
inline __m512 even_values(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
}
inline __m512 odd_values(__m512i pairs) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, mask));
}

// 16 outputs of the epilogue.
struct Outputs512 {
  using Outputs = __m512;
  static constexpr int kOutputs = 16;
  static __m512 load_floats(const float* p, int count) {
    return _mm512_maskz_loadu_ps(first_lanes(count), p);
  }
  static __m512 add_floats(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
  static __m512i load_pairs(const uint16_t* p, int count) {
    return _mm512_maskz_loadu_epi32(first_lanes(count), p);
  }
};

}  // namespace
}  // namespace ktrt
