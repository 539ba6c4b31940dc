// Many rows times a BF16 matrix as torch holds it, row-major, on AMX tiles: a k-block of a strip is
// made into the tiles' order in the L1 cache as the first rows are multiplied, a tile ahead, and
// the BF16 GEMM goes on with it. 128 shuffles make a tile, which two tiles of rows multiply with in
// 64 cycles: with 16 rows a core still takes in 40 GB/s.
#pragma once

#include "kernels/gemm_bf16/amx_body.h"
#include "kernels/unrolled.h"

namespace ktrt {
namespace {

// out[i][r] = rows[r][i], 16 × 16 words.
KTRT_INLINE void transpose(__m512i (&rows)[16], uint8_t* out) {
  __m512i pairs[16];
  unrolled<8>([&](auto i) {
    pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  });
  // fours[4 · j + i]: of rows 4j … 4j + 3, words i, i + 4, i + 8 and i + 12.
  __m512i fours[16];
  unrolled<4>([&](auto j) {
    unrolled<2>([&](auto i) {
      fours[4 * j + 2 * i] = _mm512_unpacklo_epi64(pairs[4 * j + i], pairs[4 * j + 2 + i]);
      fours[4 * j + 2 * i + 1] = _mm512_unpackhi_epi64(pairs[4 * j + i], pairs[4 * j + 2 + i]);
    });
  });
  unrolled<4>([&](auto i) {
    const __m512i low01 = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0x44);
    const __m512i high01 = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0xee);
    const __m512i low23 = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0x44);
    const __m512i high23 = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0xee);
    _mm512_store_si512(out + 64 * i, _mm512_shuffle_i32x4(low01, low23, 0x88));
    _mm512_store_si512(out + 64 * (i + 4), _mm512_shuffle_i32x4(low01, low23, 0xdd));
    _mm512_store_si512(out + 64 * (i + 8), _mm512_shuffle_i32x4(high01, high23, 0x88));
    _mm512_store_si512(out + 64 * (i + 12), _mm512_shuffle_i32x4(high01, high23, 0xdd));
  });
}

// GemmArgs::w_block is the strip's first row, block_rows how many it has, k · 2 bytes each.
class RowMajorTiles : public MadeTiles<RowMajorTiles, 1> {
 public:
  explicit RowMajorTiles(const GemmArgs& g) : g_(g), row_bytes_(int64_t{g.k} * 2) {}

  void make(int tile, uint8_t* out) const {
    make_half(0, int64_t{tile} * 64, out);
    make_half(kTileRows, int64_t{tile} * 64, out + kTileHalf);
  }

 private:
  void make_half(int first_row, int64_t byte, uint8_t* out) const {
    const uint8_t* from = g_.w_block + first_row * row_bytes_ + byte;
    const int64_t ahead = bytes_ahead(byte);
    __m512i rows[16];
    unrolled<16>([&](auto r) {
      const uint8_t* row = from + r * row_bytes_;
      const bool is_there = first_row + r < g_.block_rows;
      rows[r] = is_there ? _mm512_loadu_si512(row) : _mm512_setzero_si512();
      if (ahead != 0) __builtin_prefetch(row + ahead, 0, 2);
    });
    transpose(rows, out);
  }

  // From a row's 64 bytes to those that its place in the tiles needs a k-block later, in the next
  // strip after the last one; 0 where there is none.
  int64_t bytes_ahead(int64_t byte) const {
    constexpr int64_t kAhead = kMaxBlockTiles * 64;
    if (byte + kAhead < row_bytes_) return kAhead;
    if (g_.next == nullptr) return 0;
    const int64_t in_next = byte + kAhead - row_bytes_;
    return in_next < row_bytes_ ? g_.next - g_.w_block + in_next - byte : 0;
  }

  const GemmArgs& g_;
  const int64_t row_bytes_;
};

class AmxRowMajorGemm : public AmxBf16Gemm {
 public:
  using WeightTiles = RowMajorTiles;
  using AmxBf16Gemm::AmxBf16Gemm;
};

template <class Tiles>
void row_major_strip(const GemmArgs& g) {
  tile_strip<Tiles, AmxRowMajorGemm>(g);
}

template <class Tiles>
constexpr GemmKernel row_major_kernel(const char* name) {
  return {name, row_major_strip<Tiles>, nullptr, 0, true};
}

}  // namespace
}  // namespace ktrt
