// GEMM of coded weights on AVX-512. Codes become BF16 pairs in registers, by shifts (E4M3) or a
// table (4 bits); a chain of products per scale and output is multiplied by the scale into C, which
// stays in the L1 cache.
//
//   up to 5 rows   pairs are multiplied as they are made, of several strips side by side
//   more           256 columns are made once, as 16 KB on the stack, which all rows pass over
//
// Both add the same products in the same order. Included by the kernels' ISA files only; Dot adds
// one pair to a chain: VDPBF16PS, or two multiply-adds.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "kernels/coded_strip.h"
#include "kernels/side_by_side.h"
#include "kernels/vnni/expand.h"

namespace ktrt {
namespace {

constexpr int kMaxRows = 14;
constexpr int kChunkColumns = 256;
constexpr int kChunkGroups = kChunkColumns / 32;

// BF16 of the codes 0 … 15, twice: the fifth bit of an index is another code's.
template <Code kCode>
inline __m512i code_table() {
  alignas(32) static constexpr uint16_t kInt4[16] = {0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
                                                     0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0,
                                                     0xc080, 0xc040, 0xc000, 0xbf80};
  alignas(32) static constexpr uint16_t kE2m1[16] = {0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040,
                                                     0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80, 0xbfc0,
                                                     0xc000, 0xc040, 0xc080, 0xc0c0};
  const uint16_t* table = kCode == Code::kInt4 ? kInt4 : kE2m1;
  return _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(table)));
}

// E4M3's exponent and mantissa, moved to BF16's places, get the exponent bits 1110000: the value
// times 2^-8, and that without a carry. Scales make up for it.
constexpr float kE4m3Factor = 256.0f;

// Codes with exponent 0 are m · 2^-9 and, unless 0, normal numbers in BF16; `pairs` has each code
// in both bytes of a word.
inline __m512i with_subnormals(__m512i values, __m512i pairs) {
  alignas(16) static constexpr uint16_t kSubnormal[8] = {0x0000, 0x3700, 0x3780, 0x37c0,
                                                         0x3800, 0x3820, 0x3840, 0x3860};
  const __m512i table =
      _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kSubnormal)));
  const __mmask32 subnormal = _mm512_testn_epi16_mask(pairs, _mm512_set1_epi16(0x7800));
  const __m512i magnitude = _mm512_permutexvar_epi16(pairs, table);
  const __m512i sign = _mm512_and_si512(pairs, _mm512_set1_epi16(static_cast<int16_t>(0x8000)));
  return _mm512_mask_blend_epi16(subnormal, values, _mm512_or_si512(magnitude, sign));
}

inline __m512i e4m3_values(__m512i pairs) {
  const __m512i kept = _mm512_set1_epi16(static_cast<int16_t>(0x87f0));
  const __m512i exponent = _mm512_set1_epi16(0x3800);
  constexpr int kAndOr = 0xea;  // (a & b) | c
  return _mm512_ternarylogic_epi64(_mm512_srai_epi16(pairs, 4), kept, exponent, kAndOr);
}

// Pairs of columns in a vector of 64 bytes.
template <class Format>
constexpr int kPairs = Format::kIsFp8 ? 2 : 4;

// Calls use(pair, values) for the pairs of a vector of codes, `pair` being an Index type.
template <class Format, class Use>
KTRT_INLINE void for_each_pair(const uint8_t* w, __m512i table, Use use) {
  const __m512i codes = _mm512_loadu_si512(w);
  if constexpr (Format::kIsFp8) {
    const __m512i low = _mm512_unpacklo_epi8(codes, codes);
    const __m512i high = _mm512_unpackhi_epi8(codes, codes);
    __m512i first = e4m3_values(low);
    __m512i second = e4m3_values(high);
    // One vector in a hundred has such a code where weights are normally distributed.
    if (__builtin_expect(_mm512_testn_epi8_mask(codes, _mm512_set1_epi8(0x78)) != 0, 0)) {
      first = with_subnormals(first, low);
      second = with_subnormals(second, high);
    }
    use(Index<0>{}, first);
    use(Index<1>{}, second);
  } else {
    use(Index<0>{}, _mm512_permutexvar_epi16(codes, table));
    use(Index<1>{}, _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table));
    use(Index<2>{}, _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table));
    use(Index<3>{}, _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), table));
  }
}

// 16 scales of a tile, as float32.
template <class Format>
KTRT_INLINE __m512 tile_scales(const uint8_t* scales) {
  if constexpr (Format::kScaleBytes == 1) {
    // The byte is the exponent; 0 is a subnormal.
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
    const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23);
    return _mm512_castsi512_ps(_mm512_max_epu32(bits, _mm512_set1_epi32(0x400000)));
  } else {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
  }
}

