// Row-wise stages: right, and the same bits on every instruction set.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "base/bf16.h"
#include "helpers/random.h"
#include "kernels/variants.h"

namespace ktrt {
namespace {

using testing::Random;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int kStrip = 32;

class ElementwiseTest : public testing::VariantTest<ElementwiseKernels> {
 protected:
  static const ElementwiseKernels& portable() {
    return *select_kernels(Isa::kPortable, CpuFeatures{}).elementwise;
  }
};
INSTANTIATE_TEST_SUITE_P(Variants, ElementwiseTest,
                         ::testing::ValuesIn(testing::variants_of(testing::elementwises)),
                         testing::variant_name<ElementwiseKernels>);

struct QuantizedRow {
  float scale;
  std::vector<std::uint8_t> codes;
  friend bool operator==(const QuantizedRow& a, const QuantizedRow& b) {
    return std::bit_cast<std::uint32_t>(a.scale) == std::bit_cast<std::uint32_t>(b.scale) &&
           a.codes == b.codes;
  }
};

QuantizedRow quantize(const ElementwiseKernels& kernels, const std::vector<std::uint16_t>& row,
                      int padded, std::uint8_t offset) {
  constexpr std::uint8_t kGuard = 0x5a;
  QuantizedRow result;
  result.codes.assign(static_cast<std::size_t>(padded) + 1, kGuard);
  result.scale = kernels.quantize_row(row.data(), static_cast<int>(row.size()), padded, offset,
                                      result.codes.data());
  EXPECT_EQ(result.codes.back(), kGuard) << "written beyond the padded row";
  result.codes.pop_back();
  return result;
}

std::vector<std::uint16_t> to_bf16(const std::vector<float>& values) {
  std::vector<std::uint16_t> bits;
  for (const float value : values) bits.push_back(f32_to_bf16(value));
  return bits;
}

std::vector<std::uint16_t> random_row(Random& random, int count) {
  const auto magnitude = static_cast<float>(std::exp(random.uniform(-20.0, 20.0)));
  return to_bf16(random.normals(static_cast<std::size_t>(count), magnitude));
}

// kt_kernel's rule: scale = max · float32(1/127), code = round_half_even(x · (1/scale)).
TEST_P(ElementwiseTest, QuantizeRowFollowsTheRule) {
  Random random(11);
  for (int count = 1; count <= 200; ++count) {
    const std::vector<std::uint16_t> row = random_row(random, count);
    const int padded = (count + 63) / 64 * 64;
    float largest = 0.0f;
    for (const std::uint16_t bits : row) largest = std::max(largest, std::fabs(bf16_to_f32(bits)));
    const float scale = largest * (1.0f / 127.0f);
    for (const int offset : {0, 128}) {
      const QuantizedRow quantized =
          quantize(kernel(), row, padded, static_cast<std::uint8_t>(offset));
      ASSERT_EQ(quantized.scale, scale);
      for (std::size_t i = 0; i < quantized.codes.size(); ++i) {
        const float value = i < row.size() ? bf16_to_f32(row[i]) : 0.0f;
        const long code = std::lrint(value * (1.0f / scale));
        ASSERT_EQ(quantized.codes[i], static_cast<std::uint8_t>(code + offset))
            << count << " " << i;
      }
    }
  }
}

TEST_P(ElementwiseTest, QuantizeRowRoundsHalvesToEven) {
  const std::vector<std::uint16_t> row = to_bf16({127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127});
  const std::vector<std::uint8_t> expected = {255, 128, 130, 130, 128, 126, 126, 1};
  const QuantizedRow quantized = quantize(kernel(), row, 8, 128);
  EXPECT_EQ(quantized.scale, 1.0f);
  EXPECT_EQ(quantized.codes, expected);
}

// Zero codes everywhere; the scale is 0 where the row is (nearly) zero, and carries NaN or infinity
// into every output of the row otherwise.
TEST_P(ElementwiseTest, QuantizeRowOfSpecialValues) {
  struct Special {
    float value;
    float scale;
  };
  for (const auto& [value, scale] :
       {Special{0.0f, 0.0f}, Special{-0.0f, 0.0f}, Special{1e-40f, 0.0f}, Special{1e-37f, 0.0f},
        Special{kInfinity, kInfinity}, Special{-kInfinity, kInfinity}, Special{kNan, kNan}}) {
    for (const bool among_ones : {false, true}) {
      if (among_ones && scale == 0.0f) continue;
      std::vector<float> values(40, among_ones ? 1.0f : 0.0f);
      values[37] = value;
      const QuantizedRow quantized = quantize(kernel(), to_bf16(values), 64, 128);
      EXPECT_EQ(quantized.codes, std::vector<std::uint8_t>(64, 128)) << value;
      if (std::isnan(scale)) {
        EXPECT_TRUE(std::isnan(quantized.scale));
      } else {
        EXPECT_EQ(quantized.scale, scale) << value;
      }
    }
  }
}

TEST_P(ElementwiseTest, QuantizeRowOfExtremeMagnitudes) {
  for (const float value : {1e-36f, 1e-30f, 1e30f, 3.38e38f}) {
    const QuantizedRow quantized = quantize(kernel(), to_bf16({value, -value, 0.0f}), 3, 0);
    EXPECT_EQ(quantized.codes, (std::vector<std::uint8_t>{127, 129, 0})) << value;
  }
}

TEST_P(ElementwiseTest, QuantizeRowHasTheBitsOfThePortableOne) {
  Random random(12);
  for (int i = 0; i < 2000; ++i) {
    const int count = random.integer(1, 400);
    std::vector<std::uint16_t> row = random_row(random, count);
    // Now and then any bit pattern: infinities, NaN, subnormals.
    if (i % 4 == 0)
      row[static_cast<std::size_t>(count / 2)] = static_cast<std::uint16_t>(random.bits());
    const int padded = count + random.integer(0, 70);
    ASSERT_EQ(quantize(kernel(), row, padded, 128), quantize(portable(), row, padded, 128));
  }
}

TEST_P(ElementwiseTest, Bf16ConversionIsTheScalarOne) {
  std::vector<float> values;
  for (std::uint32_t high = 0; high <= 0xffff; ++high) {
    for (const std::uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      values.push_back(std::bit_cast<float>(high << 16 | low));
    }
  }
  std::vector<std::uint16_t> converted(values.size());
  kernel().f32_to_bf16(values.data(), static_cast<int>(values.size()), converted.data());
  for (std::size_t i = 0; i < values.size(); ++i) {
    ASSERT_EQ(converted[i], f32_to_bf16(values[i])) << values[i];
  }
}

TEST_P(ElementwiseTest, Bf16ConversionOfAnyCount) {
  Random random(13);
  for (int count = 0; count <= 100; ++count) {
    const std::vector<float> values = random.normals(static_cast<std::size_t>(count));
    std::vector<std::uint16_t> converted(values.size() + 1, 0x1234);
    kernel().f32_to_bf16(values.data(), count, converted.data());
    std::vector<std::uint16_t> expected = to_bf16(values);
    expected.push_back(0x1234);
    ASSERT_EQ(converted, expected);
  }
}

// bf16(silu(gate) · up) of one strip row.
std::vector<std::uint16_t> silu_mul(const ElementwiseKernels& kernels,
                                    const std::vector<float>& gate, const std::vector<float>& up) {
  std::vector<std::uint16_t> out(gate.size());
  const int rows = static_cast<int>(gate.size()) / kStrip;
  kernels.silu_mul(gate.data(), up.data(), rows, out.data(), kStrip);
  return out;
}

// The float32 error shows where a result lies close to a rounding boundary of BF16: many samples.
TEST_P(ElementwiseTest, SiluIsAccurate) {
  Random random(16);
  std::vector<float> gate = {1e-38f, -1e-38f, 1e-10f, -1e-10f, 88.0f, -88.0f, 1e4f, 3e38f};
  while (gate.size() < 1'000'000 + kStrip) {
    gate.push_back(static_cast<float>(random.uniform(-30.0, 30.0)));
  }
  for (int i = -4'000; i < 4'000; ++i) gate.push_back(static_cast<float>(i) * 0.021f);
  gate.resize(gate.size() / kStrip * kStrip);
  std::vector<float> up;
  for (std::size_t i = 0; i < gate.size(); ++i) {
    up.push_back(static_cast<float>(random.uniform(0.25, 1.0)));
  }
  const std::vector<std::uint16_t> out = silu_mul(kernel(), gate, up);
  for (std::size_t i = 0; i < gate.size(); ++i) {
    const double g = gate[i];
    const double exact = g / (1.0 + std::exp(-g)) * up[i];
    // Half a unit in the last place of BF16, which stops shrinking at 2^-133, and the error in
    // float32. e^-87 stands for everything below it.
    const int exponent = exact == 0.0 ? -126 : std::max(std::ilogb(exact), -126);
    const double tolerance = std::ldexp(0.5, exponent - 7) + 5e-7 * std::fabs(exact) +
                             (g < -87.0 ? std::fabs(g) * 0x1p-125 : 0.0);
    ASSERT_NEAR(bf16_to_f32(out[i]), exact, tolerance) << "silu(" << g << ") * " << up[i];
  }
}

TEST_P(ElementwiseTest, SiluOfSpecialValues) {
  std::vector<float> gate(kStrip, 0.0f);
  std::vector<float> up(kStrip, 1.0f);
  gate[0] = kInfinity;
  gate[1] = kNan;
  gate[2] = -0.0f;
  gate[3] = 1.0f, up[3] = kNan;
  gate[4] = 1.0f, up[4] = -kInfinity;
  const std::vector<std::uint16_t> out = silu_mul(kernel(), gate, up);
  EXPECT_EQ(bf16_to_f32(out[0]), kInfinity);
  EXPECT_TRUE(std::isnan(bf16_to_f32(out[1])));
  EXPECT_EQ(bf16_to_f32(out[2]), 0.0f);
  EXPECT_TRUE(std::isnan(bf16_to_f32(out[3])));
  EXPECT_EQ(bf16_to_f32(out[4]), -kInfinity);
  for (std::size_t i = 5; i < kStrip; ++i) EXPECT_EQ(out[i], 0) << i;
}

TEST_P(ElementwiseTest, SiluMulHasTheBitsOfThePortableOneAndKeepsToItsRows) {
  Random random(14);
  constexpr int kRows = 301;
  constexpr int kStride = 40;
  std::vector<float> gate(kRows * kStrip);
  for (float& value : gate)
    value = random.normal() * static_cast<float>(std::exp(random.uniform(-4, 5)));
  const std::vector<float> up = random.normals(gate.size());
  std::vector<std::uint16_t> mine(kRows * kStride, 0x1234);
  std::vector<std::uint16_t> expected = mine;
  kernel().silu_mul(gate.data(), up.data(), kRows, mine.data(), kStride);
  portable().silu_mul(gate.data(), up.data(), kRows, expected.data(), kStride);
  EXPECT_EQ(mine, expected);
  for (std::size_t i = 0; i < mine.size(); ++i) {
    if (i % kStride >= kStrip) {
      ASSERT_EQ(mine[i], 0x1234) << "written outside the strip";
    }
  }
}

// Both the product and the sum are rounded, on every instruction set: no fused multiply-add here.
TEST_P(ElementwiseTest, WeightedAddRoundsTwice) {
  Random random(15);
  for (int i = 0; i < 1000; ++i) {
    const std::vector<float> c = random.normals(kStrip);
    std::vector<float> acc = random.normals(kStrip);
    const float weight = random.normal();
    std::vector<float> expected = acc;
    for (std::size_t n = 0; n < kStrip; ++n) {
      const volatile float product = weight * c[n];
      expected[n] += product;
    }
    kernel().weighted_add(c.data(), weight, acc.data());
    ASSERT_EQ(acc, expected);
  }
}

TEST_P(ElementwiseTest, ToTileCopiesPiecesOf64BytesAndPads) {
  Random random(17);
  for (const auto& [count, tile_rows, bytes] :
       {std::tuple(1, 1, 64), std::tuple(3, 3, 70), std::tuple(7, 9, 4096), std::tuple(16, 16, 600),
        std::tuple(2, 16, 1), std::tuple(16, 16, 2816)}) {
    const int padded = (bytes + 63) / 64 * 64;
    std::vector<std::vector<std::uint8_t>> rows;
    const std::uint8_t* pointers[kMaxTileRows];
    for (int r = 0; r < count; ++r) {
      rows.emplace_back(static_cast<std::size_t>(bytes));
      for (auto& byte : rows.back()) byte = static_cast<std::uint8_t>(random.integer(1, 255));
      pointers[r] = rows.back().data();
    }
    std::vector<std::uint8_t> out(static_cast<std::size_t>(padded * tile_rows + 64), 0xee);
    kernel().to_tile(pointers, count, tile_rows, bytes, padded, out.data());
    for (std::size_t i = 0; i < out.size(); ++i) {
      const int piece = static_cast<int>(i) / (64 * tile_rows);
      const int row = static_cast<int>(i) / 64 % tile_rows;
      const int byte = piece * 64 + static_cast<int>(i) % 64;
      std::uint8_t expected = 0xee;
      if (row < count && piece * 64 < padded) {
        expected = byte < bytes
                       ? rows[static_cast<std::size_t>(row)][static_cast<std::size_t>(byte)]
                       : std::uint8_t{0};
      }
      ASSERT_EQ(out[i], expected) << count << " rows of " << bytes << ", byte " << i;
    }
  }
}

}  // namespace
}  // namespace ktrt
