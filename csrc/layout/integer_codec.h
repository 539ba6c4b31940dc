// Steps that the codecs of integer formats share.
#pragma once

#include <bit>
#include <cstdint>

#include "base/bf16.h"
#include "layout/packed_layout.h"

namespace ktrt {

// INT8 codes of some weights of a row, of which round_code() may make coarser ones; returns their
// sum. `inverse`: 1 / scale.
template <class RoundCode>
std::int32_t quantize(const bf16_t* weights, int count, float inverse, RoundCode round_code,
                      std::int8_t* codes) {
  // Adding 1.5 · 2^23 rounds half to even and leaves the integer in the low mantissa bits.
  constexpr float kRound = 12582912.0f;
  std::int32_t sum = 0;
  for (int k = 0; k < count; ++k) {
    const float rounded = bf16_to_f32(weights[k]) * inverse + kRound;
    codes[k] = round_code(static_cast<std::int8_t>(std::bit_cast<std::int32_t>(rounded) -
                                                   std::bit_cast<std::int32_t>(kRound)));
    sum += codes[k];
  }
  return sum;
}

// Adds value() of each byte of one tile to the sums of its rows: per half 16 groups of 16 rows × 4
// bytes.
template <class Value>
void add_bytes(const std::uint8_t* tile, std::int32_t* sums, Value value) {
  for (int half = 0; half < 2; ++half) {
    for (int group = 0; group < kTileRowBytes / 4; ++group) {
      for (int row = 0; row < kHalfRows; ++row, tile += 4) {
        for (int i = 0; i < 4; ++i) {
          sums[half * kHalfRows + row] += value(tile[i]);
        }
      }
    }
  }
}

}  // namespace ktrt
