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

// Lambdas in lambdas, and the arrays that they refer to: left to itself the compiler calls some of
// them, and chains are in memory, at six times the time.
#define KTRT_LAMBDA __attribute__((always_inline))

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

template <Code kCode>
constexpr bool kIs8Bits = kCode == Code::kE4m3;
template <Code kCode>
constexpr int kTileColumns = kIs8Bits<kCode> ? 64 : 128;
// Pairs of columns in a vector of 64 bytes.
template <Code kCode>
constexpr int kPairs = kIs8Bits<kCode> ? 2 : 4;
template <Code kCode>
constexpr int kScaleBytes = kIs8Bits<kCode>        ? 0
                            : kCode == Code::kE2m1 ? 1
                                                   : 2;

// Formats of one code differ by these.
struct Shape {
  int group;  // columns of one scale
  int tile_bytes;
  bool one_chain;  // one scale for all columns: `group` is then what one call adds to the chain
};
template <class Format>
constexpr Shape kShape = {Format::kGroup == 0 ? 128 : Format::kGroup, Format::kTileBytes,
                          Format::kGroup == 0};

// Calls use(pair, values) for the pairs of a vector of codes, `pair` being an Index type.
template <Code kCode, class Use>
KTRT_INLINE void for_each_pair(const uint8_t* w, __m512i table, Use use) {
  const __m512i codes = _mm512_loadu_si512(w);
  if constexpr (kIs8Bits<kCode>) {
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

// The scales of half a strip for a group of a tile, of 8 bits for the two tiles of a block.
template <Code kCode>
KTRT_INLINE __m512 scales_at(const GemmArgs& g, const Shape& shape, int tile, int group, int half) {
  if constexpr (kIs8Bits<kCode>) {
    const __m512 scales = shape.one_chain ? _mm512_loadu_ps(g.w_scale + half * 16)
                                          : _mm512_set1_ps(g.w_scale[tile / 2]);
    return _mm512_mul_ps(scales, _mm512_set1_ps(kE4m3Factor));
  } else {
    const uint8_t* scales = g.w_block + static_cast<int64_t>(tile) * shape.tile_bytes + kTileSize +
                            (group * kStripColumns + half * 16) * kScaleBytes<kCode>;
    if constexpr (kScaleBytes<kCode> == 1) {
      // The byte is the exponent; 0 is a subnormal.
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
      const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23);
      return _mm512_castsi512_ps(_mm512_max_epu32(bits, _mm512_set1_epi32(0x400000)));
    } else {
      const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales));
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
    }
  }
}

KTRT_INLINE void add_scaled(float* c, __m512 scale, __m512 chain) {
  _mm512_storeu_ps(c, _mm512_fmadd_ps(scale, chain, _mm512_loadu_ps(c)));
}

// Asks for a tile of a single strip, of which the hardware sees one stream only.
template <Code kCode>
inline void prefetch_ahead(const GemmArgs& g, const Shape& shape, int tile, int tiles) {
  constexpr int kAhead = 4;
  const uint8_t* from = g.w_block + static_cast<int64_t>(tile + kAhead) * shape.tile_bytes;
  if (tile + kAhead >= tiles) {
    if (g.next == nullptr) return;
    from = g.next + static_cast<int64_t>(tile + kAhead - tiles) * shape.tile_bytes;
  }
  for (int i = 0; i < shape.tile_bytes; i += 64) __builtin_prefetch(from + i, 0, 3);
}

// Four vectors of codes of each strip, `at` bytes after its first tile, times kRows rows from
// `byte` on. The vectors of some strips take turns: the products of a chain wait for each other,
// six cycles each. What lies `ahead` comes into the L2 cache: in the L1 cache eight strips of 36 KB
// displace each other, and one row took 0.48 instead of 0.37 ms.
template <Code kCode, class Dot, int kRows, int kStrips>
KTRT_INLINE void multiply_burst(const GemmArgs* g, int64_t at, int byte, int64_t ahead,
                                __m512i table, __m512 (&chain)[kStrips][kRows]) {
  constexpr int kWanted = kRows == 1 ? 4 : kRows <= 3 ? 2 : 1;
  constexpr int kTogether = kStrips < kWanted ? kStrips : kWanted;
  unrolled<kStrips / kTogether>([&](auto block) KTRT_LAMBDA {
    for (int v = 0; v < kBurstVectors; ++v) {
      unrolled<kTogether>([&](auto i) KTRT_LAMBDA {
        constexpr int s = block * kTogether + i;
        const uint8_t* w = g[s].w_block + at + v * 64;
        const uint8_t* x = g[s].a + byte + v * kPairs<kCode> * 4;
        if (kStrips > 1) __builtin_prefetch(w + ahead, 0, 2);
        for_each_pair<kCode>(w, table, [&](auto pair, __m512i values) KTRT_LAMBDA {
          unrolled<kRows>([&](auto r) KTRT_LAMBDA {
            chain[s][r] = Dot::multiply(chain[s][r], values,
                                        broadcast_word(x + r * g[s].a_stride + pair * 4));
          });
        });
      });
    }
  });
}

