// GEMM of coded weights on AVX2. 128 columns of a strip at a time become BF16 values in the L1
// cache, without their scales, in the order of a BF16 strip; all rows pass over them as in
// gemm_bf16/avx2.cc. C waits in memory from one group to the next.
#include <immintrin.h>
#include <string.h>

#include "kernels/avx2_expand.h"
#include "kernels/coded_strip.h"

namespace ktrt {
namespace {

constexpr int kUnitColumns = 128;
constexpr int kUnitPairs = kUnitColumns / 2;
constexpr int kMaxRows = 2;

// BF16 [half][pair][16 rows][2].
struct Unit {
  alignas(64) uint8_t values[2][kUnitPairs][64];
};

inline __m256i bytes_of(uint8_t value) { return _mm256_set1_epi8(static_cast<char>(value)); }

// The low or the high bytes of the BF16 values of 16 codes, for pshufb.
inline __m256i table(const uint8_t (&bytes)[16]) {
  __m128i half;
  memcpy(&half, bytes, 16);
  return _mm256_broadcastsi128_si256(half);
}

constexpr uint8_t kInt4High[16] = {0x00, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x40, 0x40,
                                   0xc1, 0xc0, 0xc0, 0xc0, 0xc0, 0xc0, 0xc0, 0xbf};
constexpr uint8_t kInt4Low[16] = {0x00, 0x80, 0x00, 0x40, 0x80, 0xa0, 0xc0, 0xe0,
                                  0x00, 0xe0, 0xc0, 0xa0, 0x80, 0x40, 0x00, 0x80};
constexpr uint8_t kE2m1High[16] = {0x00, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40,
                                   0x80, 0xbf, 0xbf, 0xbf, 0xc0, 0xc0, 0xc0, 0xc0};
constexpr uint8_t kE2m1Low[16] = {0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0,
                                  0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0};
// E4M3: the high byte by sign and three bits of the exponent (its lowest is in the low byte, which
// is the code times 16), and both bytes of the values of exponent 0, 2^-9 … 1.75 · 2^-7.
constexpr uint8_t kE4m3High[16] = {0x3c, 0x3d, 0x3e, 0x3f, 0x40, 0x41, 0x42, 0x43,
                                   0xbc, 0xbd, 0xbe, 0xbf, 0xc0, 0xc1, 0xc2, 0xc3};
constexpr uint8_t kSmallHigh[16] = {0x00, 0x3b, 0x3b, 0x3b, 0x3c, 0x3c, 0x3c, 0x3c};
constexpr uint8_t kSmallLow[16] = {0x00, 0x00, 0x80, 0xc0, 0x00, 0x20, 0x40, 0x60};

// 32 bytes of a vector: 8 rows, 8 columns each. `to`: their place in the first of four pairs.
template <Code kCode>
inline void unpack_nibbles(const uint8_t* from, uint8_t* to) {
  const __m256i high_table = table(kCode == Code::kInt4 ? kInt4High : kE2m1High);
  const __m256i low_table = table(kCode == Code::kInt4 ? kInt4Low : kE2m1Low);
  const __m256i nibble = bytes_of(0x0f);
  const __m256i even_bytes = _mm256_set1_epi16(0x00ff);
  const __m256i codes = load_256(from);
  for (int upper = 0; upper < 2; ++upper) {
    const __m256i index =
        _mm256_and_si256(upper == 0 ? codes : _mm256_srli_epi16(codes, 4), nibble);
    const __m256i high = _mm256_shuffle_epi8(high_table, index);
    const __m256i low = _mm256_shuffle_epi8(low_table, index);
    const __m256i first =
        _mm256_or_si256(_mm256_and_si256(low, even_bytes), _mm256_slli_epi16(high, 8));
    const __m256i second =
        _mm256_or_si256(_mm256_srli_epi16(low, 8), _mm256_andnot_si256(even_bytes, high));
    _mm256_store_si256(reinterpret_cast<__m256i*>(to + upper * 64), first);
    _mm256_store_si256(reinterpret_cast<__m256i*>(to + (upper + 2) * 64), second);
  }
}

// The same of E4M3: 8 rows, 4 columns each, two pairs.
inline void unpack_e4m3(const uint8_t* from, uint8_t* to) {
  const __m256i codes = load_256(from);
  const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(codes, 4), bytes_of(0x0f));
  const __m256i mantissa = _mm256_and_si256(codes, bytes_of(0x07));
  const __m256i is_small =
      _mm256_cmpeq_epi8(_mm256_and_si256(codes, bytes_of(0x78)), _mm256_setzero_si256());
  const __m256i sign = _mm256_and_si256(codes, bytes_of(0x80));
  const __m256i small_high =
      _mm256_or_si256(_mm256_shuffle_epi8(table(kSmallHigh), mantissa), sign);
  const __m256i low = _mm256_and_si256(_mm256_slli_epi16(codes, 4), bytes_of(0xf0));
  const __m256i high_bytes =
      _mm256_blendv_epi8(_mm256_shuffle_epi8(table(kE4m3High), upper), small_high, is_small);
  const __m256i low_bytes =
      _mm256_blendv_epi8(low, _mm256_shuffle_epi8(table(kSmallLow), mantissa), is_small);
  _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_unpacklo_epi8(low_bytes, high_bytes));
  _mm256_store_si256(reinterpret_cast<__m256i*>(to + 64),
                     _mm256_unpackhi_epi8(low_bytes, high_bytes));
}

