// Shared by the GEMMs on AMX tiles: how a strip is cut into blocks that the caches hold, and the
// LoRA expand. Included by their bodies only.
//
// A block of k (some tiles of W, 2 KB each) stays in the L1 cache while pairs of A tiles, in tile
// order and from the L2 cache, pass over it; C waits in memory from one block to the next. Sums run
// in ascending k whatever the blocks. Two tiles multiply for 64 cycles on the 4 KB they are given;
// meanwhile the next weights are prefetched, INT4 is unpacked and integer sums are scaled.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "kernels/amx/tile_ops.h"
#include "kernels/strip.h"

namespace ktrt {
namespace {

constexpr int kTilePairs = 16;  // BF16 pairs of k in a tile
// Tiles of W in a k-block, at most: 32 KB.
constexpr int kMaxBlockTiles = 16;
constexpr int64_t kCStride = kStripColumns * sizeof(float);

struct MultiplyBf16 {
  template <class Tiles, int kC, int kA, int kB>
  static void run() {
    Tiles::template multiply_bf16<kC, kA, kB>();
  }
};

struct MultiplyInt8 {
  template <class Tiles, int kC, int kA, int kB>
  static void run() {
    Tiles::template multiply_int8<kC, kA, kB>();
  }
};

// Where the tiles' sums, as [two tiles][tile_rows][32], go before other rows' take their place, and
// where those come from; null: nowhere, and zeros. Taken tile by tile, each just before the first
// multiplication that needs it, so that the other three multiply meanwhile: all at once between two
// pairs of rows costs 5 % of the time that 16 tiles of W take.
struct Turn {
  float* store = nullptr;
  const float* load = nullptr;
};

template <class Tiles, int kC>
inline void store_c(float* c, int tile_rows) {
  Tiles::template store<kC>(c + kC / 2 * tile_rows * kStripColumns + kC % 2 * 16, kCStride);
}

template <class Tiles, int kC>
inline void turn_c(const Turn& turn, int tile_rows) {
  if (turn.store != nullptr) store_c<Tiles, kC>(turn.store, tile_rows);
  if (turn.load == nullptr) {
    Tiles::template zero<kC>();
  } else {
    Tiles::template load<kC>(turn.load + kC / 2 * tile_rows * kStripColumns + kC % 2 * 16,
                             kCStride);
  }
}

template <class Tiles, bool kTwoTiles>
inline void store_all_c(float* c, int tile_rows) {
  store_c<Tiles, 0>(c, tile_rows);
  store_c<Tiles, 1>(c, tile_rows);
  if constexpr (kTwoTiles) {
    store_c<Tiles, 2>(c, tile_rows);
    store_c<Tiles, 3>(c, tile_rows);
  }
}

// Two tiles of rows, 64 bytes of k each: their addresses, and the stride to the next 64 bytes.
struct RowTiles {
  const uint8_t* first;
  const uint8_t* second;
  int64_t step;
};

inline RowTiles row_tiles(const GemmArgs& g, int first_tile, int byte) {
  const uint8_t* first = g.a + first_tile * g.a_stride + static_cast<int64_t>(byte) * g.tile_rows;
  return {first, first + g.a_stride, 64 * g.tile_rows};
}

// Asks for 64 bytes of the rows of both tiles. Reading past the end of an allocation is harmless.
inline void prefetch_rows(const RowTiles& a, int index) {
  for (int64_t i = index * a.step; i < (index + 1) * a.step; i += 64) {
    __builtin_prefetch(a.first + i, 0, 2);
    __builtin_prefetch(a.second + i, 0, 2);
  }
}

// A's rows come from the L2 cache: where a k-block of W is to stay in L1, past it.
template <class Tiles, int kTile, bool kStream>
inline void load_a(const uint8_t* a) {
  if constexpr (kStream) {
    Tiles::template load_stream<kTile>(a, 64);
  } else {
    Tiles::template load<kTile>(a, 64);
  }
}

// C in the tiles += A · W over one tile of W and 64 bytes of A's rows. before(c) runs
// before tile c's first multiplication.
template <class Tiles, class Multiply, bool kTwoTiles, bool kStream, class Before>
inline void multiply_tile(const uint8_t* w, const uint8_t* a0, const uint8_t* a1, Before before) {
  load_a<Tiles, 4, kStream>(a0);
  Tiles::template load<6>(w, 64);
  before.template operator()<0>();
  Multiply::template run<Tiles, 0, 4, 6>();
  Tiles::template load<7>(w + kTileHalf, 64);
  before.template operator()<1>();
  Multiply::template run<Tiles, 1, 4, 7>();
  if constexpr (kTwoTiles) {
    load_a<Tiles, 5, kStream>(a1);
    before.template operator()<2>();
    Multiply::template run<Tiles, 2, 5, 6>();
    before.template operator()<3>();
    Multiply::template run<Tiles, 3, 5, 7>();
  }
}

struct NothingBefore {
  template <int kC>
  void operator()() const {}
};

template <class Tiles>
struct TurnBefore {
  const Turn& turn;
  int tile_rows;
  template <int kC>
  void operator()() const {
    turn_c<Tiles, kC>(turn, tile_rows);
  }
};

// Lines that are prefetched evenly over some number of steps.
struct Prefetch {
  const uint8_t* next = nullptr;
  const uint8_t* end = nullptr;
  int64_t per_step = 0;

