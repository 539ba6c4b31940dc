// A few rows of A times several strips of W side by side. A core's reads from memory are bound by
// the lines it has under way, and the hardware asks for more of them when it sees several streams:
// on an Emerald Rapids 20 % more from eight than from one, with or without prefetching that one, if
// it goes from stream to stream every 256 bytes; 2 KB at a time gain nothing. Two to five rows gain
// 10 to 20 % on a Zen 4, and six lose. Included by the kernels' ISA files only.
#pragma once

#include "kernels/strip.h"
#include "kernels/unrolled.h"

namespace ktrt {
namespace {

constexpr int kBurst = 256;
constexpr int kBurstVectors = kBurst / 64;

// Calls multiply(strip, half, w, step) for all bursts of kStrips strips, `strip` and `half` (of a
// tile: 16 outputs) being Index types; step counts the 64-byte vectors of a half before the burst,
// and so the groups of k. Per half the steps ascend. kBlock as in for_each_tile.
template <int kStrips, int kBlock, class Multiply>
KTRT_INLINE void for_each_burst(const GemmArgs* g, int row_bytes, Multiply multiply) {
  for (int first = 0; first < row_bytes; first += kBlock) {
    const uint8_t* w[kStrips];
    unrolled<kStrips>([&](auto s) { w[s] = chunk_start<kBlock>(g[s], row_bytes, first); });
    const int rest = row_bytes - first;
    const int tiles = (rest < kBlock ? rest : kBlock) / 64;
    for (int tile = 0; tile < tiles; ++tile) {
      const int step = (first / 64 + tile) * 16;
      unrolled<2>([&](auto half) {
        for (int vector = 0; vector < 16; vector += kBurstVectors) {
          const int offset = tile * kTileSize + half * kTileHalf + vector * 64;
          unrolled<kStrips>([&](auto s) { multiply(s, half, w[s] + offset, step + vector); });
        }
      });
    }
  }
}

// Calls run(rows, number of strips, strips), the numbers being Index types, for as many strips as
// fill groups, and the kernel of single strips for those that remain. They have kRows rows or
// fewer.
template <int kRows, class Run>
inline void for_each_strip_group(const GemmArgs* strips, int count, void (*strip)(const GemmArgs&),
                                 Run run) {
  if (kRows > 1 && strips->rows < kRows) {
    return for_each_strip_group < kRows == 1 ? 1 : kRows - 1 > (strips, count, strip, run);
  }
  for (int i = 0; i < count; ++i) prefetch_expand(strips[i]);
  constexpr int kMost = side_strips(kRows);
  for (; count >= kMost; strips += kMost, count -= kMost)
    run(Index<kRows>{}, Index<kMost>{}, strips);
  if constexpr (kMost > 4) {
    for (; count >= 4; strips += 4, count -= 4) run(Index<kRows>{}, Index<4>{}, strips);
  }
  for (int i = 0; i < count; ++i) strip(strips[i]);
}

}  // namespace
}  // namespace ktrt
