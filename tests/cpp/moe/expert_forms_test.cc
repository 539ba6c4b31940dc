// Experts that are not down(silu(gate x) · up x): biases, other activations, no gate.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
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
using testing::view_of;

struct Form {
  const char* name;
  Activation activation;
  bool has_gate = true;
  bool has_bias = false;
};

constexpr Activation kGptOss{
    .alpha = 1.702f, .gate_limit = 1.5f, .up_limit = 1.2f, .up_offset = 1.0f};
const Form kForms[] = {
    {.name = "biases", .activation = {}, .has_bias = true},
    {.name = "gpt_oss", .activation = kGptOss, .has_bias = true},
    {.name = "clamped", .activation = {.gate_limit = 1.0f, .up_limit = 0.8f}},
    {.name = "gelu_tanh", .activation = {.kind = ActivationKind::kGeluTanh}},
    {.name = "softcap",
     .activation = {.kind = ActivationKind::kSoftcapSilu, .gate_limit = 1.5f, .up_limit = 2.0f}},
    {.name = "no_gate", .activation = {.kind = ActivationKind::kRelu2}, .has_gate = false},
    {.name = "no_gate_biases",
     .activation = {.kind = ActivationKind::kGelu},
     .has_gate = false,
     .has_bias = true},
};
constexpr MoeShape kShape{5, 3, 150, 90};

double activation_of(const Activation& a, double gate, double up) {
  const auto sigmoid = [](double x) { return 1.0 / (1.0 + std::exp(-x)); };
  const double g = std::min(gate, double{a.gate_limit});
  const double u = std::clamp(up, -double{a.up_limit}, double{a.up_limit}) + a.up_offset;
  switch (a.kind) {
    case ActivationKind::kSilu:
      return g * sigmoid(a.alpha * g) * u;
    case ActivationKind::kGelu:
      return 0.5 * g * std::erfc(-g / std::sqrt(2.0)) * u;
    case ActivationKind::kGeluTanh:
      return 0.5 * g * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (g + 0.044715 * g * g * g))) * u;
    case ActivationKind::kRelu:
      return std::max(g, 0.0) * u;
    case ActivationKind::kRelu2:
      return std::max(g, 0.0) * std::max(g, 0.0) * u;
    case ActivationKind::kSoftcapSilu:
      return a.gate_limit * std::tanh(gate / a.gate_limit) * sigmoid(gate) * a.up_limit *
             std::tanh(up / a.up_limit);
  }
  return 0.0;
}

// A layer of some form, and plain loops in double precision that round where the engine does.
struct FormCase {
  FormCase(const Form& form_, WeightFormat format, bool with_lora)
      : form(form_), layer(shape_of(form_), format, 11) {
    if (with_lora) layer.add_lora(form.has_gate ? 6 : 0, 5, 9);
    for (const testing::Matrix& w : layer.weights) {
      dequantized.push_back(testing::dequantized(w, format));
    }
    for (int p = 0; p < kProjections; ++p) {
      biases[p] = layer.random.normals(static_cast<std::size_t>(kShape.num_experts) *
                                       static_cast<std::size_t>(layer.outputs(p)));
    }
  }

  static MoeShape shape_of(const Form& form) {
    MoeShape shape = kShape;
    shape.has_gate = form.has_gate;
    return shape;
  }

  TensorView bias(int p) const {
    return view_of(biases[p], {kShape.num_experts, layer.outputs(p)}, "bias");
  }

  std::unique_ptr<MoeLayer> make(std::shared_ptr<Engine> engine) const {
    auto made =
        std::make_unique<MoeLayer>(std::move(engine), layer.shape, layer.format, form.activation);
    for (int e = 0; e < kShape.num_experts; ++e) {
      const auto view = [&](int p) {
        const testing::Matrix& w = layer.weight(e, p);
        return view_of(w.values, {w.n, w.k}, "w");
      };
      const auto gate = form.has_gate ? std::optional<TensorView>(view(0)) : std::nullopt;
      made->load_expert(e, gate, view(1), view(2));
    }
    if (form.has_bias) {
      const auto gate = form.has_gate ? std::optional<TensorView>(bias(0)) : std::nullopt;
      made->set_biases(gate, bias(1), bias(2));
    }
    if (layer.has_lora()) layer.set_lora(*made);
    return made;
  }

