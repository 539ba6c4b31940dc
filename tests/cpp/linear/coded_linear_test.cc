// Linears of coded weights: products, LoRA and rows, against codes times scales in double. The
// kernels' own tests cover values and sizes.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "helpers/linear_case.h"
#include "helpers/random.h"
#include "helpers/views.h"
#include "linear/packed_linear.h"

namespace ktrt {
namespace {

using testing::at;
using testing::best_kernels;
using testing::engine_of;
using testing::LinearCase;
using testing::message_of;
using testing::view_of;

// Random codes and scales in the place of a LinearCase's weight.
struct CodedWeight {
  CodedWeight(WeightFormat format_, int out_, int in_) : format(format_), out(out_), in(in_) {
    testing::Random random(5);
    const FormatTraits& traits = traits_of(format);
    row_bytes = (in * traits.bits + 7) / 8;
    codes.resize(at(out, row_bytes, 0));
    for (std::uint8_t& code : codes) {
      code = static_cast<std::uint8_t>(random.integer(0, 255));
      if (traits.bits == 8 && (code & 0x7f) == 0x7f) code = 0x3c;  // not NaN
    }
    groups = traits.group == 0 ? 1 : (in + traits.group - 1) / traits.group;
    scale_rows = traits.scale == ScaleKind::kPerBlock ? (out + 31) / 32 : out;
    values = random.normals(at(scale_rows, groups, 0), 0.01f);
    for (float& value : values) {
      if (format == WeightFormat::kMxfp4) value = std::ldexp(1.0f, random.integer(-9, -4));
      value = bf16_to_f32(f32_to_bf16(value));
      bits.push_back(f32_to_bf16(value));
      bytes.push_back(static_cast<std::uint8_t>((f32_to_bf16(value) >> 7) & 0xff));
    }
  }

  CodedSource source() const {
    TensorView scales = view_of(values, {scale_rows, groups}, "scales");
    if (format == WeightFormat::kFp8Channel) scales = view_of(values, {out}, "scales");
    if (traits_of(format).scale == ScaleKind::kInTile) {
      scales = view_of(bits.data(), DType::kBfloat16, {out, groups}, "scales");
    }
    if (format == WeightFormat::kMxfp4) {
      scales = view_of(bytes.data(), DType::kUint8, {out, groups}, "scales");
    }
    return {view_of(codes.data(), DType::kUint8, {out, row_bytes}, "codes"), scales};
  }

  double weight(int n, int k) const {
    const FormatTraits& traits = traits_of(format);
    std::uint8_t code = codes[at(n, row_bytes, k * traits.bits / 8)];
    if (traits.bits == 4) code = static_cast<std::uint8_t>(k % 2 == 0 ? code & 15 : code >> 4);
    const int row = traits.scale == ScaleKind::kPerBlock ? n / 32 : n;
    const int group = traits.group == 0 ? 0 : k / traits.group;
    return double{coded_value(format, code)} * values[at(row, groups, group)];
  }

  WeightFormat format;
  int out, in, row_bytes, groups, scale_rows;
  std::vector<std::uint8_t> codes, bytes;
  std::vector<float> values;
  std::vector<std::uint16_t> bits;
};

class CodedLinearTest : public ::testing::TestWithParam<WeightFormat> {
 protected:
  static constexpr int kOut = 70;
  static constexpr int kIn = 300;
  std::unique_ptr<PackedLinear> make(const LinearCase& c, const CodedWeight& w,
                                     int threads = 2) const {
    auto linear = std::make_unique<PackedLinear>(engine_of(threads, best_kernels()), GetParam(),
                                                 w.source(), kIn, view_of(c.bias, {kOut}, "bias"));
    if (c.rank > 0) c.set_lora(*linear);
    return linear;
  }
};

INSTANTIATE_TEST_SUITE_P(Formats, CodedLinearTest,
                         ::testing::Values(WeightFormat::kFp8, WeightFormat::kFp8Channel,
                                           WeightFormat::kInt4G64, WeightFormat::kMxfp4),
                         [](const auto& format) { return name_of(format.param); });

TEST_P(CodedLinearTest, ProductsAndLora) {
  const CodedWeight w(GetParam(), kOut, kIn);
  for (const int rank : {0, 8}) {
    const LinearCase c(37, kOut, kIn, rank);
    const auto y = c.run(*make(c, w));
    for (int r = 0; r < c.rows; ++r) {
      const auto added = c.lora(r);
      for (int n = 0; n < kOut; ++n) {
        double sum = c.bias[static_cast<std::size_t>(n)];
        double magnitude = std::abs(sum);
        for (int k = 0; k < kIn; ++k) {
          const double product = bf16_to_f32(c.x[at(r, kIn, k)]) * w.weight(n, k);
          sum += product;
          magnitude += std::abs(product);
        }
        if (rank > 0) {
          sum += added[static_cast<std::size_t>(n)].first;
          magnitude += added[static_cast<std::size_t>(n)].second;
        }
        // The output's rounding; AMX rounds weights once, LoRA its shrunk rows.
        const double tolerance = std::abs(sum) / 256 + magnitude / 512;
        ASSERT_NEAR(bf16_to_f32(y[at(r, kOut, n)]), sum, tolerance) << r << " " << n;
      }
    }
  }
}

TEST_P(CodedLinearTest, NeitherCompanyNorThreadsChangeABit) {
  if (!best_kernels().fixed) GTEST_SKIP() << "on AMX the number of rows picks the kernel";
  const CodedWeight w(GetParam(), kOut, kIn);
  const LinearCase c(37, kOut, kIn, 8);
  const auto linear = make(c, w);
  const auto all = c.run(*linear);
  EXPECT_EQ(all, c.run(*make(c, w, 1)));
  for (const int row : {0, 17, 36}) {
    const auto alone = c.run(*linear, row, 1);
    EXPECT_TRUE(std::equal(alone.begin(), alone.end(), all.begin() + row * kOut)) << row;
  }
}

TEST_P(CodedLinearTest, RefusesWhatDoesNotFit) {
  const CodedWeight w(GetParam(), kOut, kIn);
  const auto engine = engine_of(1, best_kernels());
  const auto refuse = [&](const CodedSource& source, int in) {
    return message_of([&] { PackedLinear(engine, GetParam(), source, in, std::nullopt); });
  };
  EXPECT_NE(refuse(w.source(), kIn + 8).find("codes has shape"), std::string::npos);
  CodedSource wrong = w.source();
  wrong.scales = view_of(w.values, {1, 1}, "scales");
  EXPECT_NE(refuse(wrong, kIn).find("scales"), std::string::npos);
  CodedWeight nan = w;
  nan.codes[5] = 0xff;
  nan.bytes[0] = 0xff;
  nan.bits[0] = 0x7fc0;
  EXPECT_NE(refuse(nan.source(), kIn).find("NaN"), std::string::npos);
}

}  // namespace
}  // namespace ktrt