  void start(const uint8_t* begin, int64_t bytes, int64_t steps) {
    next = begin;
    const int64_t lines = begin == nullptr ? 0 : (bytes + 63) / 64;
    end = begin + lines * 64;
    per_step = (lines + steps - 1) / steps * 64;
  }
};

// One step; returns what is next.
inline const uint8_t* prefetch_step(const uint8_t* next, const uint8_t* end, int64_t per_step) {
  const uint8_t* until = next + per_step < end ? next + per_step : end;
  for (; next < until; next += 64) __builtin_prefetch(next, 0, 2);
  return next;
}

// The strip's LoRA expand as W tiles. Ranks come packed to even counts; a tile takes 32, so the
// missing ones are zeros here, in the L1 cache, rather than in memory, where they would triple what
// decoding with rank 8 reads. Ranks above 128 are made into tiles again for every block of rows.
class ExpandTiles {
 public:
  void build(const GemmArgs& g) {
    for (int i = 0; i < kKept && i * kTilePairs < g.rank_pairs; ++i) build_tile(g, i, tiles_[i]);
  }
  // C in the tiles += T · Lᵀ for the rows from first_row on, after `turn` if there is one.
  template <class Tiles, bool kTwoTiles>
  void multiply(const GemmArgs& g, int first_row, const Turn* turn) {
    for (int i = 0; i * kTilePairs < g.rank_pairs; ++i) {
      const int slot = i < kKept ? i : kKept;
      if (slot == kKept) build_tile(g, i, tiles_[slot]);
      const uint16_t* t = g.t + first_row * g.t_stride + i * 2 * kTilePairs;
      if (i == 0 && turn != nullptr) {
        multiply_tile<Tiles, kTwoTiles>(g, tiles_[slot], t, TurnBefore<Tiles>{*turn, g.tile_rows});
      } else {
        multiply_tile<Tiles, kTwoTiles>(g, tiles_[slot], t, NothingBefore());
      }
    }
  }

