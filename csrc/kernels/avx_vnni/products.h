// INT8 and INT4 GEMM by VPDPBUSD on 256-bit vectors: unsigned bytes of A, with an offset of 128,
// times signed ones of W, exact as in kernels/vnni/block.h. Processors without AVX-512 have it in
// VEX encoding (AVX-VNNI: Intel's since Alder Lake); AVX-512 VNNI has the same instruction in EVEX
// encoding, so that these bodies run there too. Included by the kernels' ISA files only.
//
// Dot::add(sum, a, w) is the instruction.
#pragma once

#include "kernels/avx2/integer.h"
#include "kernels/avx2/products.h"
#include "kernels/chunks.h"
#include "kernels/few_or_many.h"

namespace ktrt {
namespace {

constexpr uint8_t kActivationOffset = 128;

template <class Dot>
struct DotProducts : IntegerSums256 {
  static constexpr int kParts = 1;

  static void parts(Vector v, Factor (&out)[kParts]) { out[0] = v; }
  static Sum add(Sum sum, Factor w, Factor x) { return Dot::add(sum, x, w); }
};

// Tiles that are multiplied where they are.
struct PackedInt8Tiles {
  static constexpr int kBlock = 3584;
  static constexpr int kTiles = 8;  // 16 KB
  static constexpr int kSplit = 1;
  static constexpr bool kInPlace = true;

  static const uint8_t* factors(const uint8_t* tiles, int, uint8_t*) { return tiles; }
};

template <class Dot>
struct DotInt8 {
  using Products = DotProducts<Dot>;
  static constexpr bool kHasScales = true;
  static constexpr int kSideRows = kMaxSideRows;

  template <int kRows, int kStrips>
  static void few(const GemmArgs* g) {
    burst_sums<Products, StepBurst<Products>, PackedInt8Tiles::kBlock, kRows, kStrips>(g, g->k);
    for (int s = 0; s < kStrips; ++s) finish_sums<true>(g[s]);
  }

  static void many(const GemmArgs& g) {
    chunk_sums<Products, PackedInt8Tiles>(g, g.k);
    finish_sums<true>(g);
  }
};

// 16 · code of the low and of the high nibbles: kt_kernel's scale is that of 16 · code.
inline __m256i low_nibbles(__m256i codes) {
  return _mm256_and_si256(_mm256_slli_epi16(codes, 4), _mm256_set1_epi8(static_cast<char>(0xf0)));
}
inline __m256i high_nibbles(__m256i codes) {
  return _mm256_and_si256(codes, _mm256_set1_epi8(static_cast<char>(0xf0)));
}

// A tile of nibbles is two of bytes: its low ones, and its high ones, 64 columns later.
struct UnpackedInt4Tiles {
  static constexpr int kBlock = 3584 / 2;
  static constexpr int kTiles = 4;  // 16 KB of bytes
  static constexpr int kSplit = 2;
  static constexpr bool kInPlace = false;

  static const uint8_t* factors(const uint8_t* tiles, int count, uint8_t* buffer) {
    uint8_t* to = buffer;
    for (int tile = 0; tile < count; ++tile, to += kTileSize) {
      for (int at = 0; at < kTileSize; at += 32, tiles += 32, to += 32) {
        const __m256i codes = load_256(tiles);
        IntegerSums256::store_factor(to, low_nibbles(codes));
        IntegerSums256::store_factor(to + kTileSize, high_nibbles(codes));
      }
    }
    return buffer;
  }
};

template <class Dot>
struct Int4Burst {
  // A tile has 128 columns.
  static constexpr int first_byte(int step) { return step / 16 * 128 + step % 16 * 4; }

  template <int kRows>
  static KTRT_INLINE void add(const uint8_t* w, const uint8_t* x, int64_t x_stride,
                              __m256i (&acc)[kRows][2]) {
    unrolled<kBurstVectors>([&](auto v) KTRT_LAMBDA {
      const __m256i codes[2] = {load_256(w + v * 64), load_256(w + v * 64 + 32)};
      unrolled<kRows>([&](auto i) KTRT_LAMBDA {
        const uint8_t* row = x + i * x_stride + v * 4;
        const __m256i low = Vectors256::broadcast(row);
        const __m256i high = Vectors256::broadcast(row + 64);
        unrolled<2>([&](auto q) KTRT_LAMBDA {
          acc[i][q] = Dot::add(acc[i][q], low, low_nibbles(codes[q]));
          acc[i][q] = Dot::add(acc[i][q], high, high_nibbles(codes[q]));
        });
      });
    });
  }
};

template <class Dot>
struct DotInt4 {
  using Products = DotProducts<Dot>;
  static constexpr bool kHasScales = true;
  static constexpr int kSideRows = kMaxSideRows;

  template <int kRows, int kStrips>
  static void few(const GemmArgs* g) {
    burst_sums<Products, Int4Burst<Dot>, UnpackedInt4Tiles::kBlock, kRows, kStrips>(g, g->k / 2);
    for (int s = 0; s < kStrips; ++s) finish_sums<true>(g[s]);
  }

  static void many(const GemmArgs& g) {
    chunk_sums<Products, UnpackedInt4Tiles>(g, g.k / 2);
    finish_sums<true>(g);
  }
};

template <class Body>
constexpr GemmKernel dot_kernel(const char* name) {
  return {name,  one_strip<Body>,           expand_rows, kActivationOffset,
          false, strips_side_by_side<Body>, kMaxSideRows};
}

}  // namespace
}  // namespace ktrt
