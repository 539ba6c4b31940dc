// scale = max|w| · float32(1/127), code = round_half_even(w · (1/scale)): kt_kernel's numbers.
#include <cmath>

#include "layout/format_traits.h"
#include "layout/integer_codec.h"

namespace ktrt {

namespace {

EncodedRow encode(const bf16_t* weights, int count, float largest, std::uint8_t* codes) {
  // kt_kernel is built with fast math, which turns its division by 127 into a product.
  const float scale = largest * (1.0f / 127.0f);
  const float inverse = 1.0f / scale;
  // A row of zeros, or of weights so small that 1/scale overflows, has scale 0 and codes 0.
  if (!std::isfinite(inverse)) return {};
  const auto as_is = [](std::int8_t code) { return code; };
  return {scale, quantize(weights, count, inverse, as_is, reinterpret_cast<std::int8_t*>(codes))};
}

void decode(const std::uint8_t* codes, int count, float scale, float* weights) {
  for (int k = 0; k < count; ++k) {
    weights[k] = scale * static_cast<float>(static_cast<std::int8_t>(codes[k]));
  }
}

void add_sums(const std::uint8_t* tile, std::int32_t* sums) {
  add_bytes(tile, sums, [](std::uint8_t byte) { return static_cast<std::int8_t>(byte); });
}

}  // namespace

const WeightCodec int8_codec = {encode, decode, add_sums};

}  // namespace ktrt
