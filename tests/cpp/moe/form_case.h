// Experts that are not down(silu(gate x) · up x), and their reference.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "moe/layer_case.h"

namespace ktrt::testing {

struct Form {
  const char* name;
  Activation activation;
  bool has_gate = true;
  bool has_bias = false;
};

inline constexpr Activation kGptOss{
    .alpha = 1.702f, .gate_limit = 1.5f, .up_limit = 1.2f, .up_offset = 1.0f};
inline const Form kForms[] = {
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
inline constexpr MoeShape kFormShape{5, 3, 150, 90};

inline double activation_of(const Activation& a, double gate, double up) {
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
    for (const Matrix& w : layer.weights) {
      dequantized.push_back(testing::dequantized(w, format));
    }
    for (int p = 0; p < kProjections; ++p) {
      biases[p] = layer.random.normals(static_cast<std::size_t>(kFormShape.num_experts) *
                                       static_cast<std::size_t>(layer.outputs(p)));
    }
  }

  static MoeShape shape_of(const Form& form) {
    MoeShape shape = kFormShape;
    shape.has_gate = form.has_gate;
    return shape;
  }

  TensorView bias(int p) const {
    return view_of(biases[p], {kFormShape.num_experts, layer.outputs(p)}, "bias");
  }

  std::unique_ptr<MoeLayer> make(std::shared_ptr<Engine> engine) const {
    auto made =
        std::make_unique<MoeLayer>(std::move(engine), layer.shape, layer.format, form.activation);
    for (int e = 0; e < kFormShape.num_experts; ++e) {
      const auto view = [&](int p) {
        const Matrix& w = layer.weight(e, p);
        return view_of(w.values, {w.n, w.k}, "w");
      };
      const auto gate = form.has_gate ? std::optional<TensorView>(view(0)) : std::nullopt;
      made->experts().load_expert(e, gate, view(1), view(2));
    }
    if (form.has_bias) {
      const auto gate = form.has_gate ? std::optional<TensorView>(bias(0)) : std::nullopt;
      made->experts().set_biases(gate, bias(1), bias(2));
    }
    if (layer.has_lora()) layer.set_lora(*made);
    return made;
  }

  // Output of one projection of one expert. `x` is rounded to BF16.
  std::vector<double> project(int expert, int p, const std::vector<float>& x) const {
    std::vector<float> codes = x;
    if (quantizes_rows(layer.format)) {
      quantize_and_back(codes.data(), static_cast<int>(codes.size()));
    }
    std::vector<double> y =
        dequantized[static_cast<std::size_t>(expert * kProjections + p)].times(codes);
    const LoraArrays& lora = layer.lora[p];
    if (lora.rank > 0) {
      const auto part = [&](const std::vector<float>& all, int n, int k) {
        Matrix m{n, k, {}};
        const auto first = all.begin() + static_cast<std::ptrdiff_t>(expert) * n * k;
        m.values.assign(first, first + static_cast<std::ptrdiff_t>(n) * k);
        for (float& value : m.values) value = round_to_bf16(value);
        return m;
      };
      std::vector<float> t;
      for (const double value : part(lora.a, lora.rank, lora.in).times(x)) {
        t.push_back(round_to_bf16(static_cast<float>(value)));
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
      for (float& value : x) value = round_to_bf16(value);
      for (int slot = 0; slot < batch.slots; ++slot) {
        const int expert = static_cast<int>(batch.ids[batch.at(token, slot)]);
        const std::vector<double> up = project(expert, 1, x);
        const std::vector<double> gate = form.has_gate ? project(expert, 0, x) : up;
        std::vector<float> act;
        for (std::size_t i = 0; i < up.size(); ++i) {
          const double value = activation_of(form.activation, gate[i], form.has_gate ? up[i] : 1.0);
          act.push_back(round_to_bf16(static_cast<float>(value)));
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
  std::vector<Matrix> dequantized;  // [expert][projection]
};

}  // namespace ktrt::testing
