// Layers with a state, one body for every instruction set: vectors of 16 numbers that the compiler
// splits, and plain loops that it vectorises. Without fused products all of them give the same
// bits.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels/linear_attention_args.h"
#include "kernels/scalar_bf16.h"
#include "kernels/scalar_math.h"

namespace ktrt {
namespace {

typedef float Lanes __attribute__((vector_size(64)));
constexpr int kVectors = kStateColumns / 16;

// The state is read twice and written once per token, from the L1 cache. Every fourth row is a
// chain of sums: a single one would wait for each addition.
void state_steps(const StateStepArgs& a) {
  auto* const state = reinterpret_cast<Lanes*>(a.state);
  const auto* value = reinterpret_cast<const Lanes*>(a.value);
  auto* result = reinterpret_cast<Lanes*>(a.out);
  const float* query = a.query;
  const float* key = a.key;
  const float* decay = a.decay;
  for (int t = 0; t < a.tokens; ++t, value += kVectors, result += kVectors) {
    Lanes delta[kVectors];
    for (int v = 0; v < kVectors; ++v) delta[v] = value[v];
    if (a.subtracts) {
      Lanes held[kStateRows][kVectors] = {};
      for (int r = 0; r < a.rows; r += kStateRows) {
        for (int c = 0; c < kStateRows; ++c) {
          const float weight = key[r + c] * decay[r + c];
          for (int v = 0; v < kVectors; ++v) held[c][v] += weight * state[(r + c) * kVectors + v];
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        delta[v] -= (held[0][v] + held[1][v]) + (held[2][v] + held[3][v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) delta[v] *= a.beta[t];
    Lanes out[kStateRows][kVectors] = {};
    for (int r = 0; r < a.rows; r += kStateRows) {
      for (int c = 0; c < kStateRows; ++c) {
        for (int v = 0; v < kVectors; ++v) {
          Lanes& held = state[(r + c) * kVectors + v];
          const Lanes now = decay[r + c] * held + key[r + c] * delta[v];
          held = now;
          out[c][v] += query[r + c] * now;
        }
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      result[v] = (out[0][v] + out[1][v]) + (out[2][v] + out[3][v]);
    }
    query += a.rows;
    key += a.rows;
    decay += a.rows;
  }
}

void short_conv(const ShortConvArgs& a) {
  for (int t = 0; t < a.tokens; ++t) {
    float* const out = a.out + static_cast<int64_t>(t) * kConvChannels;
    float sums[kConvChannels];
    memcpy(sums, a.bias, sizeof sums);
    for (int j = 0; j < a.taps; ++j) {
      const float* const x = a.x + static_cast<int64_t>(t + j) * kConvChannels;
      const float* const weight = a.weight + static_cast<int64_t>(j) * kConvChannels;
      for (int c = 0; c < kConvChannels; ++c) sums[c] += weight[c] * x[c];
    }
    if (a.silu) {
      for (int c = 0; c < kConvChannels; ++c) {
        // From e^-|x|, so that nothing overflows.
        const float small = exp_of_negative(-fabsf(sums[c]));
        out[c] = sums[c] * ((sums[c] < 0.0f ? small : 1.0f) / (1.0f + small));
      }
    } else {
      memcpy(out, sums, sizeof sums);
    }
  }
}

void selective_scan(const SelectiveScanArgs& a) {
  for (int t = 0; t < a.tokens; ++t) {
    const float* const dt = a.dt + static_cast<int64_t>(t) * kScanChannels;
    const float* const x = a.x + static_cast<int64_t>(t) * kScanChannels;
    const float* const b = a.b + static_cast<int64_t>(t) * a.size;
    const float* const c = a.c + static_cast<int64_t>(t) * a.size;
    float* const out = a.out + static_cast<int64_t>(t) * kScanChannels;
    float sums[kScanChannels] = {};
    float step[kScanChannels];
    for (int i = 0; i < kScanChannels; ++i) step[i] = dt[i] * x[i];
    for (int n = 0; n < a.size; ++n) {
      float* const state = a.state + static_cast<int64_t>(n) * kScanChannels;
      const float* const rate = a.a + static_cast<int64_t>(n) * kScanChannels;
      for (int i = 0; i < kScanChannels; ++i) {
        const float now = exp_of_negative(dt[i] * rate[i]) * state[i] + step[i] * b[n];
        state[i] = now;
        sums[i] += now * c[n];
      }
    }
    memcpy(out, sums, sizeof sums);
  }
}

void floats(const void* in, bool float32, int count, float* out) {
  if (float32) {
    memcpy(out, in, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  const auto* const bits = static_cast<const uint16_t*>(in);
  for (int i = 0; i < count; ++i) out[i] = bf16_value(bits[i]);
}

// Chains in which squares are added, on every ISA.
constexpr int kSquareLanes = 16;

void unit_vector(float* x, int count, float scale) {
  float lanes[kSquareLanes] = {};
  const int whole = count - count % kSquareLanes;
  for (int i = 0; i < whole; i += kSquareLanes) {
    for (int l = 0; l < kSquareLanes; ++l) lanes[l] += x[i + l] * x[i + l];
  }
  for (int i = whole; i < count; ++i) lanes[i - whole] += x[i] * x[i];
  for (int half = kSquareLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  const float factor = scale / __builtin_sqrtf(lanes[0] + 1e-6f);
  for (int i = 0; i < count; ++i) x[i] *= factor;
}

void exponentials(float* x, int count) {
  for (int i = 0; i < count; ++i) x[i] = exp_of_negative(x[i]);
}

}  // namespace
}  // namespace ktrt
