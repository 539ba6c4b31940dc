// Both conversions are monotone, so checking every representable value and both neighbours of every
// rounding boundary covers all 2^32 floats.
#include "base/bf16.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "helpers/random.h"

namespace ktrt {
namespace {

// A 16-bit format with the value that its bits stand for, by the definition in IEEE 754.
struct Format {
  const char* name;
  int exponent_bits;
  int mantissa_bits;
  float (*to_f32)(std::uint16_t);
  std::uint16_t (*from_f32)(float);

  std::uint16_t infinity() const {
    return static_cast<std::uint16_t>(((1 << exponent_bits) - 1) << mantissa_bits);
  }

  double value_of(std::uint16_t bits) const {
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = (bits & 0x7fff) >> mantissa_bits;
    const int mantissa = bits & ((1 << mantissa_bits) - 1);
    const int hidden = exponent > 0 ? 1 << mantissa_bits : 0;
    const double magnitude =
        std::ldexp(hidden + mantissa, (exponent > 0 ? exponent : 1) - bias - mantissa_bits);
    return (bits & 0x8000) != 0 ? -magnitude : magnitude;
  }
};

class ConversionTest : public ::testing::TestWithParam<Format> {};

INSTANTIATE_TEST_SUITE_P(Formats, ConversionTest,
                         ::testing::Values(Format{"bf16", 8, 7, bf16_to_f32, f32_to_bf16},
                                           Format{"fp16", 5, 10, fp16_to_f32, f32_to_fp16}),
                         [](const auto& format) { return format.param.name; });

TEST_P(ConversionTest, EveryFiniteValueIsExactBothWays) {
  const Format format = GetParam();
  for (std::uint32_t i = 0; i <= 0xffff; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    if ((bits & 0x7fff) >= format.infinity()) continue;
    const float value = format.to_f32(bits);
    ASSERT_EQ(value, format.value_of(bits)) << std::hex << bits;
    ASSERT_EQ(std::signbit(value), (bits & 0x8000) != 0) << std::hex << bits;
    ASSERT_EQ(format.from_f32(value), bits) << std::hex << bits;
  }
}

TEST_P(ConversionTest, RoundsToTheNearestEven) {
  const Format format = GetParam();
  for (std::uint16_t low = 0; low < format.infinity(); ++low) {
    const auto high = static_cast<std::uint16_t>(low + 1);
    const bool overflows = high == format.infinity();
    // The next number if the exponents went on: rounding up to it gives infinity.
    const double above =
        overflows ? 2 * format.value_of(low) - format.value_of(static_cast<std::uint16_t>(low - 1))
                  : format.value_of(high);
    const auto middle = static_cast<float>((format.value_of(low) + above) / 2);
    const std::uint16_t even = (low & 1) == 0 ? low : high;
    for (const int sign : {0, 0x8000}) {
      const float signed_middle = sign != 0 ? -middle : middle;
      const float inside = std::nextafter(signed_middle, 0.0f);
      const float outside = std::nextafter(signed_middle, signed_middle * 2);
      ASSERT_EQ(format.from_f32(inside), low | sign) << "below the middle after " << low;
      ASSERT_EQ(format.from_f32(signed_middle), even | sign) << "the middle after " << low;
      ASSERT_EQ(format.from_f32(outside), high | sign) << "above the middle after " << low;
    }
  }
}

TEST_P(ConversionTest, InfinityAndNanStayWhatTheyAre) {
  const Format format = GetParam();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(format.from_f32(kInfinity), format.infinity());
  EXPECT_EQ(format.from_f32(-kInfinity), format.infinity() | 0x8000);
  EXPECT_EQ(format.to_f32(format.infinity()), kInfinity);
  EXPECT_EQ(format.from_f32(std::numeric_limits<float>::max()), format.infinity());
  for (std::uint32_t bits = format.infinity() + 1; bits <= 0x7fff; ++bits) {
    for (const std::uint32_t sign : {0u, 0x8000u}) {
      const float nan = format.to_f32(static_cast<std::uint16_t>(bits | sign));
      ASSERT_TRUE(std::isnan(nan));
      ASSERT_GT(format.from_f32(nan) & 0x7fff, format.infinity());
      ASSERT_EQ(format.from_f32(nan) & 0x8000, sign);
    }
  }
  // A payload in the bits that are cut off must not turn into infinity.
  EXPECT_GT(format.from_f32(std::bit_cast<float>(0x7f800001u)) & 0x7fff, format.infinity());
}

TEST_P(ConversionTest, RandomFloatsGoToANearestValue) {
  const Format format = GetParam();
  testing::Random random(1);
  for (int i = 0; i < 1'000'000; ++i) {
    const auto value = std::bit_cast<float>(static_cast<std::uint32_t>(random.bits()));
    const std::uint16_t bits = format.from_f32(value);
    if (!std::isfinite(value) || (bits & 0x7fff) == format.infinity()) continue;
    const double error = std::fabs(value - format.value_of(bits));
    for (const int neighbour : {bits - 1, bits + 1}) {
      if (((bits ^ neighbour) & 0x8000) != 0) continue;  // stepped over zero
      const auto other = static_cast<std::uint16_t>(neighbour);
      ASSERT_LE(error, std::fabs(value - format.value_of(other))) << value;
    }
  }
}

}  // namespace
}  // namespace ktrt
