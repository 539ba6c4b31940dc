// How a GEMM kernel walks one strip of packed weights. Included by the kernels' ISA files only.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels/kernel_table.h"

namespace ktrt {
namespace {

constexpr int kTileSize = 2048;  // bytes: 32 rows × 64
constexpr int kTileHalf = 1024;  // bytes: 16 rows × 64
constexpr int kStripColumns = 32;

// Tiles of one k-block of a strip: consecutive in memory.
struct StripChunk {
  const uint8_t* tiles;
  int count;
  int first_byte;              // where the chunk starts in a row of A, in bytes
  const uint8_t* after_tiles;  // read after this chunk
};

// kBlock: the layout's k-block in bytes of a row (KB · element size).
template <int kBlock>
inline const uint8_t* chunk_start(const GemmArgs& g, int row_bytes, int first_byte) {
  const int rest = row_bytes - first_byte;
  const int size = rest < kBlock ? rest : kBlock;
  return g.w_block + static_cast<int64_t>(first_byte) * g.block_rows +
         static_cast<int64_t>(g.row_in_block) * size;
}

// The chunk at `first_byte` of a row of `row_bytes`.
template <int kBlock>
inline StripChunk strip_chunk(const GemmArgs& g, int row_bytes, int first_byte) {
  const int rest = row_bytes - first_byte;
  const int size = rest < kBlock ? rest : kBlock;
  const uint8_t* tiles = chunk_start<kBlock>(g, row_bytes, first_byte);
  const uint8_t* after = g.next;
  if (rest > kBlock) after = chunk_start<kBlock>(g, row_bytes, first_byte + kBlock);
  return {tiles, size / 64, first_byte, after};
}

// The tile that is `ahead` tiles after tile `index` of the chunk; null where nothing follows.
inline const uint8_t* tile_ahead(const StripChunk& chunk, int index, int ahead) {
  const int target = index + ahead;
  const bool here = target < chunk.count;
  const uint8_t* first = here ? chunk.tiles : chunk.after_tiles;
  if (first == nullptr) return nullptr;
  return first + static_cast<int64_t>(here ? target : target - chunk.count) * kTileSize;
}

// Asks for it at once, one line of 64 bytes each. Reading past the end of an allocation is harmless
// for a prefetch.
inline void prefetch_tile(const StripChunk& chunk, int index, int ahead) {
  const uint8_t* line = tile_ahead(chunk, index, ahead);
  if (line == nullptr) return;
  for (int i = 0; i < kTileSize; i += 64) __builtin_prefetch(line + i, 0, 3);
}

constexpr int kPrefetchTiles = 3;
constexpr int kTilesAhead = 4;

// Calls visit(tile, byte, ahead) for every tile of a strip in ascending k, `byte` being where its
// 64 bytes of k start in a row of A and `ahead` a tile to be prefetched meanwhile: null if not
// `prefetch`, and at the end. The layout's k-block is kBlock bytes.
template <int kBlock, class Visit>
inline __attribute__((always_inline)) void for_each_tile_ahead(const GemmArgs& g, int row_bytes,
                                                               bool prefetch, Visit visit) {
  for (int first = 0; first < row_bytes; first += kBlock) {
    const StripChunk chunk = strip_chunk<kBlock>(g, row_bytes, first);
    for (int tile = 0; tile < chunk.count; ++tile) {
      visit(chunk.tiles + static_cast<int64_t>(tile) * kTileSize, first + tile * 64,
            prefetch ? tile_ahead(chunk, tile, kTilesAhead) : nullptr);
    }
  }
}

// Asks for one of the 16 shares of a tile that is to come. All of it at once would wait for the
// memory, and the memory then for the products: three and more rows took 1.5 to 2 times as long.
// One or two rows have no such work, and lose by shares.
//
// Many rows leave the time to fetch a line from the L2 cache, and the L1's own fetches then wait
// for nothing.
template <int kRows>
inline __attribute__((always_inline)) void prefetch_share(const uint8_t* tile, int share) {
  constexpr int kBytes = kRows < 3 ? kTileSize : kTileSize / 16;
  constexpr int kLocality = kRows < 5 ? 3 : 2;
  if (tile == nullptr || (kBytes == kTileSize && share > 0)) return;
  for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(tile + share * kBytes + i, 0, kLocality);
}

// Calls visit(tile, byte), and prefetches coming tiles at once if `prefetch`.
template <int kBlock, class Visit>
inline __attribute__((always_inline)) void for_each_tile(const GemmArgs& g, int row_bytes,
                                                         bool prefetch, Visit visit) {
  for (int first = 0; first < row_bytes; first += kBlock) {
    const StripChunk chunk = strip_chunk<kBlock>(g, row_bytes, first);
    for (int tile = 0; tile < chunk.count; ++tile) {
      if (prefetch) prefetch_tile(chunk, tile, kPrefetchTiles);
      visit(chunk.tiles + static_cast<int64_t>(tile) * kTileSize, first + tile * 64);
    }
  }
}

// Asks for what turns the strip's integer sums into C, which is read after its last tile, from
// separate places.
inline void prefetch_scales(const GemmArgs& g) {
  for (int i = 0; i < kStripColumns; i += 16) {
    __builtin_prefetch(g.w_scale + i, 0, 3);
    __builtin_prefetch(g.w_sum + i, 0, 3);
  }
}

// Prefetches the strip's LoRA expand, which is read after the last tile and lies elsewhere.
inline void prefetch_expand(const GemmArgs& g) {
  if (g.lora_b == nullptr) return;
  const int bytes = g.rank_pairs * 128;
  const uint8_t* b = reinterpret_cast<const uint8_t*>(g.lora_b);
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(b + i, 0, 2);
}

// Splits `rows` into the fewest blocks of at most kMax rows, as even as possible, and calls
// run(first row, rows of the block).
template <int kMax, class Run>
inline void for_each_row_block(int rows, Run run) {
  const int blocks = (rows + kMax - 1) / kMax;
  int first = 0;
  for (int block = 0; block < blocks; ++block) {
    const int end = static_cast<int>(static_cast<int64_t>(rows) * (block + 1) / blocks);
    run(first, end - first);
    first = end;
  }
}

}  // namespace
}  // namespace ktrt
