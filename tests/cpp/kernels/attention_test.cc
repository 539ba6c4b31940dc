#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/bf16.h"
#include "helpers/random.h"
#include "kernels/variants.h"

namespace ktrt {
namespace {

using testing::Random;

constexpr float kNothing = -INFINITY;

std::size_t at(std::int64_t row, std::int64_t width, std::int64_t column) {
  return static_cast<std::size_t>(row * width + column);
}

std::vector<std::uint16_t> random_bf16(Random& random, std::size_t count) {
  std::vector<std::uint16_t> values(count);
  for (std::uint16_t& value : values) value = f32_to_bf16(random.normal());
  return values;
}

class AttentionTest : public testing::VariantTest<AttentionKernel> {
 protected:
  std::vector<float> packed(const std::vector<float>& rows, int count, int size) const {
    const int width = round_up(size, kernel().width);
    std::vector<float> out(at(count, width, 0), 9.0f);
    for (int r = 0; r < count; ++r) {
      kernel().pack(nullptr, rows.data() + r * size, size, out.data() + r * width);
    }
    return out;
  }

  void expect_dot_products(bool bf16) const;

  // The merge of one part.
  std::vector<float> unpacked(const float* sums, int size) const {
    std::vector<float> scratch(at(1, round_up(size, kernel().width), 0));
    std::vector<float> out(static_cast<std::size_t>(size));
    const float max = 0.0f;
    const float sum = 1.0f;
    kernel().merge(
        {sums, 0, &max, &sum, 0, 1, kNothing, size, scratch.data(), out.data(), nullptr});
    return out;
  }
};
INSTANTIATE_TEST_SUITE_P(Variants, AttentionTest,
                         ::testing::ValuesIn(testing::variants_of(testing::attention_kernels)),
                         testing::variant_name<AttentionKernel>);

TEST_P(AttentionTest, PacksEitherDtypeAndMergeUnpacks) {
  for (const int size : {1, 2, 15, 33, 64, 100}) {
    Random random(static_cast<std::uint64_t>(size));
    const std::vector<std::uint16_t> bits = random_bf16(random, static_cast<std::size_t>(size));
    std::vector<float> values;
    for (const std::uint16_t bit : bits) values.push_back(bf16_to_f32(bit));
    const std::vector<float> from_floats = packed(values, 1, size);
    std::vector<float> from_bits(from_floats.size(), 9.0f);
    kernel().pack(bits.data(), nullptr, size, from_bits.data());
    EXPECT_EQ(from_bits, from_floats);
    EXPECT_EQ(unpacked(from_bits.data(), size), values);
    EXPECT_EQ(static_cast<int>(std::count(from_bits.begin(), from_bits.end(), 0.0f)),
              static_cast<int>(from_bits.size()) - size)
        << "zeros after the values";
  }
}

void AttentionTest::expect_dot_products(bool bf16) const {
  for (const int heads : {1, 2, 3, 4, 5, 6, 7, 8, 11, 16}) {
    for (const auto& [size, tokens] :
         {std::pair(1, 1), std::pair(24, 7), std::pair(64, 64), std::pair(80, 33)}) {
      Random random(static_cast<std::uint64_t>(heads * 100 + size));
      std::vector<float> q = random.normals(at(heads, size, 0));
      const std::int64_t width = round_up(size, kernel().width);
      std::vector<std::uint16_t> bits(at(heads, width, 0));
      for (int i = 0; bf16 && i < heads * size; ++i) {
        std::uint16_t& bit = bits[at(i / size, width, i % size)];
        bit = f32_to_bf16(q[at(i, 1, 0)]);
        q[at(i, 1, 0)] = bf16_to_f32(bit);
      }
      const std::int64_t stride = size + 3;
      // As long as the last token needs: nothing after it must be read.
      const std::vector<std::uint16_t> keys = random_bf16(random, at(tokens - 1, stride, size));
      const std::vector<float> rows = packed(q, heads, size);
      std::vector<float> scores(at(heads, kAttentionBlock, 0), 3.0f);
      AttentionScoreArgs args{};
      args.q = bf16 ? nullptr : rows.data();
      args.q_bf16 = bf16 ? bits.data() : nullptr;
      args.q_stride = width;
      args.heads = heads;
      args.keys = keys.data();
      args.key_stride = stride;
      args.tokens = tokens;
      args.size = size;
      args.scores = scores.data();
      args.coming = {keys.data(), stride, tokens, size};
      const auto run = bf16 ? kernel().bf16_scores : kernel().scores;
      run(args);
      const std::vector<float> once = scores;
      for (int h = 0; h < heads; ++h) {
        for (int t = 0; t < tokens; ++t) {
          double sum = 0.0;
          double magnitude = 0.0;
          for (int i = 0; i < size; ++i) {
            const double product = double{q[at(h, size, i)]} * bf16_to_f32(keys[at(t, stride, i)]);
            sum += product;
            magnitude += std::abs(product);
          }
          ASSERT_NEAR(once[at(h, kAttentionBlock, t)], sum, 1e-6 * magnitude) << heads << " " << h;
        }
        if (tokens < kAttentionBlock) {
          ASSERT_EQ(once[at(h, kAttentionBlock, tokens)], 3.0f) << "written after the tokens";
        }
      }
      args.add = true;
      run(args);
      for (int t = 0; t < tokens; ++t) {
        ASSERT_EQ(scores[static_cast<std::size_t>(t)], 2 * once[static_cast<std::size_t>(t)]);
      }
    }
  }
}

TEST_P(AttentionTest, ScoresAreDotProducts) {
  expect_dot_products(false);
  if (kernel().bf16_scores != nullptr) expect_dot_products(true);
}

TEST_P(AttentionTest, ValuesAreWeightedSums) {
  for (const int heads : {1, 2, 3, 4, 5, 6, 7, 8, 11, 16}) {
    for (const auto& [size, tokens] :
         {std::pair(1, 1), std::pair(24, 7), std::pair(64, 64), std::pair(200, 33)}) {
      Random random(static_cast<std::uint64_t>(heads * 100 + size));
      const std::vector<float> weights = random.normals(at(heads, kAttentionBlock, 0));
      const std::vector<float> carry = random.normals(static_cast<std::size_t>(heads));
      const std::int64_t stride = size + 5;
      const std::vector<std::uint16_t> values = random_bf16(random, at(tokens - 1, stride, size));
      const std::int64_t width = round_up(size, kernel().width);
      std::vector<float> sums(at(heads, width + 1, 0), 7.0f);
      AttentionValueArgs args{};
      args.weights = weights.data();
      args.heads = heads;
      args.values = values.data();
      args.value_stride = stride;
      args.tokens = tokens;
      args.size = size;
      args.sums = sums.data();
      args.sum_stride = width + 1;
      args.coming = {values.data(), stride, tokens, size};
      kernel().values(args);
      const std::vector<float> once = sums;
      args.carry = carry.data();
      kernel().values(args);
      for (int h = 0; h < heads; ++h) {
        const std::vector<float> first = unpacked(once.data() + h * (width + 1), size);
        const std::vector<float> second = unpacked(sums.data() + h * (width + 1), size);
        const double factor = 1.0 + carry[static_cast<std::size_t>(h)];
        for (int i = 0; i < size; ++i) {
          double sum = 0.0;
          double magnitude = 0.0;
          for (int t = 0; t < tokens; ++t) {
            const double product =
                double{weights[at(h, kAttentionBlock, t)]} * bf16_to_f32(values[at(t, stride, i)]);
            sum += product;
            magnitude += std::abs(product);
          }
          const auto n = static_cast<std::size_t>(i);
          ASSERT_NEAR(first[n], sum, 2e-6 * magnitude) << heads << " " << h;
          ASSERT_NEAR(second[n], factor * sum, 4e-6 * magnitude * (1 + std::abs(factor)));
        }
        ASSERT_EQ(sums[at(h, width + 1, width)], 7.0f) << "written after the head";
      }
    }
  }
}

// Two blocks, one after the other: weights, max, sum and carry against float64.
TEST_P(AttentionTest, SoftmaxGoesOnFromBlockToBlock) {
  constexpr int kHeads = 3;
  for (const float softcap : {0.0f, 5.0f}) {
    for (const int tokens : {1, 17, kAttentionBlock}) {
      Random random(static_cast<std::uint64_t>(tokens));
      std::vector<float> max(kHeads, kNothing), sum(kHeads, 0.0f), carry(kHeads, 9.0f);
      std::vector<double> total(kHeads, 0.0), shift(kHeads, kNothing);
      for (const bool masked : {false, true}) {
        std::vector<float> mask = random.normals(static_cast<std::size_t>(tokens));
        mask.back() = kNothing;
        const std::vector<float> scores = random.normals(at(kHeads, kAttentionBlock, 0), 30.0f);
        std::vector<float> weights = scores;
        kernel().softmax({weights.data(), kHeads, tokens, 0.3f, softcap,
                          masked ? mask.data() : nullptr, max.data(), sum.data(), carry.data()});
        for (std::size_t h = 0; h < kHeads; ++h) {
          std::vector<double> s;
          double most = shift[h];
          for (int t = 0; t < tokens; ++t) {
            double x = 0.3 * scores[h * kAttentionBlock + static_cast<std::size_t>(t)];
            if (softcap > 0) x = softcap * std::tanh(x / softcap);
            if (masked) x += mask[static_cast<std::size_t>(t)];
            s.push_back(x);
            most = std::max(most, x);
          }
          total[h] *= shift[h] == most ? 1.0 : std::exp(shift[h] - most);
          EXPECT_NEAR(carry[h], std::exp(shift[h] - most), 1e-5 * carry[h] + 1e-30);
          shift[h] = most;
          for (int t = 0; t < kAttentionBlock; ++t) {
            const double expected =
                t < tokens ? std::exp(s[static_cast<std::size_t>(t)] - most) : 0;
            total[h] += expected;
            const float weight = weights[h * kAttentionBlock + static_cast<std::size_t>(t)];
            ASSERT_NEAR(weight, expected, 1e-5 * expected + 1e-37) << tokens << " " << t;
          }
          EXPECT_NEAR(sum[h], total[h], 1e-5 * total[h]);
        }
      }
    }
  }
}

TEST_P(AttentionTest, AMaskedBlockCountsNothing) {
  std::vector<float> scores(kAttentionBlock, 1.0f), mask(kAttentionBlock, kNothing);
  float max = kNothing;
  float sum = 0.0f;
  float carry = 9.0f;
  kernel().softmax(
      {scores.data(), 1, kAttentionBlock, 1.0f, 0.0f, mask.data(), &max, &sum, &carry});
  EXPECT_EQ(sum, 0.0f);
  EXPECT_EQ(max, kNothing);
  EXPECT_EQ(scores, std::vector<float>(kAttentionBlock, 0.0f));
  scores[3] = NAN;
  kernel().softmax({scores.data(), 1, kAttentionBlock, 1.0f, 0.0f, nullptr, &max, &sum, &carry});
  EXPECT_TRUE(std::isnan(scores[3]) && std::isnan(sum)) << "NaN is not swallowed";
}

TEST_P(AttentionTest, MergesPartsAndASinkAndRoundsOnce) {
  constexpr int kSize = 37;
  constexpr int kParts = 3;
  const int width = round_up(kSize, kernel().width);
  Random random(5);
  const std::vector<float> rows = random.normals(at(kParts, kSize, 0));
  const std::vector<float> sums = packed(rows, kParts, kSize);
  const std::vector<float> max = {1.0f, 3.0f, kNothing};
  const std::vector<float> sum = {2.0f, 1.5f, 0.0f};
  for (const float sink : {kNothing, 0.5f, 6.0f}) {
    std::vector<float> scratch(at(1, width, 0)), floats(kSize);
    std::vector<std::uint16_t> bits(kSize);
    AttentionMergeArgs args{sums.data(), width, max.data(),     sum.data(),    1,      kParts,
                            sink,        kSize, scratch.data(), floats.data(), nullptr};
    kernel().merge(args);
    args.out_f32 = nullptr;
    args.out_bf16 = bits.data();
    kernel().merge(args);
    const double whole = 2.0 * std::exp(1.0) + 1.5 * std::exp(3.0) + std::exp(double{sink});
    for (int i = 0; i < kSize; ++i) {
      const double a = rows[at(0, kSize, i)] * std::exp(1.0);
      const double b = rows[at(1, kSize, i)] * std::exp(3.0);
      const auto n = static_cast<std::size_t>(i);
      ASSERT_NEAR(floats[n], (a + b) / whole, 2e-6 * (std::abs(a) + std::abs(b)) / whole);
      ASSERT_EQ(bits[n], f32_to_bf16(floats[n]));
    }
  }
}

}  // namespace
}  // namespace ktrt
