// How a GEMM kernel walks one strip of a coded format (layout/coded.h), and what it knows of each.
// Included by the kernels' ISA files only.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels/kernel_table.h"
#include "kernels/strip.h"

namespace ktrt {
namespace {

enum class Code { kE4m3, kInt4, kE2m1 };

// The rows of layout/format_traits.h as constants for templates.
template <WeightFormat kFormat>
struct Coded {
  static constexpr bool kIsFp8 =
      kFormat == WeightFormat::kFp8 || kFormat == WeightFormat::kFp8Channel;
  static constexpr Code kCode = kIsFp8                            ? Code::kE4m3
                                : kFormat == WeightFormat::kMxfp4 ? Code::kE2m1
                                                                  : Code::kInt4;
  static constexpr int kTileColumns = kIsFp8 ? 64 : 128;
  // Columns of one scale; 0: one scale per output row, for all of k.
  static constexpr int kGroup = kFormat == WeightFormat::kFp8Channel ? 0
                                : kFormat == WeightFormat::kInt4G32  ? 32
                                : kFormat == WeightFormat::kInt4G64  ? 64
                                : kFormat == WeightFormat::kMxfp4    ? 32
                                                                     : 128;
  // Bytes of one scale in a tile, per output row; 0: scales are g.w_scale.
  static constexpr int kScaleBytes = kIsFp8 ? 0 : kFormat == WeightFormat::kMxfp4 ? 1 : 2;
  static constexpr int kGroupsInTile = kScaleBytes == 0 ? 0 : kTileColumns / kGroup;
  static constexpr int kTileBytes = kTileSize + kGroupsInTile * kScaleBytes * kStripColumns;
};

// Tiles of a strip lie one after the other.
template <class Format>
inline int coded_tiles(const GemmArgs& g) {
  return g.k / Format::kTileColumns;
}
template <class Format>
inline const uint8_t* coded_tile(const GemmArgs& g, int index) {
  return g.w_block + static_cast<int64_t>(index) * Format::kTileBytes;
}
// The scales of one group of a tile, for the 32 rows.
template <class Format>
inline const uint8_t* group_scales(const uint8_t* tile, int group) {
  return tile + kTileSize + group * Format::kScaleBytes * kStripColumns;
}

}  // namespace
}  // namespace ktrt