// One tile, whose first column is `pair` pairs into the unit.
template <class Format>
inline void unpack_tile(const uint8_t* tile, int pair, Unit& unit) {
  constexpr int kPairs = Format::kTileColumns / 32;  // of a vector
  for (int half = 0; half < 2; ++half) {
    for (int v = 0; v < 16; ++v) {
      const uint8_t* from = tile + half * kTileHalf + v * 64;
      uint8_t* to = unit.values[half][pair + v * kPairs];
      for (int part = 0; part < 64; part += 32) {
        if (Format::kIsFp8) {
          unpack_e4m3(from + part, to + part);
        } else {
          unpack_nibbles<Format::kCode>(from + part, to + part);
        }
      }
    }
  }
}

// The scales of one group as float32 [32].
template <class Format>
inline void read_scales(const GemmArgs& g, const uint8_t* tile, int group, int unit,
                        __m256 (&scales)[4]) {
  if (Format::kScaleBytes == 0) {
    for (int q = 0; q < 4; ++q) scales[q] = _mm256_set1_ps(g.w_scale[unit]);
    return;
  }
  const uint8_t* bytes = group_scales<Format>(tile, group);
  for (int q = 0; q < 4; ++q) {
    if (Format::kScaleBytes == 1) {
      const __m256i exponents =
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + q * 8)));
      // The byte is a float32's exponent; 0 is a subnormal.
      const __m256i bits =
          _mm256_blendv_epi8(_mm256_slli_epi32(exponents, 23), _mm256_set1_epi32(0x400000),
                             _mm256_cmpeq_epi32(exponents, _mm256_setzero_si256()));
      scales[q] = _mm256_castsi256_ps(bits);
    } else {
      const __m256i bits =
          _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + q * 16)));
      scales[q] = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
    }
  }
}

// One group of kRows rows: C = C + scale · chain, or, with one scale for all of k, C goes on as the
// chain.
template <class Format, int kRows>
inline void multiply_group(const Unit& unit, int pair, int pairs, const uint8_t* x,
                           int64_t x_stride, const __m256 (&scales)[4], float* c) {
  __m256 chain[kRows][4];
  for (int i = 0; i < kRows; ++i) {
    for (int q = 0; q < 4; ++q) {
      chain[i][q] = Format::kGroup == 0 ? _mm256_loadu_ps(c + i * kStripColumns + q * 8)
                                        : _mm256_setzero_ps();
    }
  }
  for (int p = pair; p < pair + pairs; ++p) {
    multiply_pairs<kRows>(unit.values[0][p], unit.values[1][p], x + p * 4, x_stride, chain);
  }
  for (int i = 0; i < kRows; ++i) {
    for (int q = 0; q < 4; ++q) {
      float* at = c + i * kStripColumns + q * 8;
      const __m256 sum = Format::kGroup == 0
                             ? chain[i][q]
                             : _mm256_fmadd_ps(scales[q], chain[i][q], _mm256_loadu_ps(at));
      _mm256_storeu_ps(at, sum);
    }
  }
}

