#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "base/bf16.h"
#include "helpers/random.h"
#include "kernels/dot_case.h"
#include "kernels/variants.h"

namespace ktrt {
namespace {

using testing::Random;

std::size_t at(std::int64_t row, std::int64_t width, std::int64_t column) {
  return testing::place(row, width, column);
}

std::vector<std::uint16_t> random_bf16(Random& random, std::size_t count) {
  return testing::DotCase<std::uint16_t>::values(random, count);
}

class DenseBf16Test : public testing::VariantTest<DenseKernel> {};
INSTANTIATE_TEST_SUITE_P(Variants, DenseBf16Test,
                         ::testing::ValuesIn(testing::variants_of(testing::dense_kernels)),
                         testing::variant_name<DenseKernel>);

TEST_P(DenseBf16Test, DotEqualsTheSumInDoublePrecision) {
  testing::expect_sums_in_double<std::uint16_t>(kernel());
}

TEST_P(DenseBf16Test, BitsDependOnNothingBesideThem) {
  testing::expect_bits_of_each_alone<std::uint16_t>(kernel());
}

TEST_P(DenseBf16Test, PartsOfKGiveTheSameBits) {
  testing::expect_bits_of_parts<std::uint16_t>(kernel());
}

// C, bias, B and T as float64, then one rounding; the ranks in one LoRA or in two.
TEST_P(DenseBf16Test, FinishAddsBiasAndLoraAndRoundsOnce) {
  constexpr int kRows = 3;
  for (const int columns : {1, 7, 16, 45}) {
    for (const int pairs : {0, 1, 4, 9}) {
      Random random(static_cast<std::uint64_t>(columns + pairs));
      const std::vector<float> c = random.normals(at(kRows, columns + 1, 0));
      const std::vector<float> bias = random.normals(static_cast<std::size_t>(columns));
      const std::vector<std::uint16_t> b = random_bf16(random, at(pairs, 2 * (columns + 7), 0));
      const std::vector<std::uint16_t> t = random_bf16(random, at(kRows, 2 * pairs + 1, 0));
      std::vector<std::uint16_t> out(at(kRows, columns + 3, 0), 0x1234);
      // Three more outputs before the first column.
      const DenseLoraB loras[] = {
          {b.data(), pairs / 3},
          {b.data() + at(pairs / 3, 2 * (columns + 7), 0), pairs - pairs / 3}};
      kernel().finish({c.data(), columns + 1, kRows, columns, bias.data(), loras, pairs > 0 ? 2 : 0,
                       columns + 7, 3, t.data(), 2 * pairs + 1, out.data(), columns + 3});
      for (int r = 0; r < kRows; ++r) {
        for (int n = 0; n < columns; ++n) {
          double sum = double{c[at(r, columns + 1, n)]} + bias[static_cast<std::size_t>(n)];
          for (int i = 0; i < 2 * pairs; ++i) {
            sum += double{bf16_to_f32(t[at(r, 2 * pairs + 1, i)])} *
                   bf16_to_f32(b[at(i / 2, 2 * (columns + 7), 2 * (n + 3) + i % 2)]);
          }
          const float value = bf16_to_f32(out[at(r, columns + 3, n)]);
          ASSERT_NEAR(value, sum, std::abs(sum) * 0.00391 + 1e-5) << pairs << " " << n;
        }
        ASSERT_EQ(out[at(r, columns + 3, columns)], 0x1234) << "written beyond the row";
      }
    }
  }
}

TEST_P(DenseBf16Test, RoundsHalfToEvenAndKeepsNan) {
  const float values[] = {1.00390625f, 1.01171875f, -1.00390625f, INFINITY, NAN};
  std::uint16_t out[5];
  kernel().finish({values, 5, 1, 5, nullptr, nullptr, 0, 0, 0, nullptr, 0, out, 5});
  for (int i = 0; i < 4; ++i) EXPECT_EQ(out[i], f32_to_bf16(values[i])) << values[i];
  EXPECT_TRUE(std::isnan(bf16_to_f32(out[4])));
}

}  // namespace
}  // namespace ktrt
