// Requirements on every GEMM variant of the coded formats, those on emulated AMX tiles included.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "kernels/coded_case.h"
#include "kernels/coded_strip.h"
#include "kernels/variants.h"

namespace ktrt {
namespace {

using testing::code_value;
using testing::CodedCase;
using testing::FormatVariant;

template <WeightFormat kFormat>
constexpr bool constants_equal_the_table() {
  using Format = Coded<kFormat>;
  constexpr const FormatTraits& traits = traits_of(kFormat);
  constexpr int kScales = traits.scale == ScaleKind::kInTile ? traits.tile_k / traits.group : 0;
  return Format::kTileColumns == traits.tile_k && Format::kGroup == traits.group &&
         Format::kGroupsInTile == kScales && Format::kIsFp8 == (traits.bits == 8) &&
         Format::kScaleBytes * kScales * kStripRows == traits.tile_scale_bytes &&
         Format::kTileBytes == kTileBytes + traits.tile_scale_bytes;
}
static_assert(constants_equal_the_table<WeightFormat::kFp8>());
static_assert(constants_equal_the_table<WeightFormat::kFp8Channel>());
static_assert(constants_equal_the_table<WeightFormat::kInt4G32>());
static_assert(constants_equal_the_table<WeightFormat::kInt4G64>());
static_assert(constants_equal_the_table<WeightFormat::kInt4G128>());
static_assert(constants_equal_the_table<WeightFormat::kMxfp4>());

std::vector<FormatVariant> variants_of_coded(bool only_mxfp4) {
  std::vector<FormatVariant> all;
  for (const WeightFormat format : kWeightFormats) {
    if (!is_coded(format) || (only_mxfp4 && format != WeightFormat::kMxfp4)) continue;
    for (const auto& variant : testing::all_gemms(format)) {
      const bool known = std::any_of(all.begin(), all.end(), [&](const FormatVariant& v) {
        return v.variant.kernel == variant.kernel;
      });
      if (variant.kernel != nullptr && !known) all.push_back({format, variant});
    }
  }
  return all;
}

class CodedTest : public ::testing::TestWithParam<FormatVariant> {
 protected:
  void SetUp() override {
    if (!GetParam().variant.runs) GTEST_SKIP() << GetParam().variant << " is not available here";
  }
  WeightFormat format() const { return GetParam().format; }
  const GemmKernel& kernel() const { return *GetParam().variant.kernel; }
  CodedCase make(int n, int k, int rows) const { return CodedCase(format(), n, k, rows); }

  void expect_exact(const CodedCase& gemm, const std::vector<float>& c, double slack = 1.0) const {
    for (int row = 0; row < gemm.rows(); ++row) {
      for (int n = 0; n < gemm.n(); ++n) {
        const auto exact = gemm.exact(row, n, kernel());
        ASSERT_NEAR(c[static_cast<std::size_t>(row * gemm.n() + n)], exact.value,
                    slack * exact.tolerance)
            << gemm.n() << " x " << gemm.k() << ", row " << row << ", output " << n;
      }
    }
  }

