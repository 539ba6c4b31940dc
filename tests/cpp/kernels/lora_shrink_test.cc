#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

#include "base/bf16.h"
#include "helpers/aligned_vector.h"
#include "helpers/random.h"
#include "helpers/views.h"
#include "kernels/variants.h"

namespace ktrt {
namespace {

using testing::AlignedVector;
using testing::Random;
using testing::Variant;

constexpr int kBlockRanks = 16;

std::size_t at(int row, int width, int column) {
  return static_cast<std::size_t>(row) * static_cast<std::size_t>(width) +
         static_cast<std::size_t>(column);
}

// X [rows][k] and A [16 · blocks][k], BF16 values.
struct ShrinkCase {
  ShrinkCase(int rows_, int k_, int blocks_) : rows(rows_), k(k_), blocks(blocks_) {
    Random random(5);
    x = random.normals(at(rows, k, 0));
    a = random.normals(at(width(), k, 0), 0.1f);
    for (float& value : x) value = testing::round_to_bf16(value);
    for (float& value : a) value = testing::round_to_bf16(value);
  }

  int width() const { return blocks * kBlockRanks; }

  // `piece_rows` rows of one tile after the other.
  static void run_pieces(const ShrinkKernel& kernel, const ShrinkArgs& all, int piece_rows) {
    for (int row = 0; row < all.rows;) {
      ShrinkArgs args = all;
      const int in_tile = row % all.tile_rows;
      args.rows = std::min({piece_rows, all.tile_rows - in_tile, all.rows - row});
      args.tile_rows = args.rows;
      args.x_step = 32 * all.tile_rows;
      args.x = all.x + row / all.tile_rows * all.x_stride + in_tile * 32;
      args.t = all.t + row * all.t_stride;
      kernel.run(args);
      row += args.rows;
    }
  }

  // Rows [first, first + count) of T, [count][width], as BF16 bits.
  std::vector<std::uint16_t> run(const ShrinkKernel& kernel, int first, int count,
                                 int tile_rows = 1, int piece_rows = 0) const {
    constexpr std::uint16_t kNan = 0x7fff;
    const int x_stride = k + 6;
    const int t_stride = width() + 3;
    constexpr std::uint16_t kGuard = 0x1234;
    AlignedVector<std::uint16_t> rows_of_x(at(count + kMaxTileRows, x_stride, 0), kNan);
    for (int row = 0; row < count; ++row) {
      for (int i = 0; i < k; ++i) {
        const int in_tile = i / 32 * 32 * tile_rows + row % tile_rows * 32 + i % 32;
        rows_of_x[at(row / tile_rows, tile_rows * x_stride, tile_rows == 1 ? i : in_tile)] =
            f32_to_bf16(x[at(first + row, k, i)]);
      }
    }
    AlignedVector<std::uint16_t> packed(a.size());
    for (int rank = 0; rank < width(); ++rank) {
      for (int i = 0; i < k; ++i) {
        packed[at(rank / kBlockRanks * (k / 2) + i / 2, 2 * kBlockRanks,
                  rank % kBlockRanks * 2 + i % 2)] = f32_to_bf16(a[at(rank, k, i)]);
      }
    }
    AlignedVector<std::uint16_t> t(at(count, t_stride, 0), kGuard);
    ShrinkArgs args{rows_of_x.data(),
                    tile_rows * x_stride,
                    tile_rows,
                    0,
                    count,
                    packed.data(),
                    blocks,
                    k,
                    t.data(),
                    t_stride};
    if (piece_rows > 0) {
      run_pieces(kernel, args, piece_rows);
    } else {
      kernel.run(args);
    }
    std::vector<std::uint16_t> result;
    for (int row = 0; row < count; ++row) {
      for (int i = 0; i < t_stride; ++i) {
        const std::uint16_t value = t[at(row, t_stride, i)];
        if (i < width()) {
          result.push_back(value);
        } else {
          EXPECT_EQ(value, kGuard) << "written beyond the row";
        }
      }
    }
    return result;
  }

