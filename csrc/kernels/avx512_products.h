// BF16 pairs as float32 multiply-adds of 512-bit vectors, as kernels/bursts.h and kernels/chunks.h
// take them. Included by the kernels' ISA files only.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "kernels/vnni/expand.h"

namespace ktrt {
namespace {

struct Bf16Products512 {
  using Vector = __m512i;
  using Factor = __m512;
  using Sum = __m512;
  static constexpr int kWidth = 64;
  static constexpr int kParts = 2;
  static constexpr int kMaxRows = 14;  // 28 sums, two factors of W, one of A

  static void parts(Vector v, Factor (&out)[kParts]) {
    out[0] = Float32Expand::low(v);
    out[1] = Float32Expand::high(v);
  }
  static Vector load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Vector broadcast(const uint8_t* p) { return broadcast_word(p); }
  static Factor load_factor(const uint8_t* p) { return _mm512_load_ps(p); }
  static void store_factor(uint8_t* p, Factor v) { _mm512_store_ps(p, v); }
  static Factor factor(Vector v) { return _mm512_castsi512_ps(v); }
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum load_sum(const float* p) { return _mm512_loadu_ps(p); }
  static void store_sum(float* p, Sum v) { _mm512_storeu_ps(p, v); }
  static Sum add(Sum sum, Factor w, Factor x) { return _mm512_fmadd_ps(x, w, sum); }
};

}  // namespace
}  // namespace ktrt
