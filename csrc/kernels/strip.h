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

// Asks for the tile that is `ahead` tiles after tile `index` of the chunk, one line of 64 bytes
// each. Reading past the end of an allocation is harmless for a prefetch.
inline void prefetch_tile(const StripChunk& chunk, int index, int ahead) {
  const int target = index + ahead;
  const uint8_t* line = chunk.tiles + static_cast<int64_t>(target) * kTileSize;
  if (target >= chunk.count) {
    if (chunk.after_tiles == nullptr) return;
    line = chunk.after_tiles + static_cast<int64_t>(target - chunk.count) * kTileSize;
  }
  for (int i = 0; i < kTileSize; i += 64) __builtin_prefetch(line + i, 0, 3);
}

constexpr int kPrefetchTiles = 3;

// Calls visit(tile, byte) for every tile of a strip in ascending k, `byte` being where its 64 bytes
// of k start in a row of A; prefetches coming tiles if `prefetch`. The layout's k-block is kBlock
// bytes.
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
