#include "dense/dense_linear.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/bf16.h"
#include "cpu/isa.h"
#include "helpers/random.h"
#include "helpers/views.h"
#include "kernels/select.h"
#include "kernels/variants.h"

namespace ktrt {
namespace {

using testing::Random;
using testing::view_of;

std::size_t at(std::int64_t row, std::int64_t width, std::int64_t column) {
  return static_cast<std::size_t>(row * width + column);
}

std::shared_ptr<Engine> engine_of(int threads, const KernelTable& kernels) {
  const std::vector<int> nodes(static_cast<std::size_t>(threads), 0);
  return std::make_shared<Engine>(std::vector<int>(static_cast<std::size_t>(threads), -1), nodes, 8,
                                  active_isa(), kernels);
}

KernelTable best() { return select_kernels(active_isa(), cpu_features()); }

// y = x Wᵀ + bias + x Aᵀ Bᵀ.
struct LinearCase {
  LinearCase(int rows_, int out_, int in_, int rank_, bool with_bias = true)
      : rows(rows_), out(out_), in(in_), rank(rank_) {
    Random random(static_cast<std::uint64_t>(out * 31 + in));
    x = bf16(random.normals(at(rows, in, 0)));
    w = bf16(random.normals(at(out, in, 0)));
    if (with_bias) bias = random.normals(static_cast<std::size_t>(out));
    a = random.normals(at(rank, in, 0), 1.0f / std::sqrt(static_cast<float>(in)));
    b = random.normals(at(out, rank, 0));
  }

  static std::vector<std::uint16_t> bf16(const std::vector<float>& values) {
    std::vector<std::uint16_t> bits(values.size());
    for (std::size_t i = 0; i < values.size(); ++i) bits[i] = f32_to_bf16(values[i]);
    return bits;
  }

  std::unique_ptr<DenseLinear> linear(std::shared_ptr<Engine> engine) const {
    std::optional<TensorView> bias_view;
    if (!bias.empty()) bias_view = view_of(bias, {out}, "bias");
    auto linear = std::make_unique<DenseLinear>(
        std::move(engine), view_of(w.data(), DType::kBfloat16, {out, in}, "weight"), bias_view);
    if (rank > 0) linear->set_lora(view_of(a, {rank, in}, "a"), view_of(b, {out, rank}, "b"));
    return linear;
  }

  std::vector<std::uint16_t> run(DenseLinear& linear, int first = 0, int count = -1) const {
    if (count < 0) count = rows;
    std::vector<std::uint16_t> y(at(count, out, 0));
    linear.forward(x.data() + first * in, std::int64_t{count} * in, y.data(),
                   static_cast<std::int64_t>(y.size()));
    return y;
  }

  void expect_near(const std::vector<std::uint16_t>& y) const {
    std::vector<double> t(static_cast<std::size_t>(rank));
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < rank; ++i) t[static_cast<std::size_t>(i)] = dot(r, rounded(a), i);
      for (int n = 0; n < out; ++n) {
        double sum = bias.empty() ? 0.0 : bias[static_cast<std::size_t>(n)];
        double lora = 0.0;
        sum += dot(r, w, n);
        for (int i = 0; i < rank; ++i) {
          const double product =
              t[static_cast<std::size_t>(i)] * bf16_to_f32(f32_to_bf16(b[at(n, rank, i)]));
          sum += product;
          lora += std::abs(product);
        }
        // BF16 rounds the output and T; float32 sums of k products.
        const double allowed =
            0.004 * (std::abs(sum) + lora) + 1e-5 * std::sqrt(static_cast<double>(in));
        ASSERT_NEAR(bf16_to_f32(y[at(r, out, n)]), sum, allowed) << r << " " << n;
      }
    }
  }

  int rows, out, in, rank;
  std::vector<std::uint16_t> x, w;
  std::vector<float> bias, a, b;

 private:
  static std::vector<std::uint16_t> rounded(const std::vector<float>& values) {
    return bf16(values);
  }
  double dot(int row, const std::vector<std::uint16_t>& matrix, int n) const {
    double sum = 0.0;
    for (int i = 0; i < in; ++i) {
      sum += double{bf16_to_f32(x[at(row, in, i)])} * bf16_to_f32(matrix[at(n, in, i)]);
    }
    return sum;
  }
};

class DenseLinearTest : public testing::VariantTest<DenseKernel> {
 protected:
  KernelTable table() const {
    KernelTable table = best();
    table.dense_bf16 = &kernel();
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
        c.expect_near(c.run(*c.linear(engine)));
      }
    }
  }
}

