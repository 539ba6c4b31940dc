// The products of 256-bit vectors, as kernels/bursts.h and kernels/chunks.h take it. Included by
// the kernels' ISA files only.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "kernels/avx2/expand.h"

namespace ktrt {
namespace {

struct Vectors256 {
  using Vector = __m256i;
  static constexpr int kWidth = 32;
  static constexpr int kMaxRows = 3;  // 12 sums, three rows' factors, one of W

  static Vector load(const uint8_t* p) { return load_256(p); }
  static Vector broadcast(const uint8_t* p) {
    int word;
    memcpy(&word, p, 4);
    return _mm256_set1_epi32(word);
  }
};

struct IntegerSums256 : Vectors256 {
  using Factor = __m256i;
  using Sum = __m256i;

  static Factor load_factor(const uint8_t* p) { return load_256(p); }
  static void store_factor(uint8_t* p, Factor v) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), v);
  }
  static Factor factor(Vector v) { return v; }
  static Sum zero() { return _mm256_setzero_si256(); }
  static Sum load_sum(const float* p) { return load_256(p); }
  static void store_sum(float* p, Sum v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
};

// Exact products of signed bytes, where VPMADDUBSW would saturate for unsigned ones: |w| ≤ 128
// times ±x, |x| ≤ 127, two products of which fit int16. A is what quantize_row makes, never -128.
struct SignedProducts256 : IntegerSums256 {
  static constexpr int kParts = 1;

  static void parts(Vector v, Factor (&out)[kParts]) { out[0] = v; }
  static Sum add(Sum sum, Factor w, Factor x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

// The same for many rows, which share what the two parts cost: the bytes with even k and those with
// odd k as int16. Two products and two additions take less time than the four steps above.
struct Int16Products256 : IntegerSums256 {
  static constexpr int kParts = 2;

  static void parts(Vector v, Factor (&out)[kParts]) {
    out[0] = _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8);
    out[1] = _mm256_srai_epi16(v, 8);
  }
  static Sum add(Sum sum, Factor w, Factor x) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x, w));
    // Or GCC adds the parts' products first, and has no registers left for all of them.
    asm("" : "+x"(sum));
    return sum;
  }
};

// BF16 pairs as float32.
struct Bf16Products256 : Vectors256 {
  using Factor = __m256;
  using Sum = __m256;
  static constexpr int kParts = 2;

  static void parts(Vector v, Factor (&out)[kParts]) {
    out[0] = low_values(v);
    out[1] = high_values(v);
  }
  static Factor load_factor(const uint8_t* p) {
    return _mm256_load_ps(reinterpret_cast<const float*>(p));
  }
  static void store_factor(uint8_t* p, Factor v) {
    _mm256_store_ps(reinterpret_cast<float*>(p), v);
  }
  static Factor factor(Vector v) { return _mm256_castsi256_ps(v); }
  static Sum zero() { return _mm256_setzero_ps(); }
  static Sum load_sum(const float* p) { return _mm256_loadu_ps(p); }
  static void store_sum(float* p, Sum v) { _mm256_storeu_ps(p, v); }
  static Sum add(Sum sum, Factor w, Factor x) { return _mm256_fmadd_ps(x, w, sum); }
};

}  // namespace
}  // namespace ktrt
