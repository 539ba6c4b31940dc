#include <cstring>

#include "layout/format_traits.h"

namespace ktrt {

namespace {

EncodedRow encode(const bf16_t* weights, int count, float, std::uint8_t* codes) {
  std::memcpy(codes, weights, static_cast<std::size_t>(count) * sizeof(bf16_t));
  return {};
}

void decode(const std::uint8_t* codes, int count, float, float* weights) {
  for (int k = 0; k < count; ++k) {
    bf16_t weight;
    std::memcpy(&weight, codes + static_cast<std::size_t>(k) * sizeof(bf16_t), sizeof(bf16_t));
    weights[k] = bf16_to_f32(weight);
  }
}

}  // namespace

const WeightCodec bf16_codec = {encode, decode, nullptr};

}  // namespace ktrt
