// Many rows of A times one strip of W, a chunk of tiles at a time: the chunk lies in the L1 cache
// as the factors that products take, made once for all rows, and C waits in memory from one chunk
// to the next. Widening in front of every product took a third of the time on AVX-512 and half of
// it on AVX2. Included by the kernels' ISA files only; `Products` as in kernels/bursts.h, and
// Products::kMaxRows rows × one strip are a register block.
#pragma once

#include "kernels/bursts.h"

namespace ktrt {
namespace {

template <class Products>
constexpr int kStripVectors = 128 / Products::kWidth;
// Bytes of one tile's factors: [half][16 steps][part][64].
template <class Products>
constexpr int kFactorTile = kTileSize * Products::kParts;

// Lines that are read after the chunk, to be asked for evenly while it is multiplied.
struct Lines {
  const uint8_t* first;
  int per_tile;  // up to 32; 0: none
};

// acc += the products of some tiles of factors. A's factors: x + row · x_stride + part ·
// part_stride, four bytes a step.
template <class Products, int kRows>
KTRT_INLINE void multiply_tiles(const uint8_t* w, int tiles, const uint8_t* x, int64_t x_stride,
                                int64_t part_stride, Lines lines,
                                typename Products::Sum (&acc)[kRows][kStripVectors<Products>]) {
  using Factor = typename Products::Factor;
  constexpr int kVectors = kStripVectors<Products>;
  constexpr int kStep = 64 * Products::kParts;
  for (int tile = 0; tile < tiles; ++tile, w += kFactorTile<Products>) {
    for (int step = 0; step < 16; ++step, x += 4) {
      if (step < lines.per_tile) __builtin_prefetch(lines.first + step * 64, 0, 2);
      if (step + 16 < lines.per_tile) __builtin_prefetch(lines.first + step * 64 + 1024, 0, 2);
      unrolled<Products::kParts>([&](auto part) KTRT_LAMBDA {
        const uint8_t* from = w + step * kStep + part * 64;
        const auto factor = [&](int q) KTRT_LAMBDA {
          constexpr int kInHalf = kVectors / 2;
          return Products::load_factor(from + q / kInHalf * (16 * kStep) +
                                       q % kInHalf * Products::kWidth);
        };
        const auto row = [&](int i) KTRT_LAMBDA {
          return Products::factor(Products::broadcast(x + i * x_stride + part * part_stride));
        };
        if constexpr (kRows < kVectors) {
          Factor rows[kRows];
          unrolled<kRows>([&](auto i) KTRT_LAMBDA { rows[i] = row(i); });
          unrolled<kVectors>([&](auto q) KTRT_LAMBDA {
            const Factor each = factor(q);
            unrolled<kRows>(
                [&](auto i) KTRT_LAMBDA { acc[i][q] = Products::add(acc[i][q], each, rows[i]); });
          });
        } else {
          Factor factors[kVectors];
          unrolled<kVectors>([&](auto q) KTRT_LAMBDA { factors[q] = factor(q); });
          unrolled<kRows>([&](auto i) KTRT_LAMBDA {
            const Factor each = row(i);
            unrolled<kVectors>([&](auto q) KTRT_LAMBDA {
              acc[i][q] = Products::add(acc[i][q], factors[q], each);
            });
          });
        }
      });
    }
    lines.first += lines.per_tile * 64;
  }
}

// Calls move(sum, place in C) for the sums of a register block.
template <class Products, int kRows, class Move>
KTRT_INLINE void for_each_sum(typename Products::Sum (&acc)[kRows][kStripVectors<Products>],
                              float* c, Move move) {
  unrolled<kRows>([&](auto i) KTRT_LAMBDA {
    unrolled<kStripVectors<Products>>([&](auto q) KTRT_LAMBDA {
      move(acc[i][q], c + i * kStripColumns + q * (Products::kWidth / 4));
    });
  });
}

// One vector's parts to memory, part_stride bytes apart.
template <class Products>
KTRT_INLINE void widen(const uint8_t* from, uint8_t* to, int64_t part_stride) {
  typename Products::Factor factors[Products::kParts];
  Products::parts(Products::load(from), factors);
  unrolled<Products::kParts>([&](auto part) KTRT_LAMBDA {
    Products::store_factor(to + part * part_stride, factors[part]);
  });
}

template <class Products>
inline void widen_tile(const uint8_t* tile, uint8_t* to) {
  for (int vector = 0; vector < 32; ++vector, to += 64 * Products::kParts) {
    for (int at = 0; at < 64; at += Products::kWidth) {
      widen<Products>(tile + vector * 64 + at, to + at, 64);
    }
  }
}

// A chunk of W as factors, and where its columns are in a row of A.
template <int kTiles>
struct Chunk {
  const uint8_t* factors;
  int tiles;
  int first_byte;
  bool resume;  // the sums go on from C
  const uint8_t* next;
  int next_lines;
};

// C of kRows rows += one chunk.
template <class Products, int kTiles, int kRows>
void chunk_rows(const GemmArgs& g, const Chunk<kTiles>& chunk, int first_row, int lines_per_tile,
                int first_line) {
  using Sum = typename Products::Sum;
  const uint8_t* x = g.a + first_row * g.a_stride + chunk.first_byte;
  int64_t x_stride = g.a_stride;
  constexpr int64_t kPartStride = kTiles * 64;
  alignas(64) uint8_t rows[Products::kParts > 1 ? kRows : 1][Products::kParts][kPartStride];
  if constexpr (Products::kParts > 1) {
    for (int i = 0; i < kRows; ++i) {
      for (int at = 0; at < chunk.tiles * 64; at += Products::kWidth) {
        widen<Products>(x + i * g.a_stride + at, rows[i][0] + at, kPartStride);
      }
    }
    x = rows[0][0];
    x_stride = sizeof(rows[0]);
  }
  float* c = g.c + static_cast<int64_t>(first_row) * kStripColumns;
  Sum acc[kRows][kStripVectors<Products>];
  if (chunk.resume) {
    for_each_sum<Products>(
        acc, c, [](Sum& sum, const float* from) KTRT_LAMBDA { sum = Products::load_sum(from); });
  } else {
    for_each_sum<Products>(acc, c,
                           [](Sum& sum, const float*) KTRT_LAMBDA { sum = Products::zero(); });
  }
  const Lines lines{chunk.next + first_line * 64, lines_per_tile};
  multiply_tiles<Products, kRows>(chunk.factors, chunk.tiles, x, x_stride, kPartStride, lines, acc);
  for_each_sum<Products>(
      acc, c, [](const Sum& sum, float* to) KTRT_LAMBDA { Products::store_sum(to, sum); });
}

template <class Products, int kTiles, int kRows = Products::kMaxRows>
KTRT_INLINE void chunk_block(const GemmArgs& g, const Chunk<kTiles>& chunk, int first_row, int rows,
                             int lines_per_tile, int first_line) {
  if (rows == kRows) {
    chunk_rows<Products, kTiles, kRows>(g, chunk, first_row, lines_per_tile, first_line);
  } else if constexpr (kRows > 1) {
    chunk_block<Products, kTiles, kRows - 1>(g, chunk, first_row, rows, lines_per_tile, first_line);
  }
}

// All rows over one chunk, its next lines shared among them.
template <class Products, int kTiles>
inline void multiply_chunk(const GemmArgs& g, const Chunk<kTiles>& chunk) {
  const int blocks = (g.rows + Products::kMaxRows - 1) / Products::kMaxRows;
  const int steps = blocks * chunk.tiles;
  const int per_tile = (chunk.next_lines + steps - 1) / steps;
  int line = 0;
  for_each_row_block<Products::kMaxRows>(g.rows, [&](int first, int rows) KTRT_LAMBDA {
    const bool more = line + per_tile * chunk.tiles <= chunk.next_lines;
    chunk_block<Products, kTiles>(g, chunk, first, rows, more ? per_tile : 0, line);
    line += per_tile * chunk.tiles;
  });
}

// C [rows][32] = the sums, as Products stores them; LoRA and scales are the caller's.
//
// Weights::factors(tiles, count, buffer) gives the factors of up to Weights::kTiles tiles of the
// layout, in the buffer or where they are. One tile of the layout is Weights::kSplit tiles of
// factors, of 64 bytes of A each.
template <class Products, class Weights>
void chunk_sums(const GemmArgs& g, int row_bytes) {
  constexpr int kTiles = Weights::kTiles * Weights::kSplit;
  alignas(64) uint8_t buffer[Weights::kInPlace ? 64 : kTiles * kFactorTile<Products>];
  Chunk<kTiles> part;
  part.resume = false;
  for (int first = 0; first < row_bytes; first += Weights::kBlock) {
    const StripChunk chunk = strip_chunk<Weights::kBlock>(g, row_bytes, first);
    for (int tile = 0; tile < chunk.count; tile += Weights::kTiles) {
      const int rest = chunk.count - tile;
      const int count = rest < Weights::kTiles ? rest : Weights::kTiles;
      part.tiles = count * Weights::kSplit;
      part.first_byte = (first + tile * 64) * Weights::kSplit;
      part.next = tile_ahead(chunk, tile, count);
      part.next_lines = part.next == nullptr ? 0 : count * (kTileSize / 64);
      part.factors =
          Weights::factors(chunk.tiles + static_cast<int64_t>(tile) * kTileSize, count, buffer);
      multiply_chunk<Products, kTiles>(g, part);
      part.resume = true;
    }
  }
}

// Tiles whose bytes are widened.
template <class Products, int kBlockBytes>
struct WidenedTiles {
  static constexpr int kBlock = kBlockBytes;
  static constexpr int kTiles = 4;  // 16 KB of factors
  static constexpr int kSplit = 1;
  static constexpr bool kInPlace = false;

  static const uint8_t* factors(const uint8_t* tiles, int count, uint8_t* buffer) {
    for (int tile = 0; tile < count; ++tile) {
      widen_tile<Products>(tiles + tile * kTileSize, buffer + tile * kFactorTile<Products>);
    }
    return buffer;
  }
};

}  // namespace
}  // namespace ktrt
