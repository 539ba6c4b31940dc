#include "linear/packed_linear.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
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

// Rows of INT8 codes, one scale each, by the format's definition and in double where it matters.
struct Quantized {
  Quantized(const std::vector<std::uint16_t>& values, int rows, int width)
      : codes(values.size()), scales(static_cast<std::size_t>(rows)) {
    for (int r = 0; r < rows; ++r) {
      float largest = 0.0f;
      for (int i = 0; i < width; ++i) {
        largest = std::max(largest, std::abs(bf16_to_f32(values[at(r, width, i)])));
      }
      const float scale = largest * (1.0f / 127.0f);
      const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
      scales[static_cast<std::size_t>(r)] = scale;
      for (int i = 0; i < width; ++i) {
        codes[at(r, width, i)] =
            static_cast<int>(std::nearbyint(bf16_to_f32(values[at(r, width, i)]) * inverse));
      }
    }
  }
  std::vector<int> codes;
  std::vector<float> scales;
};

void expect_near(const LinearCase& c, const std::vector<std::uint16_t>& y) {
  const Quantized x(c.x, c.rows, c.in);
  const Quantized w(c.w, c.out, c.in);
  for (int r = 0; r < c.rows; ++r) {
    const auto added = c.lora(r);
    for (int n = 0; n < c.out; ++n) {
      std::int64_t codes = 0;
      for (int i = 0; i < c.in; ++i) {
        codes += std::int64_t{x.codes[at(r, c.in, i)]} * w.codes[at(n, c.in, i)];
      }
      const float scale =
          x.scales[static_cast<std::size_t>(r)] * w.scales[static_cast<std::size_t>(n)];
      const float product = scale * static_cast<float>(codes);
      const float found = bf16_to_f32(y[at(r, c.out, n)]);
      if (c.rank == 0) {
        ASSERT_EQ(found, testing::round_to_bf16(product + c.bias_of(n))) << r << " " << n;
        continue;
      }
      // BF16 rounds the output and T.
      const auto [lora, size] = added[static_cast<std::size_t>(n)];
      const double sum = double{product} + c.bias_of(n) + lora;
      ASSERT_NEAR(found, sum, 0.004 * (std::abs(sum) + size) + 1e-4) << r << " " << n;
    }
  }
}

// A GEMM for any number of rows, with the shrink that belongs to it.
class PackedLinearTest : public testing::VariantTest<GemmKernel> {
 protected:
  KernelTable table() const {
    KernelTable table = testing::best_kernels();
    table.gemm(WeightFormat::kInt8) = {&kernel(), &kernel(), 1};
    if (table.lora_shrink_tiles == nullptr) table.lora_shrink_tiles = &emulated_amx_shrink();
    return table;
  }
};
INSTANTIATE_TEST_SUITE_P(Variants, PackedLinearTest,
                         ::testing::ValuesIn(testing::all_gemms(WeightFormat::kInt8)),
                         testing::variant_name<GemmKernel>);

TEST_P(PackedLinearTest, EqualsTheReference) {
  const auto engine = engine_of(2, table());
  for (const int rank : {0, 1, 8, 17}) {
    for (const int rows : {1, 2, 17, 40, 70}) {
      for (const auto& [out, in] :
           {std::pair(1, 5), std::pair(77, 100), std::pair(96, 128), std::pair(160, 300)}) {
        const LinearCase c(rows, out, in, rank, rank != 8);
        expect_near(c, c.run(*c.linear<PackedLinear>(engine)));
      }
    }
  }
}

TEST_P(PackedLinearTest, RowsInSeveralBlocksOfK) {
  // More rows than one block takes, and rows of more than the layout's block of k.
  const auto engine = engine_of(2, table());
  for (const auto& [rows, out, in] : {std::tuple(300, 40, 64), std::tuple(41, 40, 20000)}) {
    const LinearCase c(rows, out, in, 3);
    expect_near(c, c.run(*c.linear<PackedLinear>(engine)));
  }
}

TEST_P(PackedLinearTest, BitsDependNeitherOnThreadsNorOnRows) {
  for (const auto& [out, in] : {std::pair(30, 64), std::pair(1030, 320)}) {
    const LinearCase c(61, out, in, 40);
    const auto expected = c.run(*c.linear<PackedLinear>(engine_of(1, table())));
    for (const int threads : {2, 3, 5}) {
      const auto linear = c.linear<PackedLinear>(engine_of(threads, table()));
      ASSERT_EQ(c.run(*linear), expected) << threads;
      for (const int count : {1, 2, 9, 30}) {
        const std::vector<std::uint16_t> some = c.run(*linear, 7, count);
        const auto from = expected.begin() + static_cast<std::ptrdiff_t>(at(7, c.out, 0));
        ASSERT_EQ(some, std::vector<std::uint16_t>(from, from + some.size())) << count;
      }
    }
  }
}

