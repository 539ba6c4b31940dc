// The same tokens give the same bits, whoever computes them and whatever their neighbours are.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "moe/layer_case.h"

namespace ktrt {
namespace {

using testing::Batch;
using testing::forward;
using testing::LayerCase;
using testing::make_engine;
using testing::random_batch;

constexpr MoeShape kShape{8, 3, 160, 176};
// A skewed batch of these has 1000 rows for one expert: eight jobs, four where AMX makes them
// larger.
constexpr int kMaxQlen = 600;

class DeterminismTest : public ::testing::TestWithParam<std::tuple<WeightFormat, bool>> {
 protected:
  DeterminismTest() {
    if (std::get<1>(GetParam())) test_.add_lora(8, 5, 3);
  }
  LayerCase test_{kShape, std::get<0>(GetParam())};
};

INSTANTIATE_TEST_SUITE_P(Formats, DeterminismTest,
                         ::testing::Combine(::testing::ValuesIn(testing::kFormatKinds),
                                            ::testing::Bool()),
                         [](const auto& test) {
                           return std::string(name_of(std::get<0>(test.param))) +
                                  (std::get<1>(test.param) ? "_lora" : "_base");
                         });

// Half of all slots go to expert 0, a third of the rest to expert 1.
Batch skewed_batch(int qlen) {
  Batch batch = random_batch(kShape, qlen);
  testing::Random random(5);
  for (auto& id : batch.ids) {
    if (random.integer(0, 1) == 0) {
      id = 0;
    } else if (random.integer(0, 2) == 0) {
      id = 1;
    }
  }
  return batch;
}

std::vector<std::vector<float>> forward_each(MoeLayer& layer, const std::vector<Batch>& batches) {
  std::vector<std::vector<float>> outputs;
  for (const Batch& batch : batches) outputs.push_back(forward(layer, batch));
  return outputs;
}

TEST_P(DeterminismTest, NumberOfThreads) {
  const auto one = test_.make_layer(make_engine(1, kMaxQlen));
  std::vector<Batch> batches{skewed_batch(300)};
  for (const int qlen : {1, 2, 17, 64, kMaxQlen}) batches.push_back(random_batch(kShape, qlen));
  const std::vector<std::vector<float>> expected = forward_each(*one, batches);
  for (const int threads : {2, 3}) {
    const auto several = test_.make_layer(make_engine(threads, kMaxQlen));
    EXPECT_EQ(forward_each(*several, batches), expected) << threads << " threads";
  }
}

// Every expert cut into shards, as on a machine of several NUMA nodes.
TEST_P(DeterminismTest, NumberOfParts) {
  const auto whole = test_.make_layer(make_engine(1, kMaxQlen));
  std::vector<Batch> batches;
  for (const int qlen : {1, 17, kMaxQlen}) batches.push_back(skewed_batch(qlen));
  const std::vector<std::vector<float>> expected = forward_each(*whole, batches);
  for (const auto& [threads, parts] : {std::pair(2, 2), std::pair(3, 2), std::pair(5, 5)}) {
    const auto sharded = test_.make_layer(make_engine(threads, kMaxQlen, detected_isa(), parts));
    EXPECT_EQ(forward_each(*sharded, batches), expected)
        << threads << " threads, " << parts << " parts";
  }
}

TEST_P(DeterminismTest, Repetition) {
  const auto layer = test_.make_layer(make_engine(3, kMaxQlen));
  const Batch large = skewed_batch(200);
  const Batch small = random_batch(kShape, 3);
  const std::vector<float> first_large = forward(*layer, large);
  const std::vector<float> first_small = forward(*layer, small);
  for (int i = 0; i < 20; ++i) {
    ASSERT_EQ(forward(*layer, large), first_large);
    ASSERT_EQ(forward(*layer, small), first_small);
  }
}

TEST_P(DeterminismTest, OrderOfTheTokens) {
  const auto layer = test_.make_layer(make_engine(2, kMaxQlen));
  for (const int qlen : {5, 40, 300}) {
    const Batch batch = skewed_batch(qlen);
    const std::vector<float> out = forward(*layer, batch);
    const std::vector<int> order = testing::Random(6).permutation(qlen);
    const std::vector<float> permuted = forward(*layer, testing::select(batch, order));
    for (std::size_t i = 0; i < permuted.size(); ++i) {
      const auto token = static_cast<std::size_t>(order[i / 160]);
      ASSERT_EQ(permuted[i], out[token * 160 + i % 160]) << qlen << " tokens, value " << i;
    }
  }
}

TEST_P(DeterminismTest, OrderOfTheSlots) {
  const auto layer = test_.make_layer(make_engine(2, kMaxQlen));
  const Batch batch = random_batch(kShape, 20);
  Batch reversed = batch;
  for (int token = 0; token < 20; ++token) {
    for (int slot = 0; slot < 3; ++slot) {
      reversed.ids[reversed.at(token, slot)] = batch.ids[batch.at(token, 2 - slot)];
      reversed.weights[reversed.at(token, slot)] = batch.weights[batch.at(token, 2 - slot)];
    }
  }
  EXPECT_EQ(forward(*layer, reversed), forward(*layer, batch));
}

// Tokens in one forward or in several. Exact only where one kernel serves any number of rows.
TEST_P(DeterminismTest, Chunks) {
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512, Isa::kAmx}) {
    if (isa > detected_isa()) continue;
    const auto layer = test_.make_layer(make_engine(2, kMaxQlen, isa));
    const Batch batch = skewed_batch(40);
    const std::vector<float> whole = forward(*layer, batch);
    std::vector<float> pieces;
    for (int first = 0; first < 40;) {
      std::vector<int> tokens(static_cast<std::size_t>(std::min(first + 1, 40 - first)));
      std::iota(tokens.begin(), tokens.end(), first);
      const std::vector<float> part = forward(*layer, testing::select(batch, tokens));
      pieces.insert(pieces.end(), part.begin(), part.end());
      first += static_cast<int>(tokens.size());
    }
    if (isa == Isa::kAmx) {
      const std::vector<double> expected(whole.begin(), whole.end());
      EXPECT_LT(testing::relative_error(pieces, expected), 4e-3);
    } else {
      EXPECT_EQ(pieces, whole) << name_of(isa);
    }
  }
}

// Integer sums are exact and the stages between them round alike everywhere.
TEST(Determinism, IntegersWithoutLoraAreTheSameOnEveryIsa) {
  for (const WeightFormat format : {WeightFormat::kInt8, WeightFormat::kInt4}) {
    const LayerCase test(kShape, format);
    const Batch batch = skewed_batch(200);
    const std::vector<float> expected =
        forward(*test.make_layer(make_engine(2, kMaxQlen, Isa::kPortable)), batch);
    for (const Isa isa : {Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512, Isa::kAmx}) {
      if (isa > detected_isa()) continue;
      const auto layer = test.make_layer(make_engine(2, kMaxQlen, isa));
      EXPECT_EQ(forward(*layer, batch), expected) << name_of(format) << " " << name_of(isa);
    }
  }
}

}  // namespace
}  // namespace ktrt
