// Arguments of the kernels of layers that keep a state instead of keys and values: linear attention
// and short convolutions. Plain data, read by the kernels' ISA files; all numbers are float32.
#pragma once

#include <stdint.h>

namespace ktrt {

// Columns of a state that a kernel takes at once: 16 KB with 128 rows, half of an L1 cache.
constexpr int kStateColumns = 32;
// Rows that a kernel takes at once; the caller fills up with zeros.
constexpr int kStateRows = 4;
// Channels that a kernel takes at once.
constexpr int kConvChannels = 128;
constexpr int kScanChannels = 16;

// For each token: S = decay · S; delta = beta · (value - keyᵀ S), or beta · value; S += key ·
// deltaᵀ; out = queryᵀ S. decay has a number per row of S.
struct StateStepArgs {
  float* state;  // [rows][kStateColumns], aligned to 64
  int rows;      // a multiple of kStateRows
  int tokens;
  bool subtracts;      // whether keyᵀ S is subtracted: the delta rule
  const float* query;  // [tokens][rows]
  const float* key;    // [tokens][rows]
  const float* decay;  // [tokens][rows]
  const float* beta;   // [tokens]
  const float* value;  // [tokens][kStateColumns], aligned to 64
  float* out;          // [tokens][kStateColumns], aligned to 64
};

// out[t] = f(bias + Σ_j weight[j] · x[t + j]), f the identity or SiLU.
struct ShortConvArgs {
  const float* x;       // [tokens + taps - 1][kConvChannels]
  const float* weight;  // [taps][kConvChannels]
  const float* bias;    // [kConvChannels]
  int taps;
  int tokens;
  bool silu;
  float* out;  // [tokens][kConvChannels]
};

// For each token and channel: S[n] = e^(dt · a[n]) · S[n] + dt · x · b[n]; out = Σ_n S[n] · c[n].
struct SelectiveScanArgs {
  float* state;    // [size][kScanChannels]
  const float* a;  // [size][kScanChannels]
  int size;
  int tokens;
  const float* x;   // [tokens][kScanChannels]
  const float* dt;  // [tokens][kScanChannels]
  const float* b;   // [tokens][size]
  const float* c;   // [tokens][size]
  float* out;       // [tokens][kScanChannels]
};

struct LinearAttentionKernel {
  const char* name;
  void (*state_steps)(const StateStepArgs& args);
  void (*short_conv)(const ShortConvArgs& args);
  void (*selective_scan)(const SelectiveScanArgs& args);
  // Numbers in float32 or BF16 to float32.
  void (*floats)(const void* in, bool float32, int count, float* out);
  // x · scale / √(Σ x² + 1e-6).
  void (*unit_vector)(float* x, int count, float scale);
  // e^x for x at most 0 (and up to 88), at least e^-87.
  void (*exponentials)(float* x, int count);
};

}  // namespace ktrt
