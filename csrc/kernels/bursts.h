// A few rows of A times some strips of W side by side where registers are too few to hold the sums
// of all of them: C waits in the L1 cache from one burst of 256 bytes of a strip to its next one.
// A burst of one row on AVX2 has 40 instructions and more; two loads and two stores are lost in
// them. Included by the kernels' ISA files only.
//
// `Products` says what four bytes of A and of each output of W add to a sum:
//
//   Vector, Factor, Sum   types of a vector of kWidth bytes: as it lies in memory, as it is
//                         multiplied, and the sums of kWidth / 4 outputs
//   kParts                factors that one vector is widened to; 1: it is multiplied as it is
//   parts(v, factors)     widens
//   add(sum, w, x)        adds the products of one part
//   load, broadcast       a vector of W; four bytes of A for all outputs
//   zero, load_sum, store_sum
#pragma once

#include <string.h>

#include "kernels/side_by_side.h"
#include "kernels/strip.h"
#include "kernels/unrolled.h"

namespace ktrt {
namespace {

// Lambdas in lambdas, and the arrays that they refer to, stay in registers only if they are inlined
// all the way.
#define KTRT_LAMBDA __attribute__((always_inline))

// Vectors of the sums of a half strip.
template <class Products>
constexpr int kHalfVectors = 64 / Products::kWidth;

// One burst: four steps of four bytes of A (x: row 0's), 16 outputs.
template <class Products>
struct StepBurst {
  using Sum = typename Products::Sum;

  // Where the bytes of A lie that belong to a burst, see for_each_burst.
  static constexpr int first_byte(int step) { return step * 4; }

  template <int kRows>
  static KTRT_INLINE void add(const uint8_t* w, const uint8_t* x, int64_t x_stride,
                              Sum (&acc)[kRows][kHalfVectors<Products>]) {
    using Factor = typename Products::Factor;
    constexpr int kParts = Products::kParts;
    unrolled<kBurstVectors>([&](auto v) KTRT_LAMBDA {
      Factor factors[kHalfVectors<Products>][kParts];
      unrolled<kHalfVectors<Products>>([&](auto q) KTRT_LAMBDA {
        Products::parts(Products::load(w + v * 64 + q * Products::kWidth), factors[q]);
      });
      unrolled<kRows>([&](auto i) KTRT_LAMBDA {
        Factor row[kParts];
        Products::parts(Products::broadcast(x + i * x_stride + v * 4), row);
        unrolled<kHalfVectors<Products>>([&](auto q) KTRT_LAMBDA {
          unrolled<kParts>([&](auto part) KTRT_LAMBDA {
            acc[i][q] = Products::add(acc[i][q], factors[q][part], row[part]);
          });
        });
      });
    });
  }
};

// Asked for while a single strip is read, of which the hardware sees one stream.
constexpr int kSingleAhead = 4 * kTileSize;

// C [kRows][32] of each strip = the sums, as Products stores them; LoRA and scales are the
// caller's.
template <class Products, class Burst, int kBlock, int kRows, int kStrips>
inline void burst_sums(const GemmArgs* g, int row_bytes) {
  constexpr int kVectors = kHalfVectors<Products>;
  unrolled<kStrips>([&](auto s)
                        KTRT_LAMBDA { memset(g[s].c, 0, sizeof(float) * kRows * kStripColumns); });
  for_each_burst<kStrips, kBlock>(
      g, row_bytes, [&](auto s, auto half, const uint8_t* w, int step) KTRT_LAMBDA {
        if constexpr (kStrips == 1) {
          unrolled<kBurstVectors>(
              [&](auto v) KTRT_LAMBDA { __builtin_prefetch(w + kSingleAhead + v * 64, 0, 3); });
        }
        float* c = g[s].c + half * 16;
        typename Products::Sum acc[kRows][kVectors];
        const auto sums = [&](auto move) KTRT_LAMBDA {
          unrolled<kRows>([&](auto i) KTRT_LAMBDA {
            unrolled<kVectors>([&](auto q) KTRT_LAMBDA {
              move(acc[i][q], c + i * kStripColumns + q * (Products::kWidth / 4));
            });
          });
        };
        sums([](auto& sum, const float* from) KTRT_LAMBDA { sum = Products::load_sum(from); });
        Burst::template add<kRows>(w, g[s].a + Burst::first_byte(step), g[s].a_stride, acc);
        sums([](const auto& sum, float* to) KTRT_LAMBDA { Products::store_sum(to, sum); });
      });
}

}  // namespace
}  // namespace ktrt
