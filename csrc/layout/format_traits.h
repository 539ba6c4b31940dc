// One row per weight format. Sizes, packing, kernel selection, parsing and Python read the rows;
// nothing else tells formats apart.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "layout/weight_codec.h"
#include "layout/weight_format.h"

namespace ktrt {

// kPerRow: a float32 scale per output row, and the sum of the row's codes. Activations are then
// quantised to INT8, a row at a time.
enum class ScaleKind { kNone, kPerRow };

struct FormatTraits {
  WeightFormat format;
  const char* name;         // in messages, in files and in Python
  const char* kt_backend;   // as users write it
  const char* gemm_family;  // folder of kernels/
  int bits;                 // of a code
  ScaleKind scale;
  int block_rows;  // NB of kt_kernel's BufferB
  int block_k;     // KB
  int tile_k;      // KT: columns of a tile, which has 64 bytes of each row
  const WeightCodec* codec;

  // Bytes of an output row in addition to its codes: its scale, and the sum of its codes.
  constexpr std::size_t scale_bytes() const {
    return scale == ScaleKind::kPerRow ? sizeof(float) : 0;
  }
  constexpr std::size_t sum_bytes() const {
    return scale == ScaleKind::kPerRow ? sizeof(std::int32_t) : 0;
  }
};

extern const WeightCodec bf16_codec;
extern const WeightCodec int8_codec;
extern const WeightCodec int4_codec;

inline constexpr FormatTraits kFormatTraits[kNumWeightFormats] = {
    {.format = WeightFormat::kBf16,
     .name = "bf16",
     .kt_backend = "AMXBF16",
     .gemm_family = "gemm_bf16",
     .bits = 16,
     .scale = ScaleKind::kNone,
     .block_rows = 256,
     .block_k = 1792,
     .tile_k = 32,
     .codec = &bf16_codec},
    {.format = WeightFormat::kInt8,
     .name = "int8",
     .kt_backend = "AMXInt8",
     .gemm_family = "gemm_int8",
     .bits = 8,
     .scale = ScaleKind::kPerRow,
     .block_rows = 64,
     .block_k = 3584,
     .tile_k = 64,
     .codec = &int8_codec},
    {.format = WeightFormat::kInt4,
     .name = "int4",
     .kt_backend = "AMXInt4",
     .gemm_family = "gemm_int4",
     .bits = 4,
     .scale = ScaleKind::kPerRow,
     .block_rows = 128,
     .block_k = 3584,
     .tile_k = 128,
     .codec = &int4_codec},
};

constexpr const FormatTraits& traits_of(WeightFormat format) {
  return kFormatTraits[static_cast<std::size_t>(format)];
}

constexpr const char* name_of(WeightFormat format) { return traits_of(format).name; }

// Whether activations are multiplied as INT8 codes.
constexpr bool is_quantized(WeightFormat format) {
  return traits_of(format).scale != ScaleKind::kNone;
}

// Throws std::invalid_argument for an unknown name.
WeightFormat parse_format(const std::string& name);

}  // namespace ktrt
