// Half a BF16 tile (32 columns of 16 outputs, scale folded in) from the codes of a strip, on
// AVX-512: bf16(code · scale), one rounding to nearest even. Vector micro-operations per BF16
// vector of 64 bytes, the scales' share included: E4M3 5, INT4 9, E2M1 4. A pair of A tiles
// multiplies for 64 cycles, time for 128 of them, on the 32 vectors of a tile.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "kernels/coded_strip.h"
#include "kernels/unrolled.h"

namespace ktrt {
namespace {

struct alignas(64) E4m3Magnitudes {
  float of[128];
};
constexpr E4m3Magnitudes make_e4m3_magnitudes() {
  E4m3Magnitudes all{};
  for (int code = 0; code < 128; ++code) {
    const int exponent = code >> 3;
    float value = static_cast<float>(exponent == 0 ? code & 7 : 8 + (code & 7)) / 512.0f;
    for (int e = 1; e < exponent; ++e) value *= 2.0f;
    all.of[code] = value;
  }
  return all;
}
constexpr E4m3Magnitudes kE4m3Magnitudes = make_e4m3_magnitudes();

struct alignas(64) ByteIndices {
  uint8_t of[64];
};
constexpr ByteIndices make_even_bytes() {
  ByteIndices even{};
  for (int i = 0; i < 64; ++i) even.of[i] = static_cast<uint8_t>(2 * i);
  return even;
}
constexpr ByteIndices kEvenBytes = make_even_bytes();

// One scale for all outputs at a time, so that a code's BF16 value is a look-up of its two bytes.
class UnpackE4m3 {
 public:
  static constexpr int kVectors = 8;  // of codes in half a BF16 tile

  void set_scale(float scale) {
    const __m512 scales = _mm512_set1_ps(scale);
    __m512i words[4];
    unrolled<4>([&](auto i) {
      const float* magnitudes = kE4m3Magnitudes.of + i * 32;
      words[i] = reinterpret_cast<__m512i>(
          _mm512_cvtne2ps_pbh(_mm512_mul_ps(_mm512_load_ps(magnitudes + 16), scales),
                              _mm512_mul_ps(_mm512_load_ps(magnitudes), scales)));
    });
    const __m512i even = _mm512_load_si512(kEvenBytes.of);
    const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi8(1));
    unrolled<2>([&](auto i) {
      low_[i] = _mm512_permutex2var_epi8(words[2 * i], even, words[2 * i + 1]);
      high_[i] = _mm512_permutex2var_epi8(words[2 * i], odd, words[2 * i + 1]);
    });
  }

  KTRT_INLINE void half(const uint8_t* codes, uint8_t* out) const {
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    const __m512i low0 = low_[0], low1 = low_[1], high0 = high_[0], high1 = high_[1];
    for (int v = 0; v < kVectors; ++v) {
      const __m512i code = _mm512_loadu_si512(codes + v * 64);
      const __m512i low = _mm512_permutex2var_epi8(low0, code, low1);
      const __m512i magnitude = _mm512_permutex2var_epi8(high0, code, high1);
      constexpr int kXorAnd = 0x78;  // magnitude ^ (code & sign): a scale may be negative
      const __m512i high = _mm512_ternarylogic_epi32(magnitude, code, sign, kXorAnd);
      _mm512_store_si512(out + v * 128, _mm512_unpacklo_epi8(low, high));
      _mm512_store_si512(out + v * 128 + 64, _mm512_unpackhi_epi8(low, high));
    }
  }

 private:
  // Low and high byte of bf16(magnitude · scale) by code; the sign bit of an index is not looked
  // at.
  __m512i low_[2];
  __m512i high_[2];
};

// Outputs 0 … 7 or 8 … 15 twice each: the words of their pairs as 32-bit numbers.
inline __m512i twice(int side) {
  const __m512i first = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  return side == 0 ? first : _mm512_or_si512(first, _mm512_set1_epi32(8));
}

// Lowest bit of nibble j of a word, and e such that this bit of 2^e's mantissa is 1.
constexpr int nibble_bit(int j) { return 7 + 4 * j; }
constexpr int nibble_exponent(int j) { return 23 - nibble_bit(j); }

struct NibbleConstants {
  int mask[4];
  int base[4];  // 2^e as a float32, and a one that flips the code's sign bit
};
constexpr NibbleConstants make_nibble_constants() {
  NibbleConstants constants{};
  for (int j = 0; j < 4; ++j) {
    constants.mask[j] = 0xf << nibble_bit(j);
    constants.base[j] = (127 + nibble_exponent(j)) << 23 | 8 << nibble_bit(j);
  }
  return constants;
}
constexpr NibbleConstants kNibbleConstants = make_nibble_constants();

// A nibble is put into the mantissa of 2^e, so that the float32 is 2^e + code + 8 and one FMA gives
// the exact product: (2^e + code + 8) · scale − (2^e + 8) · scale. The four nibbles of a word serve
// where they lie, with e = 16, 12, 8, 4, after each word of an output was rotated to bit 7.
class UnpackInt4 {
 public:
  static constexpr int kVectors = 4;

