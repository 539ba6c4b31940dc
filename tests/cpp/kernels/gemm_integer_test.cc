// Sums of INT8 and INT4 are exact integers, so all variants must agree to the last bit.
#include <gtest/gtest.h>

#include <vector>

#include "kernels/gemm_case.h"
#include "kernels/variants.h"

namespace ktrt {
namespace {

using testing::FormatVariant;
using testing::GemmCase;

std::vector<FormatVariant> quantized_variants() {
  std::vector<FormatVariant> all = testing::all_variants();
  std::erase_if(all, [](const FormatVariant& v) { return !quantizes_rows(v.format); });
  return all;
}

class GemmIntegerTest : public ::testing::TestWithParam<FormatVariant> {
 protected:
  void SetUp() override {
    if (!GetParam().variant.runs) GTEST_SKIP() << GetParam().variant << " is not available here";
  }
  WeightFormat format() const { return GetParam().format; }
  const GemmKernel& kernel() const { return *GetParam().variant.kernel; }
  const GemmKernel& portable() const {
    const KernelTable table = select_kernels(Isa::kPortable, CpuFeatures{});
    return *table.gemm(format()).few;
  }
};
INSTANTIATE_TEST_SUITE_P(Variants, GemmIntegerTest, ::testing::ValuesIn(quantized_variants()),
                         [](const auto& test) { return testing::name_of_variant(test.param); });

TEST_P(GemmIntegerTest, UnitScalesGiveTheIntegerSum) {
  for (const auto& [n, k] : {std::pair(96, 160), std::pair(33, 70), std::pair(32, 3648)}) {
    GemmCase gemm(format(), n, k, 35);
    gemm.use_unit_scales();
    const std::vector<float> c = gemm.run(kernel());
    for (int row = 0; row < gemm.rows(); ++row) {
      for (int column = 0; column < n; ++column) {
        const double sum = gemm.exact(row, column).value;
        ASSERT_LT(std::fabs(sum), 0x1p24) << "not exact in float32";
        ASSERT_EQ(c[static_cast<std::size_t>(row * n + column)], sum) << row << " " << column;
      }
    }
  }
}

TEST_P(GemmIntegerTest, ScaledSumsHaveTheBitsOfThePortableKernel) {
  for (const auto& [n, k] : {std::pair(96, 160), std::pair(288, 2048), std::pair(64, 3648)}) {
    GemmCase gemm(format(), n, k, 15);
    EXPECT_EQ(gemm.run(kernel()), gemm.run(portable()));
  }
}

// With unsigned activations a partial sum reaches 255 · 127 · k, close to 2^31 at the largest k.
TEST_P(GemmIntegerTest, TheLargestSumsDoNotOverflow) {
  for (const int k : {1024, 65536}) {
    GemmCase gemm(format(), 32, k, 4);
    gemm.use_extreme_codes();
    const std::vector<float> c = gemm.run(kernel());
    for (int row = 0; row < gemm.rows(); ++row) {
      for (int column = 0; column < gemm.n(); ++column) {
        ASSERT_EQ(c[static_cast<std::size_t>(row * gemm.n() + column)],
                  static_cast<float>(gemm.exact(row, column).value))
            << "k " << k << ", row " << row << ", output " << column;
      }
    }
  }
}

}  // namespace
}  // namespace ktrt