  int rows, k, blocks;
  std::vector<float> x, a;
};

class LoraShrinkTest : public testing::VariantTest<ShrinkKernel> {};
INSTANTIATE_TEST_SUITE_P(Variants, LoraShrinkTest, ::testing::ValuesIn(testing::all_shrinks()),
                         testing::variant_name<ShrinkKernel>);

TEST_P(LoraShrinkTest, EqualsTheSumInDoublePrecision) {
  for (const auto& [k, blocks] : {std::pair(32, 1), std::pair(96, 2), std::pair(160, 5),
                                  std::pair(2048, 1), std::pair(7296, 2)}) {
    const ShrinkCase shrink(11, k, blocks);
    const std::vector<std::uint16_t> t = shrink.run(kernel(), 0, shrink.rows);
    for (int row = 0; row < shrink.rows; ++row) {
      for (int rank = 0; rank < shrink.width(); ++rank) {
        double sum = 0.0;
        double magnitude = 0.0;
        for (int i = 0; i < k; ++i) {
          const double product = double{shrink.x[at(row, k, i)]} * shrink.a[at(rank, k, i)];
          sum += product;
          magnitude += std::fabs(product);
        }
        // A float32 sum (see gemm_case.h), then half a unit in the last place of BF16.
        const double summed = 2.0 * std::sqrt(k) * 0x1p-24 * magnitude;
        const double tolerance = summed + 0x1p-8 * (std::fabs(sum) + summed);
        ASSERT_NEAR(bf16_to_f32(t[at(row, shrink.width(), rank)]), sum, tolerance)
            << "k " << k << ", row " << row << ", rank " << rank;
      }
    }
  }
}

TEST_P(LoraShrinkTest, ARowDoesNotDependOnTheRowsBesideIt) {
  const ShrinkCase shrink(33, 96, 2);
  const std::vector<std::uint16_t> all = shrink.run(kernel(), 0, shrink.rows);
  for (int count = 1; count <= shrink.rows; ++count) {
    const int first = shrink.rows - count;
    const std::vector<std::uint16_t> expected(all.begin() + first * shrink.width(), all.end());
    ASSERT_EQ(shrink.run(kernel(), first, count), expected) << count << " rows";
  }
}

// Tiles are as long as a GEMM's that asks for tile order.
TEST_P(LoraShrinkTest, TileOrderChangesNoBit) {
  if (!testing::is_amx(kernel())) return;
  for (const int rows : {2, 15, 16, 17, 31, 33, 50}) {
    const ShrinkCase shrink(rows, 160, 3);
    const int tile_rows = emulated_amx_gemm(WeightFormat::kBf16).tile_rows(rows);
    const std::vector<std::uint16_t> all = shrink.run(kernel(), 0, rows);
    EXPECT_EQ(shrink.run(kernel(), 0, rows, tile_rows), all) << rows;
    for (const int piece : {1, 3, 16}) {
      EXPECT_EQ(shrink.run(kernel(), 0, rows, tile_rows, piece), all) << rows << ", " << piece;
    }
  }
}

TEST_P(LoraShrinkTest, ARankDoesNotDependOnTheOthers) {
  ShrinkCase shrink(9, 64, 4);
  const std::vector<std::uint16_t> all = shrink.run(kernel(), 0, shrink.rows);
  shrink.blocks = 1;
  shrink.a.resize(at(kBlockRanks, shrink.k, 0));
  const std::vector<std::uint16_t> few = shrink.run(kernel(), 0, shrink.rows);
  for (int row = 0; row < shrink.rows; ++row) {
    for (int rank = 0; rank < kBlockRanks; ++rank) {
      ASSERT_EQ(few[at(row, kBlockRanks, rank)], all[at(row, 4 * kBlockRanks, rank)]);
    }
  }
}

}  // namespace
}  // namespace ktrt
