// Tokens of one forward with a LoRA for each: every row has the bits that it has alone, wherever
// one kernel serves any number of rows.
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "moe/layer_case.h"

namespace ktrt {
namespace {

using testing::Batch;
using testing::forward;
using testing::LayerCase;
using testing::LoraArrays;
using testing::make_engine;
using testing::random_batch;
using testing::relative_error;
using testing::view_of;
using Values = std::vector<float>;
using Ids = std::vector<std::int32_t>;

constexpr MoeShape kShape{4, 2, 160, 176};
constexpr int kHidden = 160;

Values row(const Values& all, int token) {
  return {all.begin() + token * kHidden, all.begin() + (token + 1) * kHidden};
}

class RowLorasTest : public ::testing::TestWithParam<std::tuple<Isa, WeightFormat>> {
 protected:
  void SetUp() override {
    if (isa() > detected_isa()) GTEST_SKIP() << name_of(isa()) << " is not available here";
  }
  static Isa isa() { return std::get<0>(GetParam()); }
  std::unique_ptr<MoeLayer> make_layer(int threads = 2) const {
    return base_.make_layer(make_engine(threads, 64, isa()));
  }
  void load(MoeLayer& layer, int number, int gate, int up, int down) {
    base_.add_lora(gate, up, down);
    base_.load_lora(layer, number);
    for (LoraArrays& lora : base_.lora) lora = {};
  }

