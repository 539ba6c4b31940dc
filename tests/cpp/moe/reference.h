// The reference of a layer: plain loops over dequantised weights, sums in double precision, and
// the places where the engine rounds (csrc/README.md lists them), which can be left out.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "helpers/format_reference.h"
#include "helpers/packed.h"
#include "helpers/views.h"
#include "layout/packed_layout.h"
#include "moe/expert_weights.h"

namespace ktrt::testing {

enum class Rounding { kAsTheEngine, kNone };

inline float largest_of(const float* row, int count) {
  float largest = 0.0f;
  for (int i = 0; i < count; ++i) largest = std::max(largest, std::fabs(row[i]));
  return largest;
}

// One row by kt_kernel's rule: scale = max · float32(1/127), code = round_half_even(x · (1/scale)).
inline void quantize_and_back(float* row, int count) {
  const float scale = largest_of(row, count) * (1.0f / 127.0f);
  for (int i = 0; i < count; ++i) {
    row[i] = scale > 0.0f ? scale * std::nearbyintf(row[i] * (1.0f / scale)) : 0.0f;
  }
}

// Row-major [n][k].
struct Matrix {
  int n = 0;
  int k = 0;
  std::vector<float> values;

  const float* row(int i) const { return values.data() + static_cast<std::ptrdiff_t>(i) * k; }
  float* row(int i) { return values.data() + static_cast<std::ptrdiff_t>(i) * k; }

  // y = W x
  std::vector<double> times(const std::vector<float>& x) const {
    std::vector<double> y(static_cast<std::size_t>(n), 0.0);
    for (int i = 0; i < n; ++i) {
      double sum = 0.0;
      for (int j = 0; j < k; ++j) sum += double{row(i)[j]} * x[static_cast<std::size_t>(j)];
      y[static_cast<std::size_t>(i)] = sum;
    }
    return y;
  }
};

// The weights that a packed matrix stands for.
inline Matrix dequantized(Matrix w, WeightFormat format) {
  for (float& value : w.values) value = round_to_bf16(value);
  if (is_coded(format)) {  // whose codes and scales layout/ and kernels/ test
    unpack(pack(format, w.n, w.k, w.values).view(), w.values.data());
    return w;
  }
  if (!quantizes_rows(format)) return w;
  for (int i = 0; i < w.n; ++i) {
    const float scale = scale_of(largest_of(w.row(i), w.k), format);
    for (int j = 0; j < w.k; ++j) {
      w.row(i)[j] = scale * static_cast<float>(code_of(w.row(i)[j], scale, format));
    }
  }
  return w;
}

// W x + B (A x); A [rank][in] and B [out][rank] empty without LoRA.
struct Linear {
  Matrix w;
  Matrix a;
  Matrix b;
};

struct ReferenceExpert {
  Linear projections[kProjections];
};

class Reference {
 public:
  Reference(std::vector<ReferenceExpert> experts, WeightFormat format, Rounding rounding)
      : experts_(std::move(experts)),
        int8_activations_(quantizes_rows(format)),
        rounding_(rounding) {
    for (ReferenceExpert& expert : experts_) {
      for (Linear& linear : expert.projections) {
        if (!rounds()) continue;
        linear.w = dequantized(std::move(linear.w), format);
        for (float& value : linear.a.values) value = round_to_bf16(value);
        for (float& value : linear.b.values) value = round_to_bf16(value);
      }
    }
  }

  // Adds weight · expert(x) to `sum`, [hidden_size].
  void add(int expert, std::vector<float> x, double weight, std::vector<double>& sum) const {
    const ReferenceExpert& e = experts_[static_cast<std::size_t>(expert)];
    if (rounds()) round_all(x);
    const std::vector<float> codes = quantized(x);
    const std::vector<double> gate = apply(e.projections[0], codes, x);
    const std::vector<double> up = apply(e.projections[1], codes, x);
    std::vector<float> act(gate.size());
    for (std::size_t i = 0; i < act.size(); ++i) {
      act[i] = static_cast<float>(gate[i] / (1.0 + std::exp(-gate[i])) * up[i]);
    }
    if (rounds()) round_all(act);
    const std::vector<double> down = apply(e.projections[2], quantized(act), act);
    for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += weight * down[i];
  }

 private:
  bool rounds() const { return rounding_ == Rounding::kAsTheEngine; }

  static void round_all(std::vector<float>& values) {
    for (float& value : values) value = round_to_bf16(value);
  }

  std::vector<float> quantized(std::vector<float> x) const {
    if (int8_activations_ && rounds()) quantize_and_back(x.data(), static_cast<int>(x.size()));
    return x;
  }

  // `codes` goes through W, the unquantised x through the LoRA.
  std::vector<double> apply(const Linear& linear, const std::vector<float>& codes,
                            const std::vector<float>& x) const {
    std::vector<double> y = linear.w.times(codes);
    if (linear.b.k == 0) return y;
    const std::vector<double> shrunk = linear.a.times(x);
    std::vector<float> t(shrunk.begin(), shrunk.end());
    if (rounds()) round_all(t);
    const std::vector<double> expanded = linear.b.times(t);
    for (std::size_t i = 0; i < y.size(); ++i) y[i] += expanded[i];
    return y;
  }

  std::vector<ReferenceExpert> experts_;
  const bool int8_activations_;
  const Rounding rounding_;
};

}  // namespace ktrt::testing
