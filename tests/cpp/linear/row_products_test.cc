#include "linear/row_products.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "helpers/linear_case.h"
#include "kernels/dot_case.h"
#include "kernels/variants.h"

namespace ktrt {
namespace {

using testing::at;
using testing::engine_of;
using testing::message_of;

// x [rows, in], weight [columns, in], bias [columns].
template <class Value>
struct ProductCase {
  ProductCase(int rows_, int columns_, int in_) : rows(rows_), columns(columns_), in(in_) {
    testing::Random random(static_cast<std::uint64_t>(columns * 31 + in));
    x = testing::DotCase<Value>::values(random, at(rows, in, 0));
    weight = testing::DotCase<Value>::values(random, at(columns, in, 0));
    bias = testing::DotCase<Value>::values(random, at(columns, 1, 0));
  }

  std::vector<Value> run(const std::shared_ptr<Engine>& engine, bool with_bias, int first = 0,
                         int count = -1) const {
    if (count < 0) count = rows;
    std::vector<Value> y(at(count, columns, 0));
    RowProducts(engine).multiply(RowProduct<Value>{
        x.data() + first * in, std::int64_t{count} * in, weight.data(),
        static_cast<std::int64_t>(weight.size()), with_bias ? bias.data() : nullptr, y.data(),
        static_cast<std::int64_t>(y.size()), in});
    return y;
  }

  void expect_near(const std::vector<Value>& y, bool with_bias, double rounding) const {
    for (int r = 0; r < rows; ++r) {
      for (int n = 0; n < columns; ++n) {
        double sum = with_bias ? testing::number(bias[at(n, 1, 0)]) : 0.0;
        double size = std::abs(sum);
        for (int i = 0; i < in; ++i) {
          const double product =
              testing::number(x[at(r, in, i)]) * testing::number(weight[at(n, in, i)]);
          sum += product;
          size += std::abs(product);
        }
        ASSERT_NEAR(testing::number(y[at(r, columns, n)]), sum,
                    rounding * std::abs(sum) + 1e-6 * size)
            << r << " " << n;
      }
    }
  }

  int rows, columns, in;
  std::vector<Value> x, weight, bias;
};

const std::vector<std::tuple<int, int, int>> kShapes = {
    {1, 1, 1}, {7, 77, 100}, {33, 64, 520}, {20, 70, 2500}, {3, 576, 300}};

template <class Value>
void expect_products(const KernelTable& table, double rounding) {
  for (const auto& [rows, columns, in] : kShapes) {
    const ProductCase<Value> c(rows, columns, in);
    for (const bool with_bias : {false, true}) {
      const auto expected = c.run(engine_of(1, table), with_bias);
      c.expect_near(expected, with_bias, rounding);
      for (const int threads : {2, 3}) {
        const auto engine = engine_of(threads, table);
        ASSERT_EQ(c.run(engine, with_bias), expected) << threads;
        for (int row = 0; row < rows; ++row) {
          const auto from = expected.begin() + static_cast<std::ptrdiff_t>(at(row, columns, 0));
          ASSERT_EQ(c.run(engine, with_bias, row, 1), std::vector<Value>(from, from + columns))
              << row << " alone";
        }
      }
    }
  }
}

class Bf16ProductsTest : public testing::VariantTest<DenseKernel> {};
INSTANTIATE_TEST_SUITE_P(Variants, Bf16ProductsTest,
                         ::testing::ValuesIn(testing::variants_of(testing::dense_kernels)),
                         testing::variant_name<DenseKernel>);

TEST_P(Bf16ProductsTest, EqualTheReferenceWhateverTheRows) {
  KernelTable table = testing::best_kernels();
  table.dense_bf16 = &kernel();
  expect_products<std::uint16_t>(table, 0.004);
}

class F32ProductsTest : public testing::VariantTest<DenseF32Kernel> {};
INSTANTIATE_TEST_SUITE_P(Variants, F32ProductsTest,
                         ::testing::ValuesIn(testing::variants_of(testing::dense_f32_kernels)),
                         testing::variant_name<DenseF32Kernel>);

TEST_P(F32ProductsTest, EqualTheReferenceWhateverTheRows) {
  KernelTable table = testing::best_kernels();
  table.dense_f32 = &kernel();
  expect_products<float>(table, 1e-6);
}

TEST(RowProducts, RefusesWhatDoesNotFit) {
  const auto engine = engine_of(1, testing::best_kernels());
  RowProducts products(engine);
  const ProductCase<float> c(2, 3, 4);
  std::vector<float> y(6);
  const RowProduct<float> good{c.x.data(), 8, c.weight.data(), 12, nullptr, y.data(), 6, 4};
  const auto message = [&](auto change) {
    RowProduct<float> product = good;
    change(product);
    return message_of([&] { products.multiply(product); });
  };
  EXPECT_EQ(message([](auto& p) { p.in = 0; }), "weight has 12 elements, expected rows of 0");
  EXPECT_EQ(message([](auto& p) { p.in = 5; }), "weight has 12 elements, expected rows of 5");
  EXPECT_EQ(message([](auto& p) { p.weight_count = 0; }),
            "weight has 0 elements, expected rows of 4");
  EXPECT_EQ(message([](auto& p) { p.out_count = 5; }),
            "x has 8 elements and out 5, expected rows of 4 and as many of 3");
  EXPECT_EQ(message([](auto& p) { p.x_count = 7; }),
            "x has 7 elements and out 6, expected rows of 4 and as many of 3");
  EXPECT_EQ(message([](auto& p) { p.x = nullptr; }), "x, weight or out is a null pointer");
  EXPECT_TRUE(message([](auto& p) {
                p.x_count = std::numeric_limits<std::int64_t>::max();
              }).starts_with("x has 9223372036854775807 elements of 4 bytes"));
  EXPECT_EQ(message([](auto& p) { p.x_count = p.out_count = 0; }), "nothing was thrown");
  engine->close();
  EXPECT_THROW(products.multiply(good), std::runtime_error);
}

}  // namespace
}  // namespace ktrt
