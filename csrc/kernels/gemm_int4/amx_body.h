// INT4 GEMM on AMX tiles: the nibbles of a tile become two INT8 tiles in the L1 cache, once per
// k-block, with which the INT8 GEMM goes on.
#pragma once

#include "kernels/gemm_int8/amx_body.h"

namespace ktrt {
namespace {

// One packed tile as the two INT8 tiles of its columns 0 … 63 and 64 … 127, bytes 16 · code.
inline void split_nibbles(const uint8_t* w, uint8_t* tiles) {
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(0xf0));
  for (int i = 0; i < kTileSize; i += 64) {
    const __m512i both = _mm512_loadu_si512(w + i);
    _mm512_store_si512(tiles + i, _mm512_and_si512(_mm512_slli_epi16(both, 4), mask));
    _mm512_store_si512(tiles + kTileSize + i, _mm512_and_si512(both, mask));
  }
}

class SplitTiles {
 public:
  static constexpr int kPerPacked = 2;
  static constexpr bool kInPlace = false;
  template <int kLayoutBlock, class Visit>
  static void for_each_block(const GemmArgs& g, int row_bytes, Visit visit) {
    for_each_k_block<kLayoutBlock>(g, row_bytes, kMaxBlockTiles / kPerPacked, visit);
  }

  explicit SplitTiles(const GemmArgs&) {}
  void start(const KBlock& block, int) {
    packed_ = block.tiles;
    count_ = block.count;
    split(0);
  }
  // A packed tile ahead of the multiplications, so that no multiplication waits for the stores.
  void prepare(int pass, int index) {
    if (pass > 0) return;
    const int next = index / kPerPacked + 1;
    if (index % kPerPacked == 0 && next < count_) split(next);
  }
  const uint8_t* tile(int index) const { return tiles_ + static_cast<int64_t>(index) * kTileSize; }

 private:
  void split(int packed) {
    const int64_t offset = static_cast<int64_t>(packed) * kTileSize;
    split_nibbles(packed_ + offset, tiles_ + offset * kPerPacked);
  }

  const uint8_t* packed_ = nullptr;
  int count_ = 0;
  alignas(64) uint8_t tiles_[kMaxBlockTiles * kTileSize];
};

class AmxInt4Gemm : public AmxInt8Gemm {
 public:
  static constexpr int kLayoutBlock = 3584 / 2;
  using WeightTiles = SplitTiles;
  static int row_bytes(const GemmArgs& g) { return g.k / 2; }
  using AmxInt8Gemm::AmxInt8Gemm;
};

}  // namespace
}  // namespace ktrt
