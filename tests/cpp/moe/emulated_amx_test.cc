// Whole layers on the AMX kernels' bodies, with emulated tiles: their order of rows, jobs of many
// rows, and their steps around the tiles, on machines without AMX.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "kernels/select.h"
#include "moe/form_case.h"

namespace ktrt {

namespace {

using testing::Batch;
using testing::Form;
using testing::FormCase;
using testing::forward;
using testing::LayerCase;
using testing::random_batch;

constexpr int kMaxQlen = 700;

// The kernels of an AMX machine, on emulated tiles, for experts with `rows` rows or more.
KernelTable emulated_kernels(int rows) {
  KernelTable table = select_kernels(Isa::kAvx512, cpu_features());
  for (const WeightFormat format : kWeightFormats) {
    table.gemm(format) = {table.gemm(format).few, &emulated_amx_gemm(format), rows};
  }
  table.lora_shrink_tiles = &emulated_amx_shrink();
  return table;
}

std::shared_ptr<Engine> emulated_engine(int threads, int parts = 1, int rows = 2,
                                        bool fixed_kernels = false) {
  std::vector<int> home;
  for (int thread = 0; thread < threads; ++thread) home.push_back(thread % parts);
  return std::make_shared<Engine>(
      std::vector<int>(home.size(), -1), home, kMaxQlen, Isa::kAvx512,
      fixed_kernels ? fixed(emulated_kernels(rows)) : emulated_kernels(rows));
}

class EmulatedAmxTest : public ::testing::TestWithParam<std::tuple<WeightFormat, bool>> {
 protected:
  void SetUp() override {
    if (!cpu_features().avx512_bf16 || !cpu_features().avx512_vnni) {
      GTEST_SKIP() << "around the tiles is AVX-512 code, not available here";
    }
  }
  LayerCase make_case(const MoeShape& shape) const {
    LayerCase test(shape, std::get<0>(GetParam()));
    if (std::get<1>(GetParam())) test.add_lora(7, 33, 3);
    return test;
  }
};

INSTANTIATE_TEST_SUITE_P(Formats, EmulatedAmxTest,
                         ::testing::Combine(::testing::ValuesIn(testing::kFormatKinds),
                                            ::testing::Bool()),
                         [](const auto& test) {
                           return std::string(name_of(std::get<0>(test.param))) +
                                  (std::get<1>(test.param) ? "_lora" : "_base");
                         });

// 512 rows of the two experts are a block.
TEST_P(EmulatedAmxTest, SeveralBlocksOfTokens) {
  const LayerCase test = make_case({2, 2, 64, 96});
  const auto layer = test.make_layer(emulated_engine(2));
  testing::expect_matches_reference(test, *layer, random_batch(test.shape, 601));
}

// All to one expert: 1 row and few, tiles that are not full, blocks of k, several jobs.
TEST_P(EmulatedAmxTest, AnyNumberOfRows) {
  const LayerCase test = make_case({2, 1, 160, 96});
  const auto layer = test.make_layer(emulated_engine(2));
  for (const int qlen : {1, 2, 16, 17, 33, 101, 600}) {
    SCOPED_TRACE(qlen);
    Batch batch = random_batch(test.shape, qlen);
    std::fill(batch.ids.begin(), batch.ids.end(), 1);
    testing::expect_matches_reference(test, *layer, batch);
  }
  EXPECT_STREQ(layer->last_kernels().gemm, "amx_emulated");
}

TEST_P(EmulatedAmxTest, ShapesWithTails) {
  for (const MoeShape& shape : {MoeShape{3, 2, 37, 45}, MoeShape{3, 2, 160, 176},
                                MoeShape{2, 2, 3616, 64}, MoeShape{1, 1, 1100, 290}}) {
    SCOPED_TRACE(shape.hidden_size);
    const LayerCase test = make_case(shape);
    const auto layer = test.make_layer(emulated_engine(2));
    testing::expect_matches_reference(test, *layer, random_batch(shape, 70));
  }
}

TEST_P(EmulatedAmxTest, FewRowsHaveTheirOwnKernel) {
  const LayerCase test = make_case({16, 3, 96, 64});
  const auto layer = test.make_layer(emulated_engine(2, 1, 12));
  testing::expect_matches_reference(test, *layer, random_batch(test.shape, 60));
  EXPECT_STREQ(layer->last_kernels().gemm, "amx_emulated");
  EXPECT_NE(layer->last_kernels().gemm_few_rows, nullptr);
}

TEST_P(EmulatedAmxTest, ThreadsAndPartsChangeNoBit) {
  const LayerCase test = make_case({4, 2, 160, 176});
  const auto one = test.make_layer(emulated_engine(1));
  for (const auto& [threads, parts] : {std::pair(3, 1), std::pair(4, 2)}) {
    const auto several = test.make_layer(emulated_engine(threads, parts));
    for (const int qlen : {1, 20, 300}) {
      const Batch batch = random_batch(test.shape, qlen);
      EXPECT_EQ(forward(*several, batch), forward(*one, batch)) << threads << " " << qlen;
    }
  }
}

TEST_P(EmulatedAmxTest, NanStaysInItsToken) {
  const LayerCase test = make_case({3, 2, 96, 64});
  const auto layer = test.make_layer(emulated_engine(2));
  Batch batch = random_batch(test.shape, 50);
  const std::vector<float> clean = forward(*layer, batch);
  batch.hidden[20 * 96 + 5] = std::nanf("");
  const std::vector<float> out = forward(*layer, batch);
  for (std::size_t i = 0; i < out.size(); ++i) {
    if (i / 96 == 20) {
      ASSERT_FALSE(std::isfinite(out[i])) << i;
    } else {
      ASSERT_EQ(out[i], clean[i]) << i;
    }
  }
}

// One kernel for any number of rows, or kernels of the same bits: neither a token's company nor the
// others' LoRAs matter. Jobs of 1 row, few, several tiles; runs that begin within a tile.
TEST_P(EmulatedAmxTest, FixedKernelsGiveARowItsBitsInAnyCompany) {
  LayerCase test = make_case({4, 2, 160, 176});
  for (testing::LoraArrays& lora : test.lora) lora = {};
  const auto engine = emulated_engine(2, 1, 4, true);
  EXPECT_TRUE(engine->fixed_kernels());
  const auto layer = test.make_layer(engine);
  for (const int number : {0, 1, 2}) {
    test.add_lora(8 + 9 * number, 8 + number, 40 - 17 * number);
    test.load_lora(*layer, number);
  }
  layer->activate_loras(std::vector<int>{2, 0}, std::vector<float>{0.7f, 1.0f});
  const bool lora = std::get<1>(GetParam());
  for (const int qlen : {3, 20, 150}) {
    const Batch batch = random_batch(test.shape, qlen);
    std::vector<std::int32_t> ids;
    for (int token = 0; token < qlen; ++token) ids.push_back(lora ? token * 7 / 3 % 5 - 2 : -1);
    const std::vector<float> all = forward(*layer, batch, ids);
    for (int token = 0; token < qlen; token += 1 + qlen / 20) {
      const std::vector<float> alone =
          forward(*layer, testing::select(batch, {token}), {ids[static_cast<std::size_t>(token)]});
      ASSERT_TRUE(std::equal(alone.begin(), alone.end(), all.begin() + token * 160))
          << "token " << token << " of " << qlen;
    }
  }
}

// Weights and choices act on shrunk rows, which these kernels read in pieces of 32 values.
TEST_P(EmulatedAmxTest, SeveralLoras) {
  LayerCase test = make_case({4, 2, 160, 176});
  for (testing::LoraArrays& lora : test.lora) lora = {};
  const auto layer = test.make_layer(emulated_engine(2));
  const Batch batch = random_batch(test.shape, 70);
  std::vector<std::vector<float>> alone{forward(*layer, batch)};
  for (const int rank : {8, 18}) {
    test.add_lora(rank, rank + 2, rank - 4);
    const auto pair = [&](int p) { return test.lora[p].pair(4, "lora"); };
    layer->load_lora(rank, pair(0), pair(1), pair(2));
    layer->activate_loras(std::vector<int>{rank}, std::vector<float>{1.0f});
    alone.push_back(forward(*layer, batch));
    layer->activate_loras(std::vector<int>{rank}, std::vector<float>{0.5f});
    const std::vector<float> half = forward(*layer, batch);
    for (testing::LoraArrays& lora : test.lora) {
      for (float& value : lora.b) value *= 0.5f;
    }
    EXPECT_EQ(half, forward(*test.make_layer(emulated_engine(2)), batch));
  }
  layer->activate_loras(std::vector<int>{8, 18}, std::vector<float>{1.0f, 1.0f});
  constexpr std::int32_t kIds[] = {-1, 8, 18};
  std::vector<std::int32_t> ids;
  for (int token = 0; token < 70; ++token) ids.push_back(kIds[token % 3]);
  std::vector<float> mixed(batch.hidden.size());
  layer->forward(testing::view_of(batch.hidden, {70, 160}, "hidden_states"),
                 testing::view_of(batch.ids.data(), DType::kInt64, {70, 2}, "expert_ids"),
                 testing::view_of(batch.weights, {70, 2}, "routing_weights"),
                 testing::view_of(mixed, {70, 160}, "out"),
                 testing::view_of(ids.data(), DType::kInt32, {70}, "adapter_ids"));
  std::vector<double> expected;
  for (std::size_t i = 0; i < mixed.size(); ++i) expected.push_back(alone[i / 160 % 3][i]);
  EXPECT_LT(testing::relative_error(mixed, expected), 4e-3);
}

TEST(EmulatedAmx, IntegersWithoutLoraHaveTheBitsOfThePortableKernels) {
  if (!cpu_features().avx512_bf16 || !cpu_features().avx512_vnni) GTEST_SKIP();
  for (const WeightFormat format : {WeightFormat::kInt8, WeightFormat::kInt4}) {
    const LayerCase test({4, 2, 160, 176}, format);
    const Batch batch = random_batch(test.shape, 333);
    EXPECT_EQ(forward(*test.make_layer(emulated_engine(3)), batch),
              forward(*test.make_layer(testing::make_engine(2, kMaxQlen, Isa::kPortable)), batch));
  }
}

TEST(EmulatedAmx, SlicesOfDownHaveTheBitsOfThePortableKernels) {
  if (!cpu_features().avx512_bf16 || !cpu_features().avx512_vnni) GTEST_SKIP();
  for (const WeightFormat format : {WeightFormat::kInt8, WeightFormat::kInt4}) {
    const LayerCase test({4, 2, 96, 512}, format);
    const Batch batch = random_batch(test.shape, 90);
    const auto run = [&](std::shared_ptr<Engine> engine, int slices) {
      MoeLayer layer(std::move(engine), test.shape, format, Activation{}, slices);
      for (int e = 0; e < test.shape.num_experts; ++e) test.load(layer, e);
      return forward(layer, batch);
    };
    const auto portable = testing::make_engine(2, kMaxQlen, Isa::kPortable);
    EXPECT_EQ(run(emulated_engine(3), 2), run(portable, 2));
    EXPECT_EQ(run(emulated_engine(3), 4), run(portable, 4));
    EXPECT_NE(run(portable, 4), run(portable, 2));
  }
}

// Biases, other activations, no gate: where rows are in tile order, and where jobs end in the
// middle of a tile.
class EmulatedAmxFormsTest : public ::testing::TestWithParam<std::tuple<WeightFormat, Form>> {};

INSTANTIATE_TEST_SUITE_P(Forms, EmulatedAmxFormsTest,
                         ::testing::Combine(::testing::ValuesIn(kKtFormats),
                                            ::testing::ValuesIn(testing::kForms)),
                         [](const auto& test) {
                           return std::string(name_of(std::get<0>(test.param))) + "_" +
                                  std::get<1>(test.param).name;
                         });

TEST_P(EmulatedAmxFormsTest, MatchesTheReference) {
  if (!cpu_features().avx512_bf16 || !cpu_features().avx512_vnni) GTEST_SKIP();
  for (const bool lora : {false, true}) {
    const FormCase test(std::get<1>(GetParam()), std::get<0>(GetParam()), lora);
    const auto layer = test.make(emulated_engine(2));
    for (const int qlen : {1, 71}) {
      const Batch batch = random_batch(test.layer.shape, qlen);
      EXPECT_LT(testing::relative_error(forward(*layer, batch), test.expected(batch)),
                lora ? 4e-3 : 2e-3)
          << "qlen " << qlen << ", lora " << lora;
    }
    EXPECT_STREQ(layer->last_kernels().gemm, "amx_emulated");
  }
}

}  // namespace
}  // namespace ktrt
