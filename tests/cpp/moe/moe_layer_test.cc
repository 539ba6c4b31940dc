#include "moe/moe_layer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/select.h"
#include "moe/layer_case.h"

namespace ktrt {
namespace {

using testing::Batch;
using testing::forward;
using testing::LayerCase;
using testing::make_engine;
using testing::random_batch;
using testing::view_of;

constexpr MoeShape kSmall{5, 3, 160, 96};

struct ShapeCase {
  const char* name;
  MoeShape shape;
  int qlen;
};

// On every ISA level and in every format.
class MoeLayerTest : public ::testing::TestWithParam<std::tuple<Isa, WeightFormat>> {
 protected:
  void SetUp() override {
    if (isa_ > detected_isa()) GTEST_SKIP() << name_of(isa_) << " is not available here";
  }
  std::shared_ptr<Engine> engine(int max_qlen = 64) const { return make_engine(2, max_qlen, isa_); }

  const Isa isa_ = std::get<0>(GetParam());
  const WeightFormat format_ = std::get<1>(GetParam());
};

std::string name_of_case(const ::testing::TestParamInfo<std::tuple<Isa, WeightFormat>>& test) {
  return std::string(name_of(std::get<0>(test.param))) + "_" + name_of(std::get<1>(test.param));
}

INSTANTIATE_TEST_SUITE_P(Levels, MoeLayerTest,
                         ::testing::Combine(::testing::Values(Isa::kPortable, Isa::kAvx2,
                                                              Isa::kAvx512, Isa::kAmx),
                                            ::testing::ValuesIn(testing::kFormatKinds)),
                         name_of_case);

TEST_P(MoeLayerTest, MatchesTheReference) {
  const ShapeCase cases[] = {
      {"one expert", {1, 1, 32, 32}, 5},
      {"padded sizes", {4, 2, 160, 96}, 33},
      {"odd intermediate size", {3, 2, 160, 176}, 7},
      {"odd sizes", {3, 2, 37, 45}, 7},
      {"every expert for every token", {8, 8, 64, 64}, 16},
      {"many experts", {256, 8, 64, 32}, 21},
      {"k-blocks with tails", {2, 2, 3616, 64}, 2},
      {"several n-blocks and k-blocks", {1, 1, 2048, 288}, 3},
  };
  for (const ShapeCase& c : cases) {
    SCOPED_TRACE(c.name);
    const LayerCase test(c.shape, format_);
    const auto layer = test.make_layer(engine());
    testing::expect_matches_reference(test, *layer, random_batch(c.shape, c.qlen));
    testing::expect_matches_reference(test, *layer, random_batch(c.shape, 1));
  }
}

TEST_P(MoeLayerTest, TheRoundingErrorIsWhatTheFormatsCost) {
  const LayerCase test({4, 2, 512, 256}, format_);
  const auto layer = test.make_layer(engine());
  const Batch batch = random_batch(test.shape, 16);
  const double error = testing::relative_error(forward(*layer, batch),
                                               test.expected(batch, testing::Rounding::kNone));
  EXPECT_LT(error, testing::cost_of(format_));
}

TEST_P(MoeLayerTest, OneExpertWithAllTokens) {
  const MoeShape shape{4, 1, 64, 64};
  const LayerCase test(shape, format_);
  constexpr int kTokens = 300;  // three jobs
  const auto layer = test.make_layer(engine(kTokens));
  Batch batch = random_batch(shape, kTokens);
  std::fill(batch.ids.begin(), batch.ids.end(), 2);
  testing::expect_matches_reference(test, *layer, batch);
}

TEST_P(MoeLayerTest, IdsOutsideContributeNothing) {
  const LayerCase test(kSmall, format_);
  const auto layer = test.make_layer(engine());
  Batch batch = random_batch(kSmall, 6);
  const std::vector<float> all = forward(*layer, batch);
  constexpr std::int64_t kOutside[] = {-1,
                                       kSmall.num_experts,
                                       std::numeric_limits<std::int64_t>::max(),
                                       std::numeric_limits<std::int64_t>::min(),
                                       std::int64_t{1} << 32,
                                       (std::int64_t{1} << 32) + 1};
  for (int token = 0; token < 6; ++token) {
    batch.ids[batch.at(token, token % 3)] = kOutside[token];
    // Not even a routing weight that is not a number.
    batch.weights[batch.at(token, token % 3)] = std::nanf("");
  }
  testing::expect_matches_reference(test, *layer, batch);
  EXPECT_NE(forward(*layer, batch), all);
}

TEST_P(MoeLayerTest, TokensWithoutExpertsGiveZeros) {
  const LayerCase test(kSmall, format_);
  const auto layer = test.make_layer(engine());
  Batch batch = random_batch(kSmall, 4);
  for (int slot = 0; slot < batch.slots; ++slot) batch.ids[batch.at(1, slot)] = -1;
  const std::vector<float> out = forward(*layer, batch);
  for (std::size_t i = 160; i < 320; ++i) ASSERT_EQ(out[i], 0.0f);
  EXPECT_NE(out[0], 0.0f);
  EXPECT_NE(out[320], 0.0f);
  std::fill(batch.ids.begin(), batch.ids.end(), -1);
  EXPECT_EQ(forward(*layer, batch), std::vector<float>(out.size(), 0.0f));
  batch.slots = 0;
  EXPECT_EQ(forward(*layer, batch), std::vector<float>(out.size(), 0.0f));
}

TEST_P(MoeLayerTest, DuplicateIdsAddUp) {
  const LayerCase test(kSmall, format_);
  const auto layer = test.make_layer(engine());
  for (const int qlen : {1, 5}) {
    Batch batch = random_batch(kSmall, qlen);
    for (int token = 0; token < qlen; ++token) {
      batch.ids[batch.at(token, 2)] = batch.ids[batch.at(token, 0)];
    }
    testing::expect_matches_reference(test, *layer, batch);
  }
}

TEST_P(MoeLayerTest, FewerSlotsThanTopK) {
  const LayerCase test(kSmall, format_);
  const auto layer = test.make_layer(engine());
  for (const int slots : {1, 2}) {
    testing::expect_matches_reference(test, *layer, random_batch(kSmall, 4, slots));
  }
}

TEST_P(MoeLayerTest, FloatTypesInAndOut) {
  const LayerCase test(kSmall, format_);
  const auto layer = test.make_layer(engine());
  Batch batch = random_batch(kSmall, 6);
  // Values that all three types hold.
  for (float& value : batch.hidden) value = std::nearbyintf(value * 16.0f) / 16.0f;
  for (float& value : batch.weights) value = std::nearbyintf(value * 16.0f) / 16.0f;
  const std::vector<float> exact = forward(*layer, batch);
  const std::vector<std::int32_t> narrow_ids(batch.ids.begin(), batch.ids.end());
  const DType floats[] = {DType::kFloat32, DType::kFloat16, DType::kBfloat16};
  for (const DType dtype : floats) {
    const std::vector<std::byte> hidden = testing::encode(batch.hidden, dtype);
    const std::vector<std::byte> expected = testing::encode(exact, dtype);
    for (const DType weight_dtype : floats) {
      const std::vector<std::byte> weights = testing::encode(batch.weights, weight_dtype);
      for (const DType id_dtype : {DType::kInt32, DType::kInt64}) {
        const void* ids = id_dtype == DType::kInt32 ? static_cast<const void*>(narrow_ids.data())
                                                    : batch.ids.data();
        std::vector<std::byte> out(hidden.size());
        layer->forward(view_of(hidden.data(), dtype, {6, 160}), view_of(ids, id_dtype, {6, 3}),
                       view_of(weights.data(), weight_dtype, {6, 3}),
                       view_of(out.data(), dtype, {6, 160}));
        EXPECT_EQ(out, expected) << name_of(dtype) << name_of(weight_dtype) << name_of(id_dtype);
      }
    }
  }
}

TEST_P(MoeLayerTest, RowsMayBeApart) {
  const LayerCase test(kSmall, format_);
  const auto layer = test.make_layer(engine());
  const Batch batch = random_batch(kSmall, 4);
  const std::vector<float> expected = forward(*layer, batch);
  constexpr std::size_t kWide = 167;
  std::vector<float> hidden(4 * kWide, 1e30f);
  std::vector<std::int64_t> ids(4 * 5, 1 << 20);
  std::vector<float> weights(4 * 5, 1e30f);
  std::vector<float> out(4 * kWide, -7.0f);
  for (std::size_t token = 0; token < 4; ++token) {
    std::copy_n(&batch.hidden[token * 160], 160, &hidden[token * kWide]);
    std::copy_n(&batch.ids[token * 3], 3, &ids[token * 5]);
    std::copy_n(&batch.weights[token * 3], 3, &weights[token * 5]);
  }
  const auto apart = [](TensorView view, std::int64_t stride) {
    view.stride[0] = stride;
    return view;
  };
  layer->forward(apart(view_of(hidden, {4, 160}), kWide),
                 apart(view_of(ids.data(), DType::kInt64, {4, 3}), 5),
                 apart(view_of(weights, {4, 3}), 5), apart(view_of(out, {4, 160}), kWide));
  for (std::size_t i = 0; i < out.size(); ++i) {
    const std::size_t token = i / kWide;
    const std::size_t column = i % kWide;
    ASSERT_EQ(out[i], column < 160 ? expected[token * 160 + column] : -7.0f) << i;
  }
}

TEST_P(MoeLayerTest, NanAndInfinityStayInTheirToken) {
  const LayerCase test(kSmall, format_);
  const auto layer = test.make_layer(engine());
  Batch batch = random_batch(kSmall, 3);
  const std::vector<float> clean = forward(*layer, batch);
  for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
    batch.hidden[160 + 40] = bad;
    const std::vector<float> out = forward(*layer, batch);
    for (std::size_t i = 0; i < out.size(); ++i) {
      if (i / 160 == 1) {
        ASSERT_FALSE(std::isfinite(out[i])) << i;
      } else {
        ASSERT_EQ(out[i], clean[i]) << i;
      }
    }
  }
}

TEST_P(MoeLayerTest, SaysWhichKernelsRan) {
  LayerCase test(kSmall, format_);
  const auto layer = test.make_layer(engine());
  forward(*layer, random_batch(kSmall, 2));
  const KernelTable table = select_kernels(isa_, cpu_features());
  const KernelsUsed base = layer->last_kernels();
  EXPECT_STREQ(base.elementwise, table.elementwise->name);
  EXPECT_EQ(base.lora_shrink, nullptr);
  test.add_lora(4, 4, 4);
  test.set_lora(*layer);
  forward(*layer, random_batch(kSmall, 2));
  const KernelsUsed used = layer->last_kernels();
  const GemmChoice& gemm = table.gemm(format_);
  EXPECT_TRUE(used.lora_shrink != nullptr || used.lora_shrink_few_rows != nullptr);
  if (used.gemm != nullptr) {
    EXPECT_STREQ(used.lora_shrink, table.shrink_for(*gemm.many).name);
  }
  if (used.gemm_few_rows != nullptr) {
    EXPECT_STREQ(used.lora_shrink_few_rows, table.lora_shrink->name);
  }
}

// The following tests do not depend on the kernels.

TEST(MoeLayer, QlenZeroWritesNothing) {
  const LayerCase test(kSmall, WeightFormat::kBf16);
  const auto layer = test.make_layer(make_engine());
  float guard = 5.0f;
  const TensorView empty = view_of(nullptr, DType::kFloat32, {0, 160});
  TensorView out = view_of(&guard, DType::kFloat32, {0, 160});
  layer->forward(empty, view_of(nullptr, DType::kInt64, {0, 3}),
                 view_of(nullptr, DType::kFloat32, {0, 3}), out);
  EXPECT_EQ(guard, 5.0f);
}

TEST(MoeLayer, MaxQlenIsAllowedAndOneMoreIsNot) {
  const LayerCase test(kSmall, WeightFormat::kInt8);
  const auto layer = test.make_layer(make_engine(2, 9));
  testing::expect_matches_reference(test, *layer, random_batch(kSmall, 9));
  try {
    forward(*layer, random_batch(kSmall, 10));
    FAIL() << "accepted";
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(), "qlen is 10, at most max_qlen (9) expected");
  }
}