  // 16 BF16 scales.
  KTRT_INLINE void set_scales(const uint8_t* scales) {
    const __m256i bf16 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales));
    const __m512i floats = _mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16);
    unrolled<2>([&](auto side) {
      scale_[side] = _mm512_castsi512_ps(_mm512_permutexvar_epi32(twice(side), floats));
      unrolled<4>([&](auto j) {
        constexpr float kOffset = -static_cast<float>((1 << nibble_exponent(j)) + 8);
        offset_[j][side] = _mm512_mul_ps(scale_[side], _mm512_set1_ps(kOffset));
      });
    });
  }

  KTRT_INLINE void half(const uint8_t* codes, uint8_t* out) const {
    const __m512i rotation = _mm512_set1_epi64(int64_t{23} << 32 | 7);
    // From memory: GCC would make them of general registers, on the port that shuffles need.
    const NibbleConstants* constants = &kNibbleConstants;
    asm("" : "+r"(constants));
    for (int v = 0; v < kVectors; ++v) {
      const __m512i outputs = _mm512_loadu_si512(codes + v * 64);
      __m512i nibbles[2];
      unrolled<2>([&](auto side) {
        nibbles[side] = _mm512_rolv_epi32(_mm512_permutexvar_epi32(twice(side), outputs), rotation);
      });
      unrolled<4>([&](auto j) {
        const __m512 first = product<j, 0>(*constants, nibbles[0]);
        const __m512 second = product<j, 1>(*constants, nibbles[1]);
        _mm512_store_si512(out + (4 * v + j) * 64,
                           reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
      });
    }
  }

 private:
  template <int kJ, int kSide>
  KTRT_INLINE __m512 product(const NibbleConstants& constants, __m512i nibbles) const {
    constexpr int kAndXor = 0x6a;  // (nibbles & mask) ^ base
    const __m512i value = _mm512_ternarylogic_epi32(nibbles, _mm512_set1_epi32(constants.mask[kJ]),
                                                    _mm512_set1_epi32(constants.base[kJ]), kAndXor);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(value), scale_[kSide], offset_[kJ][kSide]);
  }

  __m512 scale_[2];
  __m512 offset_[4][2];
};

struct alignas(64) E2m1Words {
  int16_t of[32];
};
constexpr int kLargestE8m0 = 252;  // 6 · 2^(252 − 127) is below infinity
// Exponents and mantissas of 0, 0.5, 1, 1.5, 2, 3, 4 and 6 in BF16, from 1 on.
constexpr int kE2m1Magnitudes[8] = {0, -1 << 7, 0, 1 << 6, 1 << 7, 3 << 6, 2 << 7, 5 << 6};

// BF16 words of code · 2^(kLargestE8m0 − 127), −32768 (which is −0) for zero; twice, as an index
// has a bit of the next nibble.
constexpr E2m1Words make_e2m1_words() {
  E2m1Words words{};
  for (int i = 0; i < 32; ++i) {
    const int code = i & 7;
    const int magnitude = code == 0 ? 0 : (kLargestE8m0 << 7) + kE2m1Magnitudes[code];
    const bool negative = (i & 8) != 0 || code == 0;
    words.of[i] = static_cast<int16_t>(negative ? magnitude - 32768 : magnitude);
  }
  return words;
}
constexpr E2m1Words kE2m1Words = make_e2m1_words();

// A scale is a sum of exponents; saturation keeps zero −0.
class UnpackE2m1 {
 public:
  static constexpr int kVectors = 4;

  // 16 E8M0 scales.
  KTRT_INLINE void set_scales(const uint8_t* scales) {
    scales_ = scales;
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
    const __m128i below = _mm_sub_epi8(bytes, _mm_set1_epi8(1));  // 0: 255
    extreme_ = _mm_cmpgt_epu8_mask(below, _mm_set1_epi8(static_cast<char>(kLargestE8m0 - 1))) != 0;
    __m512i words = _mm512_cvtepu8_epi32(bytes);
    words = _mm512_or_si512(words, _mm512_slli_epi32(words, 16));
    words = _mm512_sub_epi16(words, _mm512_set1_epi16(kLargestE8m0));
    exponents_ = _mm512_slli_epi16(words, 7);
  }

  KTRT_INLINE void half(const uint8_t* codes, uint8_t* out) const {
    if (__builtin_expect(extreme_, 0)) return extreme_half(codes, scales_, out);
    const __m512i table = _mm512_load_si512(kE2m1Words.of);
    for (int v = 0; v < kVectors; ++v) {
      const __m512i outputs = _mm512_loadu_si512(codes + v * 64);
      unrolled<4>([&](auto j) {
        const __m512i values = _mm512_permutexvar_epi16(_mm512_srli_epi16(outputs, 4 * j), table);
        _mm512_store_si512(out + (4 * v + j) * 64, _mm512_adds_epi16(values, exponents_));
      });
    }
  }

 private:
  // Scales 2^-127, 2^126 and 2^127, whose products may be subnormal, which tiles take for zero, or
  // infinite: word by word.
  static __attribute__((noinline)) void extreme_half(const uint8_t* codes, const uint8_t* scales,
                                                     uint8_t* out) {
    for (int i = 0; i < kVectors * 4 * 32; ++i) {
      const int word = i % 32;
      const int vector = i / 32;
      const uint8_t* both = codes + vector / 4 * 64 + word * 2 + vector % 4 / 2;
      const int code = *both >> vector % 2 * 4 & 15;
      int bits = (scales[word / 2] << 7) + kE2m1Magnitudes[code & 7];
      if ((code & 7) == 0 || bits < 1 << 7) bits = 0;
      if (bits > 0xff << 7) bits = 0xff << 7;
      const uint16_t value = static_cast<uint16_t>(bits | (code & 8) << 12);
      memcpy(out + i * 2, &value, 2);
    }
  }

  const uint8_t* scales_;
  bool extreme_;
  __m512i exponents_;
};

template <Code>
struct UnpackOf;
template <>
struct UnpackOf<Code::kE4m3> {
  using Type = UnpackE4m3;
};
template <>
struct UnpackOf<Code::kInt4> {
  using Type = UnpackInt4;
};
template <>
struct UnpackOf<Code::kE2m1> {
  using Type = UnpackE2m1;
};

}  // namespace
}  // namespace ktrt
