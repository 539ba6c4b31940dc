// One row per weight format. Sizes, packing, kernel selection, parsing and Python read the rows;
// nothing else tells formats apart.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "layout/weight_codec.h"
#include "layout/weight_format.h"

namespace ktrt {

// Where a weight's scale is.
enum class ScaleKind {
  kNone,
  kPerRow,      // float32 per output row, and the sum of the row's codes: activations are then
                // quantised to INT8, a row at a time
  kPerBlock,    // float32 per strip of 32 output rows and kBlockColumns columns
  kPerChannel,  // float32 per output row
  kInTile,      // per output row and group of columns, after the tile's codes
};
inline constexpr int kBlockColumns = 128;  // of FP8

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
  // Columns of one scale of kPerBlock and kInTile.
  int group = 0;
  int tile_scale_bytes = 0;            // of kInTile
  const WeightCodec* codec = nullptr;  // null for coded formats (layout/coded.h)

  // Whether activations are multiplied as INT8 codes.
  constexpr bool quantizes_rows() const { return scale == ScaleKind::kPerRow; }
};

extern const WeightCodec bf16_codec;
extern const WeightCodec int8_codec;
extern const WeightCodec int4_codec;

// More columns than any matrix has: all of k is one block.
inline constexpr int kWholeK = 1 << 30;

constexpr FormatTraits coded_traits(WeightFormat format, const char* name, const char* kt_backend,
                                    int bits, ScaleKind scale, int group,
                                    int tile_scale_bytes = 0) {
  return {.format = format,
          .name = name,
          .kt_backend = kt_backend,
          .gemm_family = "gemm_coded",
          .bits = bits,
          .scale = scale,
          .block_rows = 32,
          .block_k = kWholeK,
          .tile_k = 512 / bits,
          .group = group,
          .tile_scale_bytes = tile_scale_bytes};
}

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
    coded_traits(WeightFormat::kFp8, "fp8", "FP8", 8, ScaleKind::kPerBlock, kBlockColumns),
    coded_traits(WeightFormat::kFp8Channel, "fp8_channel", "FP8", 8, ScaleKind::kPerChannel, 0),
    coded_traits(WeightFormat::kInt4G32, "int4_g32", "RAWINT4", 4, ScaleKind::kInTile, 32, 256),
    coded_traits(WeightFormat::kInt4G64, "int4_g64", "RAWINT4", 4, ScaleKind::kInTile, 64, 128),
    coded_traits(WeightFormat::kInt4G128, "int4_g128", "RAWINT4", 4, ScaleKind::kInTile, 128, 64),
    coded_traits(WeightFormat::kMxfp4, "mxfp4", "MXFP4", 4, ScaleKind::kInTile, 32, 128),
};

constexpr const FormatTraits& traits_of(WeightFormat format) {
  return kFormatTraits[static_cast<std::size_t>(format)];
}

constexpr const char* name_of(WeightFormat format) { return traits_of(format).name; }

constexpr bool quantizes_rows(WeightFormat format) { return traits_of(format).quantizes_rows(); }

// Throws std::invalid_argument for an unknown name.
WeightFormat parse_format(const std::string& name);

}  // namespace ktrt
