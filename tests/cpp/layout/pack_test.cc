#include "layout/pack.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "helpers/format_reference.h"
#include "helpers/packed.h"
#include "helpers/random.h"
#include "helpers/views.h"

namespace ktrt {
namespace {

using testing::code_of;
using testing::OwnedMatrix;
using testing::packed_index;
using testing::Random;
using testing::round_to_bf16;
using testing::scale_of;
using testing::view_of;
using Shape = std::tuple<WeightFormat, int, int>;

// Rows of very different magnitude, rounded to bfloat16.
std::vector<float> random_matrix(int n, int k, std::uint64_t seed) {
  Random random(seed);
  std::vector<float> w = random.normals(static_cast<std::size_t>(n) * static_cast<std::size_t>(k));
  for (std::size_t row = 0; row < static_cast<std::size_t>(n); ++row) {
    const float magnitude = std::exp(2.0f * random.normal()) * 0.05f;
    for (std::size_t i = 0; i < static_cast<std::size_t>(k); ++i) {
      float& value = w[row * static_cast<std::size_t>(k) + i];
      value = round_to_bf16(value * magnitude);
    }
  }
  return w;
}

float max_abs(const float* row, int k) {
  float largest = 0.0f;
  for (int i = 0; i < k; ++i) largest = std::max(largest, std::fabs(row[i]));
  return largest;
}

// The integer that the kernels multiply, as it was packed.
int code_at(const OwnedMatrix& packed, int n, int k) {
  return testing::packed_code(packed.codes.data(), packed.layout.format(), packed.layout.padded_n(),
                              packed.layout.padded_k(), n, k);
}

class PackTest : public ::testing::TestWithParam<Shape> {
 protected:
  const WeightFormat format_ = std::get<0>(GetParam());
  const int n_ = std::get<1>(GetParam());
  const int k_ = std::get<2>(GetParam());
  const std::vector<float> w_ = random_matrix(n_, k_, 3);
};

INSTANTIATE_TEST_SUITE_P(Shapes, PackTest,
                         ::testing::Combine(::testing::ValuesIn(kKtFormats),
                                            ::testing::Values(32, 33, 96, 176, 288),
                                            ::testing::Values(64, 160, 1825, 3649)),
                         [](const auto& shape) {
                           return std::string(name_of(std::get<0>(shape.param))) + "_" +
                                  std::to_string(std::get<1>(shape.param)) + "x" +
                                  std::to_string(std::get<2>(shape.param));
                         });

TEST_P(PackTest, EveryElementLiesWhereTheFormulaSays) {
  const OwnedMatrix packed = testing::pack(format_, n_, k_, w_);
  const int N = testing::padded_rows(n_);
  const int K = testing::padded_columns(format_, k_);
  for (int n = 0; n < N; ++n) {
    const float* row = w_.data() + static_cast<std::ptrdiff_t>(n) * k_;
    const float scale = n < n_ ? scale_of(max_abs(row, k_), format_) : 0.0f;
    int sum = 0;
    for (int k = 0; k < K; ++k) {
      const float value = n < n_ && k < k_ ? row[k] : 0.0f;
      if (format_ == WeightFormat::kBf16) {
        std::uint16_t bits;
        std::memcpy(&bits, packed.codes.data() + 2 * packed_index(format_, N, K, n, k), 2);
        ASSERT_EQ(bits, f32_to_bf16(value)) << n << " " << k;
      } else {
        const int code = code_at(packed, n, k);
        ASSERT_EQ(code, code_of(value, scale, format_)) << n << " " << k;
        sum += code;
      }
    }
    if (format_ == WeightFormat::kBf16) continue;
    ASSERT_EQ(packed.scales[static_cast<std::size_t>(n)], scale) << n;
    ASSERT_EQ(packed.sums[static_cast<std::size_t>(n)], sum) << n;
  }
}

TEST_P(PackTest, UnpackGivesTheValuesBack) {
  OwnedMatrix packed = testing::pack(format_, n_, k_, w_);
  EXPECT_TRUE(packed.finite);
  std::vector<float> back(w_.size());
  unpack(packed.view(), back.data());
  for (std::size_t i = 0; i < w_.size(); ++i) {
    if (format_ == WeightFormat::kBf16) {
      ASSERT_EQ(back[i], w_[i]);
      continue;
    }
    const std::size_t n = i / static_cast<std::size_t>(k_);
    // The rounding of w / scale, which is at most 127, comes on top.
    const float step = testing::reference_of(format_).max_error + 127.0f * 0x1p-22f;
    ASSERT_LE(std::fabs(back[i] - w_[i]), packed.scales[n] * step) << i;
  }
}

TEST_P(PackTest, SourceTypesAndStridesDoNotMatter) {
  const OwnedMatrix expected = testing::pack(format_, n_, k_, w_);
  for (const DType dtype : {DType::kFloat32, DType::kBfloat16}) {
    const int stride = k_ + 7;
    std::vector<float> spread(static_cast<std::size_t>(n_) * static_cast<std::size_t>(stride),
                              9.0f);
    for (int n = 0; n < n_; ++n) {
      std::copy_n(w_.data() + static_cast<std::ptrdiff_t>(n) * k_, k_,
                  spread.data() + static_cast<std::ptrdiff_t>(n) * stride);
    }
    const std::vector<std::byte> bytes = testing::encode(spread, dtype);
    TensorView view = view_of(bytes.data(), dtype, {n_, k_});
    view.stride[0] = stride;
    const OwnedMatrix packed = testing::pack(format_, view);
    EXPECT_EQ(packed.codes, expected.codes) << name_of(dtype);
    EXPECT_EQ(packed.scales, expected.scales) << name_of(dtype);
  }
}

TEST_P(PackTest, AStripWritesItsOwnPartOnly) {
  const OwnedMatrix whole = testing::pack(format_, n_, k_, w_);
  const int strips = whole.layout.strips();
  for (const int strip : {0, strips / 2, strips - 1}) {
    OwnedMatrix one = testing::allocate(format_, n_, k_);
    ASSERT_TRUE(pack_strip(view_of(w_, {n_, k_}), one.view(), strip));
    const std::size_t written = static_cast<std::size_t>(
        std::count_if(one.codes.begin(), one.codes.end(), [](auto byte) { return byte != 0xee; }));
    EXPECT_LE(written, one.codes.size() / static_cast<std::size_t>(strips));
    for (std::size_t i = 0; i < one.codes.size(); ++i) {
      ASSERT_TRUE(one.codes[i] == whole.codes[i] || one.codes[i] == 0xee) << i;
    }
    for (std::size_t n = 0; n < one.scales.size(); ++n) {
      const bool inside = static_cast<int>(n) / 32 == strip;
      ASSERT_EQ(one.scales[n], inside ? whole.scales[n] : -1.0f);
      ASSERT_EQ(one.sums[n], inside ? whole.sums[n] : -1);
    }
  }
}

OwnedMatrix pack_row(WeightFormat format, std::vector<float> row) {
  const auto k = static_cast<int>(row.size());
  return testing::pack(format, 1, k, row);
}

TEST(Quantisation, ScaleIsAProductWithTheRoundedReciprocal) {
  // kt_kernel is built with fast math: amax / 127 becomes amax · float32(1/127), which differs by
  // one unit in the last place from the quotient for some values.
  int differences = 0;
  for (int i = 0; i < 256; ++i) {
    const float amax = round_to_bf16(1.0f + static_cast<float>(i) / 128.0f);
    const OwnedMatrix packed = pack_row(WeightFormat::kInt8, {amax});
    ASSERT_EQ(packed.scales[0], amax * (1.0f / 127.0f));
    differences += packed.scales[0] != amax / 127.0f;
  }
  EXPECT_GT(differences, 0);
}

TEST(Quantisation, HalvesGoToEven) {
  // amax = 127 gives scale and reciprocal exactly 1.
  ASSERT_EQ(127.0f * (1.0f / 127.0f), 1.0f);
  const OwnedMatrix packed =
      pack_row(WeightFormat::kInt8, {127, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, -127});
  const std::vector<int> expected = {127, 0, 2, 2, 4, 0, -2, -2, -127};
  for (std::size_t k = 0; k < expected.size(); ++k) {
    const std::size_t index = packed_index(WeightFormat::kInt8, 32, 64, 0, static_cast<int>(k));
    EXPECT_EQ(static_cast<std::int8_t>(packed.codes[index]), expected[k]) << k;
  }
  EXPECT_EQ(packed.sums[0], 4);
}

TEST(Quantisation, Int4RoundsTwice) {
  // amax = 112 gives scale and reciprocal exactly 1: first halves go to even, then away from zero.
  const OwnedMatrix packed = pack_row(WeightFormat::kInt4, {112, 7, 7.5, 8, 8.5, 23.5, 23, 24, -7.5,
                                                            -7, -24, -112, 104, 103.5, -103});
  const std::vector<int> expected = {112, 0, 16,  16,   16,  32,  16, 32,
                                     -16, 0, -32, -112, 112, 112, -96};
  int sum = 0;
  for (std::size_t k = 0; k < expected.size(); ++k) {
    EXPECT_EQ(code_at(packed, 0, static_cast<int>(k)), expected[k]) << k;
    sum += expected[k];
  }
  EXPECT_EQ(packed.scales[0], 1.0f);
  EXPECT_EQ(packed.sums[0], sum);
}

TEST(Quantisation, Int4ScaleIsADoubleProduct) {
  int differences = 0;
  for (int i = 0; i < 256; ++i) {
    const float amax = round_to_bf16(1.0f + static_cast<float>(i) / 128.0f);
    const OwnedMatrix packed = pack_row(WeightFormat::kInt4, {amax});
    ASSERT_EQ(packed.scales[0], static_cast<float>(double{amax} * (1.0 / 112.0)));
    differences += packed.scales[0] != amax * (1.0f / 112.0f);
  }
  EXPECT_GT(differences, 0);
}

TEST(Quantisation, RowsOfZerosAndOfNearlyZeros) {
  for (const WeightFormat format : kKtFormats) {
    if (!quantizes_rows(format)) continue;
    // 1 / (1e-37 / 127) is infinite.
    for (const float amax : {0.0f, -0.0f, 1e-40f, 1e-37f}) {
      const OwnedMatrix packed = pack_row(format, {amax, -amax, amax});
      EXPECT_TRUE(packed.finite);
      EXPECT_EQ(packed.scales[0], 0.0f) << amax;
      EXPECT_EQ(packed.sums[0], 0) << amax;
      EXPECT_TRUE(std::all_of(packed.codes.begin(), packed.codes.end(),
                              [](std::uint8_t code) { return code == 0; }));
    }
    const OwnedMatrix small = pack_row(format, {1e-36f, -1e-36f});
    EXPECT_GT(small.scales[0], 0.0f);
    EXPECT_EQ(code_at(small, 0, 0), testing::reference_of(format).largest);
  }
}

TEST(Quantisation, TheLargestValueHasTheLargestCode) {
  Random random(8);
  for (int i = 0; i < 20'000; ++i) {
    const float amax = round_to_bf16(static_cast<float>(std::exp(random.uniform(-80.0, 80.0))));
    for (const WeightFormat format : kKtFormats) {
      if (!quantizes_rows(format)) continue;
      const int largest = testing::reference_of(format).largest;
      const OwnedMatrix packed = pack_row(format, {amax, -amax});
      ASSERT_EQ(code_at(packed, 0, 0), largest) << name_of(format) << " " << amax;
      ASSERT_EQ(code_at(packed, 0, 1), -largest) << name_of(format) << " " << amax;
    }
  }
}

TEST(Finite, NanAndInfinityAreReported) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  // 3.4e38 is a finite float32 whose nearest bfloat16 is infinite; 1e6 has no finite float16.
  const std::vector<std::pair<DType, float>> bad = {
      {DType::kFloat32, kInfinity},  {DType::kFloat32, -kInfinity}, {DType::kFloat32, kNan},
      {DType::kFloat32, 3.4e38f},    {DType::kFloat16, 1e6f},       {DType::kFloat16, kNan},
      {DType::kBfloat16, kInfinity}, {DType::kBfloat16, kNan}};
  for (const WeightFormat format : kKtFormats) {
    for (const auto& [dtype, value] : bad) {
      for (const std::size_t position : {std::size_t{0}, std::size_t{40 * 70 - 1}}) {
        std::vector<float> w(40 * 70, 1.0f);
        w[position] = value;
        const std::vector<std::byte> bytes = testing::encode(w, dtype);
        const OwnedMatrix packed = testing::pack(format, view_of(bytes.data(), dtype, {40, 70}));
        EXPECT_FALSE(packed.finite) << name_of(format) << " " << name_of(dtype) << " " << value;
      }
    }
    const std::vector<float> large(64, 3.38e38f);
    EXPECT_TRUE(testing::pack(format, 1, 64, large).finite);
  }
}

TEST(RowToBf16, RoundsEveryFloatType) {
  const std::vector<float> values = {0.0f, 1.0f, -1.00390625f, 3.14159f, 65504.0f, 6e-8f, 1e-30f};
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBfloat16}) {
    const std::vector<std::byte> bytes = testing::encode(values, dtype);
    const std::vector<float> exact = testing::decode(bytes, dtype);
    std::vector<bf16_t> row(values.size());
    row_to_bf16(bytes.data(), dtype, static_cast<int>(values.size()), row.data());
    for (std::size_t i = 0; i < values.size(); ++i) {
      EXPECT_EQ(row[i], f32_to_bf16(exact[i])) << name_of(dtype) << " " << values[i];
    }
  }
}

}  // namespace
}  // namespace ktrt
