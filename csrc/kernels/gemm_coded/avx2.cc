// GEMM of coded weights on AVX2. Codes become BF16 pairs in registers, by shifts (E4M3) or byte
// tables (4 bits), and float32 values by a shift and a mask; a chain of products per scale and
// output is multiplied by the scale into C.
//
//   up to 3 rows   pairs are multiplied as they are made, of several strips side by side
//   more           128 columns are made once, as 16 KB of float32, which all rows pass over
//
// Both add the same products in the same order: of 4 bits, even and odd columns in a chain each,
// which a group's end adds.
#include "kernels/avx2/products.h"
#include "kernels/chunks.h"
#include "kernels/coded_strip.h"
#include "kernels/few_or_many.h"

namespace ktrt {
namespace {

using Products = Bf16Products256;

constexpr int kUnitColumns = 128;
constexpr int kFactorColumns = 32;  // of a tile of factors

inline __m256i bytes_of(uint8_t value) { return _mm256_set1_epi8(static_cast<char>(value)); }
inline __m256i words_of(uint16_t value) { return _mm256_set1_epi16(static_cast<int16_t>(value)); }

// 16 bytes in both halves, for pshufb.
inline __m256i table(const uint8_t (&bytes)[16]) {
  __m128i half;
  memcpy(&half, bytes, 16);
  return _mm256_broadcastsi128_si256(half);
}

// The low or the high bytes of the BF16 values of 16 codes.
constexpr uint8_t kInt4High[16] = {0x00, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x40, 0x40,
                                   0xc1, 0xc0, 0xc0, 0xc0, 0xc0, 0xc0, 0xc0, 0xbf};
constexpr uint8_t kInt4Low[16] = {0x00, 0x80, 0x00, 0x40, 0x80, 0xa0, 0xc0, 0xe0,
                                  0x00, 0xe0, 0xc0, 0xa0, 0x80, 0x40, 0x00, 0x80};
constexpr uint8_t kE2m1High[16] = {0x00, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40,
                                   0x80, 0xbf, 0xbf, 0xbf, 0xc0, 0xc0, 0xc0, 0xc0};
constexpr uint8_t kE2m1Low[16] = {0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0,
                                  0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0};
// E4M3's subnormal codes, 2^-9 … 1.75 · 2^-7, divided by kE4m3Factor.
constexpr uint8_t kSmallHigh[16] = {0x00, 0x37, 0x37, 0x37, 0x38, 0x38, 0x38, 0x38};
constexpr uint8_t kSmallLow[16] = {0x00, 0x00, 0x80, 0xc0, 0x00, 0x20, 0x40, 0x60};

// E4M3's exponent and mantissa, moved to BF16's places, get the exponent bits 1110000: the value
// times 2^-8, and that without a carry. Scales make up for it.
constexpr float kE4m3Factor = 256.0f;

inline __m256i e4m3_values(__m256i twice) {
  return _mm256_or_si256(_mm256_and_si256(_mm256_srai_epi16(twice, 4), words_of(0x87f0)),
                         words_of(0x3800));
}

// The low and the high bytes of the BF16 values of the low [0] and the upper nibbles of 32 bytes.
template <Code kCode>
struct NibbleBytes {
  KTRT_INLINE explicit NibbleBytes(__m256i codes) {
    const __m256i high_table = table(kCode == Code::kInt4 ? kInt4High : kE2m1High);
    const __m256i low_table = table(kCode == Code::kInt4 ? kInt4Low : kE2m1Low);
    unrolled<2>([&](auto upper) KTRT_LAMBDA {
      const __m256i nibbles = upper == 0 ? codes : _mm256_srli_epi16(codes, 4);
      const __m256i index = _mm256_and_si256(nibbles, bytes_of(0x0f));
      high[upper] = _mm256_shuffle_epi8(high_table, index);
      low[upper] = _mm256_shuffle_epi8(low_table, index);
    });
  }
  __m256i low[2];
  __m256i high[2];
};

// Calls use(pair, values) for the pairs of 32 bytes of codes, `pair` being an Index type: 8 outputs
// each.
template <Code kCode, class Use>
KTRT_INLINE void for_each_pair(const uint8_t* from, Use use) {
  const __m256i codes = load_256(from);
  if constexpr (kCode == Code::kE4m3) {
    __m256i first = e4m3_values(_mm256_unpacklo_epi8(codes, codes));
    __m256i second = e4m3_values(_mm256_unpackhi_epi8(codes, codes));
    // One vector in two hundred has such a code where weights are normally distributed.
    const __m256i small =
        _mm256_cmpeq_epi8(_mm256_and_si256(codes, bytes_of(0x78)), _mm256_setzero_si256());
    if (__builtin_expect(_mm256_movemask_epi8(small) != 0, 0)) {
      const __m256i mantissa = _mm256_and_si256(codes, bytes_of(0x07));
      const __m256i high = _mm256_or_si256(_mm256_shuffle_epi8(table(kSmallHigh), mantissa),
                                           _mm256_and_si256(codes, bytes_of(0x80)));
      const __m256i low = _mm256_shuffle_epi8(table(kSmallLow), mantissa);
      first = _mm256_blendv_epi8(first, _mm256_unpacklo_epi8(low, high),
                                 _mm256_unpacklo_epi8(small, small));
      second = _mm256_blendv_epi8(second, _mm256_unpackhi_epi8(low, high),
                                  _mm256_unpackhi_epi8(small, small));
    }
    use(Index<0>{}, first);
    use(Index<1>{}, second);
  } else {
    const __m256i even = words_of(0x00ff);
    const NibbleBytes<kCode> bytes(codes);
    // In ascending order: a chain's.
    unrolled<2>([&](auto upper) KTRT_LAMBDA {
      use(Index<upper>{}, _mm256_or_si256(_mm256_and_si256(bytes.low[upper], even),
                                          _mm256_slli_epi16(bytes.high[upper], 8)));
    });
    unrolled<2>([&](auto upper) KTRT_LAMBDA {
      use(Index<upper + 2>{}, _mm256_or_si256(_mm256_srli_epi16(bytes.low[upper], 8),
                                              _mm256_andnot_si256(even, bytes.high[upper])));
    });
  }
}

template <class Format>
constexpr int kVectorPairs = Format::kTileColumns / 32;  // of 64 bytes of codes

// The scales of 8 outputs for the group that holds `column`.
template <class Format>
KTRT_INLINE __m256 scales_at(const GemmArgs& g, int column, int output) {
  if constexpr (Format::kScaleBytes == 0) {
    return _mm256_set1_ps(g.w_scale[column / kUnitColumns] * kE4m3Factor);
  } else {
    const uint8_t* tile = coded_tile<Format>(g, column / Format::kTileColumns);
    const uint8_t* scales =
        group_scales<Format>(tile, column % Format::kTileColumns / Format::kGroup) +
        output * Format::kScaleBytes;
    if constexpr (Format::kScaleBytes == 1) {
      // The byte is a float32's exponent; 0 is a subnormal.
      const __m256i exponents =
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales)));
      return _mm256_castsi256_ps(
          _mm256_max_epu32(_mm256_slli_epi32(exponents, 23), _mm256_set1_epi32(0x400000)));
    } else {
      const __m256i bits =
          _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
      return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
    }
  }
}

