#include <gtest/gtest.h>

#include "kernels/dot_case.h"
#include "kernels/variants.h"

namespace ktrt {
namespace {

class DenseF32Test : public testing::VariantTest<DenseF32Kernel> {};
INSTANTIATE_TEST_SUITE_P(Variants, DenseF32Test,
                         ::testing::ValuesIn(testing::variants_of(testing::dense_f32_kernels)),
                         testing::variant_name<DenseF32Kernel>);

TEST_P(DenseF32Test, DotEqualsTheSumInDoublePrecision) {
  testing::expect_sums_in_double<float>(kernel());
}

TEST_P(DenseF32Test, BitsDependOnNothingBesideThem) {
  testing::expect_bits_of_each_alone<float>(kernel());
}

TEST_P(DenseF32Test, PartsOfKGiveTheSameBits) { testing::expect_bits_of_parts<float>(kernel()); }

}  // namespace
}  // namespace ktrt
