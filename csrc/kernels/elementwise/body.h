// Row-wise stages, one body for every instruction set: plain loops that the compiler vectorises.
// The files are compiled with -ffp-contract=off, so that all of them give the same bits.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels/kernel_table.h"
#include "kernels/scalar_bf16.h"

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

float quantize_row(const uint16_t* x, int count, int padded, uint8_t offset, uint8_t* codes) {
  uint32_t largest = 0;
  for (int i = 0; i < count; ++i) {
    const uint32_t magnitude = x[i] & 0x7fffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  const float scale = as_float(largest << 16) * (1.0f / 127.0f);
  const float inverse = 1.0f / scale;
  int done = 0;
  // A row of zeros, or so small that 1/scale overflows, has scale 0; so has one with NaN or
  // infinity, whose scale then carries it into the output.
  if (inverse > 0.0f && inverse <= 3.4028234e38f) {
    for (; done < count; ++done) {
      const int32_t code = round_to_int(bf16_value(x[done]) * inverse);
      codes[done] = static_cast<uint8_t>(code + offset);
    }
  }
  for (; done < padded; ++done) codes[done] = offset;
  if (inverse > 3.4028234e38f) return 0.0f;
  return scale;
}

void f32_to_bf16(const float* in, int count, uint16_t* out) {
  for (int i = 0; i < count; ++i) out[i] = bf16_bits(in[i]);
}

// e^x for x ≤ 0 by 2^n · p(f), |f| ≤ 1/2; relative error below 2e-7 (Cephes' expf polynomial).
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

// From e^-|x|, so that nothing overflows.
inline float sigmoid(float x) {
  const float decay = exp_of_negative(-fabsf(x));
  return (x < 0.0f ? decay : 1.0f) / (1.0f + decay);
}

inline float silu(float x) { return x * sigmoid(x); }

void silu_mul(const float* gate, const float* up, int rows, uint16_t* out, int64_t out_stride) {
  for (int r = 0; r < rows; ++r) {
    const float* g = gate + static_cast<int64_t>(r) * 32;
    const float* u = up + static_cast<int64_t>(r) * 32;
    uint16_t* y = out + r * out_stride;
    for (int n = 0; n < 32; ++n) y[n] = bf16_bits(silu(g[n]) * u[n]);
  }
}

void weighted_add(const float* c, float weight, float* acc) {
  for (int n = 0; n < 32; ++n) acc[n] += weight * c[n];
}

void add_bias(const float* bias, int rows, float* c) {
  for (int r = 0; r < rows; ++r) {
    for (int n = 0; n < 32; ++n) c[static_cast<int64_t>(r) * 32 + n] += bias[n];
  }
}

// Comparisons that leave NaN as it is.
inline float at_most(float x, float limit) { return x > limit ? limit : x; }
inline float clamp(float x, float limit) { return at_most(x < -limit ? -limit : x, limit); }

// x · Φ(x) = max(x, 0) - |x| · erfc(|x| / √2) / 2; erfc by Numerical Recipes' erfcc, fractional
// error below 1.2e-7 everywhere. It is 0 long before 100, which keeps infinity out of the product.
inline float gelu(float x) {
  const float magnitude = at_most(fabsf(x), 100.0f);
  const float z = magnitude * 0.70710678118654752f;
  const float t = 1.0f / (1.0f + 0.5f * z);
  float p = 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const float half = 0.5f * t * exp_of_negative(p - z * z);
  return (x < 0.0f ? 0.0f : x) - magnitude * half;
}

// (1 + tanh(y)) / 2 is sigmoid(2 y).
inline float gelu_tanh(float x) {
  return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
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

template <class Function>
inline __attribute__((always_inline)) void for_strip_rows(int rows, uint16_t* out,
                                                          int64_t out_stride, Function value) {
  for (int r = 0; r < rows; ++r) {
    const int64_t first = static_cast<int64_t>(r) * 32;
    uint16_t* y = out + r * out_stride;
    for (int n = 0; n < 32; ++n) y[n] = bf16_bits(value(first + n));
  }
}

// `f` is the kind's function.
template <class Function>
inline __attribute__((always_inline)) void activate_by(Activation a, const float* gate,
                                                       const float* up, int rows, uint16_t* out,
                                                       int64_t out_stride, Function f) {
  if (gate == nullptr) {
    for_strip_rows(rows, out, out_stride, [=](int64_t i) { return f(up[i]); });
  } else {
    for_strip_rows(rows, out, out_stride, [=](int64_t i) {
      return f(at_most(gate[i], a.gate_limit)) * (clamp(up[i], a.up_limit) + a.up_offset);
    });
  }
}

void activate_softcap(Activation a, const float* gate, const float* up, int rows, uint16_t* out,
                      int64_t out_stride) {
  const auto bend = [=](float x) { return a.gate_limit * soft(x / a.gate_limit) * sigmoid(x); };
  if (gate == nullptr) {
    for_strip_rows(rows, out, out_stride, [=](int64_t i) { return bend(up[i]); });
  } else {
    for_strip_rows(rows, out, out_stride, [=](int64_t i) {
      return bend(gate[i]) * (a.up_limit * soft(up[i] / a.up_limit) + a.up_offset);
    });
  }
}

void activate(const Activation& a, const float* gate, const float* up, int rows, uint16_t* out,
              int64_t out_stride) {
  const auto by = [&](auto f) { activate_by(a, gate, up, rows, out, out_stride, f); };
  switch (a.kind) {
    case ActivationKind::kSilu: {
      const float alpha = a.alpha;
      return by([=](float x) { return x * sigmoid(alpha * x); });
    }
    case ActivationKind::kGelu:
      return by([](float x) { return gelu(x); });
    case ActivationKind::kGeluTanh:
      return by([](float x) { return gelu_tanh(x); });
    case ActivationKind::kRelu:
      return by([](float x) { return x < 0.0f ? 0.0f : x; });
    case ActivationKind::kRelu2:
      return by([](float x) { return x < 0.0f ? 0.0f : x * x; });
    case ActivationKind::kSoftcapSilu:
      return activate_softcap(a, gate, up, rows, out, out_stride);
  }
}

}  // namespace
}  // namespace ktrt