 private:
  template <class Tiles, bool kTwoTiles, class Before>
  static void multiply_tile(const GemmArgs& g, const uint8_t* w, const uint16_t* t, Before before) {
    const int64_t stride = g.t_stride * 2;
    Tiles::template load<6>(w, 64);
    Tiles::template load<7>(w + kTileHalf, 64);
    Tiles::template load<4>(t, stride);
    before.template operator()<0>();
    Tiles::template multiply_bf16<0, 4, 6>();
    before.template operator()<1>();
    Tiles::template multiply_bf16<1, 4, 7>();
    if constexpr (kTwoTiles) {
      Tiles::template load<5>(t + g.tile_rows * g.t_stride, stride);
      before.template operator()<2>();
      Tiles::template multiply_bf16<2, 5, 6>();
      before.template operator()<3>();
      Tiles::template multiply_bf16<3, 5, 7>();
    }
  }

  static void build_tile(const GemmArgs& g, int index, uint8_t* tile) {
    for (int p = 0; p < kTilePairs; ++p) {
      const int pair = index * kTilePairs + p;
      __m512i halves[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      if (pair < g.rank_pairs) {
        halves[0] = _mm512_loadu_si512(g.lora_b + pair * 64);
        halves[1] = _mm512_loadu_si512(g.lora_b + pair * 64 + 32);
      }
      _mm512_store_si512(tile + p * 64, halves[0]);
      _mm512_store_si512(tile + kTileHalf + p * 64, halves[1]);
    }
  }

  static constexpr int kKept = 4;
  alignas(64) uint8_t tiles_[kKept + 1][kTileSize];
};

// Some tiles of W, consecutive in memory and in k.
struct KBlock {
  const uint8_t* tiles;
  int count;
  int byte;             // where it starts in a row of W
  const uint8_t* next;  // the block after it, of this strip or the next one; may be null
  int next_count;
};

// Calls visit(KBlock) for blocks of at most max_tiles, evenly cut from the layout's k-blocks.
template <int kLayoutBlock, class Visit>
inline void for_each_k_block(const GemmArgs& g, int row_bytes, int max_tiles, Visit visit) {
  const auto blocks_in = [&](int tiles) { return (tiles + max_tiles - 1) / max_tiles; };
  const auto first_count = [&](int first_byte) {
    const int rest = row_bytes - first_byte;
    const int tiles = (rest < kLayoutBlock ? rest : kLayoutBlock) / 64;
    return tiles / blocks_in(tiles);
  };
  for (int first = 0; first < row_bytes; first += kLayoutBlock) {
    const StripChunk chunk = strip_chunk<kLayoutBlock>(g, row_bytes, first);
    const int blocks = blocks_in(chunk.count);
    const bool last_chunk = first + kLayoutBlock >= row_bytes;
    for (int b = 0; b < blocks; ++b) {
      const int begin = chunk.count * b / blocks;
      const int end = chunk.count * (b + 1) / blocks;
      KBlock block{chunk.tiles + static_cast<int64_t>(begin) * kTileSize, end - begin,
                   first + begin * 64, chunk.after_tiles,
                   first_count(last_chunk ? 0 : first + kLayoutBlock)};
      if (b + 1 < blocks) {
        block.next = chunk.tiles + static_cast<int64_t>(end) * kTileSize;
        block.next_count = chunk.count * (b + 2) / blocks - end;
      }
      visit(block);
    }
  }
}

// The tiles of a k-block as they are multiplied. BF16 and INT8: as they lie in memory.
class TilesInPlace {
 public:
  static constexpr int kPerPacked = 1;  // tiles to multiply in one tile of memory
  static constexpr bool kInPlace = true;
  template <int kLayoutBlock, class Visit>
  static void for_each_block(const GemmArgs& g, int row_bytes, Visit visit) {
    for_each_k_block<kLayoutBlock>(g, row_bytes, kMaxBlockTiles, visit);
  }

  explicit TilesInPlace(const GemmArgs&) {}
  // `passes`: pairs of A tiles that each tile is multiplied with.
  void start(const KBlock& block, int) { tiles_ = block.tiles; }
  // Called before tile `index` is multiplied, in each pass.
  void prepare(int, int) {}
  const uint8_t* tile(int index) const { return tiles_ + static_cast<int64_t>(index) * kTileSize; }