// kStrips strips side by side, in pieces of 128 columns: one tile of 4 bits, half after half, or
// two of 8 bits, both halves at once so that memory is read in its order.
template <Code kCode, class Dot, int kRows, int kStrips>
void multiply_few(const GemmArgs* g, const Shape& shape) {
  constexpr int kPieceTiles = 128 / kTileColumns<kCode>;
  constexpr int kVectorColumns = kPairs<kCode> * 2;
  constexpr int kHalves = kIs8Bits<kCode> ? 2 : 1;
  const __m512i table = code_table<kCode>();
  unrolled<kStrips>([&](auto s) KTRT_LAMBDA {
    unrolled<kRows * 2>(
        [&](auto i) KTRT_LAMBDA { _mm512_storeu_ps(g[s].c + i * 16, _mm512_setzero_ps()); });
  });
  const int tiles = g->k / kTileColumns<kCode>;
  const int64_t ahead = shape.tile_bytes;
  for (int tile = 0; tile < tiles; tile += kPieceTiles) {
    const int first = tile * kTileColumns<kCode>;
    const int columns = g->k - first < 128 ? g->k - first : 128;
    if (kStrips == 1) prefetch_ahead<kCode>(g[0], shape, tile, tiles);
    if (kStrips == 1 && kPieceTiles > 1) prefetch_ahead<kCode>(g[0], shape, tile + 1, tiles);
    for (int first_half = 0; first_half < 2; first_half += kHalves) {
      // The number of the group: a division for each strip took a tenth of INT4's time.
      int index = 0;
      for (int group = 0; group < columns; group += shape.group, ++index) {
        __m512 chain[kHalves][kStrips][kRows];
        const auto c = [&](auto h, auto s, auto r) KTRT_LAMBDA {
          return g[s].c + r * kStripColumns + (first_half + h) * 16;
        };
        const auto for_all = [&](auto use) KTRT_LAMBDA {
          unrolled<kHalves>([&](auto h) KTRT_LAMBDA {
            unrolled<kStrips>([&](auto s) KTRT_LAMBDA { use(h, s); });
          });
        };
        for_all([&](auto h, auto s) KTRT_LAMBDA {
          unrolled<kRows>([&](auto r) KTRT_LAMBDA {
            chain[h][s][r] = shape.one_chain ? _mm512_loadu_ps(c(h, s, r)) : _mm512_setzero_ps();
          });
        });
        const int end = columns < group + shape.group ? columns : group + shape.group;
        for (int part = group; part < end; part += kTileColumns<kCode>) {
          const int part_end = end < part + kTileColumns<kCode> ? end : part + kTileColumns<kCode>;
          unrolled<kHalves>([&](auto h) KTRT_LAMBDA {
            for (int column = part; column < part_end; column += kVectorColumns * kBurstVectors) {
              const int in_tile = column % kTileColumns<kCode>;
              const int64_t at =
                  static_cast<int64_t>(tile + column / kTileColumns<kCode>) * shape.tile_bytes +
                  (first_half + h) * kTileHalf + in_tile / kVectorColumns * 64;
              multiply_burst<kCode, Dot, kRows, kStrips>(g, at, (first + column) * 2, ahead, table,
                                                         chain[h]);
            }
          });
        }
        for_all([&](auto h, auto s) KTRT_LAMBDA {
          if (shape.one_chain && first + columns < g->k) {
            unrolled<kRows>([&](auto r)
                                KTRT_LAMBDA { _mm512_storeu_ps(c(h, s, r), chain[h][s][r]); });
            return;
          }
          if (kStrips > 1 && !kIs8Bits<kCode>) {
            __builtin_prefetch(g[s].w_block + (tile + int64_t{1}) * shape.tile_bytes + kTileSize +
                                   index * kStripColumns * kScaleBytes<kCode>,
                               0, 3);
          }
          const __m512 scale = scales_at<kCode>(g[s], shape, tile, index, first_half + h);
          unrolled<kRows>([&](auto r) KTRT_LAMBDA {
            const __m512 sum = shape.one_chain ? _mm512_setzero_ps() : _mm512_loadu_ps(c(h, s, r));
            _mm512_storeu_ps(c(h, s, r), _mm512_fmadd_ps(scale, chain[h][s][r], sum));
          });
        });
      }
    }
  }
}

