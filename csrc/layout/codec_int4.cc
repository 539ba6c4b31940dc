// scale = float32(max|w| · (1/112)), code = round_half_even(w · (1/scale)) / 16, halves away from
// zero. Rounding twice is kt_kernel's way; its kernels, and ours, multiply 16 · code, which a
// nibble in the upper half of a byte is.
//
// A tile of 128 columns keeps its first 64 in the low nibbles, the others in the high ones.
#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "layout/format_traits.h"
#include "layout/integer_codec.h"

namespace ktrt {

namespace {

constexpr int kNibbleColumns = 64;
constexpr int kTileColumns = 2 * kNibbleColumns;

// The multiple of 16 nearest to an INT8 code in [-112, 112], halves away from zero.
std::int8_t round_to_16(std::int8_t code) {
  const int magnitude = (std::abs(code) + 8) & 0xf0;
  return static_cast<std::int8_t>(code < 0 ? -magnitude : magnitude);
}

EncodedRow encode(const bf16_t* weights, int count, float largest, std::uint8_t* codes) {
  // kt_kernel is built with fast math, which turns its division by 112, a double, into a product.
  const auto scale = static_cast<float>(static_cast<double>(largest) * (1.0 / 112.0));
  const float inverse = 1.0f / scale;
  // A row of zeros, or of weights so small that 1/scale overflows, has scale 0 and codes 0.
  if (!std::isfinite(inverse)) return {};
  EncodedRow result{scale, 0};
  for (int first = 0; first < count; first += kTileColumns) {
    std::int8_t sixteen_codes[kTileColumns] = {};
    result.sum += quantize(weights + first, std::min(kTileColumns, count - first), inverse,
                           round_to_16, sixteen_codes);
    for (int k = 0; k < kNibbleColumns; ++k) {
      const auto low = static_cast<std::uint8_t>(sixteen_codes[k]);
      const auto high = static_cast<std::uint8_t>(sixteen_codes[kNibbleColumns + k]);
      codes[first / 2 + k] = static_cast<std::uint8_t>((low >> 4) | (high & 0xf0));
    }
  }
  return result;
}

void decode(const std::uint8_t* codes, int count, float scale, float* weights) {
  for (int k = 0; k < count; ++k) {
    const int column = k % kTileColumns;
    const std::uint8_t both = codes[(k - column) / 2 + column % kNibbleColumns];
    const int upper = column < kNibbleColumns ? both << 4 : both & 0xf0;
    weights[k] = scale * static_cast<float>(static_cast<std::int8_t>(upper));
  }
}

void add_sums(const std::uint8_t* tile, std::int32_t* sums) {
  add_bytes(tile, sums, [](std::uint8_t byte) {
    return static_cast<std::int8_t>(byte << 4) + static_cast<std::int8_t>(byte & 0xf0);
  });
}

}  // namespace

const WeightCodec int4_codec = {encode, decode, add_sums};

}  // namespace ktrt