TEST(PackedLinear, LargeSumsAreExact) {
  LinearCase c(2, 32, static_cast<int>(PackedLinear::kMaxIn), 0, false);
  std::fill(c.x.begin(), c.x.end(), f32_to_bf16(1.0f));
  std::fill(c.w.begin(), c.w.end(), f32_to_bf16(-1.0f));
  const auto y = c.run(*c.linear<PackedLinear>(engine_of(1, testing::best_kernels())));
  for (const std::uint16_t value : y) ASSERT_EQ(bf16_to_f32(value), -65536.0f);
}

TEST(PackedLinear, RowsOfZeros) {
  LinearCase c(2, 40, 64, 0);
  std::fill(c.x.begin(), c.x.begin() + 64, std::uint16_t{0});
  std::fill(c.w.begin(), c.w.begin() + 64, std::uint16_t{0});
  expect_near(c, c.run(*c.linear<PackedLinear>(engine_of(2, testing::best_kernels()))));
}

TEST(PackedLinear, NanStaysInItsRow) {
  LinearCase c(4, 40, 64, 4);
  const auto linear = c.linear<PackedLinear>(engine_of(2, testing::best_kernels()));
  const auto before = c.run(*linear);
  c.x[at(1, 64, 5)] = f32_to_bf16(std::numeric_limits<float>::quiet_NaN());
  const auto after = c.run(*linear);
  for (int r = 0; r < 4; ++r) {
    for (int n = 0; n < 40; ++n) {
      const std::size_t i = at(r, 40, n);
      ASSERT_TRUE(r == 1 ? std::isnan(bf16_to_f32(after[i])) : after[i] == before[i]) << r;
    }
  }
}

TEST(PackedLinear, LoraComesAndGoes) {
  const LinearCase c(3, 40, 64, 4);
  LinearCase without = c;
  without.rank = 0;
  const auto engine = engine_of(2, testing::best_kernels());
  const auto linear = c.linear<PackedLinear>(engine);
  const auto base = without.run(*without.linear<PackedLinear>(engine));
  EXPECT_NE(c.run(*linear), base);
  EXPECT_EQ(linear->packed_bytes(), 64u * 64u + 64u * 8u) << "40 outputs are two strips";
  testing::apply_no_lora(*linear);
  EXPECT_EQ(c.run(*linear), base);
  const std::vector<float> zeros(at(c.out, 4, 0));
  linear->load_lora(0, view_of(c.a, {4, 64}, "a"), view_of(zeros, {40, 4}, "b"));
  testing::apply_lora(*linear);
  EXPECT_EQ(c.run(*linear), base) << "B = 0 is the base, bit for bit";
}

TEST(PackedLinear, RefusesWhatDoesNotFit) {
  LinearCase c(2, 24, 32, 4);
  const auto engine = engine_of(1, testing::best_kernels());
  const std::vector<float> floats(24 * 32);
  EXPECT_EQ(message_of([&] { PackedLinear(engine, view_of(floats, {24, 32}, "weight"), {}); }),
            "weight is float32, expected bfloat16");
  EXPECT_EQ(message_of([&] { PackedLinear(engine, c.weight(), view_of(floats, {23}, "bias")); }),
            "bias has shape [23], expected [24]");
  const std::vector<std::uint16_t> row(PackedLinear::kMaxIn + 1);
  const TensorView wide = view_of(row.data(), DType::kBfloat16, {1, 65537}, "weight");
  EXPECT_EQ(message_of([&] { PackedLinear(engine, wide, {}); }),
            "weight has rows of 65537, expected at most 65536 for exact sums in INT8");
  PackedLinear linear(engine, c.weight(), {});
  EXPECT_EQ(message_of([&] {
              linear.load_lora(0, view_of(c.a, {4, 31}, "a"), view_of(c.b, {24, 4}, "b"));
            }),
            "a has shape [4, 31], expected [4, 32]");
  const std::vector<float> large(257 * 32);
  EXPECT_EQ(message_of([&] {
              linear.load_lora(0, view_of(large, {257, 32}, "a"), view_of(large, {24, 257}, "b"));
            }),
            "a has shape [257, 32], expected [rank, 32] with a rank from 1 to 256");
  std::uint16_t out[48];
  EXPECT_EQ(message_of([&] { linear.forward(c.x.data(), 64, out, 47); }),
            "x has 64 elements and out 47, expected rows of 32 and as many of 24");
  for (const float damaged :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    c.w[at(23, 32, 31)] = f32_to_bf16(damaged);
    EXPECT_EQ(message_of([&] { PackedLinear(engine, c.weight(), {}); }),
              "weight holds NaN or infinity; the weights are damaged");
  }
  engine->close();
  EXPECT_THROW(linear.forward(c.x.data(), 64, out, 48), std::runtime_error);
  EXPECT_THROW(PackedLinear(engine, c.weight(), {}), std::runtime_error);
}

}  // namespace
}  // namespace ktrt
