// The LoRAs that a layer holds: the active sum, and the numbers that tokens name.
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
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

constexpr MoeShape kShape{4, 2, 160, 176};

std::size_t size(int value) { return static_cast<std::size_t>(value); }

void load(MoeLayer& layer, int id, const LayerCase& test) { test.load_lora(layer, id); }

void activate(MoeLayer& layer, const std::vector<int>& ids, const Values& weights) {
  layer.activate_loras(ids, weights);
}

// Every value of B times `weight`.
LayerCase scaled(LayerCase test, float weight) {
  for (LoraArrays& lora : test.lora) {
    for (float& value : lora.b) value *= weight;
  }
  return test;
}

// Rows of `count` matrices, `left`'s above `right`'s.
Values stack(const Values& left, const Values& right, int count) {
  Values result;
  const std::size_t of_left = left.size() / size(count);
  const std::size_t of_right = right.size() / size(count);
  for (std::size_t i = 0; i < size(count); ++i) {
    const auto at = [i](const Values& from, std::size_t length) {
      return from.begin() + static_cast<std::ptrdiff_t>(i * length);
    };
    result.insert(result.end(), at(left, of_left), at(left, of_left + 0) + of_left);
    result.insert(result.end(), at(right, of_right), at(right, of_right) + of_right);
  }
  return result;
}

// One LoRA of the sum of the ranks: A's rows and B's columns side by side.
LayerCase side_by_side(const LayerCase& left, const LayerCase& right) {
  LayerCase both = left;
  const int experts = left.shape.num_experts;
  for (int p = 0; p < kProjections; ++p) {
    const LoraArrays& l = left.lora[p];
    const LoraArrays& r = right.lora[p];
    if (r.rank == 0) continue;
    LoraArrays& sum = both.lora[p];
    sum = {l.rank + r.rank, r.in, r.out, {}, {}};
    if (!r.a.empty()) sum.a = stack(l.a, r.a, experts);
    sum.b = stack(l.b, r.b, experts * r.out);
  }
  return both;
}

class LayerLorasTest : public ::testing::TestWithParam<WeightFormat> {
 protected:
  LayerCase with_lora(int gate, int up, int down) {
    base_.add_lora(gate, up, down);
    LayerCase test = base_;
    for (LoraArrays& lora : base_.lora) lora = {};
    return test;
  }
  // The outputs of a separate layer with this LoRA only.
  static Values alone(const LayerCase& test, const Batch& batch, Isa isa = detected_isa()) {
    return forward(*test.make_layer(make_engine(2, 64, isa)), batch);
  }

  LayerCase base_{kShape, GetParam()};
  const Batch batch_ = random_batch(kShape, 20);
};

INSTANTIATE_TEST_SUITE_P(Formats, LayerLorasTest, ::testing::ValuesIn(testing::kFormatKinds),
                         [](const auto& format) { return name_of(format.param); });

template <class F>
void for_each_isa(F f) {
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAmx}) {
    if (isa > detected_isa()) continue;
    SCOPED_TRACE(name_of(isa));
    f(isa);
  }
}

TEST_P(LayerLorasTest, OneOfSeveralIsThatOneAlone) {
  const LayerCase one = with_lora(8, 8, 8);
  const LayerCase two = with_lora(5, 0, 19);
  for_each_isa([&](Isa isa) {
    const auto layer = base_.make_layer(make_engine(2, 64, isa));
    const Values base = forward(*layer, batch_);
    load(*layer, 7, one);
    load(*layer, 3, two);
    load(*layer, 4, base_);
    EXPECT_EQ(forward(*layer, batch_), base) << "loaded is not active";
    for (int round = 0; round < 2; ++round) {
      activate(*layer, {7}, {1.0f});
      EXPECT_EQ(forward(*layer, batch_), alone(one, batch_, isa));
      activate(*layer, {3}, {1.0f});
      EXPECT_EQ(forward(*layer, batch_), alone(two, batch_, isa));
      activate(*layer, {4}, {1.0f});
      EXPECT_EQ(forward(*layer, batch_), base) << "a LoRA of nothing";
      activate(*layer, {}, {});
      EXPECT_EQ(forward(*layer, batch_), base);
    }
  });
}

