// Row-wise stages, one body for every instruction set: plain loops that the compiler vectorises.
// The files are compiled with -ffp-contract=off, so that all of them give the same bits.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels/kernel_table.h"
#include "kernels/scalar_bf16.h"
#include "kernels/scalar_math.h"

namespace ktrt {
namespace {

// A row of zeros, or so small that 1/scale overflows, has scale 0; so has one with NaN or infinity,
// whose scale then carries it into the output: their codes are all the offset.
inline bool has_codes(float inverse) { return inverse > 0.0f && inverse <= 3.4028234e38f; }

float quantize_row(const uint16_t* x, int count, int padded, uint8_t offset, uint8_t* codes) {
  uint32_t largest = 0;
  for (int i = 0; i < count; ++i) {
    const uint32_t magnitude = x[i] & 0x7fffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  const float scale = as_float(largest << 16) * (1.0f / 127.0f);
  const float inverse = 1.0f / scale;
  int done = 0;
  if (has_codes(inverse)) {
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

// From e^-|x|, so that nothing overflows.
inline float sigmoid(float x) {
  const float decay = exp_of_negative(-fabsf(x));
  return (x < 0.0f ? decay : 1.0f) / (1.0f + decay);
}

inline float silu(float x) { return x * sigmoid(x); }

// Rows of a strip that are asked for before they are written: each is one line that no cache has,
// and stores leave in order.
constexpr int kRowsAhead = 8;

template <class Function>
inline __attribute__((always_inline)) void for_strip_rows(int rows, uint16_t* out,
                                                          int64_t out_stride, Function value) {
  int asked = 0;
  for (int r = 0; r < rows; ++r) {
    for (; asked < rows && asked <= r + kRowsAhead; ++asked) {
      __builtin_prefetch(out + asked * out_stride, 1, 3);
    }
    const int64_t first = static_cast<int64_t>(r) * 32;
    uint16_t* y = out + r * out_stride;
    for (int n = 0; n < 32; ++n) y[n] = bf16_bits(value(first + n));
  }
}

void silu_mul(const float* gate, const float* up, int rows, uint16_t* out, int64_t out_stride) {
  for_strip_rows(rows, out, out_stride, [=](int64_t i) { return silu(gate[i]) * up[i]; });
}

void weighted_add(const float* c, float weight, float* acc) {
  for (int n = 0; n < 32; ++n) acc[n] += weight * c[n];
}

// Four lines of a row at a time, so that neither side's lines crowd one set of the L1 cache; rows
// come from memory, whose own prefetcher would start again with every row.
void to_tile(const uint8_t* const* rows, int count, int tile_rows, int bytes, int padded,
             uint8_t* out) {
  constexpr int kPiece = 256;
  const int whole = bytes / 64 * 64;
  for (int first = 0; first < whole; first += kPiece) {
    const int end = first + kPiece < whole ? first + kPiece : whole;
    for (int r = 0; r < count; ++r) {
      for (int b = first; b < end; b += 64) {
        __builtin_prefetch(rows[r] + b + 3 * kPiece, 0, 3);
        memcpy(out + static_cast<int64_t>(b) * tile_rows + r * 64, rows[r] + b, 64);
      }
    }
  }
  for (int b = whole; b < padded; b += 64) {
    for (int r = 0; r < count; ++r) {
      uint8_t* line = out + static_cast<int64_t>(b) * tile_rows + r * 64;
      const int rest = b < bytes ? bytes - b : 0;
      memset(line, 0, 64);
      memcpy(line, rows[r] + b, static_cast<size_t>(rest));
    }
  }
}

void add_bias(const float* bias, int rows, float* c) {
  for (int r = 0; r < rows; ++r) {
    for (int n = 0; n < 32; ++n) c[static_cast<int64_t>(r) * 32 + n] += bias[n];
  }
}

// Comparisons that keep NaN.
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

// Chains in which squares are added, on every ISA.
constexpr int kNormLanes = 32;

void rms_norm(const RmsNormArgs& a) {
  float lanes[kNormLanes] = {};
  const int whole = a.size - a.size % kNormLanes;
  for (int i = 0; i < whole; i += kNormLanes) {
    for (int l = 0; l < kNormLanes; ++l) {
      const float value = bf16_value(a.x[i + l]);
      lanes[l] += value * value;
    }
  }
  for (int i = whole; i < a.size; ++i) {
    lanes[i - whole] += bf16_value(a.x[i]) * bf16_value(a.x[i]);
  }
  for (int half = kNormLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  const float r = 1.0f / __builtin_sqrtf(lanes[0] / static_cast<float>(a.size) + a.eps);
  const auto multiply = [&](auto weight) {
    if (a.rounds_twice) {
      for (int i = 0; i < a.size; ++i) {
        a.out[i] = bf16_bits(weight(i) * bf16_value(bf16_bits(bf16_value(a.x[i]) * r)));
      }
    } else {
      for (int i = 0; i < a.size; ++i) a.out[i] = bf16_bits(bf16_value(a.x[i]) * r * weight(i));
    }
  };
  const float offset = a.offset;
  if (a.weight_f32 != nullptr) {
    multiply([=](int i) { return a.weight_f32[i] + offset; });
  } else {
    multiply([=](int i) { return bf16_value(a.weight_bf16[i]) + offset; });
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
