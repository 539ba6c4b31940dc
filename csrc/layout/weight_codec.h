// Codecs: weights to the codes of one format, and back.
#pragma once

#include <cstdint>

#include "base/bf16.h"

namespace ktrt {

struct EncodedRow {
  float scale = 0.0f;    // 0: all codes are 0
  std::int32_t sum = 0;  // of the values that the kernels multiply
};

// One codec per weight format, in codec_<format>.cc. Rows of codes are row-major.
struct WeightCodec {
  // The first `count` weights of an output row, all finite; `largest` is the largest magnitude.
  // `codes` has room for the padded k, and zeros in it.
  EncodedRow (*encode)(const bf16_t* weights, int count, float largest, std::uint8_t* codes);
  void (*decode)(const std::uint8_t* codes, int count, float scale, float* weights);
  // Adds the values that the kernels multiply to the sums of a tile's 32 rows; null without sums.
  void (*add_sums)(const std::uint8_t* tile, std::int32_t* sums);
};

}  // namespace ktrt