  // Row r of A is one at column `column(r)` and zero elsewhere: C is the weights themselves.
  template <class Column>
  void expect_weights(CodedCase& gemm, Column column) const {
    gemm.set_activations([&](int row, int k) { return k == column(row) ? 1.0f : 0.0f; });
    const std::vector<float> c = gemm.run(kernel());
    for (int row = 0; row < gemm.rows(); ++row) {
      for (int n = 0; n < gemm.n(); ++n) {
        const double weight = gemm.weight(n, column(row), gemm.rounds_weights(kernel()));
        ASSERT_EQ(c[static_cast<std::size_t>(row * gemm.n() + n)], static_cast<float>(weight))
            << "output " << n << ", column " << column(row) << ", code "
            << gemm.code(n, column(row)) << ", scale " << gemm.scale(n, column(row));
      }
    }
  }
};
INSTANTIATE_TEST_SUITE_P(Variants, CodedTest, ::testing::ValuesIn(variants_of_coded(false)),
                         [](const auto& test) { return testing::name_of_variant(test.param); });

// Whole and ragged strips, tiles, groups and blocks of scales; k of more than one block of a
// kernel's.
TEST_P(CodedTest, EqualsTheSumInDoublePrecision) {
  for (const auto& [n, k] : {std::pair(32, 64), std::pair(33, 177), std::pair(96, 160),
                             std::pair(47, 1001), std::pair(32, 3712)}) {
    CodedCase gemm = make(n, k, 35);
    expect_exact(gemm, gemm.run(kernel()));
  }
}

TEST_P(CodedTest, EveryCodeAtEveryPlaceOfATileIsItsValue) {
  constexpr int kColumns = 320;  // two tiles and a half
  CodedCase gemm = make(48, kColumns, 40);
  for (int first = 0; first < kColumns; first += 40) {
    expect_weights(gemm, [&](int row) { return first + row; });
  }
}

// Chains of subnormal E4M3 codes, of INT4 and E2M1 are exact in float32.
TEST_P(CodedTest, SmallCodesAreExact) {
  CodedCase gemm = make(64, 384, 9);
  gemm.set_scales(1.0, 1.0);
  gemm.set_activations([](int row, int k) { return (row * 31 + k * 17) % 129 - 64; });
  const bool fp8 = testing::coded_reference(format()).bits == 8;
  gemm.set_codes([&](int n, int k) {
    const int code = (n * 7 + k * 3 + n * k) % 16;
    return fp8 ? (code & 7) | (code & 8) << 4 : code;
  });
  const std::vector<float> c = gemm.run(kernel());
  for (int row = 0; row < gemm.rows(); ++row) {
    for (int n = 0; n < gemm.n(); ++n) {
      const double exact = gemm.exact(row, n, kernel()).value;
      ASSERT_EQ(c[static_cast<std::size_t>(row * gemm.n() + n)], exact) << row << " " << n;
    }
  }
}

TEST_P(CodedTest, TheLargestCodesDoNotOverflow) {
  CodedCase gemm = make(32, 640, 5);
  const int largest = testing::coded_reference(format()).bits == 8 ? 0x7e
                      : format() == WeightFormat::kMxfp4           ? 7
                                                                   : 8;
  gemm.set_codes([&](int, int) { return largest; });
  gemm.set_activations([](int row, int k) { return (row + k) % 3 == 0 ? -240.0f : 240.0f; });
  expect_exact(gemm, gemm.run(kernel()));
}

class E8m0Test : public CodedTest {};
INSTANTIATE_TEST_SUITE_P(Variants, E8m0Test, ::testing::ValuesIn(variants_of_coded(true)),
                         [](const auto& test) { return testing::name_of_variant(test.param); });

// The smallest E8M0 scale is a subnormal float32, 2^-127; the largest with which all codes are
// finite is 2^125, and larger ones are refused.
TEST_P(E8m0Test, TheSmallestAndTheLargestScalesArePowersOfTwo) {
  CodedCase gemm = make(40, 160, 40);
  for (const double scale : {0x1p-127, 0x1p-126, 0x1p-1, 1.0, 0x1p+124, 0x1p+125}) {
    gemm.set_scales(scale, scale);
    gemm.set_codes([](int n, int k) { return (n + k) % 4 | (n / 4 + k) % 2 << 3; });
    for (const int first : {0, 120}) expect_weights(gemm, [&](int row) { return first + row; });
  }
}

TEST_P(CodedTest, LoraIsAdded) {
  for (const int rank : {1, 8, 17, 64}) {
    for (const int rows : {1, 5, 19, 37}) {
      CodedCase gemm = make(40, 160, rows);
      gemm.add_lora(rank);
      const std::vector<float> c = gemm.run(kernel());
      expect_exact(gemm, c);
      const std::vector<float> apart = gemm.run(kernel(), 0, rows, true);
      if (!kernel().tile_order || kernel().fixed == nullptr) {
        EXPECT_EQ(apart, c) << "rank " << rank << ", " << rows << " rows";
      } else {
        expect_exact(gemm, apart, 2.0);
      }
    }
  }
}

TEST_P(CodedTest, ARowDoesNotDependOnTheRowsBesideIt) {
  constexpr int kRows = 40;
  constexpr int kColumns = 40;
  CodedCase gemm = make(kColumns, 1200, kRows);
  gemm.add_lora(7);
  const std::vector<float> all = gemm.run(kernel());
  for (const int count : testing::row_counts(kRows)) {
    const int first = kRows - count;
    const std::vector<float> expected(all.begin() + first * kColumns, all.end());
    ASSERT_EQ(gemm.run(kernel(), first, count), expected) << count << " rows";
  }
}

TEST_P(CodedTest, StripsSideBySideHaveTheBitsOfSingleOnes) {
  if (kernel().side_by_side == nullptr) GTEST_SKIP() << "strip by strip";
  constexpr int kRows = 7;
  for (const auto& [n, k] : {std::pair(96, 160), std::pair(96, 1001)}) {
    for (const int rank : {0, 7}) {
      CodedCase gemm = make(n, k, kRows);
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

TEST_P(CodedTest, ThePaddingOfAIsNotSeen) {
  for (const int rows : {3, 20}) {
    CodedCase gemm = make(32, 33, rows);
    const std::vector<float> c = gemm.run(kernel());
    for (const float padding : {-128.0f, 77.0f}) {
      gemm.set_padding(padding);
      EXPECT_EQ(gemm.run(kernel()), c) << padding;
    }
  }
}

}  // namespace
}  // namespace ktrt
