// A layer with random weights, batches of tokens for it, and its reference.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "helpers/loras.h"
#include "helpers/random.h"
#include "helpers/views.h"
#include "moe/moe_layer.h"
#include "moe/reference.h"

namespace ktrt::testing {

// An engine whose threads are not pinned, at an ISA level of this machine or below; thread i is at
// home in part i % parts of the weights.
inline std::shared_ptr<Engine> make_engine(int threads = 2, int max_qlen = 64,
                                           Isa isa = detected_isa(), int parts = 1) {
  const char* before = std::getenv("KTRT_ISA");
  const std::optional<std::string> saved =
      before ? std::optional<std::string>(before) : std::nullopt;
  std::vector<int> home;
  for (int thread = 0; thread < threads; ++thread) home.push_back(thread % parts);
  setenv("KTRT_ISA", name_of(isa), 1);
  auto engine = std::make_shared<Engine>(std::vector<int>(home.size(), -1), home, max_qlen);
  saved ? setenv("KTRT_ISA", saved->c_str(), 1) : unsetenv("KTRT_ISA");
  return engine;
}

// Tokens with their routing. Ids and weights [qlen][slots].
struct Batch {
  int qlen = 0;
  int slots = 0;
  std::vector<float> hidden;
  std::vector<std::int64_t> ids;
  std::vector<float> weights;

  std::vector<float> row(int token) const {
    const std::size_t width = hidden.size() / static_cast<std::size_t>(qlen);
    const auto first = hidden.begin() + static_cast<std::ptrdiff_t>(width) * token;
    return {first, first + static_cast<std::ptrdiff_t>(width)};
  }
  std::size_t at(int token, int slot) const {
    return static_cast<std::size_t>(token * slots + slot);
  }
};

// Every token goes to `slots` different experts.
inline Batch random_batch(const MoeShape& shape, int qlen, int slots, std::uint64_t seed = 7) {
  Random random(seed);
  Batch batch{qlen, slots, {}, {}, {}};
  batch.hidden =
      random.normals(static_cast<std::size_t>(qlen) * static_cast<std::size_t>(shape.hidden_size));
  for (int token = 0; token < qlen; ++token) {
    const std::vector<int> order = random.permutation(shape.num_experts);
    for (int slot = 0; slot < slots; ++slot) {
      batch.ids.push_back(order[static_cast<std::size_t>(slot)]);
      batch.weights.push_back(static_cast<float>(random.uniform(0.05, 1.0)));
    }
  }
  return batch;
}
inline Batch random_batch(const MoeShape& shape, int qlen) {
  return random_batch(shape, qlen, shape.top_k);
}

// The tokens `order` of a batch.
inline Batch select(const Batch& batch, const std::vector<int>& order) {
  Batch result{static_cast<int>(order.size()), batch.slots, {}, {}, {}};
  for (const int token : order) {
    const std::vector<float> row = batch.row(token);
    result.hidden.insert(result.hidden.end(), row.begin(), row.end());
    for (int slot = 0; slot < batch.slots; ++slot) {
      result.ids.push_back(batch.ids[batch.at(token, slot)]);
      result.weights.push_back(batch.weights[batch.at(token, slot)]);
    }
  }
  return result;
}

// [qlen][hidden_size], float32 in and out. `adapters`: each token's LoRA; none: the active ones.
inline std::vector<float> forward(MoeLayer& layer, const Batch& batch,
                                  const std::vector<std::int32_t>& adapters = {}) {
  const int hidden = layer.shape().hidden_size;
  std::optional<TensorView> ids;
  if (!adapters.empty()) {
    ids = view_of(adapters.data(), DType::kInt32, {batch.qlen}, "adapter_ids");
  }
  std::vector<float> out(batch.hidden.size(), std::nanf(""));
  layer.forward(view_of(batch.hidden, {batch.qlen, hidden}, "hidden_states"),
                view_of(batch.ids.data(), DType::kInt64, {batch.qlen, batch.slots}, "expert_ids"),
                view_of(batch.weights, {batch.qlen, batch.slots}, "routing_weights"),
                view_of(out, {batch.qlen, hidden}, "out"), ids);
  return out;
}

// One projection's LoRA for all experts, float32: A [E][rank][in], B [E][out][rank].
struct LoraArrays {
  int rank = 0;  // 0: none
  int in = 0;
  int out = 0;
  std::vector<float> a;  // empty: up shares gate's
  std::vector<float> b;

  LoraPair pair(int experts, const std::string& name) const {
    LoraPair pair;
    if (rank == 0) return pair;
    if (!a.empty()) pair.a = view_of(a, {experts, rank, in}, name + "_a");
    pair.b = view_of(b, {experts, out, rank}, name + "_b");
    return pair;
  }
};

// Weights and LoRA of a layer whose outputs are of order one.
struct LayerCase {
  LayerCase(const MoeShape& shape_, WeightFormat format_, std::uint64_t seed = 3)
      : shape(shape_), format(format_), random(seed) {
    for (int e = 0; e < shape.num_experts; ++e) {
      for (int p = 0; p < kProjections; ++p)
        weights.push_back(random_matrix(outputs(p), inputs(p)));
    }
  }

  int inputs(int projection) const {
    return projection == 2 ? shape.intermediate_size : shape.hidden_size;
  }
  int outputs(int projection) const {
    return projection == 2 ? shape.hidden_size : shape.intermediate_size;
  }

