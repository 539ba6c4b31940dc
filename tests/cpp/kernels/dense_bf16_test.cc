#include <gtest/gtest.h>

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

std::size_t at(std::int64_t row, std::int64_t width, std::int64_t column) {
  return static_cast<std::size_t>(row * width + column);
}

std::vector<std::uint16_t> random_bf16(Random& random, std::size_t count, float deviation = 1.0f) {
  std::vector<std::uint16_t> values(count);
  for (std::uint16_t& value : values) value = f32_to_bf16(random.normal() * deviation);
  return values;
}

// X [rows][k] and W [columns][k], both with rows further apart than they are long.
struct DotCase {
  DotCase(int rows_, int columns_, int k_) : rows(rows_), columns(columns_), k(k_) {
    Random random(static_cast<std::uint64_t>(k));
    x = random_bf16(random, at(rows, k + 3, 0));
    w = random_bf16(random, at(columns, k + 5, 0));
  }

  DenseDotArgs args(float* c) const {
    DenseDotArgs dot{};
    dot.x = x.data();
    dot.x_stride = k + 3;
    dot.rows = rows;
    dot.w = w.data();
    dot.w_stride = k + 5;
    dot.columns = columns;
    dot.k = k;
    dot.last = true;
    dot.c = c;
    dot.c_stride = columns + 2;
    return dot;
  }

  std::vector<float> result() const { return std::vector<float>(at(rows, columns + 2, 0), kGuard); }

  std::vector<float> run(const DenseKernel& kernel, bool cold = false) const {
    std::vector<float> c = result();
    DenseDotArgs dot = args(c.data());
    dot.cold = cold;
    kernel.dot(dot);
    return c;
  }

  static constexpr float kGuard = 123.0f;
  int rows, columns, k;
  std::vector<std::uint16_t> x, w;
};

const std::vector<std::pair<int, int>> kShapes = {{1, 1},  {4, 7},   {5, 16},   {9, 31},  {8, 32},
                                                  {3, 33}, {6, 100}, {13, 517}, {4, 2048}};

class DenseBf16Test : public testing::VariantTest<DenseKernel> {};
INSTANTIATE_TEST_SUITE_P(Variants, DenseBf16Test,
                         ::testing::ValuesIn(testing::variants_of(testing::dense_kernels)),
                         testing::variant_name<DenseKernel>);

TEST_P(DenseBf16Test, DotEqualsTheSumInDoublePrecision) {
  for (int rows = 1; rows <= kernel().block_rows; ++rows) {
    for (const auto& [columns, k] : kShapes) {
      const DotCase dot(rows, columns, k);
      const std::vector<float> c = dot.run(kernel());
      for (int r = 0; r < rows; ++r) {
        for (int n = 0; n < columns; ++n) {
          double sum = 0.0;
          double magnitude = 0.0;
          for (int i = 0; i < k; ++i) {
            const double product =
                double{bf16_to_f32(dot.x[at(r, k + 3, i)])} * bf16_to_f32(dot.w[at(n, k + 5, i)]);
            sum += product;
            magnitude += std::abs(product);
          }
          ASSERT_NEAR(c[at(r, columns + 2, n)], sum, 1e-6 * magnitude) << rows << " " << k;
        }
        ASSERT_EQ(c[at(r, columns + 2, columns)], DotCase::kGuard) << "written beyond the row";
      }
    }
  }
}

TEST_P(DenseBf16Test, BitsDependOnNothingBesideThem) {
  for (const auto& [columns, k] : kShapes) {
    const DotCase all(kernel().block_rows, columns, k);
    const std::vector<float> expected = all.run(kernel());
    ASSERT_EQ(all.run(kernel(), true), expected) << "cold";
    for (int rows = 1; rows < kernel().block_rows; ++rows) {
      DotCase fewer = all;
      fewer.rows = rows;
      std::vector<float> c = fewer.run(kernel());
      ASSERT_EQ(c, std::vector<float>(expected.begin(), expected.begin() + c.size())) << rows;
    }
    DotCase one = all;
    one.columns = 1;
    for (int n = 0; n < columns; ++n) {
      const std::vector<float> c = one.run(kernel());
      for (int r = 0; r < one.rows; ++r) {
        ASSERT_EQ(c[at(r, 3, 0)], expected[at(r, columns + 2, n)]) << n;
      }
      one.w.erase(one.w.begin(), one.w.begin() + one.k + 5);
      one.w.resize(all.w.size());
    }
  }
}

TEST_P(DenseBf16Test, PartsOfKGiveTheSameBits) {
  for (const int k : {33, 100, 517}) {
    const DotCase dot(kernel().block_rows, 7, k);
    AlignedVector<std::uint8_t> sums(at(dot.rows, dot.columns * kDenseSumBytes, 0));
    std::vector<float> c = dot.result();
    for (int first = 0; first < k; first += 2 * kDenseStep) {
      DenseDotArgs part = dot.args(c.data());
      part.x += first;
      part.w += first;
      part.k = std::min(2 * kDenseStep, k - first);
      part.sums = sums.data();
      part.resume = first > 0;
      part.last = first + part.k == k;
      kernel().dot(part);
    }
    ASSERT_EQ(c, dot.run(kernel())) << k;
  }
}

// C, bias, B and T as float64, then one rounding.
TEST_P(DenseBf16Test, FinishAddsBiasAndLoraAndRoundsOnce) {
  constexpr int kRows = 3;
  for (const int columns : {1, 7, 16, 45}) {
    for (const int pairs : {0, 1, 4, 9}) {
      Random random(static_cast<std::uint64_t>(columns + pairs));
      const std::vector<float> c = random.normals(at(kRows, columns + 1, 0));
      const std::vector<float> bias = random.normals(static_cast<std::size_t>(columns));
      const std::vector<std::uint16_t> b = random_bf16(random, at(pairs, 2 * (columns + 4), 0));
      const std::vector<std::uint16_t> t = random_bf16(random, at(kRows, 2 * pairs + 1, 0));
      std::vector<std::uint16_t> out(at(kRows, columns + 3, 0), 0x1234);
      kernel().finish({c.data(), columns + 1, kRows, columns, bias.data(),
                       pairs > 0 ? b.data() : nullptr, columns + 4, t.data(), 2 * pairs + 1, pairs,
                       out.data(), columns + 3});
      for (int r = 0; r < kRows; ++r) {
        for (int n = 0; n < columns; ++n) {
          double sum = double{c[at(r, columns + 1, n)]} + bias[static_cast<std::size_t>(n)];
          for (int i = 0; i < 2 * pairs; ++i) {
            sum += double{bf16_to_f32(t[at(r, 2 * pairs + 1, i)])} *
                   bf16_to_f32(b[at(i / 2, 2 * (columns + 4), 2 * n + i % 2)]);
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
  kernel().finish({values, 5, 1, 5, nullptr, nullptr, 0, nullptr, 0, 0, out, 5});
  for (int i = 0; i < 4; ++i) EXPECT_EQ(out[i], f32_to_bf16(values[i])) << values[i];
  EXPECT_TRUE(std::isnan(bf16_to_f32(out[4])));
}

}  // namespace
}  // namespace ktrt