// The scales of half the strip for the group that begins at `column` of `tile`.
template <class Format>
KTRT_INLINE __m512 scales_at(const GemmArgs& g, const uint8_t* tile, int column, int half) {
  if constexpr (Format::kScaleBytes != 0) {
    const int group = column % Format::kTileColumns / Format::kGroup;
    return tile_scales<Format>(group_scales<Format>(tile, group) + half * 16 * Format::kScaleBytes);
  } else if constexpr (Format::kGroup != 0) {
    return _mm512_set1_ps(g.w_scale[column / Format::kGroup] * kE4m3Factor);
  } else {
    return _mm512_mul_ps(_mm512_loadu_ps(g.w_scale + half * 16), _mm512_set1_ps(kE4m3Factor));
  }
}

KTRT_INLINE void add_scaled(float* c, __m512 scale, __m512 chain) {
  _mm512_storeu_ps(c, _mm512_fmadd_ps(scale, chain, _mm512_loadu_ps(c)));
}

// A burst of a half's vectors, times kRows rows, from x on.
template <class Format, class Dot, int kRows>
KTRT_INLINE void multiply_burst(const uint8_t* w, const uint8_t* x, int64_t x_stride, __m512i table,
                                __m512* chain, int step) {
  unrolled<kBurstVectors>([&](auto v) {
    for_each_pair<Format>(w + v * 64, table, [&](auto pair, __m512i values) {
      const int byte = (v * kPairs<Format> + pair) * 4;
      unrolled<kRows>([&](auto i) {
        chain[i * step] =
            Dot::multiply(chain[i * step], values, broadcast_word(x + i * x_stride + byte));
      });
    });
  });
}

// Strips of 4 bits: a group is one to four bursts of one half.
template <class Format, class Dot, int kRows, int kStrips>
KTRT_INLINE void multiply_tile(const GemmArgs* g, int tile, __m512i table) {
  constexpr int kGroupBytes = Format::kGroup / 8 * 64;
  const int64_t offset = static_cast<int64_t>(tile) * Format::kTileBytes;
  unrolled<2>([&](auto half) {
    for (int group = 0; group < Format::kGroupsInTile; ++group) {
      __m512 chain[kStrips][kRows];
      unrolled<kStrips>(
          [&](auto s) { unrolled<kRows>([&](auto i) { chain[s][i] = _mm512_setzero_ps(); }); });
      const int first = tile * Format::kTileColumns + group * Format::kGroup;
      for (int byte = 0; byte < kGroupBytes; byte += kBurst) {
        const int64_t at = offset + half * kTileHalf + group * kGroupBytes + byte;
        unrolled<kStrips>([&](auto s) {
          multiply_burst<Format, Dot, kRows>(g[s].w_block + at, g[s].a + first * 2 + byte / 4,
                                             g[s].a_stride, table, chain[s], 1);
        });
      }
      unrolled<kStrips>([&](auto s) {
        const __m512 scale = scales_at<Format>(g[s], g[s].w_block + offset, first, half);
        unrolled<kRows>([&](auto i) {
          add_scaled(g[s].c + i * kStripColumns + half * 16, scale, chain[s][i]);
        });
      });
    }
  });
}

// Strips of 8 bits: a group is one or more tiles.
template <class Format, class Dot, int kRows, int kStrips>
KTRT_INLINE void multiply_group(const GemmArgs* g, int first_tile, int tiles) {
  __m512 chain[kStrips][kRows][2];
  unrolled<kStrips>([&](auto s) {
    unrolled<kRows>([&](auto i) { chain[s][i][0] = chain[s][i][1] = _mm512_setzero_ps(); });
  });
  for (int tile = first_tile; tile < first_tile + tiles; ++tile) {
    const int64_t offset = static_cast<int64_t>(tile) * Format::kTileBytes;
    unrolled<2>([&](auto half) {
      for (int byte = 0; byte < kTileHalf; byte += kBurst) {
        const int x = tile * Format::kTileColumns * 2 + byte / 8;
        unrolled<kStrips>([&](auto s) {
          multiply_burst<Format, Dot, kRows>(g[s].w_block + offset + half * kTileHalf + byte,
                                             g[s].a + x, g[s].a_stride, __m512i{},
                                             &chain[s][0][half], 2);
        });
      }
    });
  }
  unrolled<kStrips>([&](auto s) {
    unrolled<2>([&](auto half) {
      const __m512 scale =
          scales_at<Format>(g[s], nullptr, first_tile * Format::kTileColumns, half);
      unrolled<kRows>([&](auto i) {
        add_scaled(g[s].c + i * kStripColumns + half * 16, scale, chain[s][i][half]);
      });
    });
  });
}

