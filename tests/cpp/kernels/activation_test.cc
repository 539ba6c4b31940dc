// Activations beyond SiLU · up, and biases: right, and the same bits on every instruction set.
#include "kernels/activation.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "base/bf16.h"
#include "helpers/random.h"
#include "kernels/variants.h"

namespace ktrt {
namespace {

using testing::Random;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr std::size_t kStrip = 32;

constexpr ActivationKind kKinds[] = {ActivationKind::kSilu,     ActivationKind::kGelu,
                                     ActivationKind::kGeluTanh, ActivationKind::kRelu,
                                     ActivationKind::kRelu2,    ActivationKind::kSoftcapSilu};

// Every kind plain, and with the numbers of gpt-oss, DeepSeek-V4 and Inkling 2.
std::vector<Activation> activations() {
  std::vector<Activation> all;
  for (const ActivationKind kind : kKinds) {
    if (kind != ActivationKind::kSoftcapSilu) {
      all.push_back({.kind = kind});
      all.push_back({.kind = kind, .gate_limit = 2.5f, .up_limit = 1.5f, .up_offset = 1.0f});
    }
  }
  all.push_back({.alpha = 1.702f, .gate_limit = 7.0f, .up_limit = 7.0f, .up_offset = 1.0f});
  all.push_back({.gate_limit = 10.0f, .up_limit = 10.0f});
  all.push_back({.kind = ActivationKind::kSoftcapSilu, .gate_limit = 4.0f, .up_limit = 25.0f});
  return all;
}

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

double function_of(const Activation& a, double x) {
  switch (a.kind) {
    case ActivationKind::kSilu:
      return x * sigmoid(double{a.alpha} * x);
    case ActivationKind::kGelu:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case ActivationKind::kGeluTanh:
      return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
    case ActivationKind::kRelu:
      return std::max(x, 0.0);
    case ActivationKind::kRelu2:
      return std::max(x, 0.0) * std::max(x, 0.0);
    case ActivationKind::kSoftcapSilu:
      return a.gate_limit * std::tanh(x / a.gate_limit) * sigmoid(x);
  }
  return 0.0;
}

double expected(const Activation& a, double gate, double up) {
  if (a.kind == ActivationKind::kSoftcapSilu) {
    return function_of(a, gate) * (a.up_limit * std::tanh(up / a.up_limit) + a.up_offset);
  }
  const double clamped = std::clamp(up, -double{a.up_limit}, double{a.up_limit});
  return function_of(a, std::min(gate, double{a.gate_limit})) * (clamped + a.up_offset);
}

std::vector<std::uint16_t> activate(const ElementwiseKernels& kernels, const Activation& activation,
                                    const std::vector<float>* gate, const std::vector<float>& up) {
  std::vector<std::uint16_t> out(up.size());
  kernels.activate(activation, gate == nullptr ? nullptr : gate->data(), up.data(),
                   static_cast<int>(up.size() / kStrip), out.data(), kStrip);
  return out;
}

class ActivationTest : public testing::VariantTest<ElementwiseKernels> {
 protected:
  static const ElementwiseKernels& portable() {
    return *select_kernels(Isa::kPortable, CpuFeatures{}).elementwise;
  }
};
INSTANTIATE_TEST_SUITE_P(Variants, ActivationTest,
                         ::testing::ValuesIn(testing::variants_of(testing::elementwises)),
                         testing::variant_name<ElementwiseKernels>);

// Half a unit in the last place of BF16, and 4e-6 of the function in float32; where the function
// falls to nothing, what the sums around it lose.
bool is_close(std::uint16_t found, double exact, double scale) {
  const int exponent = exact == 0.0 ? -126 : std::max(std::ilogb(exact), -126);
  const double tolerance = std::ldexp(0.5, exponent - 7) + 4e-6 * std::fabs(exact) + 1e-9 * scale;
  return std::fabs(bf16_to_f32(found) - exact) <= tolerance;
}

TEST_P(ActivationTest, IsAccurate) {
  Random random(21);
  std::vector<float> gate = {0.0f, -0.0f, 1e-10f, -1e-10f, 88.0f, -88.0f, 7.0f, 10.0f, 2.5f, 4.0f};
  for (int i = -3000; i < 3000; ++i) gate.push_back(static_cast<float>(i) * 0.006f);
  while (gate.size() % kStrip != 0 || gate.size() < 20'000) {
    gate.push_back(static_cast<float>(random.uniform(-14.0, 14.0)));
  }
  std::vector<float> up;
  for (std::size_t i = 0; i < gate.size(); ++i) {
    up.push_back(static_cast<float>(random.uniform(-30.0, 30.0)));
  }
  for (const Activation& a : activations()) {
    const std::vector<std::uint16_t> gated = activate(kernel(), a, &gate, up);
    const std::vector<std::uint16_t> alone = activate(kernel(), a, nullptr, gate);
    for (std::size_t i = 0; i < gate.size(); ++i) {
      ASSERT_TRUE(is_close(gated[i], expected(a, gate[i], up[i]), 1.0 + std::fabs(up[i])))
          << static_cast<int>(a.kind) << ": " << gate[i] << ", " << up[i];
      ASSERT_TRUE(is_close(alone[i], function_of(a, gate[i]), 1.0))
          << static_cast<int>(a.kind) << ": " << gate[i];
    }
  }
}

TEST_P(ActivationTest, ClampsKeepNanAndBoundInfinity) {
  const Activation clamped{.gate_limit = 7.0f, .up_limit = 7.0f, .up_offset = 1.0f};
  std::vector<float> gate(kStrip, 1.0f);
  std::vector<float> up(kStrip, 2.0f);
  gate[0] = kInfinity;
  up[1] = kInfinity;
  up[2] = -kInfinity;
  gate[3] = kNan;
  up[4] = kNan;
  const std::vector<std::uint16_t> out = activate(kernel(), clamped, &gate, up);
  const auto silu = [](double x) { return x * sigmoid(x); };
  EXPECT_NEAR(bf16_to_f32(out[0]), silu(7.0) * 3.0, 0.1);
  EXPECT_NEAR(bf16_to_f32(out[1]), silu(1.0) * 8.0, 0.05);
  EXPECT_NEAR(bf16_to_f32(out[2]), silu(1.0) * -6.0, 0.05);
  EXPECT_TRUE(std::isnan(bf16_to_f32(out[3])));
  EXPECT_TRUE(std::isnan(bf16_to_f32(out[4])));
  for (const Activation& a : activations()) {
    EXPECT_TRUE(std::isnan(bf16_to_f32(activate(kernel(), a, &gate, up)[3])));
    EXPECT_TRUE(std::isnan(bf16_to_f32(activate(kernel(), a, nullptr, gate)[3])));
  }
}

// The padding of gate and up is 0, and stays so.
TEST_P(ActivationTest, OfZerosIsZero) {
  const std::vector<float> zeros(kStrip, 0.0f);
  for (const Activation& a : activations()) {
    EXPECT_EQ(activate(kernel(), a, &zeros, zeros), std::vector<std::uint16_t>(kStrip, 0));
    EXPECT_EQ(activate(kernel(), a, nullptr, zeros), std::vector<std::uint16_t>(kStrip, 0));
  }
}

TEST_P(ActivationTest, PlainSiluIsSiluMul) {
  Random random(22);
  const std::vector<float> gate = random.normals(64 * kStrip, 3.0f);
  const std::vector<float> up = random.normals(gate.size());
  std::vector<std::uint16_t> out(gate.size());
  kernel().silu_mul(gate.data(), up.data(), 64, out.data(), kStrip);
  EXPECT_EQ(activate(kernel(), Activation{}, &gate, up), out);
  EXPECT_TRUE(Activation{}.is_silu_mul());
  for (const Activation& a : activations()) {
    if (a.kind != ActivationKind::kSilu || a.gate_limit != Activation::kNoLimit) {
      EXPECT_FALSE(a.is_silu_mul());
    }
  }
  EXPECT_FALSE((Activation{.alpha = 1.702f}).is_silu_mul());
  EXPECT_FALSE((Activation{.up_limit = 7.0f}).is_silu_mul());
  EXPECT_FALSE((Activation{.up_offset = 1.0f}).is_silu_mul());
}

TEST_P(ActivationTest, HasTheBitsOfThePortableOneAndKeepsToItsRows) {
  Random random(23);
  constexpr int kRows = 97;
  constexpr std::size_t kStride = 40;
  std::vector<float> gate(kRows * kStrip);
  for (float& value : gate) {
    value = random.normal() * static_cast<float>(std::exp(random.uniform(-4, 5)));
  }
  const std::vector<float> up = random.normals(gate.size(), 5.0f);
  for (const Activation& a : activations()) {
    for (const float* gates :
         {static_cast<const float*>(gate.data()), static_cast<const float*>(nullptr)}) {
      std::vector<std::uint16_t> mine(kRows * kStride, 0x1234);
      std::vector<std::uint16_t> other = mine;
      kernel().activate(a, gates, up.data(), kRows, mine.data(), kStride);
      portable().activate(a, gates, up.data(), kRows, other.data(), kStride);
      ASSERT_EQ(mine, other) << static_cast<int>(a.kind);
      for (std::size_t i = 0; i < mine.size(); ++i) {
        if (i % kStride >= kStrip) {
          ASSERT_EQ(mine[i], 0x1234) << "written outside the strip";
        }
      }
    }
  }
}

TEST_P(ActivationTest, AddBiasAddsItToEveryRow) {
  Random random(24);
  const std::vector<float> bias = random.normals(kStrip);
  for (const std::size_t rows : {1u, 3u, 50u}) {
    std::vector<float> c = random.normals(rows * kStrip + 1);
    std::vector<float> sums = c;
    for (std::size_t i = 0; i < rows * kStrip; ++i) sums[i] += bias[i % kStrip];
    kernel().add_bias(bias.data(), static_cast<int>(rows), c.data());
    EXPECT_EQ(c, sums);
  }
}

}  // namespace
}  // namespace ktrt