// Sums of 8 outputs. 4 bits: of 4 outputs each, as even and odd columns alternately.
template <class Format>
constexpr int kOutputSums = Format::kCode == Code::kE4m3 ? 1 : 2;

// Otherwise GCC keeps what it has loaded for the next outputs too, and sums in memory, where one
// takes twice as long to reach: one row of 4 bits was 15 % slower, many rows of FP8 half as fast.
KTRT_INLINE void forget_loads() { asm volatile("" ::: "memory"); }

inline __m256 broadcast_pair(const uint8_t* p) {
  return _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(p)));
}

// The products of 32 bytes of codes, x being row 0's first column: BF16 for 8 bits, else float32.
template <class Format, int kRows>
KTRT_INLINE void add_products(const uint8_t* w, const uint8_t* x, int64_t x_stride,
                              __m256 (&acc)[kRows][kOutputSums<Format>]) {
  if constexpr (Format::kCode == Code::kE4m3) {
    for_each_pair<Format::kCode>(w, [&](auto pair, __m256i values) KTRT_LAMBDA {
      const __m256 low = low_values(values);
      const __m256 high = high_values(values);
      unrolled<kRows>([&](auto i) KTRT_LAMBDA {
        const __m256i both = Vectors256::broadcast(x + i * x_stride + pair * 4);
        acc[i][0] = _mm256_fmadd_ps(low_values(both), low, acc[i][0]);
        acc[i][0] = _mm256_fmadd_ps(high_values(both), high, acc[i][0]);
      });
    });
  } else {
    // Joined by unpacking, low and high bytes become dwords of two columns that lie four apart; the
    // next dword is the same output's, of the columns after these. One instruction each makes them
    // float32, where words in the order of for_each_pair take four more for two vectors.
    forget_loads();
    const NibbleBytes<Format::kCode> bytes(load_256(w));
    unrolled<2>([&](auto side) KTRT_LAMBDA {
      __m256i joined[2];
      unrolled<2>([&](auto upper) KTRT_LAMBDA {
        joined[upper] = side == 0 ? _mm256_unpacklo_epi8(bytes.low[upper], bytes.high[upper])
                                  : _mm256_unpackhi_epi8(bytes.low[upper], bytes.high[upper]);
      });
      unrolled<4>([&](auto pair) KTRT_LAMBDA {
        const __m256 values =
            pair < 2 ? low_values(joined[pair % 2]) : high_values(joined[pair % 2]);
        unrolled<kRows>([&](auto i) KTRT_LAMBDA {
          acc[i][side] =
              _mm256_fmadd_ps(broadcast_pair(x + i * x_stride + pair * 8), values, acc[i][side]);
        });
      });
    });
  }
}