// Tiles ahead that a single strip prefetches: the hardware sees one stream only.
template <class Format>
inline void prefetch_ahead(const GemmArgs& g, int tile, int tiles) {
  constexpr int kAhead = 4;
  const uint8_t* from = coded_tile<Format>(g, tile + kAhead);
  if (tile + kAhead >= tiles) {
    if (g.next == nullptr) return;
    from = g.next + static_cast<int64_t>(tile + kAhead - tiles) * Format::kTileBytes;
  }
  for (int i = 0; i < Format::kTileBytes; i += 64) __builtin_prefetch(from + i, 0, 3);
}

template <class Format, class Dot, int kRows, int kStrips>
void few_rows(const GemmArgs* g) {
  unrolled<kStrips>([&](auto s) { memset(g[s].c, 0, sizeof(float) * kRows * kStripColumns); });
  const int tiles = coded_tiles<Format>(g[0]);
  if constexpr (Format::kIsFp8) {
    constexpr int kGroupTiles = Format::kGroup / Format::kTileColumns;
    const int step = kGroupTiles == 0 ? tiles : kGroupTiles;
    for (int tile = 0; tile < tiles; tile += step) {
      if (kStrips == 1) prefetch_ahead<Format>(g[0], tile, tiles);
      multiply_group<Format, Dot, kRows, kStrips>(g, tile,
                                                  tiles - tile < step ? tiles - tile : step);
    }
  } else {
    const __m512i table = code_table<Format::kCode>();
    for (int tile = 0; tile < tiles; ++tile) {
      if (kStrips == 1) prefetch_ahead<Format>(g[0], tile, tiles);
      multiply_tile<Format, Dot, kRows, kStrips>(g, tile, table);
    }
  }
  unrolled<kStrips>([&](auto s) {
    if (g[s].lora_b != nullptr) expand_rows<Dot>(g[s]);
  });
}

// Some columns of a strip as BF16 pairs, and their scales. The same for all formats.
struct Chunk {
  alignas(64) uint8_t values[kChunkColumns / 2][2][64];
  alignas(64) float scales[kChunkGroups][kStripColumns];
  int first;    // column
  int columns;  // the last chunk may have fewer, and so may its last group
  int group;    // columns of one scale: kChunkColumns or less
  // The chain goes on from C, and from one chunk to the next; the last one's scale is multiplied.
  bool one_chain;
  bool last;
  const uint8_t* next;  // lines that are read next
  int next_lines;
};

template <class Format>
inline void unpack(const GemmArgs& g, Chunk& chunk) {
  const __m512i table = Format::kIsFp8 ? __m512i{} : code_table<Format::kCode>();
  const uint8_t* tile = coded_tile<Format>(g, chunk.first / Format::kTileColumns);
  for (int column = 0; column < chunk.columns; column += Format::kTileColumns) {
    uint8_t(*values)[2][64] = &chunk.values[column / 2];
    for (int v = 0; v < 16; ++v, values += kPairs<Format>) {
      unrolled<2>([&](auto half) {
        for_each_pair<Format>(
            tile + half * kTileHalf + v * 64, table,
            [&](auto pair, __m512i pairs) { _mm512_store_si512(values[pair][half], pairs); });
      });
    }
    tile += Format::kTileBytes;
  }
  for (int column = 0; column < chunk.columns; column += chunk.group) {
    const int at = chunk.first + column;
    unrolled<2>([&](auto half) {
      _mm512_store_ps(
          chunk.scales[column / chunk.group] + half * 16,
          scales_at<Format>(g, coded_tile<Format>(g, at / Format::kTileColumns), at, half));
    });
  }
}

