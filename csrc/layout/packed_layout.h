// kt_kernel 0.7.2's packed weight layout ("BufferB"): where each element of a matrix W [n, k] lies.
//
// Order: n-block, k-block, strip of 32 rows, tile of `tile_k` columns, two halves of 16 rows,
// groups of consecutive k that fill 4 bytes (2 BF16 or 4 INT8 values), 16 rows, the group's values.
// A half tile is 16 × 16 words of 4 bytes = 1 KB: an AMX B tile and, equally, sixteen 64-byte
// vectors that hold one k-group of 16 output rows each. An INT4 tile is two INT8 tiles in one: its
// low nibbles are columns 0 … 63, its high nibbles columns 64 … 127, two's complement in [-7, 7].
// Checked byte for byte against kt_kernel by tests/python/test_golden_packing.py.
//
// kt_kernel refuses sizes that do not fill its strips and tiles; here they are padded with zeros.
//
// Coded formats (layout/coded.h) have the strips and tiles in the same order, without n-blocks and
// k-blocks, and their own order inside a tile, whose scales may follow its codes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/aligned_buffer.h"
#include "layout/format_traits.h"

namespace ktrt {

inline constexpr int kStripRows = 32;  // rows of W that one kernel call produces
inline constexpr int kHalfRows = 16;   // rows of one 64-byte vector, and of one AMX tile
inline constexpr int kTileBytes = 2048;
inline constexpr int kTileRowBytes = 64;  // bytes of k in a tile, per row

// Sizes and addresses of one packed matrix.
class PackedLayout {
 public:
  PackedLayout() = default;
  PackedLayout(WeightFormat format, int n, int k)
      : traits_(&traits_of(format)),
        n_(n),
        k_(k),
        padded_n_(round_up(n, kStripRows)),
        padded_k_(round_up(k, traits_->tile_k)) {}

  WeightFormat format() const { return traits_->format; }
  int n() const { return n_; }
  int k() const { return k_; }
  int padded_n() const { return padded_n_; }
  int padded_k() const { return padded_k_; }
  int strips() const { return padded_n_ / kStripRows; }
  int tiles() const { return padded_k_ / traits_->tile_k; }
  // Bytes of the tiles, with the scales that they hold.
  std::size_t code_bytes() const {
    return static_cast<std::size_t>(strips()) * static_cast<std::size_t>(tiles()) * tile_bytes();
  }
  std::size_t tile_bytes() const {
    return static_cast<std::size_t>(kTileBytes + traits_->tile_scale_bytes);
  }
  // Float32 scales outside of the tiles.
  std::size_t scales() const {
    return static_cast<std::size_t>(strips()) * static_cast<std::size_t>(strip_scales());
  }
  int strip_scales() const {
    switch (traits_->scale) {
      case ScaleKind::kPerRow:
      case ScaleKind::kPerChannel:
        return kStripRows;
      case ScaleKind::kPerBlock:
        return (k_ + kBlockColumns - 1) / kBlockColumns;
      default:
        return 0;
    }
  }
  std::size_t scale_bytes() const { return scales() * sizeof(float); }
  // Sums of the rows' codes.
  std::size_t sums() const {
    return traits_->quantizes_rows() ? static_cast<std::size_t>(padded_n_) : 0;
  }
  std::size_t sum_bytes() const { return sums() * sizeof(std::int32_t); }
  // Bytes of one row's codes over the padded k.
  int row_bytes() const { return padded_k_ * traits_->bits / 8; }
  const FormatTraits& traits() const { return *traits_; }

  // Byte offset of the n-block that holds `strip`, and the rows of that block.
  std::size_t block_offset(int strip) const {
    return static_cast<std::size_t>(block_start(strip) / kStripRows) *
           static_cast<std::size_t>(tiles()) * tile_bytes();
  }
  int block_rows(int strip) const {
    const int rest = padded_n_ - block_start(strip);
    return rest < traits_->block_rows ? rest : traits_->block_rows;
  }
  // First row of `strip` inside its n-block.
  int row_in_block(int strip) const { return strip * kStripRows - block_start(strip); }

  // Byte offset of the tile of `strip` that starts at column k0 (a multiple of tile_k).
  std::size_t tile_offset(int strip, int k0) const;

 private:
  int block_start(int strip) const {
    return strip * kStripRows / traits_->block_rows * traits_->block_rows;
  }

  const FormatTraits* traits_ = &traits_of(WeightFormat::kBf16);
  int n_ = 0;
  int k_ = 0;
  int padded_n_ = 0;
  int padded_k_ = 0;
};

}  // namespace ktrt
