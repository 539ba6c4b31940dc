#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "base/bf16.h"
#include "helpers/random.h"
#include "kernels/select.h"
#include "kernels/variants.h"

namespace ktrt {
namespace {

using testing::Random;

std::vector<std::uint16_t> bf16(const std::vector<float>& values) {
  std::vector<std::uint16_t> bits(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) bits[i] = f32_to_bf16(values[i]);
  return bits;
}

class RmsNormTest : public testing::VariantTest<ElementwiseKernels> {};
INSTANTIATE_TEST_SUITE_P(Variants, RmsNormTest,
                         ::testing::ValuesIn(testing::variants_of(testing::elementwises)),
                         testing::variant_name<ElementwiseKernels>);

TEST_P(RmsNormTest, EqualsDoublePrecisionAndTheOtherVariants) {
  const KernelTable portable = select_kernels(Isa::kPortable, {});
  for (const int size : {1, 7, 32, 128, 1000}) {
    Random random(static_cast<std::uint64_t>(size));
    const auto count = static_cast<std::size_t>(size);
    const std::vector<std::uint16_t> x = bf16(random.normals(count, 3.0f));
    const std::vector<float> floats = random.normals(count);
    const std::vector<std::uint16_t> bits = bf16(floats);
    double squares = 0.0;
    for (const std::uint16_t value : x) squares += std::pow(double{bf16_to_f32(value)}, 2);
    const double r = 1.0 / std::sqrt(squares / size + 0.25);
    for (const bool wide : {false, true}) {
      for (const bool twice : {false, true}) {
        for (const float offset : {0.0f, 1.0f}) {
          std::vector<std::uint16_t> out(count), other(count);
          RmsNormArgs args{x.data(),
                           size,
                           wide ? nullptr : bits.data(),
                           wide ? floats.data() : nullptr,
                           offset,
                           0.25f,
                           twice,
                           out.data()};
          kernel().rms_norm(args);
          for (std::size_t i = 0; i < count; ++i) {
            const double weight = double{wide ? floats[i] : bf16_to_f32(bits[i])} + offset;
            const double expected = bf16_to_f32(x[i]) * r * weight;
            // One or two roundings to 8 bits, and of 1 + w to 24.
            const double allowed = (twice ? 0.0079 : 0.00395) * std::abs(expected) + 1e-6;
            ASSERT_NEAR(bf16_to_f32(out[i]), expected, allowed) << size << " " << i;
          }
          args.out = other.data();
          portable.elementwise->rms_norm(args);
          ASSERT_EQ(out, other) << "the same bits on every ISA";
        }
      }
    }
  }
}

TEST_P(RmsNormTest, RoundsTwiceOnlyWhereAsked) {
  // r = 1 / √(1 + 1/2): x · r is no BF16 number.
  const std::vector<std::uint16_t> x(64, f32_to_bf16(1.0f));
  const std::vector<float> weight(64, 1.0078125f);
  const float normed = 1.0f / std::sqrt(1.5f);
  std::vector<std::uint16_t> out(64);
  RmsNormArgs args{x.data(), 64, nullptr, weight.data(), 0.0f, 0.5f, true, out.data()};
  kernel().rms_norm(args);
  const std::uint16_t twice = f32_to_bf16(weight[0] * bf16_to_f32(f32_to_bf16(normed)));
  EXPECT_EQ(out, std::vector<std::uint16_t>(64, twice));
  args.rounds_twice = false;
  kernel().rms_norm(args);
  const std::uint16_t once = f32_to_bf16(weight[0] * normed);
  EXPECT_EQ(out, std::vector<std::uint16_t>(64, once));
}

TEST_P(RmsNormTest, KeepsNan) {
  std::vector<std::uint16_t> x(40, f32_to_bf16(1.0f));
  x[39] = f32_to_bf16(NAN);
  const std::vector<std::uint16_t> weight(40, f32_to_bf16(1.0f));
  RmsNormArgs args{x.data(), 40, weight.data(), nullptr, 0.0f, 1e-6f, false, x.data()};
  kernel().rms_norm(args);
  for (const std::uint16_t value : x) EXPECT_TRUE(std::isnan(bf16_to_f32(value)));
}

}  // namespace
}  // namespace ktrt
