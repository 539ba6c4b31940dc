#include "layout/packed_layout.h"

#include <algorithm>

namespace ktrt {

std::size_t PackedLayout::tile_offset(int strip, int k0) const {
  const int k_block = k0 / traits_->block_k * traits_->block_k;
  const int k_block_size = std::min(traits_->block_k, padded_k_ - k_block);
  const auto tiles_of = [&](int columns, int rows) {
    return static_cast<std::size_t>(columns / traits_->tile_k) *
           static_cast<std::size_t>(rows / kStripRows);
  };
  const std::size_t tiles = tiles_of(k_block, block_rows(strip)) +
                            tiles_of(k_block_size, row_in_block(strip)) +
                            tiles_of(k0 - k_block, kStripRows);
  return block_offset(strip) + tiles * tile_bytes();
}

}  // namespace ktrt
