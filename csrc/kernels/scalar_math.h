// Functions of float32 as plain arithmetic, which compilers vectorise on every instruction set and
// which gives the same bits on all. Included by the kernels' ISA files only.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace ktrt {
namespace {

inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Round half to even for |value| < 2^22: adding 1.5 · 2^23 leaves the integer in the low mantissa
// bits. Vectorises on every ISA, unlike rintf on SSE2.
inline int32_t round_to_int(float value) {
  const float shifted = value + 12582912.0f;
  uint32_t bits;
  memcpy(&bits, &shifted, 4);
  return static_cast<int32_t>(bits) - 0x4b400000;
}

// e^x for x ≤ 0 by 2^n · p(f), |f| ≤ 1/2; relative error below 2e-7 (Cephes' expf polynomial). It
// ends at e^-87.
inline float exp_of_negative(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const int32_t n = round_to_int(clamped * 1.44269504088896341f);
  const float integer = static_cast<float>(n);
  const float f = (clamped - integer * 0.693359375f) - integer * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + f + 1.0f;
  return p * as_float(static_cast<uint32_t>(n + 127) << 23);
}

// `yes` if `condition`, else `no`, by bits: compilers do not vectorise a choice of computations
// that might trap.
inline float choose(bool condition, float yes, float no) {
  const uint32_t mask = condition ? 0xffffffffu : 0u;
  uint32_t bits_yes, bits_no;
  memcpy(&bits_yes, &yes, 4);
  memcpy(&bits_no, &no, 4);
  return as_float((bits_yes & mask) | (bits_no & ~mask));
}

// tanh(x); near 0, where the exponentials cancel, its series.
inline float soft(float x) {
  const float magnitude = fabsf(x);
  const float decay = exp_of_negative(-2.0f * magnitude);
  const float far = (1.0f - decay) / (1.0f + decay);
  const float square = magnitude * magnitude;
  const float near = magnitude * (1.0f - square * (0.33333333f - square * 0.13333333f));
  return copysignf(choose(magnitude < 0.05f, near, far), x);
}

}  // namespace
}  // namespace ktrt
