// Requirements on every GEMM variant of every format; exact sums are in gemm_integer_test.cc.
#include <gtest/gtest.h>

#include <ostream>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/gemm_case.h"
#include "kernels/variants.h"

namespace ktrt {
namespace {

using testing::all_variants;
using testing::FormatVariant;
using testing::GemmCase;
using testing::name_of_variant;

void expect_exact(const GemmCase& gemm, const std::vector<float>& c, double slack = 1.0) {
  for (int row = 0; row < gemm.rows(); ++row) {
    for (int n = 0; n < gemm.n(); ++n) {
      const auto exact = gemm.exact(row, n);
      ASSERT_NEAR(c[static_cast<std::size_t>(row * gemm.n() + n)], exact.value,
                  slack * exact.tolerance)
          << "row " << row << ", output " << n;
    }
  }
}

template <class Param>
class GemmTestBase : public ::testing::TestWithParam<Param> {
 protected:
  void SetUp() override {
    if (!v().variant.runs) GTEST_SKIP() << name_of_variant(v()) << " is not available here";
  }
  const FormatVariant& v() const {
    if constexpr (std::is_same_v<Param, FormatVariant>) {
      return this->GetParam();
    } else {
      return std::get<0>(this->GetParam());
    }
  }
  const GemmKernel& kernel() const { return *v().variant.kernel; }
  GemmCase make(int n, int k, int rows) const { return GemmCase(v().format, n, k, rows); }
};

// Sizes with tails in the formats' n-blocks (256, 64, 128) and k-blocks (1792, 3584), and padded
// ones.
using Shape = std::pair<int, int>;
class GemmShapeTest : public GemmTestBase<std::tuple<FormatVariant, Shape>> {};
INSTANTIATE_TEST_SUITE_P(Variants, GemmShapeTest,
                         ::testing::Combine(::testing::ValuesIn(all_variants()),
                                            ::testing::Values(Shape(32, 64), Shape(96, 160),
                                                              Shape(176, 96), Shape(33, 177),
                                                              Shape(288, 1856), Shape(64, 3648),
                                                              Shape(32, 7296))),
                         [](const auto& test) {
                           const Shape shape = std::get<1>(test.param);
                           return name_of_variant(std::get<0>(test.param)) + "_" +
                                  std::to_string(shape.first) + "x" + std::to_string(shape.second);
                         });

TEST_P(GemmShapeTest, EqualsTheSumInDoublePrecision) {
  const auto [n, k] = std::get<1>(GetParam());
  GemmCase gemm = make(n, k, 35);
  expect_exact(gemm, gemm.run(kernel()));
}

class LoraExpandTest : public GemmTestBase<std::tuple<FormatVariant, int>> {
 protected:
  const int rank_ = std::get<1>(GetParam());
};
INSTANTIATE_TEST_SUITE_P(Variants, LoraExpandTest,
                         ::testing::Combine(::testing::ValuesIn(all_variants()),
                                            ::testing::Values(1, 2, 3, 8, 15, 16, 17, 64, 255,
                                                              256)),
                         [](const auto& test) {
                           return name_of_variant(std::get<0>(test.param)) + "_r" +
                                  std::to_string(std::get<1>(test.param));
                         });

TEST_P(LoraExpandTest, AddsTheProductOfTAndB) {
  for (const int rows : {1, 19, 37}) {
    GemmCase gemm = make(96, 160, rows);
    gemm.add_lora(rank_);
    expect_exact(gemm, gemm.run(kernel()));
  }
}

TEST_P(LoraExpandTest, ApartItHasTheSameBits) {
  for (const int rows : {1, 2, 19, 37, 64}) {
    GemmCase gemm = make(96, 160, rows);
    gemm.add_lora(rank_);
    const std::vector<float> apart = gemm.run(kernel(), 0, rows, true);
    if (kernel().fixed == nullptr) {
      EXPECT_EQ(apart, gemm.run(kernel())) << rows << " rows";
    } else {
      expect_exact(gemm, apart, 2.0);  // rounded more often than on tiles
    }
  }
}

TEST_P(LoraExpandTest, ZeroBChangesNoBit) {
  GemmCase gemm = make(96, 160, 15);
  const std::vector<float> base = gemm.run(kernel());
  gemm.add_lora(rank_);
  EXPECT_NE(gemm.run(kernel()), base);
  gemm.clear_b();
  EXPECT_EQ(gemm.run(kernel()), base);
}

TEST_P(LoraExpandTest, PaddingTheRankChangesNoBit) {
  GemmCase gemm = make(64, 64, 15);
  gemm.add_lora(rank_);
  const std::vector<float> c = gemm.run(kernel());
  for (const int more : {1, 2, 16}) {
    GemmCase padded = gemm;
    padded.pad_rank(rank_ + more);
    EXPECT_EQ(padded.run(kernel()), c) << "rank " << rank_ << " padded by " << more;
  }
}

class GemmTest : public GemmTestBase<FormatVariant> {};
INSTANTIATE_TEST_SUITE_P(Variants, GemmTest, ::testing::ValuesIn(all_variants()),
                         [](const auto& test) { return name_of_variant(test.param); });

TEST_P(GemmTest, ARowDoesNotDependOnTheRowsBesideIt) {
  constexpr int kRows = 64;
  constexpr int kColumns = 40;
  GemmCase gemm = make(kColumns, 160, kRows);
  gemm.add_lora(7);
  const std::vector<float> all = gemm.run(kernel());
  for (const int count : testing::row_counts(kRows)) {
    const int first = kRows - count;
    const std::vector<float> expected(all.begin() + first * kColumns, all.end());
    ASSERT_EQ(gemm.run(kernel(), first, count), expected) << count << " rows";
  }
}

// Strips of different rows, as several experts have them, and over the ends of n-blocks and of
// k-blocks.
TEST_P(GemmTest, StripsSideBySideHaveTheBitsOfSingleOnes) {
  if (kernel().side_by_side == nullptr) GTEST_SKIP() << "strip by strip";
  constexpr int kRows = 7;
  for (const auto& [n, k] : {std::pair(96, 160), std::pair(288, 160), std::pair(64, 3648)}) {
    for (const int rank : {0, 7}) {
      GemmCase gemm = make(n, k, kRows);
      if (rank > 0) gemm.add_lora(rank);
      const std::vector<float> all = gemm.run(kernel());
      for (int count = 1; count <= kernel().side_rows; ++count) {
        for (int strips = 1; strips <= side_strips(count); ++strips) {
          const std::vector<float> c = gemm.run_side_by_side(kernel(), strips, count);
          for (int i = 0; i < strips * count * kStripRows; ++i) {
            const int strip = i / (count * kStripRows);
            const int column = strip % (n / kStripRows) * kStripRows + i % kStripRows;
            const int row = strip % (kRows - count + 1) + i / kStripRows % count;
            ASSERT_EQ(c[static_cast<std::size_t>(i)],
                      all[static_cast<std::size_t>(row * n + column)])
                << n << " x " << k << ", rank " << rank << ", " << strips << " strips of " << count
                << " rows, value " << i;
          }
        }
      }
    }
  }
}

TEST_P(GemmTest, ThePaddingOfAIsNotSeen) {
  GemmCase gemm = make(32, 33, 3);
  const std::vector<float> c = gemm.run(kernel());
  for (const float padding : {-128.0f, 77.0f}) {
    gemm.set_padding(padding);
    EXPECT_EQ(gemm.run(kernel()), c) << padding;
  }
}

}  // namespace
}  // namespace ktrt