 private:
  const uint8_t* tiles_ = nullptr;
};

// BF16 tiles, 32 values of k each, that are made as the first rows are multiplied, kTilesAhead of
// them ahead: Maker::make(tile of the strip, out).
template <class Maker, int kTilesAhead>
class MadeTiles {
 public:
  static constexpr int kPerPacked = 1;
  static constexpr bool kInPlace = false;

  template <int kLayoutBlock, class Visit>
  static void for_each_block(const GemmArgs& g, int, Visit visit) {
    const int tiles = g.k / 32;
    const int blocks = (tiles + kMaxBlockTiles - 1) / kMaxBlockTiles;
    const auto begin = [&](int block) { return tiles * block / blocks; };
    for (int b = 0; b < blocks; ++b) {
      visit(KBlock{nullptr, begin(b + 1) - begin(b), begin(b) * 64, nullptr, 0});
    }
  }

  void start(const KBlock& block, int) {
    first_ = block.byte / 64;
    count_ = block.count;
    done_ = 0;
    make_until(kTilesAhead);
  }
  void prepare(int pass, int index) {
    if (pass == 0 && done_ < count_) make_until(index + 1 + kTilesAhead);
  }
  const uint8_t* tile(int index) const { return tiles_ + static_cast<int64_t>(index) * kTileSize; }

 private:
  // Out of line: inlined at all its calls, the code would not stay in the instruction cache.
  __attribute__((noinline)) void make_until(int tiles) {
    for (; done_ < tiles && done_ < count_; ++done_) {
      static_cast<Maker*>(this)->make(first_ + done_,
                                      tiles_ + static_cast<int64_t>(done_) * kTileSize);
    }
  }

  int first_ = 0;  // tile of the block
  int count_ = 0;  // its tiles,
  int done_ = 0;   // and how many are made
  alignas(64) uint8_t tiles_[kMaxBlockTiles * kTileSize];
};

// One strip. Gemm has kLayoutBlock (bytes of W), WeightTiles, Multiply, row_bytes(g) of W, and for
// the rows of one or two tiles: finish<Tiles, kTwoTiles>(first tile) when their sums are complete
// in the tiles, which returns the address to store the tiles at; stored() after the store; then
// steps(count), whose step() is called between the next `count` multiplications, stepped(steps)
// when they are done, and flush() before the next finish.
template <class Tiles, class Gemm>
class TileStrip {
  using WeightTiles = typename Gemm::WeightTiles;
  using Multiply = typename Gemm::Multiply;
  static constexpr int kPerPacked = WeightTiles::kPerPacked;

 public:
  explicit TileStrip(const GemmArgs& g)
      : g_(g),
        gemm_(g),
        row_bytes_(Gemm::row_bytes(g)),
        tiles_((g.rows + g.tile_rows - 1) / g.tile_rows),
        w_(g) {}

  void run() {
    prefetch_expand(g_);
    Tiles::configure(g_.tile_rows);
    if (tiles_ > 2) {
      all_rows();
    } else if (tiles_ == 2) {
      few_rows<true>();
    } else {
      few_rows<false>();
    }
    gemm_.stored();
    gemm_.flush();
    Tiles::release();
  }

 private:
  // All rows in the tiles: W is read once and C needs no memory.
  template <bool kTwoTiles>
  void few_rows() {
    // Loading the configuration cleared C.
    const auto multiply = [&](const uint8_t* w, int a_byte) {
      const RowTiles a = row_tiles(g_, 0, a_byte);
      multiply_tile<Tiles, Multiply, kTwoTiles, false>(w, a.first, a.second, NothingBefore());
    };
    if constexpr (WeightTiles::kInPlace) {
      for_each_tile<Gemm::kLayoutBlock>(g_, row_bytes_, true, multiply);
    } else {
      for_each_block([&](const KBlock& block) {
        for (int i = 0; i < block.count * kPerPacked; ++i) {
          w_.prepare(0, i);
          multiply(w_.tile(i), block.byte * kPerPacked + i * 64);
          weights_.next = prefetch_step(weights_.next, weights_.end, weights_.per_step);
        }
      });
    }
    store_all_c<Tiles, kTwoTiles>(gemm_.template finish<Tiles, kTwoTiles>(0), g_.tile_rows);
  }

