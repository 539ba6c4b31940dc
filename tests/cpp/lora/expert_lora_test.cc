#include "lora/expert_lora.h"

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "moe/layer_case.h"

namespace ktrt {
namespace {

using testing::Batch;
using testing::forward;
using testing::LayerCase;
using testing::make_engine;
using testing::random_batch;
using testing::relative_error;
using testing::view_of;

constexpr MoeShape kShape{4, 2, 160, 176};

class ExpertLoraTest : public ::testing::TestWithParam<WeightFormat> {
 protected:
  LayerCase make() const { return LayerCase(kShape, GetParam()); }
};

INSTANTIATE_TEST_SUITE_P(Formats, ExpertLoraTest, ::testing::ValuesIn(testing::kFormatKinds),
                         [](const auto& format) { return name_of(format.param); });

struct Ranks {
  int gate, up, down;
};

TEST_P(ExpertLoraTest, AnySubsetOfProjectionsAndRanks) {
  const Batch batch = random_batch(kShape, 9);
  for (const auto& [gate, up, down] :
       {Ranks{8, 0, 0}, Ranks{0, 8, 0}, Ranks{0, 0, 8}, Ranks{8, 8, 0}, Ranks{8, 0, 8},
        Ranks{0, 8, 8}, Ranks{8, 8, 8}, Ranks{1, 1, 1}, Ranks{3, 5, 7}, Ranks{5, 16, 64},
        Ranks{17, 1, 33}, Ranks{64, 63, 2}, Ranks{256, 256, 256}, Ranks{255, 2, 1}}) {
    SCOPED_TRACE(std::to_string(gate) + " " + std::to_string(up) + " " + std::to_string(down));
    LayerCase test = make();
    const std::vector<double> base = test.expected(batch);
    test.add_lora(gate, up, down);
    const auto layer = test.make_layer(make_engine());
    testing::expect_matches_reference(test, *layer, batch);
    EXPECT_GT(relative_error(forward(*layer, batch), base), 0.3) << "the LoRA hardly shows";
  }
}

TEST_P(ExpertLoraTest, EveryIsaLevel) {
  const Batch batch = random_batch(kShape, 20);
  LayerCase test = make();
  test.add_lora(8, 5, 19);
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAmx}) {
    if (isa > detected_isa()) continue;
    SCOPED_TRACE(name_of(isa));
    testing::expect_matches_reference(test, *test.make_layer(make_engine(2, 64, isa)), batch);
  }
}

TEST_P(ExpertLoraTest, UpMayShareTheAOfGate) {
  const Batch batch = random_batch(kShape, 9);
  for (const int rank : {1, 6, 33}) {
    for (const int down : {0, 4}) {
      LayerCase test = make();
      test.add_lora(rank, 0, down);
      test.add_lora(Projection::kUp, rank, true);
      const auto layer = test.make_layer(make_engine());
      testing::expect_matches_reference(test, *layer, batch);
      // One shrink serves both, bit for bit.
      const std::vector<float> shared = forward(*layer, batch);
      test.lora[1].a = test.lora[0].a;
      test.set_lora(*layer);
      EXPECT_EQ(forward(*layer, batch), shared);
    }
  }
}

TEST_P(ExpertLoraTest, FusedEqualsMerged) {
  const Batch batch = random_batch(kShape, 16);
  LayerCase test = make();
  test.add_lora(8, 8, 8);
  const std::vector<float> fused = forward(*test.make_layer(make_engine()), batch);
  const double error = relative_error(fused, test.expected(batch, testing::Rounding::kNone));
  EXPECT_LT(error, testing::cost_of(GetParam()));
}

TEST_P(ExpertLoraTest, ZeroBChangesNoBit) {
  const Batch batch = random_batch(kShape, 16);
  LayerCase test = make();
  const std::vector<float> base = forward(*test.make_layer(make_engine()), batch);
  test.add_lora(8, 5, 3);
  for (testing::LoraArrays& lora : test.lora) lora.b.assign(lora.b.size(), 0.0f);
  EXPECT_EQ(forward(*test.make_layer(make_engine()), batch), base);
}

// A [E][rank][in] and B [E][out][rank] with zero ranks added at the end.
void pad_rank(testing::LoraArrays& lora, int experts, int rank) {
  testing::LoraArrays padded{rank, lora.in, lora.out, {}, {}};
  const auto size = [](int value) { return static_cast<std::size_t>(value); };
  padded.a.assign(size(experts) * size(rank * lora.in), 0.0f);
  padded.b.assign(size(experts) * size(rank * lora.out), 0.0f);
  for (int e = 0; e < experts; ++e) {
    for (int r = 0; r < lora.rank; ++r) {
      for (int i = 0; i < lora.in; ++i) {
        padded.a[size((e * rank + r) * lora.in + i)] =
            lora.a[size((e * lora.rank + r) * lora.in + i)];
      }
      for (int o = 0; o < lora.out; ++o) {
        padded.b[size((e * lora.out + o) * rank + r)] =
            lora.b[size((e * lora.out + o) * lora.rank + r)];
      }
    }
  }
  lora = padded;
}

TEST_P(ExpertLoraTest, PaddingTheRankChangesNoBit) {
  const Batch batch = random_batch(kShape, 16);
  for (const int rank : {1, 5, 8, 16}) {
    LayerCase test = make();
    test.add_lora(rank, rank, rank);
    const std::vector<float> out = forward(*test.make_layer(make_engine()), batch);
    for (const int more : {1, 8, 17}) {
      LayerCase padded = test;
      for (testing::LoraArrays& lora : padded.lora) pad_rank(lora, kShape.num_experts, rank + more);
      EXPECT_EQ(forward(*padded.make_layer(make_engine()), batch), out) << rank << " + " << more;
    }
  }
}