// A factor of a power of two rounds nothing, on shrunk rows as on B.
TEST_P(LayerLorasTest, AScaleIsThatOfB) {
  const LayerCase test = with_lora(8, 5, 33);
  for_each_isa([&](Isa isa) {
    const auto layer = base_.make_layer(make_engine(2, 64, isa));
    const Values base = forward(*layer, batch_);
    load(*layer, 0, test);
    for (const float weight : {0.5f, 4.0f, -1.0f, 1.0f}) {
      activate(*layer, {0}, {weight});
      EXPECT_EQ(forward(*layer, batch_), alone(scaled(test, weight), batch_, isa)) << weight;
    }
    activate(*layer, {0}, {0.3f});
    EXPECT_LT(relative_error(forward(*layer, batch_), scaled(test, 0.3f).expected(batch_)), 6e-3);
    activate(*layer, {0}, {0.0f});
    EXPECT_EQ(forward(*layer, batch_), base);
  });
}

// On tiles the sums of several LoRAs' ranks are added apart.
void expect_same(const Values& out, const Values& expected, Isa isa) {
  if (isa != Isa::kAmx) {
    EXPECT_EQ(out, expected);
  } else {
    EXPECT_LT(relative_error(out, {expected.begin(), expected.end()}), 4e-3);
  }
}

TEST_P(LayerLorasTest, ASumIsOneLoraOfAllRanks) {
  struct Pair {
    int one[3], two[3];
  };
  for (const auto& [l, r] : {Pair{{8, 8, 8}, {8, 8, 8}}, Pair{{4, 16, 2}, {20, 6, 64}},
                             Pair{{8, 0, 8}, {8, 6, 0}}, Pair{{0, 0, 8}, {8, 8, 0}}}) {
    const LayerCase one = with_lora(l[0], l[1], l[2]);
    const LayerCase two = with_lora(r[0], r[1], r[2]);
    for_each_isa([&](Isa isa) {
      const auto layer = base_.make_layer(make_engine(2, 64, isa));
      load(*layer, 1, one);
      load(*layer, 2, two);
      activate(*layer, {1, 2}, {1.0f, 1.0f});
      expect_same(forward(*layer, batch_), alone(side_by_side(one, two), batch_, isa), isa);
      activate(*layer, {1, 2}, {2.0f, -0.5f});
      const LayerCase weighed = side_by_side(scaled(one, 2.0f), scaled(two, -0.5f));
      expect_same(forward(*layer, batch_), alone(weighed, batch_, isa), isa);
      activate(*layer, {2, 1}, {1.0f, 0.0f});
      EXPECT_EQ(forward(*layer, batch_), alone(two, batch_, isa)) << "the other one's ranks";
      activate(*layer, {1}, {1.0f});
      EXPECT_EQ(forward(*layer, batch_), alone(one, batch_, isa));
    });
  }
}

TEST_P(LayerLorasTest, OddRanksAndSharedA) {
  LayerCase one = with_lora(7, 3, 1);
  LayerCase two = base_;
  two.add_lora(5, 0, 9);
  two.add_lora(Projection::kUp, 5, true);
  LayerCase three = base_;
  three.random = testing::Random(99);
  three.add_lora(3, 0, 4);
  three.add_lora(Projection::kUp, 3, true);
  const auto layer = base_.make_layer(make_engine());
  load(*layer, 1, one);
  load(*layer, 2, two);
  load(*layer, 3, three);
  activate(*layer, {1, 2}, {1.0f, 1.0f});
  LayerCase own = two;
  own.lora[1].a = own.lora[0].a;
  EXPECT_LT(relative_error(forward(*layer, batch_), side_by_side(one, own).expected(batch_)), 4e-3);
  activate(*layer, {2, 3}, {1.0f, 1.0f});
  const LayerCase both = side_by_side(two, three);
  EXPECT_LT(relative_error(forward(*layer, batch_), both.expected(batch_)), 4e-3);
}

