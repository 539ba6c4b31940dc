// GEMM of coded weights in plain C++: the kernel of last resort, and the one that is easiest to
// read.
#include <string.h>

#include "kernels/coded_strip.h"
#include "kernels/scalar.h"

namespace ktrt {
namespace {

// Codes as values: 16 of E2M1 or INT4, 128 magnitudes of E4M3.
struct Values {
  float of[256];
};

constexpr float power_of_two(int exponent) {
  float value = 1.0f;
  for (; exponent > 0; --exponent) value *= 2.0f;
  for (; exponent < 0; ++exponent) value *= 0.5f;
  return value;
}

constexpr Values make_values(Code code) {
  constexpr float kE2m1[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  Values values{};
  for (int i = 0; i < 256; ++i) {
    if (code == Code::kE4m3) {
      const int exponent = i >> 3 & 15;
      const int mantissa = i & 7;
      const float magnitude = exponent == 0
                                  ? static_cast<float>(mantissa) * power_of_two(-9)
                                  : static_cast<float>(8 + mantissa) * power_of_two(exponent - 10);
      values.of[i] = i < 128 ? magnitude : -magnitude;
    } else if (code == Code::kE2m1) {
      values.of[i] = (i & 8) == 0 ? kE2m1[i & 7] : -kE2m1[i & 7];
    } else {
      values.of[i] = static_cast<float>((i & 15) < 8 ? i & 15 : (i & 15) - 16);
    }
  }
  return values;
}

template <Code kCode>
constexpr Values kValues = make_values(kCode);

// chain[n] += x[0] · W[n][2·pair] + x[1] · W[n][2·pair + 1], columns of a tile, for the 32 rows n.
template <class Format>
void multiply_pair(const uint8_t* tile, int pair, const uint16_t* x, float* chain) {
  const Values& values = kValues<Format::kCode>;
  const float x0 = bf16_value(x[0]);
  const float x1 = bf16_value(x[1]);
  for (int n = 0; n < kStripColumns; ++n) {
    const uint8_t* half = tile + n / 16 * kTileHalf;
    const int row = n % 16;
    int first, second;
    if (Format::kCode == Code::kE4m3) {
      const uint8_t* codes = half + pair / 2 * 64 + row / 4 * 16 + pair % 2 * 8 + row % 4 * 2;
      first = codes[0];
      second = codes[1];
    } else {
      const uint8_t* codes = half + pair / 4 * 64 + row * 4 + pair % 4 / 2;
      first = codes[0] >> pair % 2 * 4 & 15;
      second = codes[2] >> pair % 2 * 4 & 15;
    }
    chain[n] += x0 * values.of[first];
    chain[n] += x1 * values.of[second];
  }
}

template <class Format>
float scale_of(const GemmArgs& g, const uint8_t* tile, int column, int n) {
  if (Format::kScaleBytes == 0) return g.w_scale[Format::kGroup == 0 ? n : column / 128];
  const int group = column % Format::kTileColumns / Format::kGroup;
  const uint8_t* scales = group_scales<Format>(tile, group);
  uint32_t bits;
  if (Format::kScaleBytes == 1) {
    // The byte is a float32's exponent; 0 is a subnormal.
    bits = scales[n] == 0 ? 0x400000u : static_cast<uint32_t>(scales[n]) << 23;
  } else {
    uint16_t bf16;
    memcpy(&bf16, scales + 2 * n, 2);
    return bf16_value(bf16);
  }
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

template <class Format>
void row(const GemmArgs& g, const uint8_t* a, float* c) {
  for (int n = 0; n < kStripColumns; ++n) c[n] = 0.0f;
  const int group = Format::kGroup == 0 ? g.k : Format::kGroup;
  for (int first = 0; first < g.k; first += group) {
    float chain[kStripColumns] = {};
    const int end = first + group < g.k ? first + group : g.k;
    for (int column = first; column < end; column += 2) {
      const uint8_t* tile = coded_tile<Format>(g, column / Format::kTileColumns);
      uint16_t x[2];
      memcpy(x, a + 2 * column, 4);
      multiply_pair<Format>(tile, column % Format::kTileColumns / 2, x, chain);
    }
    const uint8_t* tile = coded_tile<Format>(g, first / Format::kTileColumns);
    for (int n = 0; n < kStripColumns; ++n) c[n] += scale_of<Format>(g, tile, first, n) * chain[n];
  }
}

template <WeightFormat kFormat>
void strip(const GemmArgs& g) {
  for (int r = 0; r < g.rows; ++r) {
    float* c = g.c + static_cast<int64_t>(r) * kStripColumns;
    row<Coded<kFormat>>(g, g.a + r * g.a_stride, c);
    if (g.lora_b != nullptr) expand_row(g, r, c);
  }
}

template <WeightFormat kFormat>
constexpr GemmKernel kKernel = {"portable", strip<kFormat>, expand_rows, 0};

}  // namespace

extern const GemmKernel gemm_coded_portable[kNumCodedFormats];
const GemmKernel gemm_coded_portable[kNumCodedFormats] = {
    kKernel<WeightFormat::kFp8>,      kKernel<WeightFormat::kFp8Channel>,
    kKernel<WeightFormat::kInt4G32>,  kKernel<WeightFormat::kInt4G64>,
    kKernel<WeightFormat::kInt4G128>, kKernel<WeightFormat::kMxfp4>};

}  // namespace ktrt