// A chain of 8 outputs.
template <class Format>
KTRT_INLINE __m256 chain_of(const __m256 (&sums)[kOutputSums<Format>]) {
  if constexpr (Format::kCode == Code::kE4m3) {
    return sums[0];
  } else {
    return _mm256_add_ps(_mm256_shuffle_ps(sums[0], sums[1], 0x88),
                         _mm256_shuffle_ps(sums[0], sums[1], 0xdd));
  }
}

// One channel's scale is multiplied in the end: C is the chain until then.
inline void scale_rows(const GemmArgs& g) {
  for (int row = 0; row < g.rows; ++row) {
    float* c = g.c + static_cast<int64_t>(row) * kStripColumns;
    for (int n = 0; n < kStripColumns; n += 8) {
      const __m256 scale =
          _mm256_mul_ps(_mm256_loadu_ps(g.w_scale + n), _mm256_set1_ps(kE4m3Factor));
      _mm256_storeu_ps(c + n, _mm256_mul_ps(_mm256_loadu_ps(c + n), scale));
    }
  }
}

template <class Format>
struct CodedBody {
  static constexpr bool kHasScales = false;
  static constexpr int kSideRows = 3;  // more have no registers

  template <int kRows, int kStrips>
  static void few(const GemmArgs* g) {
    constexpr int kColumns = kVectorPairs<Format> * 2 * kBurstVectors;  // of a burst
    constexpr int kBursts = Format::kTileColumns / kColumns;            // of half a tile
    Sums<kRows> chains[kStrips][2];
    // For 4 bits, a tile at a time. Strips may multiply different rows.
    alignas(32) float wide[Format::kIsFp8 ? 1 : kStrips][kRows][kUnitColumns];
    for (int s = 0; s < kStrips; ++s) memset(g[s].c, 0, sizeof(float) * kRows * kStripColumns);
    const int tiles = coded_tiles<Format>(*g);
    for (int tile = 0; tile < tiles; ++tile) {
      for (int s = 0; !Format::kIsFp8 && s < kStrips; ++s) {
        widen_rows<kRows>(g[s], tile * Format::kTileColumns, wide[s][0]);
      }
      for (int half_burst = 0; half_burst < 2 * kBursts; ++half_burst) {
        const int half = half_burst / kBursts;
        const int column = tile * Format::kTileColumns + half_burst % kBursts * kColumns;
        const int end = column + kColumns;
        const bool starts = Format::kGroup != 0 && column % Format::kGroup == 0;
        const bool ends = Format::kGroup != 0 && (end % Format::kGroup == 0 || end == g->k);
        const int64_t at = static_cast<int64_t>(tile) * Format::kTileBytes + half_burst * kBurst;
        for (int s = 0; s < kStrips; ++s) {
          const uint8_t* w = g[s].w_block + at;
          // Two tiles ahead: scales, which lie between the codes of two tiles, come with them.
          for (int i = 0; i < kBurst + 64; i += 64) {
            __builtin_prefetch(w + 2 * Format::kTileBytes + i, 0, kStrips == 1 ? 3 : 2);
          }
          const void* x = g[s].a + column * 2;
          if constexpr (!Format::kIsFp8) x = wide[s][0] + column % kUnitColumns;
          burst<kRows>(g[s], w, static_cast<const uint8_t*>(x), column, half, starts, ends,
                       chains[s][half]);
        }
      }
    }
    for (int s = 0; s < kStrips; ++s) finish(g[s]);
  }