  void all_rows() {
    for_each_block([&](const KBlock& block) {
      int tile = 0;
      for (; tile + 2 <= tiles_; tile += 2) multiply_block<true>(block, tile);
      if (tile < tiles_) {
        store_pending<true>();
        multiply_block<false>(block, tile);
        store_pending<false>();
      }
    });
    store_pending<true>();
  }

  template <bool kTwoTiles>
  void store_pending() {
    if (pending_ == nullptr) return;
    store_all_c<Tiles, kTwoTiles>(pending_, g_.tile_rows);
    pending_ = nullptr;
    gemm_.stored();
  }

  // Calls visit(block), whose tiles are ready to be prepared; the next block is prefetched
  // meanwhile.
  template <class Visit>
  void for_each_block(Visit visit) {
    const int passes = (tiles_ + 1) / 2;
    WeightTiles::template for_each_block<Gemm::kLayoutBlock>(
        g_, row_bytes_, [&](const KBlock& block) {
          weights_.start(block.next, static_cast<int64_t>(block.next_count) * kTileSize,
                         static_cast<int64_t>(block.count) * kPerPacked * passes);
          w_.start(block, passes);
          visit(block);
        });
  }

  template <bool kTwoTiles>
  void multiply_block(const KBlock& block, int tile) {
    float* c = g_.c + static_cast<int64_t>(tile) * g_.tile_rows * kStripColumns;
    const Turn turn{pending_, block.byte == 0 ? nullptr : c};
    const int count = block.count * kPerPacked;
    const RowTiles a = row_tiles(g_, tile, block.byte * kPerPacked);
    const RowTiles coming = tile + 2 < tiles_
                                ? row_tiles(g_, tile + 2, block.byte * kPerPacked)
                                : row_tiles(g_, 0, block.byte * kPerPacked + count * 64);
    const bool cold_rows = g_.cold_rows;
    const uint8_t* next = weights_.next;
    const uint8_t* const end = weights_.end;
    const int64_t per_step = weights_.per_step;
    int64_t offset = 0;  // of A's next 64 bytes
    const auto multiply = [&](int i, auto before) {
      w_.prepare(tile / 2, i);
      if (cold_rows) prefetch_rows(coming, i);
      multiply_tile<Tiles, Multiply, kTwoTiles, true>(w_.tile(i), a.first + offset,
                                                      a.second + offset, before);
      offset += a.step;
      next = prefetch_step(next, end, per_step);
      // In registers: a step that stores to memory, be it one counter, has tile loads wait.
      asm("" : "+r"(offset), "+r"(next));
    };
    multiply(0, TurnBefore<Tiles>{turn, g_.tile_rows});
    gemm_.stored();
    auto scaling = gemm_.steps(count);
    scaling.step();
    for (int i = 1; i < count; ++i) {
      multiply(i, NothingBefore());
      scaling.step();
    }
    gemm_.stepped(scaling);
    weights_.next = next;
    const bool last = block.byte + block.count * 64 == row_bytes_;
    pending_ = last ? gemm_.template finish<Tiles, kTwoTiles>(tile) : c;
  }

  const GemmArgs& g_;
  Gemm gemm_;
  const int row_bytes_;
  const int tiles_;
  WeightTiles w_;
  Prefetch weights_;
  float* pending_ = nullptr;  // where the tiles' sums are to be stored
};

template <class Tiles, class Gemm>
void tile_strip(const GemmArgs& g) {
  TileStrip<Tiles, Gemm>(g).run();
}

}  // namespace
}  // namespace ktrt