// Arguments of a forward, one of which a test spoils.
struct Arguments {
  Batch batch = random_batch(kSmall, 2);
  std::vector<float> result = std::vector<float>(320);
  TensorView hidden = view_of(batch.hidden, {2, 160}, "hidden_states");
  TensorView ids = view_of(batch.ids.data(), DType::kInt64, {2, 3}, "expert_ids");
  TensorView weights = view_of(batch.weights, {2, 3}, "routing_weights");
  TensorView out = view_of(result, {2, 160}, "out");
};

TEST(MoeLayer, WrongArgumentsAreNamed) {
  const LayerCase test(kSmall, WeightFormat::kBf16);
  const auto layer = test.make_layer(make_engine());
  const auto expect_refused = [&](const char* message, void (*spoil)(Arguments&)) {
    Arguments a;
    spoil(a);
    try {
      layer->forward(a.hidden, a.ids, a.weights, a.out);
      ADD_FAILURE() << "accepted: " << message;
    } catch (const std::invalid_argument& error) {
      EXPECT_STREQ(error.what(), message);
    }
  };
  expect_refused("hidden_states is int32, expected float32, float16 or bfloat16",
                 [](Arguments& a) { a.hidden.dtype = DType::kInt32; });
  expect_refused("hidden_states has shape [2, 159], expected [any, 160]",
                 [](Arguments& a) { a.hidden.shape[1] = 159; });
  expect_refused("hidden_states has shape [2], expected [any, 160]",
                 [](Arguments& a) { a.hidden.ndim = 1; });
  expect_refused("out has shape [1, 160], expected [2, 160]",
                 [](Arguments& a) { a.out.shape[0] = 1; });
  expect_refused("out is bfloat16, expected the dtype of hidden_states (float32)",
                 [](Arguments& a) { a.out.dtype = DType::kBfloat16; });
  expect_refused("out has overlapping rows (their stride is 0), expected 160 or more",
                 [](Arguments& a) { a.out.stride[0] = 0; });
  expect_refused("expert_ids is float32, expected int32 or int64",
                 [](Arguments& a) { a.ids.dtype = DType::kFloat32; });
  expect_refused("expert_ids has shape [3, 3], expected [2, any]",
                 [](Arguments& a) { a.ids.shape[0] = 3; });
  expect_refused("expert_ids has 4 slots, at most top_k (3) expected",
                 [](Arguments& a) { a.ids.shape[1] = 4; });
  expect_refused("routing_weights is int64, expected float32, float16 or bfloat16",
                 [](Arguments& a) { a.weights.dtype = DType::kInt64; });
  expect_refused("routing_weights has shape [2, 2], expected [2, 3]",
                 [](Arguments& a) { a.weights.shape[1] = 2; });
}