  static void many(const GemmArgs& g) {
    memset(g.c, 0, static_cast<size_t>(g.rows) * kStripColumns * sizeof(float));
    Unit unit;
    for (unit.first = 0; unit.first < g.k; unit.first += kUnitColumns) {
      const int rest = g.k - unit.first;
      unit.columns = rest < kUnitColumns ? rest : kUnitColumns;
      unpack(g, unit);
      for_each_row_block<Products::kMaxRows>(g.rows, [&](int first, int rows) KTRT_LAMBDA {
        if (rows == 3) {
          unit_rows<3>(g, unit, first);
        } else if (rows == 2) {
          unit_rows<2>(g, unit, first);
        } else {
          unit_rows<1>(g, unit, first);
        }
      });
    }
    finish(g);
  }

 private:
  // Factors as kernels/chunks.h orders them.
  struct Unit {
    alignas(64) uint8_t factors[kUnitColumns / kFactorColumns * kFactorTile<Products>];
    int first;  // column
    int columns;
  };

  static void finish(const GemmArgs& g) {
    if (Format::kGroup == 0) scale_rows(g);
    if (g.lora_b != nullptr) expand_rows(g);
  }

  // The sums of half a strip that wait for the rest of their group.
  template <int kRows>
  struct alignas(32) Sums {
    float of[2][kRows][kOutputSums<Format>][8];
  };