TEST_P(ExpertLoraTest, CanBeReplacedAndTakenAway) {
  const Batch batch = random_batch(kShape, 5);
  LayerCase test = make();
  const auto layer = test.make_layer(make_engine());
  const std::vector<float> base = forward(*layer, batch);
  test.add_lora(8, 8, 8);
  test.set_lora(*layer);
  const std::vector<float> first = forward(*layer, batch);
  test.add_lora(20, 3, 0);
  test.lora[2].rank = 0;
  test.set_lora(*layer);
  testing::expect_matches_reference(test, *layer, batch);
  const std::vector<float> second = forward(*layer, batch);
  EXPECT_NE(second, first);
  testing::apply_no_lora(*layer);
  EXPECT_EQ(forward(*layer, batch), base);
  EXPECT_EQ(layer->last_kernels().lora_shrink, nullptr);
  testing::apply_lora(*layer);
  EXPECT_EQ(forward(*layer, batch), second);
  layer->load_lora(0, {}, {}, {});
  EXPECT_EQ(forward(*layer, batch), base);
  EXPECT_EQ(layer->last_kernels().lora_shrink, nullptr);
}

// The error of load_lora() for one wrong array; the LoRA that was there stays.
std::string error_of(const LayerCase& test, MoeLayer& layer, void (*spoil)(LoraPair (&)[3])) {
  LoraPair pairs[3];
  const char* names[] = {"gate", "up", "down"};
  for (int p = 0; p < 3; ++p) pairs[p] = test.lora[p].pair(kShape.num_experts, names[p]);
  spoil(pairs);
  try {
    layer.load_lora(0, pairs[0], pairs[1], pairs[2]);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

TEST(ExpertLora, WrongArraysAreNamed) {
  LayerCase test(kShape, WeightFormat::kBf16);
  test.add_lora(8, 8, 8);
  const auto layer = test.make_layer(make_engine());
  const Batch batch = random_batch(kShape, 3);
  const std::vector<float> before = forward(*layer, batch);
  const auto error = [&](void (*spoil)(LoraPair(&)[3])) { return error_of(test, *layer, spoil); };
  EXPECT_EQ(error([](LoraPair(&p)[3]) { p[0].b.reset(); }), "gate_a is given without gate_b");
  EXPECT_EQ(error([](LoraPair(&p)[3]) { p[2].a.reset(); }), "down_b is given without down_a");
  EXPECT_EQ(error([](LoraPair(&p)[3]) {
              p[0] = {};
              p[1].a.reset();
            }),
            "up_b is given without up_a");
  EXPECT_EQ(error([](LoraPair(&p)[3]) { p[1].a->dtype = DType::kBfloat16; }),
            "up_a is bfloat16, expected float32");
  EXPECT_EQ(error([](LoraPair(&p)[3]) { p[1].b->dtype = DType::kFloat16; }),
            "up_b is float16, expected float32");
  EXPECT_EQ(error([](LoraPair(&p)[3]) { p[2].a->shape[0] = 3; }),
            "down_a has shape [3, 8, 176], expected [4, 8, 176]");
  EXPECT_EQ(error([](LoraPair(&p)[3]) { p[2].a->shape[2] = 160; }),
            "down_a has shape [4, 8, 160], expected [4, 8, 176]");
  EXPECT_EQ(error([](LoraPair(&p)[3]) { p[2].b->shape[1] = 176; }),
            "down_b has shape [4, 176, 8], expected [4, 160, 8]");
  EXPECT_EQ(error([](LoraPair(&p)[3]) { p[0].b->shape[2] = 7; }),
            "gate_b has shape [4, 176, 7], expected [4, 176, 8]");
  EXPECT_EQ(error([](LoraPair(&p)[3]) { p[0].a->shape[1] = 0; }),
            "gate_a has rank 0, expected 1 to 256");
  EXPECT_EQ(error([](LoraPair(&p)[3]) { p[0].a->shape[1] = 257; }),
            "gate_a has rank 257, expected 1 to 256");
  EXPECT_EQ(error([](LoraPair(&p)[3]) { p[0].a->ndim = 2; }),
            "gate_a has shape [4, 8], expected [num_experts, rank, in]");
  EXPECT_EQ(forward(*layer, batch), before);
}

TEST(ExpertLora, RowsMayBeApart) {
  LayerCase test(kShape, WeightFormat::kBf16);
  test.add_lora(6, 0, 0);
  const auto layer = test.make_layer(make_engine());
  const Batch batch = random_batch(kShape, 3);
  const std::vector<float> expected = forward(*layer, batch);
  // A of an adapter that stores more ranks than this layer uses.
  constexpr std::size_t kWide = 10 * 160;
  std::vector<float> a(4 * kWide, 1e30f);
  for (std::size_t e = 0; e < 4; ++e) {
    std::copy_n(test.lora[0].a.data() + e * 6 * 160, 6 * 160, a.data() + e * kWide);
  }
  LoraPair gate = test.lora[0].pair(4, "gate");
  gate.a->data = a.data();
  gate.a->stride[0] = kWide;
  layer->load_lora(0, gate, {}, {});
  EXPECT_EQ(forward(*layer, batch), expected);
}

}  // namespace
}  // namespace ktrt