template <class Dot, int kRows>
void row_block(const Chunk& chunk, const uint8_t* x, int64_t x_stride, float* c, int next_lines) {
  for (int column = 0; column < chunk.columns; column += chunk.group) {
    const int rest = chunk.columns - column;
    const int end = (column + (rest < chunk.group ? rest : chunk.group)) / 2;
    __m512 chain[kRows][2];
    unrolled<kRows>([&](auto i) { chain[i][0] = chain[i][1] = _mm512_setzero_ps(); });
    if (chunk.one_chain) {
      unrolled<kRows>([&](auto i) {
        chain[i][0] = _mm512_loadu_ps(c + i * kStripColumns);
        chain[i][1] = _mm512_loadu_ps(c + i * kStripColumns + 16);
      });
    }
    for (int pair = column / 2; pair < end; ++pair) {
      if (pair < next_lines) __builtin_prefetch(chunk.next + pair * 64, 0, 2);
      const __m512i w0 = _mm512_load_si512(chunk.values[pair][0]);
      const __m512i w1 = _mm512_load_si512(chunk.values[pair][1]);
      unrolled<kRows>([&](auto i) {
        const __m512i xi = broadcast_word(x + i * x_stride + pair * 4);
        chain[i][0] = Dot::multiply(chain[i][0], w0, xi);
        chain[i][1] = Dot::multiply(chain[i][1], w1, xi);
      });
    }
    const __m512 s0 = _mm512_load_ps(chunk.scales[column / chunk.group]);
    const __m512 s1 = _mm512_load_ps(chunk.scales[column / chunk.group] + 16);
    if (chunk.one_chain) {
      const __m512 zero = _mm512_setzero_ps();
      unrolled<kRows>([&](auto i) {
        if (chunk.last) chain[i][0] = _mm512_fmadd_ps(s0, chain[i][0], zero);
        if (chunk.last) chain[i][1] = _mm512_fmadd_ps(s1, chain[i][1], zero);
        _mm512_storeu_ps(c + i * kStripColumns, chain[i][0]);
        _mm512_storeu_ps(c + i * kStripColumns + 16, chain[i][1]);
      });
    } else {
      unrolled<kRows>([&](auto i) {
        add_scaled(c + i * kStripColumns, s0, chain[i][0]);
        add_scaled(c + i * kStripColumns + 16, s1, chain[i][1]);
      });
    }
  }
}

template <class Dot>
using RowBlock = void (*)(const Chunk&, const uint8_t*, int64_t, float*, int);
template <class Dot>
constexpr RowBlock<Dot> kRowBlocks[kMaxRows + 1] = {nullptr,
                                                    row_block<Dot, 1>,
                                                    row_block<Dot, 2>,
                                                    row_block<Dot, 3>,
                                                    row_block<Dot, 4>,
                                                    row_block<Dot, 5>,
                                                    row_block<Dot, 6>,
                                                    row_block<Dot, 7>,
                                                    row_block<Dot, 8>,
                                                    row_block<Dot, 9>,
                                                    row_block<Dot, 10>,
                                                    row_block<Dot, 11>,
                                                    row_block<Dot, 12>,
                                                    row_block<Dot, 13>,
                                                    row_block<Dot, 14>};

template <class Format, class Dot>
void many_rows(const GemmArgs& g) {
  Chunk chunk;
  chunk.one_chain = Format::kGroup == 0;
  chunk.group = chunk.one_chain ? kChunkColumns : Format::kGroup;
  memset(g.c, 0, sizeof(float) * kStripColumns * static_cast<size_t>(g.rows));
  for (chunk.first = 0; chunk.first < g.k; chunk.first += kChunkColumns) {
    const int rest = g.k - chunk.first;
    chunk.last = rest <= kChunkColumns;
    chunk.columns = chunk.last ? rest : kChunkColumns;
    const int tiles = chunk.columns / Format::kTileColumns;
    const int end = chunk.first / Format::kTileColumns + tiles;
    chunk.next = chunk.last ? g.next : coded_tile<Format>(g, end);
    chunk.next_lines = chunk.next == nullptr ? 0 : tiles * Format::kTileBytes / 64;
    unpack<Format>(g, chunk);
    for_each_row_block<kMaxRows>(g.rows, [&](int first, int rows) {
      kRowBlocks<Dot>[rows](chunk, g.a + first * g.a_stride + chunk.first * 2, g.a_stride,
                            g.c + static_cast<int64_t>(first) * kStripColumns,
                            first == 0 ? chunk.next_lines : 0);
    });
  }
  if (g.lora_b != nullptr) expand_rows<Dot>(g);
}

template <class Format, class Dot, int kRows = kMaxSideRows>
void strip(const GemmArgs& g) {
  if (g.rows > kRows) return many_rows<Format, Dot>(g);
  if (g.rows == kRows) return few_rows<Format, Dot, kRows, 1>(&g);
  if constexpr (kRows > 1) strip<Format, Dot, kRows - 1>(g);
}

template <class Format, class Dot>
void strip_of_any(const GemmArgs& g) {
  prefetch_expand(g);
  strip<Format, Dot>(g);
}

template <class Format, class Dot>
void side_by_side(const GemmArgs* strips, int count) {
  for_each_strip_group<kMaxSideRows>(
      strips, count, strip<Format, Dot>,
      [](auto rows, auto n, const GemmArgs* g) { few_rows<Format, Dot, rows, n>(g); });
}

template <WeightFormat kFormat, class Dot>
constexpr GemmKernel coded_kernel(const char* name) {
  return {name,  strip_of_any<Coded<kFormat>, Dot>, expand_rows<Dot>, 0,
          false, side_by_side<Coded<kFormat>, Dot>, kMaxSideRows};
}

}  // namespace
}  // namespace ktrt