  // kUnitColumns of A as float32, fewer at the end.
  template <int kRows>
  static KTRT_INLINE void widen_rows(const GemmArgs& g, int column, float* x) {
    const int rest = g.k - column;
    const int columns = rest < kUnitColumns ? rest : kUnitColumns;
    for (int i = 0; i < kRows; ++i) {
      const uint8_t* from = g.a + i * g.a_stride + column * 2;
      for (int at = 0; at < columns; at += 8) {
        const __m256i words =
            _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at * 2)));
        _mm256_store_ps(x + i * kUnitColumns + at, low_values(words));
      }
    }
  }

  template <int kRows>
  static KTRT_INLINE void burst(const GemmArgs& g, const uint8_t* w, const uint8_t* x, int column,
                                int half, bool starts, bool ends, Sums<kRows>& chain) {
    constexpr int kSums = kOutputSums<Format>;
    constexpr int kValueBytes = Format::kIsFp8 ? 2 : 4;  // of A
    const int64_t x_stride = Format::kIsFp8 ? g.a_stride : kUnitColumns * kValueBytes;
    // Eight outputs after the others where registers are too few.
    constexpr int kTogether = kRows * kSums < 3 ? 2 : 1;
    for (int first = 0; first < 2; first += kTogether) {
      __m256 acc[kTogether][kRows][kSums];
      float* c = g.c + half * 16 + first * 8;
      const auto for_all = [&](auto move) KTRT_LAMBDA {
        unrolled<kTogether>([&](auto q) KTRT_LAMBDA {
          unrolled<kRows>([&](auto i) KTRT_LAMBDA {
            unrolled<kSums>([&](auto n) KTRT_LAMBDA {
              move(acc[q][i][n],
                   Format::kGroup == 0 ? c + i * kStripColumns + q * 8 : chain.of[first + q][i][n]);
            });
          });
        });
      };
      if (starts) {
        for_all([](__m256& sum, float*) KTRT_LAMBDA { sum = _mm256_setzero_ps(); });
      } else {
        for_all([](__m256& sum, float* from) KTRT_LAMBDA { sum = _mm256_loadu_ps(from); });
      }
      for (int v = 0; v < kBurstVectors; ++v) {
        unrolled<kTogether>([&](auto q) KTRT_LAMBDA {
          add_products<Format, kRows>(w + v * 64 + (first + q) * 32,
                                      x + v * kVectorPairs<Format> * 2 * kValueBytes, x_stride,
                                      acc[q]);
        });
      }
      if (!ends) {
        for_all([](__m256& sum, float* to) KTRT_LAMBDA { _mm256_storeu_ps(to, sum); });
        continue;
      }
      unrolled<kTogether>([&](auto q) KTRT_LAMBDA {
        const __m256 scale = scales_at<Format>(g, column, half * 16 + (first + q) * 8);
        unrolled<kRows>([&](auto i) KTRT_LAMBDA {
          float* to = c + i * kStripColumns + q * 8;
          _mm256_storeu_ps(
              to, _mm256_fmadd_ps(scale, chain_of<Format>(acc[q][i]), _mm256_loadu_ps(to)));
        });
      });
    }
  }

  static void unpack(const GemmArgs& g, Unit& unit) {
    constexpr int kAhead = 2 * kUnitColumns / Format::kTileColumns * Format::kTileBytes;
    const uint8_t* tile = coded_tile<Format>(g, unit.first / Format::kTileColumns);
    for (int column = 0; column < unit.columns; column += Format::kTileColumns) {
      for (int i = 0; i < Format::kTileBytes; i += 64) __builtin_prefetch(tile + kAhead + i, 0, 3);
      for (int vector = 0; vector < 32; ++vector) {
        const int first_pair = column / 2 + vector % 16 * kVectorPairs<Format>;
        uint8_t* half = unit.factors + vector / 16 * (kFactorTile<Products> / 2);
        for (int q = 0; q < 2; ++q) {
          for_each_pair<Format::kCode>(
              tile + vector * 64 + q * 32, [&](auto pair, __m256i values) KTRT_LAMBDA {
                const int at = first_pair + pair;
                uint8_t* to = half + at / 16 * kFactorTile<Products> + at % 16 * 128 + q * 32;
                Products::store_factor(to, low_values(values));
                Products::store_factor(to + 64, high_values(values));
              });
        }
      }
      tile += Format::kTileBytes;
    }
  }

  // kParts parts of some tiles of factors.
  template <int kParts, int kRows>
  static KTRT_INLINE void multiply_parts(const uint8_t* w, int tiles, const uint8_t* x,
                                         int64_t x_stride, __m256 (&acc)[kRows][4]) {
    for (int tile = 0; tile < tiles; ++tile, w += kFactorTile<Products>) {
      for (int step = 0; step < 16; ++step, x += 4) {
        unrolled<kParts>([&](auto part) KTRT_LAMBDA {
          __m256 rows[kRows];
          unrolled<kRows>([&](auto i) KTRT_LAMBDA {
            rows[i] =
                Products::factor(Products::broadcast(x + i * x_stride + part * (kUnitColumns * 2)));
          });
          unrolled<4>([&](auto q) KTRT_LAMBDA {
            forget_loads();
            const __m256 each = Products::load_factor(w + step * 128 + part * 64 + q % 2 * 32 +
                                                      q / 2 * (kFactorTile<Products> / 2));
            unrolled<kRows>(
                [&](auto i) KTRT_LAMBDA { acc[i][q] = _mm256_fmadd_ps(rows[i], each, acc[i][q]); });
          });
        });
      }
    }
  }

  // C of kRows rows += one unit. Inlined, it would share its registers with the unpacking's
  // constants, and chains would be in memory: two thirds of the speed.
  template <int kRows>
  static __attribute__((noinline)) void unit_rows(const GemmArgs& g, const Unit& unit,
                                                  int first_row) {
    constexpr int kGroup = Format::kGroup == 0 ? kUnitColumns : Format::kGroup;
    alignas(64) uint8_t rows[kRows][2][kUnitColumns * 2];
    const uint8_t* x = g.a + first_row * g.a_stride + unit.first * 2;
    for (int i = 0; i < kRows; ++i) {
      for (int at = 0; at < unit.columns * 2; at += 32) {
        widen<Products>(x + i * g.a_stride + at, rows[i][0] + at, sizeof(rows[i][0]));
      }
    }
    float* c = g.c + static_cast<int64_t>(first_row) * kStripColumns;
    for (int column = 0; column < unit.columns; column += kGroup) {
      const int rest = unit.columns - column;
      __m256 chain[kRows][4];
      for_each_sum<Products>(chain, c, [](__m256& sum, const float* from) KTRT_LAMBDA {
        sum = Format::kGroup == 0 ? _mm256_loadu_ps(from) : _mm256_setzero_ps();
      });
      const uint8_t* factors = unit.factors + column / kFactorColumns * kFactorTile<Products>;
      const int tiles = (rest < kGroup ? rest : kGroup) / kFactorColumns;
      if constexpr (kOutputSums<Format> == 1) {
        multiply_parts<2>(factors, tiles, rows[0][0] + column * 2, sizeof(rows[0]), chain);
      } else {
        multiply_parts<1>(factors, tiles, rows[0][0] + column * 2, sizeof(rows[0]), chain);
        __m256 odd[kRows][4];
        for_each_sum<Products>(
            odd, c, [](__m256& sum, const float*) KTRT_LAMBDA { sum = _mm256_setzero_ps(); });
        multiply_parts<1>(factors + 64, tiles, rows[0][1] + column * 2, sizeof(rows[0]), odd);
        unrolled<kRows>([&](auto i) KTRT_LAMBDA {
          unrolled<4>([&](auto q)
                          KTRT_LAMBDA { chain[i][q] = _mm256_add_ps(chain[i][q], odd[i][q]); });
        });
      }
      if (Format::kGroup == 0) {
        for_each_sum<Products>(
            chain, c, [](const __m256& sum, float* to) KTRT_LAMBDA { _mm256_storeu_ps(to, sum); });
        continue;
      }
      unrolled<4>([&](auto q) KTRT_LAMBDA {
        const __m256 scale = scales_at<Format>(g, unit.first + column, q * 8);
        unrolled<kRows>([&](auto i) KTRT_LAMBDA {
          float* to = c + i * kStripColumns + q * 8;
          _mm256_storeu_ps(to, _mm256_fmadd_ps(scale, chain[i][q], _mm256_loadu_ps(to)));
        });
      });
    }
  }
};

template <WeightFormat kFormat>
constexpr GemmKernel kKernel = {"avx2",
                                one_strip<CodedBody<Coded<kFormat>>>,
                                expand_rows,
                                0,
                                false,
                                strips_side_by_side<CodedBody<Coded<kFormat>>>,
                                CodedBody<Coded<kFormat>>::kSideRows};

}  // namespace

extern const GemmKernel gemm_coded_avx2[kNumCodedFormats];
const GemmKernel gemm_coded_avx2[kNumCodedFormats] = {
    kKernel<WeightFormat::kFp8>,      kKernel<WeightFormat::kFp8Channel>,
    kKernel<WeightFormat::kInt4G32>,  kKernel<WeightFormat::kInt4G64>,
    kKernel<WeightFormat::kInt4G128>, kKernel<WeightFormat::kMxfp4>};

}  // namespace ktrt