  Matrix random_matrix(int n, int k) {
    const auto count = static_cast<std::size_t>(n) * static_cast<std::size_t>(k);
    return {n, k, random.normals(count, 1.0f / std::sqrt(static_cast<float>(k)))};
  }
  const Matrix& weight(int expert, int projection) const {
    return weights[static_cast<std::size_t>(expert * kProjections + projection)];
  }

  // As large as the base's part: a mistake in it shows.
  void add_lora(Projection projection, int rank, bool share_gate_a = false) {
    const auto p = static_cast<int>(projection);
    LoraArrays& l = lora[p];
    l = {rank, inputs(p), outputs(p), {}, {}};
    const auto e = static_cast<std::size_t>(shape.num_experts) * static_cast<std::size_t>(rank);
    if (!share_gate_a) {
      l.a = random.normals(e * static_cast<std::size_t>(l.in),
                           1.0f / std::sqrt(static_cast<float>(l.in)));
    }
    l.b = random.normals(e * static_cast<std::size_t>(l.out),
                         1.0f / std::sqrt(static_cast<float>(rank)));
  }
  void add_lora(int gate, int up, int down) {
    if (gate > 0) add_lora(Projection::kGate, gate);
    if (up > 0) add_lora(Projection::kUp, up);
    if (down > 0) add_lora(Projection::kDown, down);
  }

  void load(MoeLayer& layer, int expert) const {
    TensorView views[kProjections];
    const char* names[] = {"gate", "up", "down"};
    for (int p = 0; p < kProjections; ++p) {
      const Matrix& w = weight(expert, p);
      views[p] = view_of(w.values, {w.n, w.k}, names[p]);
    }
    layer.experts().load_expert(expert, views[0], views[1], views[2]);
  }
  void load_lora(MoeLayer& layer, int number) const {
    const int e = shape.num_experts;
    layer.load_lora(number, lora[0].pair(e, "gate"), lora[1].pair(e, "up"),
                    lora[2].pair(e, "down"));
  }
  void set_lora(MoeLayer& layer) const {
    load_lora(layer, 0);
    apply_lora(layer);
  }
  bool has_lora() const { return lora[0].rank + lora[1].rank + lora[2].rank > 0; }

  std::unique_ptr<MoeLayer> make_layer(std::shared_ptr<Engine> engine) const {
    auto layer = std::make_unique<MoeLayer>(std::move(engine), shape, format);
    for (int e = 0; e < shape.num_experts; ++e) load(*layer, e);
    if (has_lora()) set_lora(*layer);
    return layer;
  }

  Reference reference(Rounding rounding = Rounding::kAsTheEngine) const {
    std::vector<ReferenceExpert> experts(static_cast<std::size_t>(shape.num_experts));
    for (int e = 0; e < shape.num_experts; ++e) {
      for (int p = 0; p < kProjections; ++p) {
        Linear& linear = experts[static_cast<std::size_t>(e)].projections[p];
        linear.w = weight(e, p);
        const LoraArrays& l = lora[p];
        if (l.rank == 0) continue;
        linear.a = expert_part(l.a.empty() ? lora[0].a : l.a, e, l.rank, l.in);
        linear.b = expert_part(l.b, e, l.out, l.rank);
      }
    }
    return Reference(std::move(experts), format, rounding);
  }

  std::vector<double> expected(const Batch& batch,
                               Rounding rounding = Rounding::kAsTheEngine) const {
    const Reference expert = reference(rounding);
    std::vector<double> out;
    for (int token = 0; token < batch.qlen; ++token) {
      std::vector<double> sum(static_cast<std::size_t>(shape.hidden_size), 0.0);
      for (int slot = 0; slot < batch.slots; ++slot) {
        const std::int64_t id = batch.ids[batch.at(token, slot)];
        if (id < 0 || id >= shape.num_experts) continue;
        expert.add(static_cast<int>(id), batch.row(token),
                   double{batch.weights[batch.at(token, slot)]}, sum);
      }
      out.insert(out.end(), sum.begin(), sum.end());
    }
    return out;
  }

  MoeShape shape;
  WeightFormat format;
  Random random;
  std::vector<Matrix> weights;  // [expert][projection]
  LoraArrays lora[kProjections];

 private:
  static Matrix expert_part(const std::vector<float>& all, int expert, int n, int k) {
    const auto first = all.begin() + static_cast<std::ptrdiff_t>(expert) * n * k;
    return {n, k, {first, first + static_cast<std::ptrdiff_t>(n) * k}};
  }
};

// ‖actual - expected‖ / ‖expected‖
inline double relative_error(const std::vector<float>& actual,
                             const std::vector<double>& expected) {
  double difference = 0.0;
  double norm = 0.0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    difference += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference / norm);
}

// With the same rounding points the results are equal but where a sum lies next to a rounding
// boundary: one BF16 activation then differs by 2^-8, one INT8 code by 1/127 of its row's largest,
// and one shrunk value (of few) by 2^-8. AMX tiles hold codes times scales, rounded to BF16: a
// relative error of 1.6e-3 in each of three products.
inline void expect_matches_reference(const LayerCase& test, MoeLayer& layer, const Batch& batch) {
  const std::vector<float> out = forward(layer, batch);
  const char* gemm = layer.last_kernels().gemm;
  const bool rounds_weights =
      is_coded(test.format) && gemm != nullptr && std::strstr(gemm, "amx") != nullptr;
  EXPECT_LT(relative_error(out, test.expected(batch)),
            (test.has_lora() ? 4e-3 : 2e-3) + (rounds_weights ? 3e-3 : 0.0));
}

}  // namespace ktrt::testing