template <class Format, class Dot, int kRows, int kStrips>
void few_rows(const GemmArgs* g) {
  multiply_few<Format::kCode, Dot, kRows, kStrips>(g, kShape<Format>);
  for (int s = 0; s < kStrips; ++s) {
    if (g[s].lora_b != nullptr) expand_rows<Dot>(g[s]);
  }
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

template <Code kCode>
void unpack(const GemmArgs& g, const Shape& shape, Chunk& chunk) {
  const __m512i table = code_table<kCode>();
  const uint8_t* tile =
      g.w_block + static_cast<int64_t>(chunk.first / kTileColumns<kCode>) * shape.tile_bytes;
  for (int column = 0; column < chunk.columns; column += kTileColumns<kCode>) {
    uint8_t(*values)[2][64] = &chunk.values[column / 2];
    for (int v = 0; v < 16; ++v, values += kPairs<kCode>) {
      unrolled<2>([&](auto half) KTRT_LAMBDA {
        for_each_pair<kCode>(tile + half * kTileHalf + v * 64, table,
                             [&](auto pair, __m512i pairs)
                                 KTRT_LAMBDA { _mm512_store_si512(values[pair][half], pairs); });
      });
    }
    tile += shape.tile_bytes;
  }
  for (int column = 0; column < chunk.columns; column += chunk.group) {
    float* scales = chunk.scales[column / chunk.group];
    const int tile_index = (chunk.first + column) / kTileColumns<kCode>;
    const int group = column % kTileColumns<kCode> / chunk.group;
    _mm512_store_ps(scales, scales_at<kCode>(g, shape, tile_index, group, 0));
    _mm512_store_ps(scales + 16, scales_at<kCode>(g, shape, tile_index, group, 1));
  }
}

template <class Dot, int kRows>
void row_block(const Chunk& chunk, const uint8_t* x, int64_t x_stride, float* c, int next_lines) {
  for (int column = 0; column < chunk.columns; column += chunk.group) {
    const int rest = chunk.columns - column;
    const int end = (column + (rest < chunk.group ? rest : chunk.group)) / 2;
    __m512 chain[kRows][2];
    unrolled<kRows>([&](auto i) KTRT_LAMBDA { chain[i][0] = chain[i][1] = _mm512_setzero_ps(); });
    if (chunk.one_chain) {
      unrolled<kRows>([&](auto i) KTRT_LAMBDA {
        chain[i][0] = _mm512_loadu_ps(c + i * kStripColumns);
        chain[i][1] = _mm512_loadu_ps(c + i * kStripColumns + 16);
      });
    }
    for (int pair = column / 2; pair < end; ++pair) {
      if (pair < next_lines) __builtin_prefetch(chunk.next + pair * 64, 0, 2);
      const __m512i w0 = _mm512_load_si512(chunk.values[pair][0]);
      const __m512i w1 = _mm512_load_si512(chunk.values[pair][1]);
      unrolled<kRows>([&](auto i) KTRT_LAMBDA {
        const __m512i xi = broadcast_word(x + i * x_stride + pair * 4);
        chain[i][0] = Dot::multiply(chain[i][0], w0, xi);
        chain[i][1] = Dot::multiply(chain[i][1], w1, xi);
      });
    }
    const __m512 s0 = _mm512_load_ps(chunk.scales[column / chunk.group]);
    const __m512 s1 = _mm512_load_ps(chunk.scales[column / chunk.group] + 16);
    if (chunk.one_chain) {
      const __m512 zero = _mm512_setzero_ps();
      unrolled<kRows>([&](auto i) KTRT_LAMBDA {
        if (chunk.last) chain[i][0] = _mm512_fmadd_ps(s0, chain[i][0], zero);
        if (chunk.last) chain[i][1] = _mm512_fmadd_ps(s1, chain[i][1], zero);
        _mm512_storeu_ps(c + i * kStripColumns, chain[i][0]);
        _mm512_storeu_ps(c + i * kStripColumns + 16, chain[i][1]);
      });
    } else {
      unrolled<kRows>([&](auto i) KTRT_LAMBDA {
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
    unpack<Format::kCode>(g, kShape<Format>, chunk);
    for_each_row_block<kMaxRows>(g.rows, [&](int first, int rows) KTRT_LAMBDA {
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
