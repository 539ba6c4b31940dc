#include "layout/copy_strip.h"

#include <algorithm>
#include <cstring>

namespace ktrt {

void copy_strip(const PackedMatrix& from, int from_strip, const PackedMatrix& to, int to_strip) {
  const PackedLayout& layout = to.layout;
  std::int32_t sums[kStripRows] = {};
  for (int k0 = 0; k0 < layout.padded_k(); k0 += layout.traits().tile_k) {
    const std::uint8_t* tile = from.codes + from.layout.tile_offset(from_strip, k0);
    std::memcpy(to.codes + layout.tile_offset(to_strip, k0), tile, kTileBytes);
    if (layout.traits().codec->add_sums != nullptr) layout.traits().codec->add_sums(tile, sums);
  }
  if (to.scales == nullptr) return;
  std::copy_n(from.scales + from_strip * kStripRows, kStripRows, to.scales + to_strip * kStripRows);
  std::copy_n(sums, kStripRows, to.sums + to_strip * kStripRows);
}

}  // namespace ktrt