  // Of one projection of one expert. `x` is rounded to BF16.
  std::vector<double> project(int expert, int p, const std::vector<float>& x) const {
    std::vector<float> codes = x;
    if (layer.format == WeightFormat::kInt8) {
      testing::quantize_and_back(codes.data(), static_cast<int>(codes.size()));
    }
    std::vector<double> y =
        dequantized[static_cast<std::size_t>(expert * kProjections + p)].times(codes);
    const testing::LoraArrays& lora = layer.lora[p];
    if (lora.rank > 0) {
      const auto part = [&](const std::vector<float>& all, int n, int k) {
        testing::Matrix m{n, k, {}};
        const auto first = all.begin() + static_cast<std::ptrdiff_t>(expert) * n * k;
        m.values.assign(first, first + static_cast<std::ptrdiff_t>(n) * k);
        for (float& value : m.values) value = testing::round_to_bf16(value);
        return m;
      };
      std::vector<float> t;
      for (const double value : part(lora.a, lora.rank, lora.in).times(x)) {
        t.push_back(testing::round_to_bf16(static_cast<float>(value)));
      }
      const std::vector<double> delta = part(lora.b, lora.out, lora.rank).times(t);
      for (std::size_t i = 0; i < y.size(); ++i) y[i] += delta[i];
    }
    if (form.has_bias) {
      const std::size_t first = static_cast<std::size_t>(expert) * y.size();
      for (std::size_t i = 0; i < y.size(); ++i) y[i] += biases[p][first + i];
    }
    return y;
  }

  std::vector<double> expected(const Batch& batch) const {
    std::vector<double> out(batch.hidden.size(), 0.0);
    for (int token = 0; token < batch.qlen; ++token) {
      std::vector<float> x = batch.row(token);
      for (float& value : x) value = testing::round_to_bf16(value);
      for (int slot = 0; slot < batch.slots; ++slot) {
        const int expert = static_cast<int>(batch.ids[batch.at(token, slot)]);
        const std::vector<double> up = project(expert, 1, x);
        const std::vector<double> gate = form.has_gate ? project(expert, 0, x) : up;
        std::vector<float> act;
        for (std::size_t i = 0; i < up.size(); ++i) {
          const double value = activation_of(form.activation, gate[i], form.has_gate ? up[i] : 1.0);
          act.push_back(testing::round_to_bf16(static_cast<float>(value)));
        }
        const std::vector<double> y = project(expert, 2, act);
        for (std::size_t i = 0; i < y.size(); ++i) {
          out[static_cast<std::size_t>(token) * y.size() + i] +=
              double{batch.weights[batch.at(token, slot)]} * y[i];
        }
      }
    }
    return out;
  }

  Form form;
  LayerCase layer;
  std::vector<float> biases[kProjections];
  std::vector<testing::Matrix> dequantized;  // [expert][projection]
};

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
  EXPECT_EQ(message_of([&] { gated->load_expert(0, std::nullopt, w(1), w(2)); }),
            "gate is missing, but the experts have one");
  EXPECT_EQ(message_of([&] { ungated->load_expert(0, w(0), w(1), w(2)); }),
            "gate is given, but the experts have none");
  EXPECT_EQ(message_of([&] { ungated->set_biases(plain.bias(0), std::nullopt, std::nullopt); }),
            "bias is given, but the experts have no gate");
  EXPECT_EQ(message_of([&] { gated->set_biases(plain.bias(0), plain.bias(2), std::nullopt); }),
            "bias has shape [5, 150], expected [5, 90]");
  std::vector<float> damaged = plain.biases[1];
  damaged[91] = std::nanf("");
  const TensorView bad = view_of(damaged, {5, 90}, "up");
  EXPECT_EQ(message_of([&] { gated->set_biases(std::nullopt, bad, std::nullopt); }),
            "up of expert 1 holds NaN or infinity; the weights are damaged");
  TensorView integers = plain.bias(1);
  integers.dtype = DType::kInt32;
  EXPECT_EQ(message_of([&] { gated->set_biases(std::nullopt, integers, std::nullopt); }),
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
    EXPECT_THROW(MoeLayer(engine, kShape, WeightFormat::kBf16, a), std::invalid_argument);
  }
}

TEST(ExpertForms, ExpertsWithoutGateHoldNoMemoryForIt) {
  const FormCase plain({.name = "", .activation = {}}, WeightFormat::kInt8, false);
  const FormCase no_gate({.name = "", .activation = {}, .has_gate = false}, WeightFormat::kInt8,
                         false);
  const auto engine = make_engine();
  const auto gated = plain.make(engine);
  const auto ungated = no_gate.make(engine);
  const std::size_t gate = gated->packed_codes(0, Projection::kGate).size() +
                           gated->packed_scales(0, Projection::kGate).size() * sizeof(float);
  EXPECT_EQ(ungated->packed_bytes() + kShape.num_experts * gate, gated->packed_bytes());
  EXPECT_TRUE(ungated->packed_codes(0, Projection::kGate).empty());
}

}  // namespace
}  // namespace ktrt