  LayerCase base_{kShape, std::get<1>(GetParam())};
};

INSTANTIATE_TEST_SUITE_P(IsasAndFormats, RowLorasTest,
                         ::testing::Combine(::testing::Values(Isa::kPortable, Isa::kAvx2,
                                                              Isa::kAvx512),
                                            ::testing::ValuesIn(testing::kFormatKinds)),
                         [](const auto& test) {
                           return std::string(name_of(std::get<0>(test.param))) + "_" +
                                  name_of(std::get<1>(test.param));
                         });

// Batches of jobs with 1 row, few, and more than are shrunk by all threads together.
TEST_P(RowLorasTest, ARowHasTheBitsThatItHasAloneAndAmongItsLike) {
  const auto layer = make_layer();
  load(*layer, 1, 8, 8, 8);
  load(*layer, 2, 3, 20, 6);
  load(*layer, 5, 33, 0, 17);
  load(*layer, 9, 0, 5, 0);
  layer->activate_loras(std::vector<int>{2, 9, 1}, Values{0.7f, -1.5f, 1.0f});
  constexpr std::int32_t kNames[] = {1, kBaseRow, 2, kActiveRow, 5, 9};
  for (const int qlen : {2, 7, 20, 64}) {
    SCOPED_TRACE(qlen);
    const Batch batch = random_batch(kShape, qlen, 2, static_cast<std::uint64_t>(qlen));
    Ids ids;
    for (int token = 0; token < qlen; ++token) ids.push_back(kNames[token * 5 / 3 % 6]);
    const Values mixed = forward(*layer, batch, ids);
    for (const std::int32_t id : kNames) {
      const Values uniform = forward(*layer, batch, Ids(ids.size(), id));
      for (int token = 0; token < qlen; ++token) {
        if (ids[static_cast<std::size_t>(token)] != id) continue;
        ASSERT_EQ(row(mixed, token), row(uniform, token)) << "token " << token << ", LoRA " << id;
        ASSERT_EQ(row(mixed, token), forward(*layer, testing::select(batch, {token}), {id}))
            << "token " << token << ", LoRA " << id;
      }
    }
    EXPECT_EQ(forward(*layer, batch, Ids(ids.size(), kActiveRow)), forward(*layer, batch));
    layer->activate_loras(std::vector<int>{5}, Values{1.0f});
    EXPECT_EQ(forward(*layer, batch, Ids(ids.size(), 5)), forward(*layer, batch));
    layer->activate_loras(std::vector<int>{2, 9, 1}, Values{0.7f, -1.5f, 1.0f});
  }
}

TEST_P(RowLorasTest, BaseRowsHaveTheBitsOfALayerWithoutLoras) {
  const auto plain = make_layer();
  const auto layer = make_layer(3);
  load(*layer, 0, 16, 16, 16);
  const Batch batch = random_batch(kShape, 40);
  const Values base = forward(*plain, batch);
  Ids ids(40, kBaseRow);
  EXPECT_EQ(forward(*layer, batch, ids), base);
  for (std::size_t token = 0; token < ids.size(); token += 3) ids[token] = 0;
  const Values mixed = forward(*layer, batch, ids);
  for (int token = 0; token < batch.qlen; ++token) {
    const bool tuned = token % 3 == 0;
    ASSERT_EQ(row(mixed, token) == row(base, token), !tuned) << token;
  }
}

TEST_P(RowLorasTest, IdleRowsAreNotComputedAndChangeNobody) {
  const auto layer = make_layer();
  load(*layer, 0, 8, 8, 8);
  load(*layer, 1, 4, 4, 4);
  Batch batch = random_batch(kShape, 9);
  Ids ids = {0, 1, -1, 0, 1, 0, 1, -1, 0};
  const Values all = forward(*layer, batch, ids);
  ids[2] = ids[4] = kIdleRow;
  batch.hidden[4 * kHidden] = std::nanf("");
  const Values some = forward(*layer, batch, ids);
  for (int token = 0; token < batch.qlen; ++token) {
    const bool idle = ids[static_cast<std::size_t>(token)] == kIdleRow;
    ASSERT_EQ(row(some, token), idle ? Values(kHidden, 0.0f) : row(all, token)) << token;
  }
  EXPECT_EQ(forward(*layer, batch, Ids(9, kIdleRow)), Values(9 * kHidden, 0.0f));
}

// Wider rows of shrunk ranks than one LoRA can have: the scratch memory grows.
TEST_P(RowLorasTest, TwelveLorasOfRank32AndTheirSum) {
  const auto layer = make_layer();
  std::vector<int> numbers;
  for (int i = 0; i < 12; ++i) {
    load(*layer, i, 32, 32, 32);
    numbers.push_back(i);
  }
  const Batch batch = random_batch(kShape, 48);
  Ids ids;
  for (int token = 0; token < 48; ++token) ids.push_back(token % 14 - 2);
  layer->activate_loras(numbers, Values(12, 1.0f));
  const Values mixed = forward(*layer, batch, ids);
  std::vector<Values> alone;
  for (int id = -2; id < 12; ++id) {
    alone.push_back(forward(*layer, batch, Ids(ids.size(), id)));
  }
  for (int token = 0; token < 48; ++token) {
    ASSERT_EQ(row(mixed, token), row(alone[static_cast<std::size_t>(token % 14)], token)) << token;
  }
}

// The reference has the weights in B, in float32; the engine weighs shrunk rows, rounded to BF16.
TEST_P(RowLorasTest, AWeightedSumMatchesTheReference) {
  const auto layer = make_layer();
  LayerCase sum = base_;
  sum.random = testing::Random(11);
  constexpr float kWeights[] = {0.3f, 1.0f, -1.7f};
  sum.add_lora(12, 12, 12);  // ranks 0 … 3, 4 … 7, 8 … 11 are the three LoRAs
  for (int i = 0; i < 3; ++i) {
    LayerCase part = base_;
    for (int p = 0; p < kProjections; ++p) {
      const LoraArrays& all = sum.lora[p];
      LoraArrays& few = part.lora[p];
      few = {4, all.in, all.out, {}, {}};
      for (int e = 0; e < kShape.num_experts; ++e) {
        const auto a = all.a.begin() + (e * 12 + i * 4) * all.in;
        few.a.insert(few.a.end(), a, a + 4 * all.in);
        for (int n = 0; n < all.out; ++n) {
          const auto b = all.b.begin() + (e * all.out + n) * 12 + i * 4;
          few.b.insert(few.b.end(), b, b + 4);
        }
      }
    }
    part.load_lora(*layer, i);
  }
  for (LoraArrays& lora : sum.lora) {
    for (std::size_t i = 0; i < lora.b.size(); ++i) lora.b[i] *= kWeights[i % 12 / 4];
  }
  layer->activate_loras(std::vector<int>{0, 1, 2}, kWeights);
  const Batch batch = random_batch(kShape, 20);
  EXPECT_LT(relative_error(forward(*layer, batch), sum.expected(batch)), 8e-3);
}

std::string error_of(const auto& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

TEST_P(RowLorasTest, IdsAreChecked) {
  const auto layer = make_layer();
  load(*layer, 1, 2, 2, 2);
  const Batch batch = random_batch(kShape, 2);
  Values out(batch.hidden.size());
  const auto run = [&](const TensorView& adapters) {
    return error_of([&] {
      layer->forward(view_of(batch.hidden, {2, kHidden}, "hidden_states"),
                     view_of(batch.ids.data(), DType::kInt64, {2, 2}, "expert_ids"),
                     view_of(batch.weights, {2, 2}, "routing_weights"),
                     view_of(out, {2, kHidden}, "out"), adapters);
    });
  };
  const auto wide = [&](std::vector<std::int64_t> ids) {
    return run(view_of(ids.data(), DType::kInt64, {2}, "adapter_ids"));
  };
  EXPECT_EQ(wide({1, -2}), "");
  EXPECT_EQ(wide({1, 2}),
            "adapter_ids[1] is 2, expected the number of a LoRA that is held, -1 for none or -2 "
            "for the active ones");
  for (const std::int64_t id :
       {std::int64_t{-4}, std::int64_t{1} << 32 | 1, std::numeric_limits<std::int64_t>::min()}) {
    EXPECT_EQ(wide({id, 1}), "adapter_ids[0] is " + std::to_string(id) +
                                 ", expected the number of a LoRA, -1 for none, -2 for the active "
                                 "ones or -3 for a row that stands for nothing");
  }
  const std::int64_t one[] = {1};
  EXPECT_EQ(run(view_of(one, DType::kInt64, {1}, "adapter_ids")),
            "adapter_ids has shape [1], expected [2]");
  EXPECT_EQ(run(view_of(out, {2}, "adapter_ids")),
            "adapter_ids is float32, expected int32 or int64");
}

// A LoRA may be loaded, replaced and removed while forwards run: each sees one set or the other.
TEST_P(RowLorasTest, TheSetChangesDuringForwards) {
  const auto layer = make_layer();
  load(*layer, 0, 8, 8, 8);
  const Batch batch = random_batch(kShape, 12);
  const Ids ids = {0, -1, -2, 0, 0, -1, -2, 0, 0, -1, -2, -3};
  const Values base = forward(*layer, batch, Ids(12, -1));
  const Values tuned = forward(*layer, batch, Ids(12, 0));
  std::atomic<bool> stop{false};
  std::thread changing([&] {
    LayerCase other = base_;
    other.add_lora(40, 2, 24);
    for (int i = 0; !stop.load(); ++i) {
      if (i % 2 == 0) other.load_lora(*layer, 1);
      layer->activate_loras(std::vector<int>{i % 2 == 0 ? 1 : 0}, Values{1.0f});
      if (i % 2 == 1) layer->unload_lora(1);
    }
  });
  for (int i = 0; i < 20; ++i) {
    const Values out = forward(*layer, batch, ids);
    for (const int token : {0, 3, 4, 7, 8}) EXPECT_EQ(row(out, token), row(tuned, token));
    for (const int token : {1, 5, 9}) EXPECT_EQ(row(out, token), row(base, token));
  }
  stop.store(true);
  changing.join();
}

}  // namespace
}  // namespace ktrt
