#include "linear/dense_linear.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "base/bf16.h"
#include "helpers/linear_case.h"
#include "helpers/views.h"
#include "kernels/variants.h"

namespace ktrt {
namespace {

using testing::at;
using testing::engine_of;
using testing::LinearCase;
using testing::message_of;
using testing::view_of;

KernelTable best() { return testing::best_kernels(); }

void expect_near(const LinearCase& c, const std::vector<std::uint16_t>& y) {
  for (int r = 0; r < c.rows; ++r) {
    const auto added = c.lora(r);
    for (int n = 0; n < c.out; ++n) {
      const auto [lora, size] = added[static_cast<std::size_t>(n)];
      double sum = c.bias_of(n) + lora;
      for (int i = 0; i < c.in; ++i) {
        sum += double{bf16_to_f32(c.x[at(r, c.in, i)])} * bf16_to_f32(c.w[at(n, c.in, i)]);
      }
      // BF16 rounds the output and T; float32 sums of k products.
      const double allowed =
          0.004 * (std::abs(sum) + size) + 1e-5 * std::sqrt(static_cast<double>(c.in));
      ASSERT_NEAR(bf16_to_f32(y[at(r, c.out, n)]), sum, allowed) << r << " " << n;
    }
  }
}

class DenseLinearTest : public testing::VariantTest<DenseKernel> {
 protected:
  KernelTable table() const {
    KernelTable table = best();
    table.dense_bf16 = &kernel();
    table.dense_tiles = nullptr;
    return table;
  }
};
INSTANTIATE_TEST_SUITE_P(Variants, DenseLinearTest,
                         ::testing::ValuesIn(testing::variants_of(testing::dense_kernels)),
                         testing::variant_name<DenseKernel>);

TEST_P(DenseLinearTest, EqualsTheReference) {
  const auto engine = engine_of(2, table());
  for (const int rank : {0, 1, 8, 17}) {
    for (const int rows : {1, 2, 7, 40}) {
      for (const auto& [out, in] : {std::pair(1, 5), std::pair(77, 100), std::pair(576, 300)}) {
        const LinearCase c(rows, out, in, rank, rank != 8);
        expect_near(c, c.run(*c.linear<DenseLinear>(engine)));
      }
    }
  }
}

TEST_P(DenseLinearTest, LongDotProductsInParts) {
  const auto engine = engine_of(2, table());
  for (const int in : {2049, 4500}) {
    const LinearCase c(20, 70, in, 8);
    expect_near(c, c.run(*c.linear<DenseLinear>(engine)));
  }
}

TEST_P(DenseLinearTest, BitsDependNeitherOnThreadsNorOnRows) {
  // Large enough for several threads: one row of the last, all rows of the others; the first is
  // not.
  for (const auto& [out, in] : {std::pair(30, 64), std::pair(150, 320), std::pair(70, 2500)}) {
    const LinearCase c(61, out, in, 9);
    const std::vector<std::uint16_t> expected =
        c.run(*c.linear<DenseLinear>(engine_of(1, table())));
    for (const int threads : {2, 3, 5}) {
      const auto linear = c.linear<DenseLinear>(engine_of(threads, table()));
      ASSERT_EQ(c.run(*linear), expected) << threads;
      for (const int count : {1, 2, 9, 30}) {
        const std::vector<std::uint16_t> some = c.run(*linear, 7, count);
        const auto from = expected.begin() + static_cast<std::ptrdiff_t>(at(7, c.out, 0));
        ASSERT_EQ(some, std::vector<std::uint16_t>(from, from + some.size())) << count;
      }
    }
  }
}

// Many rows on tiles.
class DenseTilesTest : public testing::VariantTest<GemmKernel> {
 protected:
  KernelTable table() const {
    KernelTable table = best();
    table.dense_tiles = &kernel();
    table.dense_tiles_from = 1;
    table.fixed = false;
    return table;
  }
};
INSTANTIATE_TEST_SUITE_P(Variants, DenseTilesTest, ::testing::ValuesIn(testing::all_dense_tiles()),
                         testing::variant_name<GemmKernel>);

TEST_P(DenseTilesTest, EqualsTheReference) {
  const auto engine = engine_of(2, table());
  for (const int rank : {0, 9, 70}) {
    for (const int rows : {1, 17, 75}) {
      for (const auto& [out, in] : {std::pair(1, 32), std::pair(77, 96), std::pair(48, 1088)}) {
        const LinearCase c(rows, out, in, rank, rank == 0);
        expect_near(c, c.run(*c.linear<DenseLinear>(engine)));
      }
    }
  }
}

TEST_P(DenseTilesTest, RowsInBlocks) {
  // Three blocks; two passes.
  for (const auto& [rows, in] : {std::pair(300, 8192), std::pair(600, 16384)}) {
    const LinearCase c(rows, in == 8192 ? 40 : 1, in, 9);
    expect_near(c, c.run(*c.linear<DenseLinear>(engine_of(3, table()))));
  }
}

TEST_P(DenseTilesTest, BitsDependNeitherOnThreadsNorOnRows) {
  const LinearCase c(61, 150, 576, 9);
  const std::vector<std::uint16_t> expected = c.run(*c.linear<DenseLinear>(engine_of(1, table())));
  for (const int threads : {2, 5}) {
    const auto linear = c.linear<DenseLinear>(engine_of(threads, table()));
    ASSERT_EQ(c.run(*linear), expected) << threads;
    for (const int count : {1, 16, 30}) {
      const std::vector<std::uint16_t> some = c.run(*linear, 7, count);
      const auto from = expected.begin() + static_cast<std::ptrdiff_t>(at(7, c.out, 0));
      ASSERT_EQ(some, std::vector<std::uint16_t>(from, from + some.size())) << count;
    }
  }
}

TEST(DenseLinear, LoraComesAndGoes) {
  const LinearCase with(3, 40, 64, 4);
  LinearCase without = with;
  without.rank = 0;
  const auto engine = engine_of(2, best());
  const auto linear = with.linear<DenseLinear>(engine);
  const std::vector<std::uint16_t> base = without.run(*without.linear<DenseLinear>(engine));
  EXPECT_NE(with.run(*linear), base);
  testing::apply_no_lora(*linear);
  EXPECT_EQ(with.run(*linear), base);
  const std::vector<float> zeros(at(with.out, 4, 0));
  linear->load_lora(0, view_of(with.a, {4, 64}, "a"), view_of(zeros, {40, 4}, "b"));
  testing::apply_lora(*linear);
  EXPECT_EQ(with.run(*linear), base) << "B = 0 is the base, bit for bit";
}

TEST(DenseLinear, BiasInAnyFloatDtype) {
  LinearCase c(2, 24, 32, 0);
  for (float& value : c.bias) value = testing::round_to_bf16(value);
  const auto engine = engine_of(1, best());
  const std::vector<std::uint16_t> expected = c.run(*c.linear<DenseLinear>(engine));
  const std::vector<std::byte> half = testing::encode(c.bias, DType::kBfloat16);
  DenseLinear linear(engine, view_of(c.w.data(), DType::kBfloat16, {24, 32}, "weight"),
                     view_of(half.data(), DType::kBfloat16, {24}, "bias"));
  EXPECT_EQ(c.run(linear), expected);
}

TEST(DenseLinear, RefusesWhatDoesNotFit) {
  const LinearCase c(2, 24, 32, 4);
  const auto engine = engine_of(1, best());
  const std::vector<float> floats(24 * 32);
  EXPECT_EQ(message_of([&] { DenseLinear(engine, view_of(floats, {24, 32}, "weight"), {}); }),
            "weight is float32, expected bfloat16");
  TensorView apart = view_of(c.w.data(), DType::kBfloat16, {12, 32}, "weight");
  apart.stride[0] = 64;
  EXPECT_EQ(message_of([&] { DenseLinear(engine, apart, {}); }),
            "weight has rows 64 elements apart, expected 32 (contiguous)");
  const TensorView weight = view_of(c.w.data(), DType::kBfloat16, {24, 32}, "weight");
  EXPECT_EQ(message_of([&] { DenseLinear(engine, weight, view_of(floats, {23}, "bias")); }),
            "bias has shape [23], expected [24]");
  DenseLinear linear(engine, weight, {});
  EXPECT_EQ(message_of([&] {
              linear.load_lora(0, view_of(c.a, {4, 31}, "a"), view_of(c.b, {24, 4}, "b"));
            }),
            "a has shape [4, 31], expected [4, 32]");
  EXPECT_EQ(message_of([&] {
              linear.load_lora(0, view_of(c.a, {4, 32}, "a"), view_of(c.b, {24, 3}, "b"));
            }),
            "b has shape [24, 3], expected [24, 4]");
  std::uint16_t out[48];
  EXPECT_EQ(message_of([&] { linear.forward(c.x.data(), 64, out, 47); }),
            "x has 64 elements and out 47, expected rows of 32 and as many of 24");
  engine->close();
  EXPECT_THROW(linear.forward(c.x.data(), 64, out, 48), std::runtime_error);
}

}  // namespace
}  // namespace ktrt