// All rows over the unit's first `pairs`. `tile`: the first that it was made of.
template <class Format>
inline void multiply_unit(const GemmArgs& g, const Unit& unit, int index, int pairs,
                          const uint8_t* tile) {
  constexpr int kGroupPairs = Format::kGroup == 0 ? kUnitPairs : Format::kGroup / 2;
  const uint8_t* x = g.a + static_cast<int64_t>(index) * kUnitColumns * 2;
  for (int group = 0; group * kGroupPairs < pairs; ++group) {
    __m256 scales[4] = {};
    if (Format::kGroup > 0) read_scales<Format>(g, tile, group, index, scales);
    const int pair = group * kGroupPairs;
    const int count = pairs - pair < kGroupPairs ? pairs - pair : kGroupPairs;
    int row = 0;
    for (; row + kMaxRows <= g.rows; row += kMaxRows) {
      multiply_group<Format, kMaxRows>(unit, pair, count, x + row * g.a_stride, g.a_stride, scales,
                                       g.c + static_cast<int64_t>(row) * kStripColumns);
    }
    if (row < g.rows) {
      multiply_group<Format, 1>(unit, pair, count, x + row * g.a_stride, g.a_stride, scales,
                                g.c + static_cast<int64_t>(row) * kStripColumns);
    }
  }
}

template <class Format>
inline void scale_rows(const GemmArgs& g) {
  for (int row = 0; row < g.rows; ++row) {
    float* c = g.c + static_cast<int64_t>(row) * kStripColumns;
    for (int n = 0; n < kStripColumns; n += 8) {
      _mm256_storeu_ps(c + n,
                       _mm256_mul_ps(_mm256_loadu_ps(c + n), _mm256_loadu_ps(g.w_scale + n)));
    }
  }
}

template <WeightFormat kFormat>
void strip(const GemmArgs& g) {
  using Format = Coded<kFormat>;
  constexpr int kTiles = kUnitColumns / Format::kTileColumns;
  // A tile and its scales, some units ahead of the unpacking.
  constexpr int kAhead = 2 * kTiles * Format::kTileBytes;
  prefetch_expand(g);
  memset(g.c, 0, static_cast<size_t>(g.rows) * kStripColumns * sizeof(float));
  const int tiles = coded_tiles<Format>(g);
  Unit unit;
  for (int first = 0; first < tiles; first += kTiles) {
    const uint8_t* tile = coded_tile<Format>(g, first);
    const int count = tiles - first < kTiles ? tiles - first : kTiles;
    for (int t = 0; t < count; ++t) {
      const uint8_t* from = tile + t * Format::kTileBytes;
      for (int i = 0; i < Format::kTileBytes; i += 64) __builtin_prefetch(from + kAhead + i, 0, 3);
      unpack_tile<Format>(from, t * Format::kTileColumns / 2, unit);
    }
    multiply_unit<Format>(g, unit, first / kTiles, count * Format::kTileColumns / 2, tile);
  }
  if (Format::kGroup == 0) scale_rows<Format>(g);
  if (g.lora_b != nullptr) expand_rows(g);
}

template <WeightFormat kFormat>
constexpr GemmKernel kKernel = {"avx2", strip<kFormat>, expand_rows, 0};

}  // namespace

extern const GemmKernel gemm_coded_avx2[kNumCodedFormats];
const GemmKernel gemm_coded_avx2[kNumCodedFormats] = {
    kKernel<WeightFormat::kFp8>,      kKernel<WeightFormat::kFp8Channel>,
    kKernel<WeightFormat::kInt4G32>,  kKernel<WeightFormat::kInt4G64>,
    kKernel<WeightFormat::kInt4G128>, kKernel<WeightFormat::kMxfp4>};

}  // namespace ktrt
