#include "layout/packed_layout.h"

#include <algorithm>

namespace ktrt {

std::size_t PackedLayout::tile_offset(int strip, int k0) const {
  const int k_block = k0 / traits_->block_k * traits_->block_k;
  const int k_block_size = std::min(traits_->block_k, padded_k_ - k_block);
  const std::size_t rows = static_cast<std::size_t>(block_rows(strip));
  const std::size_t elements =
      static_cast<std::size_t>(k_block) * rows +
      static_cast<std::size_t>(row_in_block(strip)) * static_cast<std::size_t>(k_block_size) +
      static_cast<std::size_t>(k0 - k_block) * kStripRows;
  return block_offset(strip) + elements * static_cast<std::size_t>(traits_->bits) / 8;
}

}  // namespace ktrt