std::string error_of(const auto& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

TEST_P(LayerLorasTest, ErrorsLeaveEverythingAsItWas) {
  const LayerCase one = with_lora(200, 2, 2);
  const LayerCase two = with_lora(100, 2, 2);
  const auto layer = base_.make_layer(make_engine());
  load(*layer, 1, one);
  load(*layer, 2, two);
  activate(*layer, {1}, {0.5f});
  const Values before = forward(*layer, batch_);
  const int version = layer->lora_version();
  EXPECT_EQ(error_of([&] { activate(*layer, {5}, {1.0f}); }), "there is no LoRA 5; 2 are held");
  EXPECT_EQ(error_of([&] { activate(*layer, {1, 2}, {1.0f}); }),
            "there are 2 LoRAs and 1 weights, expected one for each");
  EXPECT_EQ(error_of([&] { activate(*layer, {1, 1}, {1.0f, 1.0f}); }), "LoRA 1 is named twice");
  EXPECT_EQ(error_of([&] { activate(*layer, {2}, {std::nanf("")}); }),
            "the weight of LoRA 2 is nan, expected a number");
  EXPECT_EQ(error_of([&] { layer->unload_lora(1); }),
            "LoRA 1 is active; activate another, or none, before it is removed");
  EXPECT_EQ(error_of([&] { layer->unload_lora(3); }), "there is no LoRA 3");
  EXPECT_NE(error_of([&] { load(*layer, -1, one); }), "");
  EXPECT_EQ(forward(*layer, batch_), before);
  EXPECT_EQ(layer->lora_version(), version);
  EXPECT_EQ(layer->active_loras(), (std::vector<std::pair<int, float>>{{1, 0.5f}}));
}

TEST_P(LayerLorasTest, ReplacingWhatIsActive) {
  const LayerCase one = with_lora(8, 8, 8);
  const LayerCase two = with_lora(4, 4, 4);
  const LayerCase other = with_lora(6, 2, 8);
  const auto layer = base_.make_layer(make_engine());
  load(*layer, 1, one);
  load(*layer, 2, two);
  activate(*layer, {1, 2}, {1.0f, 1.0f});
  const int version = layer->lora_version();
  load(*layer, 2, other);
  EXPECT_NE(layer->lora_version(), version);
  expect_same(forward(*layer, batch_), alone(side_by_side(one, other), batch_), detected_isa());
  activate(*layer, {}, {});
  layer->unload_lora(2);
  activate(*layer, {1}, {1.0f});
  EXPECT_EQ(forward(*layer, batch_), alone(one, batch_));
}

// The version tells holders of copies that the set, or what acts, is another.
TEST_P(LayerLorasTest, VersionChangesWithTheSet) {
  const auto layer = base_.make_layer(make_engine());
  load(*layer, 1, with_lora(8, 8, 8));
  int version = layer->lora_version();
  const auto changed = [&] { return std::exchange(version, layer->lora_version()) != version; };
  activate(*layer, {1}, {1.0f});
  EXPECT_TRUE(changed());
  activate(*layer, {1}, {1.0f});
  EXPECT_FALSE(changed());
  activate(*layer, {1}, {0.5f});
  EXPECT_TRUE(changed());
  load(*layer, 2, with_lora(8, 8, 8));
  EXPECT_TRUE(changed());
  EXPECT_EQ(layer->loras(), (std::vector<int>{1, 2}));
  layer->unload_lora(2);
  EXPECT_TRUE(changed());
  activate(*layer, {}, {});
  EXPECT_TRUE(changed());
}

// A switch waits for the forward under way: every forward is wholly with the one or the other.
TEST_P(LayerLorasTest, SwitchingDuringForwards) {
  const LayerCase one = with_lora(8, 8, 8);
  const LayerCase two = with_lora(4, 4, 4);
  const auto layer = base_.make_layer(make_engine(1));
  load(*layer, 1, one);
  load(*layer, 2, two);
  const Values expected[] = {alone(one, batch_), alone(two, batch_)};
  activate(*layer, {1}, {1.0f});
  std::atomic<bool> stop{false};
  std::thread switching([&] {
    for (int i = 0; !stop.load(); ++i) activate(*layer, {1 + i % 2}, {1.0f});
  });
  for (int i = 0; i < 30; ++i) {
    const Values out = forward(*layer, batch_);
    EXPECT_TRUE(out == expected[0] || out == expected[1]);
  }
  stop.store(true);
  switching.join();
}

}  // namespace
}  // namespace ktrt