TEST(MoeLayer, ShapesOutOfRangeAreRefused) {
  const auto engine = make_engine();
  for (const MoeShape& shape :
       {MoeShape{0, 1, 32, 32}, MoeShape{2, 0, 32, 32}, MoeShape{2, 3, 32, 32},
        MoeShape{2, 1, 0, 32}, MoeShape{2, 1, 32, -5}, MoeShape{2, 1, 65537, 32}}) {
    EXPECT_THROW(MoeLayer(engine, shape, WeightFormat::kBf16), std::invalid_argument);
  }
}

std::string forward_error(MoeLayer& layer) {
  try {
    forward(layer, random_batch(layer.shape(), 2));
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

TEST(MoeLayer, EveryExpertMustBeLoaded) {
  const LayerCase test(kSmall, WeightFormat::kInt8);
  MoeLayer layer(make_engine(), kSmall, WeightFormat::kInt8);
  for (int expert = 4; expert >= 0; --expert) {
    EXPECT_EQ(forward_error(layer), "expert 0 has not been loaded");
    test.load(layer, expert);
  }
  EXPECT_EQ(forward_error(layer), "");
}

TEST(MoeLayer, LoadExpertChecksItsArguments) {
  const LayerCase test(kSmall, WeightFormat::kBf16);
  MoeLayer layer(make_engine(), kSmall, WeightFormat::kBf16);
  EXPECT_THROW(layer.experts().packed_codes(0, Projection::kUp), std::invalid_argument);
  EXPECT_THROW(layer.experts().packed_scales(-1, Projection::kUp), std::invalid_argument);
  const TensorView gate = view_of(test.weight(0, 0).values, {96, 160}, "gate");
  const TensorView down = view_of(test.weight(0, 2).values, {160, 96}, "down");
  EXPECT_THROW(layer.experts().load_expert(-1, gate, gate, down), std::invalid_argument);
  EXPECT_THROW(layer.experts().load_expert(5, gate, gate, down), std::invalid_argument);
  EXPECT_THROW(layer.experts().load_expert(0, gate, down, down), std::invalid_argument);
  EXPECT_THROW(layer.experts().load_expert(0, gate, gate, gate), std::invalid_argument);
  TensorView integers = gate;
  integers.dtype = DType::kInt32;
  EXPECT_THROW(layer.experts().load_expert(0, gate, integers, down), std::invalid_argument);
}

TEST(MoeLayer, DamagedWeightsAreRefusedAndNotUsed) {
  for (const WeightFormat format : testing::kFormatKinds) {
    LayerCase test(kSmall, format);
    const auto layer = test.make_layer(make_engine());
    EXPECT_EQ(forward_error(*layer), "");
    test.weights[2 * 3 + 1].values[96 * 160 - 1] = std::nanf("");
    try {
      test.load(*layer, 2);
      ADD_FAILURE() << "accepted";
    } catch (const std::invalid_argument& error) {
      EXPECT_STREQ(error.what(), "up of expert 2 holds NaN or infinity; the weights are damaged");
    }
    EXPECT_EQ(forward_error(*layer), "expert 2 has not been loaded");
  }
}

TEST(MoeLayer, AnExpertCanBeReplaced) {
  const LayerCase first(kSmall, WeightFormat::kInt8, 3);
  const LayerCase second(kSmall, WeightFormat::kInt8, 4);
  const auto layer = first.make_layer(make_engine());
  for (int expert = 0; expert < 5; ++expert) second.load(*layer, expert);
  testing::expect_matches_reference(second, *layer, random_batch(kSmall, 3));
}

TEST(MoeLayer, PackedMatricesAreThoseOfTheLayout) {
  for (const WeightFormat format : testing::kFormatKinds) {
    const LayerCase test({2, 1, 70, 40}, format);
    const auto layer = test.make_layer(make_engine());
    std::size_t bytes = 0;
    for (int expert = 0; expert < 2; ++expert) {
      for (int p = 0; p < kProjections; ++p) {
        const testing::Matrix& w = test.weight(expert, p);
        const PackedLayout layout(format, w.n, w.k);
        std::vector<std::uint8_t> codes =
            layer->experts().packed_codes(expert, static_cast<Projection>(p));
        std::vector<float> scales =
            layer->experts().packed_scales(expert, static_cast<Projection>(p));
        ASSERT_EQ(codes.size(), layout.code_bytes());
        ASSERT_EQ(scales.size(), layout.scales());
        std::vector<float> values(w.values.size());
        unpack({layout, codes.data(), scales.empty() ? nullptr : scales.data(), nullptr},
               values.data());
        EXPECT_EQ(values, testing::dequantized(w, format).values);
        bytes += codes.size() + scales.size() * sizeof(float);
      }
    }
    EXPECT_EQ(layer->experts().packed_bytes(), bytes);
  }
}

}  // namespace
}  // namespace ktrt
