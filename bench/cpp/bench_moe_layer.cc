// Whole layers of DeepSeek-V2-Lite's shape (fewer experts, so that it starts quickly), some of them
// in turn. GB/s counts the distinct experts' weights; read_GB/s is a plain read of memory, measured
// in the same run: their ratio is what decoding reaches of the limit.

#include <benchmark/benchmark.h>

#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "array_view.h"
#include "base/bf16.h"
#include "cpu/topology.h"
#include "layout/coded.h"
#include "moe/moe_layer.h"

namespace ktrt {
namespace {

constexpr MoeShape kShape = {
    .num_experts = 16, .top_k = 6, .hidden_size = 2048, .intermediate_size = 1408};
// A token reads 26 MB of INT4 experts in each layer; all layers together are beyond any L3 cache.
constexpr int layers_of(WeightFormat format) { return traits_of(format).bits < 8 ? 4 : 2; }
constexpr std::size_t kProbeBytes = std::size_t{256} << 20;

struct Model {
  std::shared_ptr<Engine> engine;
  std::vector<std::unique_ptr<MoeLayer>> layers;
};

// A matrix [n, k] of a coded format, all codes and scales the same.
struct CodedMatrix {
  CodedMatrix(WeightFormat format, std::int64_t n, std::int64_t k)
      : codes(static_cast<std::size_t>(n * k * traits_of(format).bits / 8), 0x22),
        floats(static_cast<std::size_t>(n), 0.02f),
        words(static_cast<std::size_t>(n * k), f32_to_bf16(0.02f)),
        bytes(static_cast<std::size_t>(n * k), 120) {
    const FormatTraits& traits = traits_of(format);
    const std::int64_t groups = traits.group == 0 ? 1 : (k + traits.group - 1) / traits.group;
    source.codes = view(codes.data(), DType::kUint8, {n, k * traits.bits / 8});
    if (traits.scale == ScaleKind::kPerBlock) {
      floats.assign(static_cast<std::size_t>((n + 31) / 32 * groups), 0.02f);
      source.scales = view(floats.data(), DType::kFloat32, {(n + 31) / 32, groups});
    } else if (traits.scale == ScaleKind::kPerChannel) {
      source.scales = view(floats.data(), DType::kFloat32, {n});
    } else if (format == WeightFormat::kMxfp4) {
      source.scales = view(bytes.data(), DType::kUint8, {n, groups});
    } else {
      source.scales = view(words.data(), DType::kBfloat16, {n, groups});
    }
  }
  std::vector<std::uint8_t> codes;
  std::vector<float> floats;
  std::vector<bf16_t> words;
  std::vector<std::uint8_t> bytes;
  CodedSource source;
};

void load_experts(MoeLayer& layer, WeightFormat format) {
  const std::int64_t h = kShape.hidden_size;
  const std::int64_t i = kShape.intermediate_size;
  if (is_coded(format)) {
    const CodedMatrix wide(format, i, h);
    const CodedMatrix tall(format, h, i);
    for (int e = 0; e < kShape.num_experts; ++e) {
      layer.experts().load_coded_expert(e, wide.source, wide.source, tall.source);
    }
    return;
  }
  const std::vector<bf16_t> w(static_cast<std::size_t>(h * i), f32_to_bf16(0.02f));
  const TensorView rows = view(w.data(), DType::kBfloat16, {i, h});
  for (int e = 0; e < kShape.num_experts; ++e) {
    layer.experts().load_expert(e, rows, rows, view(w.data(), DType::kBfloat16, {h, i}));
  }
}

Model make_model(WeightFormat format, int rank) {
  Model model;
  const Topology topology = read_topology(allowed_cpus());
  std::vector<int> cpus = topology.cpu_ids();
  cpus.resize(static_cast<std::size_t>(topology.num_cores()));
  model.engine = std::make_shared<Engine>(cpus, 1024);
  const std::int64_t h = kShape.hidden_size;
  const std::int64_t i = kShape.intermediate_size;
  const auto lora_size = static_cast<std::size_t>(kShape.num_experts * rank * h);
  std::vector<float> lora(lora_size, 0.01f);
  for (int l = 0; l < layers_of(format); ++l) {
    auto layer = std::make_unique<MoeLayer>(model.engine, kShape, format);
    load_experts(*layer, format);
    if (rank > 0) {
      const auto pair = [&](std::int64_t in, std::int64_t out) {
        return LoraPair{view(lora.data(), DType::kFloat32, {kShape.num_experts, rank, in}),
                        view(lora.data(), DType::kFloat32, {kShape.num_experts, out, rank})};
      };
      layer->load_lora(0, pair(h, i), pair(h, i), pair(i, h));
      layer->activate_loras(std::vector<int>{0}, std::vector<float>{1.0f});
    }
    model.layers.push_back(std::move(layer));
  }
  return model;
}

// The model, kept until another is asked for: packing takes longer than measuring.
Model& model_of(WeightFormat format, int rank) {
  static Model model;
  static WeightFormat held_format = format;
  static int held_rank = -1;
  if (held_rank != rank || held_format != format) {
    model = {};
    model = make_model(format, rank);
    held_format = format;
    held_rank = rank;
  }
  return model;
}

// Distinct experts of a token, a different set for every token.
std::vector<std::int64_t> random_ids(std::int64_t qlen, std::mt19937& random) {
  std::vector<std::int64_t> all(static_cast<std::size_t>(kShape.num_experts));
  for (std::size_t e = 0; e < all.size(); ++e) all[e] = static_cast<std::int64_t>(e);
  std::vector<std::int64_t> ids;
  for (std::int64_t t = 0; t < qlen; ++t) {
    std::shuffle(all.begin(), all.end(), random);
    ids.insert(ids.end(), all.begin(), all.begin() + kShape.top_k);
  }
  return ids;
}

void layer(benchmark::State& state, WeightFormat format) {
  const std::int64_t qlen = state.range(0);
  const int rank = static_cast<int>(state.range(1));
  Model& model = model_of(format, rank);
  std::mt19937 random(1);
  std::vector<bf16_t> x(static_cast<std::size_t>(qlen * kShape.hidden_size), f32_to_bf16(1.0f));
  std::vector<bf16_t> out(x.size());
  std::vector<float> weights(static_cast<std::size_t>(qlen * kShape.top_k), 1.0f / 6.0f);
  std::vector<std::int64_t> ids = random_ids(qlen, random);
  std::size_t next = 0;
  for (auto _ : state) {
    model.layers[next++ % model.layers.size()]->forward(
        view(x.data(), DType::kBfloat16, {qlen, kShape.hidden_size}),
        view(ids.data(), DType::kInt64, {qlen, kShape.top_k}),
        view(weights.data(), DType::kFloat32, {qlen, kShape.top_k}),
        view(out.data(), DType::kBfloat16, {qlen, kShape.hidden_size}));
  }
  const ReadProbe probe(kProbeBytes);
  const double matrix = 1.0 * kShape.hidden_size * kShape.intermediate_size;
  const double experts = qlen == 1 ? kShape.top_k : kShape.num_experts;
  const double bytes = experts * 3 * matrix * traits_of(format).bits / 8;
  using benchmark::Counter;
  state.counters["GB/s"] = Counter(bytes / 1e9, Counter::kIsIterationInvariantRate);
  state.counters["read_GB/s"] =
      static_cast<double>(kProbeBytes) / model.engine->run_probe(probe) / 1e9;
  state.counters["GFLOP/s"] = Counter(6.0 * static_cast<double>(qlen) * kShape.top_k * matrix / 1e9,
                                      Counter::kIsIterationInvariantRate);
}

const bool kRegistered = [] {
  for (const FormatTraits& traits : kFormatTraits) {
    benchmark::RegisterBenchmark((std::string("layer/") + traits.name).c_str(), layer,
                                 traits.format)
        ->ArgNames({"qlen", "rank"})
        ->ArgsProduct({{1, 16, 256, 1024}, {0, 8, 64}})
        ->UseRealTime()
        ->Unit(benchmark::kMillisecond);
  }
  return true;
}();

}  // namespace
}  // namespace ktrt
