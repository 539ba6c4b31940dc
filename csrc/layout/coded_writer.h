// Writes rows of codes, and scales, into one strip of a packed matrix of a coded format.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "layout/pack.h"

namespace ktrt {

inline constexpr std::uint8_t kE4m3Nan = 0x7f;
inline constexpr std::uint8_t kE8m0Nan = 0xff;
inline constexpr std::uint8_t kE8m0One = 127;

// Byte of a half tile that holds a column of one of its 16 rows, and the bits below it.
struct Place {
  int byte;
  int shift;
};

inline Place place_of(int bits, int row, int column) {
  if (bits == 8) {
    const int in = column % 4;
    return {column / 4 * 64 + row / 4 * 16 + in / 2 * 8 + row % 4 * 2 + in % 2, 0};
  }
  const int in = column % 8;
  const int nibble = in / 2 + in % 2 * 4;
  return {column / 8 * 64 + row * 4 + nibble / 2, nibble % 2 * 4};
}

// Bytes of a scale as the format keeps it.
inline int scale_size(WeightFormat format) {
  if (format == WeightFormat::kMxfp4) return 1;
  return traits_of(format).scale == ScaleKind::kInTile ? 2 : 4;
}

class StripWriter {
 public:
  StripWriter(const PackedMatrix& packed, int strip) : packed_(packed), strip_(strip) {
    const PackedLayout& layout = packed.layout;
    std::uint8_t* const first = packed.codes + layout.tile_offset(strip, 0);
    std::memset(first, 0, layout.tile_bytes() * static_cast<std::size_t>(layout.tiles()));
    if (packed.scales != nullptr) {
      std::fill_n(packed.scales + std::int64_t{strip} * layout.strip_scales(),
                  layout.strip_scales(), 0.0f);
    }
    if (layout.format() != WeightFormat::kMxfp4) return;
    for (int t = 0; t < layout.tiles(); ++t) {
      std::uint8_t* const tile = first + static_cast<std::size_t>(t) * layout.tile_bytes();
      std::memset(tile + kTileBytes, kE8m0One, layout.tile_bytes() - kTileBytes);
    }
  }

  void code(int row, int column, std::uint8_t code) {
    const FormatTraits& traits = packed_.layout.traits();
    const Place place = place_of(traits.bits, row % kHalfRows, column % traits.tile_k);
    std::uint8_t& byte = tile(column)[row / kHalfRows * (kTileBytes / 2) + place.byte];
    byte = static_cast<std::uint8_t>(byte | (code << place.shift));
  }
  // The codes of a row of a source, its first `columns`. Returns whether none is NaN.
  bool row(int row, const std::uint8_t* codes, int columns) {
    return packed_.layout.traits().bits == 8 ? row_of_bytes(row, codes, columns)
                                             : row_of_nibbles(row, codes, columns);
  }
  // `bits`: the scale as the format keeps it.
  void group_scale(int row, int group, const void* bits) {
    const FormatTraits& traits = packed_.layout.traits();
    const int column = group * traits.group;
    const int size = scale_size(traits.format);
    const int in_tile = column % traits.tile_k / traits.group;
    std::memcpy(tile(column) + kTileBytes + (in_tile * kStripRows + row) * size, bits,
                static_cast<std::size_t>(size));
  }
  float& outer_scale(int index) {
    return packed_.scales[std::int64_t{strip_} * packed_.layout.strip_scales() + index];
  }

 private:
  std::uint8_t* tile(int column) {
    const int tile_k = packed_.layout.traits().tile_k;
    return packed_.codes + packed_.layout.tile_offset(strip_, column / tile_k * tile_k);
  }

  // Calls write(first column, where the row's part of that vector lies) for the whole vectors of a
  // row; returns the columns that they hold.
  template <class Write>
  int for_each_vector(int row, int vector_columns, int row_offset, int columns,
                      const Write& write) {
    const int tile_k = packed_.layout.traits().tile_k;
    int column = 0;
    while (column + vector_columns <= columns) {
      std::uint8_t* to = tile(column) + row / kHalfRows * (kTileBytes / 2) + row_offset;
      const int end = std::min(columns, column / tile_k * tile_k + tile_k);
      for (; column + vector_columns <= end; column += vector_columns, to += 64) write(column, to);
    }
    return column;
  }

  bool row_of_bytes(int row, const std::uint8_t* codes, int columns) {
    const int in_half = row % kHalfRows;
    std::uint32_t nans = 0;
    const int done = for_each_vector(row, 4, in_half / 4 * 16 + in_half % 4 * 2, columns,
                                     [&](int column, std::uint8_t* to) {
                                       std::uint32_t four;
                                       std::memcpy(&four, codes + column, 4);
                                       // A byte that is NaN without its sign carries into its
                                       // highest bit.
                                       nans |= (four & 0x7f7f7f7fu) + 0x01010101u;
                                       std::memcpy(to, codes + column, 2);
                                       std::memcpy(to + 8, codes + column + 2, 2);
                                     });
    bool finite = (nans & 0x80808080u) == 0;
    for (int column = done; column < columns; ++column) {
      finite = finite && (codes[column] & kE4m3Nan) != kE4m3Nan;
      code(row, column, codes[column]);
    }
    return finite;
  }

  bool row_of_nibbles(int row, const std::uint8_t* codes, int columns) {
    // The nibbles at 0x0f of four bytes, side by side.
    const auto gathered = [](std::uint32_t four) {
      four &= 0x0f0f0f0fu;
      four = (four | four >> 4) & 0x00ff00ffu;
      return (four | four >> 8) & 0xffffu;
    };
    const int done =
        for_each_vector(row, 8, row % kHalfRows * 4, columns, [&](int column, std::uint8_t* to) {
          std::uint32_t four;
          std::memcpy(&four, codes + column / 2, 4);
          four = gathered(four) | gathered(four >> 4) << 16;
          std::memcpy(to, &four, 4);
        });
    for (int column = done; column < columns; ++column) {
      const int byte = codes[column / 2];
      code(row, column, static_cast<std::uint8_t>(column % 2 == 0 ? byte & 15 : byte >> 4));
    }
    return true;
  }

  const PackedMatrix& packed_;
  const int strip_;
};

}  // namespace ktrt
