#include "layout/copy_strip.h"

#include <algorithm>
#include <cstring>

namespace ktrt {

namespace {

// Adds what value() makes of each byte of one tile to the sums of its rows: per half 16 groups of
// 16 rows × 4 bytes.
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

void add_tile(WeightFormat format, const std::uint8_t* tile, std::int32_t* sums) {
  switch (format) {
    case WeightFormat::kBf16:
      return;
    case WeightFormat::kInt8:
      add_bytes(tile, sums, [](std::uint8_t byte) { return static_cast<std::int8_t>(byte); });
      return;
    case WeightFormat::kInt4:  // of 16 · code
      add_bytes(tile, sums, [](std::uint8_t byte) {
        return static_cast<std::int8_t>(byte << 4) + static_cast<std::int8_t>(byte & 0xf0);
      });
      return;
  }
}

}  // namespace

void copy_strip(const PackedMatrix& from, int from_strip, const PackedMatrix& to, int to_strip) {
  const PackedLayout& layout = to.layout;
  std::int32_t sums[kStripRows] = {};
  for (int k0 = 0; k0 < layout.padded_k(); k0 += layout.params().tile_k) {
    const std::uint8_t* tile = from.codes + from.layout.tile_offset(from_strip, k0);
    std::memcpy(to.codes + layout.tile_offset(to_strip, k0), tile, kTileBytes);
    add_tile(layout.format(), tile, sums);
  }
  if (to.scales == nullptr) return;
  std::copy_n(from.scales + from_strip * kStripRows, kStripRows, to.scales + to_strip * kStripRows);
  std::copy_n(sums, kStripRows, to.sums + to_strip * kStripRows);
}

}  // namespace ktrt
