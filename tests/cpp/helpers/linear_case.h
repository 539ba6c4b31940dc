// A linear layer's numbers, and calls that run any kind of linear on them.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "base/bf16.h"
#include "cpu/isa.h"
#include "engine/engine.h"
#include "helpers/loras.h"
#include "helpers/random.h"
#include "helpers/views.h"
#include "kernels/select.h"
#include "lora/lora_table.h"

namespace ktrt::testing {

inline std::size_t at(std::int64_t row, std::int64_t width, std::int64_t column) {
  return static_cast<std::size_t>(row * width + column);
}

inline std::shared_ptr<Engine> engine_of(int threads, const KernelTable& kernels) {
  const std::vector<int> nodes(static_cast<std::size_t>(threads), 0);
  return std::make_shared<Engine>(std::vector<int>(static_cast<std::size_t>(threads), -1), nodes, 8,
                                  active_isa(), kernels);
}

inline KernelTable best_kernels() { return select_kernels(active_isa(), cpu_features()); }

inline std::vector<std::uint16_t> to_bf16(const std::vector<float>& values) {
  std::vector<std::uint16_t> bits(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) bits[i] = f32_to_bf16(values[i]);
  return bits;
}

// y = x Wᵀ + bias + x Aᵀ Bᵀ.
struct LinearCase {
  LinearCase(int rows_, int out_, int in_, int rank_, bool with_bias = true)
      : rows(rows_), out(out_), in(in_), rank(rank_) {
    Random random(static_cast<std::uint64_t>(out * 31 + in));
    x = to_bf16(random.normals(at(rows, in, 0)));
    w = to_bf16(random.normals(at(out, in, 0)));
    if (with_bias) bias = random.normals(static_cast<std::size_t>(out));
    a = random.normals(at(rank, in, 0), 1.0f / std::sqrt(static_cast<float>(in)));
    b = random.normals(at(out, rank, 0));
  }

  TensorView weight() const { return view_of(w.data(), DType::kBfloat16, {out, in}, "weight"); }

  template <class Linear>
  std::unique_ptr<Linear> linear(std::shared_ptr<Engine> engine) const {
    std::optional<TensorView> bias_view;
    if (!bias.empty()) bias_view = view_of(bias, {out}, "bias");
    auto linear = std::make_unique<Linear>(std::move(engine), weight(), bias_view);
    if (rank > 0) set_lora(*linear);
    return linear;
  }

  void set_lora(auto& linear) const {
    linear.load_lora(0, view_of(a, {rank, in}, "a"), view_of(b, {out, rank}, "b"));
    apply_lora(linear);
  }

  std::vector<std::uint16_t> run(auto& linear, int first = 0, int count = -1,
                                 const AdapterIds& adapters = {}) const {
    if (count < 0) count = rows;
    std::vector<std::uint16_t> y(at(count, out, 0));
    linear.forward(x.data() + first * in, std::int64_t{count} * in, y.data(),
                   static_cast<std::int64_t>(y.size()), adapters);
    return y;
  }

  // LoRA's share of every output of a row, in double, and the sum of its terms' magnitudes.
  std::vector<std::pair<double, double>> lora(int row) const {
    std::vector<std::pair<double, double>> sums(static_cast<std::size_t>(out));
    for (int i = 0; i < rank; ++i) {
      double t = 0.0;
      for (int k = 0; k < in; ++k) {
        t += double{bf16_to_f32(x[at(row, in, k)])} * round_to_bf16(a[at(i, in, k)]);
      }
      for (int n = 0; n < out; ++n) {
        const double product = t * round_to_bf16(b[at(n, rank, i)]);
        sums[static_cast<std::size_t>(n)].first += product;
        sums[static_cast<std::size_t>(n)].second += std::abs(product);
      }
    }
    return sums;
  }

  float bias_of(int n) const { return bias.empty() ? 0.0f : bias[static_cast<std::size_t>(n)]; }

  int rows, out, in, rank;
  std::vector<std::uint16_t> x, w;
  std::vector<float> bias, a, b;
};

inline std::string message_of(const auto& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "nothing was thrown";
}

}  // namespace ktrt::testing
