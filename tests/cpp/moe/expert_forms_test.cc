// Experts that are not down(silu(gate x) · up x): biases, other activations, no gate.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "moe/form_case.h"

namespace ktrt {
namespace {

using testing::Batch;
using testing::Form;
using testing::FormCase;
using testing::forward;
using testing::kForms;
using testing::kFormShape;
using testing::LayerCase;
using testing::make_engine;
using testing::random_batch;
using testing::view_of;

class ExpertFormsTest : public ::testing::TestWithParam<std::tuple<Isa, WeightFormat, Form>> {
 protected:
  void SetUp() override {
    if (isa_ > detected_isa()) GTEST_SKIP() << name_of(isa_) << " is not available here";
  }
  const Isa isa_ = std::get<0>(GetParam());
  const WeightFormat format_ = std::get<1>(GetParam());
  const Form form_ = std::get<2>(GetParam());
};

INSTANTIATE_TEST_SUITE_P(
    Levels, ExpertFormsTest,
    ::testing::Combine(::testing::Values(Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAmx),
                       ::testing::Values(WeightFormat::kBf16, WeightFormat::kInt8),
                       ::testing::ValuesIn(kForms)),
    [](const auto& test) {
      return std::string(name_of(std::get<0>(test.param))) + "_" +
             name_of(std::get<1>(test.param)) + "_" + std::get<2>(test.param).name;
    });

TEST_P(ExpertFormsTest, MatchesTheReference) {
  for (const bool lora : {false, true}) {
    const FormCase test(form_, format_, lora);
    const auto layer = test.make(make_engine(2, 64, isa_));
    for (const int qlen : {1, 19}) {
      const Batch batch = random_batch(test.layer.shape, qlen);
      EXPECT_LT(testing::relative_error(forward(*layer, batch), test.expected(batch)),
                lora ? 4e-3 : 2e-3)
          << "qlen " << qlen << ", lora " << lora;
    }
  }
}

TEST_P(ExpertFormsTest, ThreadsAndPartsChangeNoBit) {
  const FormCase test(form_, format_, true);
  const Batch batch = random_batch(test.layer.shape, 23);
  const std::vector<float> one = forward(*test.make(make_engine(1, 64, isa_)), batch);
  EXPECT_EQ(forward(*test.make(make_engine(3, 64, isa_)), batch), one);
  EXPECT_EQ(forward(*test.make(make_engine(2, 64, isa_, 2)), batch), one);
  EXPECT_EQ(forward(*test.make(make_engine(3, 64, isa_, 3)), batch), one);
}

std::string message_of(const std::function<void()>& run) {
  try {
    run();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "accepted";
}

TEST(ExpertForms, ArgumentsThatDoNotFitAreNamed) {
  const FormCase plain({.name = "", .activation = {}}, WeightFormat::kBf16, false);
  const FormCase no_gate({.name = "", .activation = {}, .has_gate = false}, WeightFormat::kBf16,
                         false);
  const auto engine = make_engine();
  const auto gated = plain.make(engine);
  const auto ungated = no_gate.make(engine);
  const auto w = [&](int p) {
    const testing::Matrix& m = plain.layer.weight(0, p);
    return view_of(m.values, {m.n, m.k}, "w");
  };
  EXPECT_EQ(message_of([&] { gated->experts().load_expert(0, std::nullopt, w(1), w(2)); }),
            "gate is missing, but the experts have one");
  EXPECT_EQ(message_of([&] { ungated->experts().load_expert(0, w(0), w(1), w(2)); }),
            "gate is given, but the experts have none");
  EXPECT_EQ(
      message_of([&] { ungated->experts().set_biases(plain.bias(0), std::nullopt, std::nullopt); }),
      "bias is given, but the experts have no gate");
  EXPECT_EQ(
      message_of([&] { gated->experts().set_biases(plain.bias(0), plain.bias(2), std::nullopt); }),
      "bias has shape [5, 150], expected [5, 90]");
  std::vector<float> damaged = plain.biases[1];
  damaged[91] = std::nanf("");
  const TensorView bad = view_of(damaged, {5, 90}, "up");
  EXPECT_EQ(message_of([&] { gated->experts().set_biases(std::nullopt, bad, std::nullopt); }),
            "up of expert 1 holds NaN or infinity; the weights are damaged");
  TensorView integers = plain.bias(1);
  integers.dtype = DType::kInt32;
  EXPECT_EQ(message_of([&] { gated->experts().set_biases(std::nullopt, integers, std::nullopt); }),
            "bias is int32, expected float32");
  LayerCase lora(no_gate.layer.shape, WeightFormat::kBf16);
  lora.add_lora(4, 4, 0);
  EXPECT_EQ(message_of([&] { lora.set_lora(*ungated); }),
            "LoRA of gate is given, but the experts have no gate");
}

TEST(ExpertForms, ActivationsThatMakeNoSenseAreRefused) {
  const auto engine = make_engine();
  for (const Activation& a :
       {Activation{.gate_limit = 0.0f}, Activation{.up_limit = -1.0f},
        Activation{.alpha = std::nanf("")}, Activation{.kind = ActivationKind::kSoftcapSilu}}) {
    EXPECT_THROW(MoeLayer(engine, kFormShape, WeightFormat::kBf16, a), std::invalid_argument);
  }
}

TEST(ExpertForms, ExpertsWithoutGateHoldNoMemoryForIt) {
  const FormCase plain({.name = "", .activation = {}}, WeightFormat::kInt8, false);
  const FormCase no_gate({.name = "", .activation = {}, .has_gate = false}, WeightFormat::kInt8,
                         false);
  const auto engine = make_engine();
  const auto gated = plain.make(engine);
  const auto ungated = no_gate.make(engine);
  const std::size_t gate =
      gated->experts().packed_codes(0, Projection::kGate).size() +
      gated->experts().packed_scales(0, Projection::kGate).size() * sizeof(float);
  EXPECT_EQ(ungated->experts().packed_bytes() + kFormShape.num_experts * gate,
            gated->experts().packed_bytes());
  EXPECT_TRUE(ungated->experts().packed_codes(0, Projection::kGate).empty());
}

}  // namespace
}  // namespace ktrt