TEST_P(DenseLinearTest, LongDotProductsInParts) {
  const auto engine = engine_of(2, table());
  for (const int in : {2049, 4500}) {
    const LinearCase c(20, 70, in, 8);
    c.expect_near(c.run(*c.linear(engine)));
  }
}

TEST_P(DenseLinearTest, BitsDependNeitherOnThreadsNorOnRows) {
  // Large enough for several threads: one row of the last, all rows of the others; the first is
  // not.
  for (const auto& [out, in] : {std::pair(30, 64), std::pair(150, 320), std::pair(70, 2500)}) {
    const LinearCase c(61, out, in, 9);
    const std::vector<std::uint16_t> expected = c.run(*c.linear(engine_of(1, table())));
    for (const int threads : {2, 3, 5}) {
      const auto linear = c.linear(engine_of(threads, table()));
      ASSERT_EQ(c.run(*linear), expected) << threads;
      for (const int count : {1, 2, 9, 30}) {
        const std::vector<std::uint16_t> some = c.run(*linear, 7, count);
        const auto from = expected.begin() + static_cast<std::ptrdiff_t>(at(7, c.out, 0));
        ASSERT_EQ(some, std::vector<std::uint16_t>(from, from + some.size())) << count;
      }
    }
  }
}

TEST_P(DenseLinearTest, GroupsHaveInputsOfTheirOwn) {
  const LinearCase c(6, 60, 100, 0, false);
  for (const int threads : {1, 3}) {
    const auto linear = c.linear(engine_of(threads, table()));
    const std::vector<std::uint16_t> all = c.run(*linear);
    std::vector<std::uint16_t> y(60);
    linear->forward_groups(6, c.x.data(), 600, y.data(), 60);
    for (int n = 0; n < 60; ++n) {
      ASSERT_EQ(y[static_cast<std::size_t>(n)], all[at(n / 10, 60, n)]) << n;
    }
  }
}

TEST(DenseLinear, LoraComesAndGoes) {
  const LinearCase with(3, 40, 64, 4);
  LinearCase without = with;
  without.rank = 0;
  const auto engine = engine_of(2, best());
  const auto linear = with.linear(engine);
  const std::vector<std::uint16_t> base = without.run(*without.linear(engine));
  EXPECT_NE(with.run(*linear), base);
  linear->clear_lora();
  EXPECT_EQ(with.run(*linear), base);
  const std::vector<float> zeros(at(with.out, 4, 0));
  linear->set_lora(view_of(with.a, {4, 64}, "a"), view_of(zeros, {40, 4}, "b"));
  EXPECT_EQ(with.run(*linear), base) << "B = 0 is the base, bit for bit";
}

TEST(DenseLinear, BiasInAnyFloatDtype) {
  LinearCase c(2, 24, 32, 0);
  for (float& value : c.bias) value = testing::round_to_bf16(value);
  const auto engine = engine_of(1, best());
  const std::vector<std::uint16_t> expected = c.run(*c.linear(engine));
  const std::vector<std::byte> half = testing::encode(c.bias, DType::kBfloat16);
  DenseLinear linear(engine, view_of(c.w.data(), DType::kBfloat16, {24, 32}, "weight"),
                     view_of(half.data(), DType::kBfloat16, {24}, "bias"));
  EXPECT_EQ(c.run(linear), expected);
}

std::string message_of(const auto& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "nothing was thrown";
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
  EXPECT_EQ(
      message_of([&] { linear.set_lora(view_of(c.a, {4, 31}, "a"), view_of(c.b, {24, 4}, "b")); }),
      "a has shape [4, 31], expected [4, 32]");
  EXPECT_EQ(
      message_of([&] { linear.set_lora(view_of(c.a, {4, 32}, "a"), view_of(c.b, {24, 3}, "b")); }),
      "b has shape [24, 3], expected [24, 4]");
  std::uint16_t out[48];
  EXPECT_EQ(message_of([&] { linear.forward(c.x.data(), 64, out, 47); }),
            "x has 64 elements and out 47, expected rows of 32 and as many of 24");
  EXPECT_EQ(message_of([&] { linear.forward_groups(5, c.x.data(), 64, out, 24); }),
            "groups is 5, expected a divisor of 24");
  EXPECT_EQ(message_of([&] { linear.forward_groups(3, c.x.data(), 64, out, 24); }),
            "x has 64 elements and out 24, expected 96 and 24");
  engine->close();
  EXPECT_THROW(linear.forward(c.x.data(), 64, out, 48), std::runtime_error);
}

}  // namespace
}  // namespace ktrt
