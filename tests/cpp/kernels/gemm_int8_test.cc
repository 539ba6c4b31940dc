// INT8 sums are exact integers, so all variants must agree to the last bit.
#include <gtest/gtest.h>

#include <vector>

#include "kernels/gemm_case.h"
#include "kernels/variants.h"

namespace ktrt {
namespace {

using testing::GemmCase;

class GemmInt8Test : public testing::VariantTest<GemmKernel> {
 protected:
  static const GemmKernel& portable() {
    return *select_kernels(Isa::kPortable, CpuFeatures{}).gemm_int8.few;
  }
};
INSTANTIATE_TEST_SUITE_P(Variants, GemmInt8Test,
                         ::testing::ValuesIn(testing::all_gemms(WeightFormat::kInt8)),
                         testing::variant_name<GemmKernel>);

TEST_P(GemmInt8Test, UnitScalesGiveTheIntegerSum) {
  for (const auto& [n, k] : {std::pair(96, 160), std::pair(33, 70), std::pair(64, 3648)}) {
    GemmCase gemm(WeightFormat::kInt8, n, k, 35);
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

TEST_P(GemmInt8Test, ScaledSumsHaveTheBitsOfThePortableKernel) {
  for (const auto& [n, k] : {std::pair(96, 160), std::pair(288, 2048), std::pair(64, 3648)}) {
    GemmCase gemm(WeightFormat::kInt8, n, k, 15);
    EXPECT_EQ(gemm.run(kernel()), gemm.run(portable()));
  }
}

// With unsigned activations a partial sum reaches 255 · 127 · k, close to 2^31 at the largest k.
TEST_P(GemmInt8Test, TheLargestSumsDoNotOverflow) {
  for (const int k : {1024, 65536}) {
    GemmCase gemm(WeightFormat::kInt8, 32, k, 4);
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
