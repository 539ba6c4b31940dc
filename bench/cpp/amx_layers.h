// The part of bench_amx that measures whole layers of DeepSeek-V2-Lite's shape.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "array_view.h"
#include "base/bf16.h"
#include "cpu/read_probe.h"
#include "moe/moe_layer.h"

namespace ktrt {

inline constexpr int kHidden = 2048;
inline constexpr int kIntermediate = 1408;
inline constexpr int kTopK = 6;

inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

struct Peaks {
  double one[2] = {1e12, 1e12};  // BF16, integers: FLOP/s of one core
  // Measured by the call, in FLOP/s of all threads together.
  std::function<double(bool int8)> all_now = [](bool) { return 16e12; };
  double one_of(WeightFormat format) const { return one[quantizes_rows(format)]; }
};

class Layers {
 public:
  // seconds: of each line.
  Layers(WeightFormat format, const std::vector<int>& cpus, int experts, int layers, double seconds)
      : format_(format), experts_(experts), seconds_(seconds) {
    engine_ = std::make_shared<Engine>(cpus, 16384);
    std::normal_distribution<float> normal(0.0f, 0.02f);
    std::vector<bf16_t> w(std::size_t{kHidden} * kIntermediate);
    for (bf16_t& value : w) value = f32_to_bf16(normal(random_));
    const double start = now();
    for (int l = 0; l < layers; ++l) {
      layers_.push_back(std::make_unique<MoeLayer>(
          engine_, MoeShape{experts_, kTopK, kHidden, kIntermediate}, format));
      for (int e = 0; e < experts_; ++e) {
        const TensorView rows = view(w.data(), DType::kBfloat16, {kIntermediate, kHidden});
        layers_.back()->experts().load_expert(
            e, rows, rows, view(w.data(), DType::kBfloat16, {kHidden, kIntermediate}));
      }
    }
    std::printf("\nlayers %s: %d threads, %zu layers of %d experts, loaded in %.1f s\n",
                name_of(format), engine_->num_threads(), layers_.size(), experts_, now() - start);
    x_.resize(std::size_t{16384} * kHidden);
    for (std::size_t i = 0; i < x_.size(); ++i) {
      x_[i] = i < w.size() ? w[i] : x_[i - w.size() + 7];
    }
    out_.resize(x_.size());
  }

  void set_lora(int rank) {
    for (auto& layer : layers_) {
      if (rank == 0) {
        layer->activate_loras({}, {});
        continue;
      }
      const std::vector<float> values(
          static_cast<std::size_t>(experts_) * kHidden * static_cast<std::size_t>(rank), 0.01f);
      const auto pair = [&](int in, int out) {
        return LoraPair{view(values.data(), DType::kFloat32, {experts_, rank, in}),
                        view(values.data(), DType::kFloat32, {experts_, out, rank})};
      };
      layer->load_lora(0, pair(kHidden, kIntermediate), pair(kHidden, kIntermediate),
                       pair(kIntermediate, kHidden));
      layer->activate_loras(std::vector<int>{0}, std::vector<float>{1.0f});
    }
  }

  // Prints one line; the layers in turn, each forward with its own routing and right after the
  // tile peak that it is compared with.
  void measure(int qlen, int rank, const Peaks& peaks) {
    const std::vector<float> weights(static_cast<std::size_t>(qlen) * kTopK, 1.0f / kTopK);
    std::vector<double> times;
    std::vector<double> peak_rates;
    std::vector<double> fractions;
    const double flops =
        2.0 * qlen * kTopK * 3 * (1.0 * kHidden * kIntermediate + rank * (kHidden + kIntermediate));
    const double end = now() + seconds_;
    double distinct = 0;
    while (times.size() < 5 || (now() < end && times.size() < 1000)) {
      const std::vector<std::int64_t> ids = random_ids(qlen, distinct);
      peak_rates.push_back(peaks.all_now(quantizes_rows(format_)));
      const double start = now();
      layers_[times.size() % layers_.size()]->forward(
          view(x_.data(), DType::kBfloat16, {qlen, kHidden}),
          view(ids.data(), DType::kInt64, {qlen, kTopK}),
          view(weights.data(), DType::kFloat32, {qlen, kTopK}),
          view(out_.data(), DType::kBfloat16, {qlen, kHidden}));
      times.push_back(now() - start);
      fractions.push_back(flops / times.back() / peak_rates.back());
    }
    const double n = static_cast<double>(times.size());
    const double bytes = distinct / n *
                         (3.0 * kHidden * kIntermediate * traits_of(format_).bits / 8 +
                          rank * 6.0 * (kHidden + kIntermediate));
    const double time = median(times);
    const double least = *std::min_element(times.begin(), times.end());
    std::printf(
        "%s r%-2d q%-5d %5.0f rows/expert  %8.3f ms (min %8.3f)  %6.0f GFLOP/s, peak %6.0f, %3.0f "
        "%% (best %3.0f)  %4.0f GB/s\n",
        name_of(format_), rank, qlen, qlen * kTopK / (distinct / n), time * 1e3, least * 1e3,
        flops / time / 1e9, median(peak_rates) / 1e9, 100 * median(fractions),
        100 * *std::max_element(fractions.begin(), fractions.end()), bytes / time / 1e9);
    std::fflush(stdout);
  }

  void print_probe() {
    const ReadProbe probe(std::size_t{512} << 20);
    std::vector<double> rates;
    for (int i = 0; i < 7; ++i) {
      rates.push_back(static_cast<double>(probe.bytes()) / engine_->run_probe(probe) / 1e9);
    }
    std::printf("read probe %.0f GB/s\n", median(rates));
  }

 private:
  std::vector<std::int64_t> random_ids(int qlen, double& distinct) {
    std::vector<char> seen(static_cast<std::size_t>(experts_), 0);
    std::vector<std::int64_t> ids;
    for (int token = 0; token < qlen; ++token) {
      std::int64_t chosen[kTopK];
      for (int slot = 0; slot < kTopK; ++slot) {
        do {
          chosen[slot] = static_cast<std::int64_t>(random_() % static_cast<unsigned>(experts_));
        } while (std::find(chosen, chosen + slot, chosen[slot]) != chosen + slot);
        ids.push_back(chosen[slot]);
        seen[static_cast<std::size_t>(chosen[slot])] = 1;
      }
    }
    for (const char c : seen) distinct += c;
    return ids;
  }

  const WeightFormat format_;
  const int experts_;
  const double seconds_;
  std::mt19937 random_{1};
  std::shared_ptr<Engine> engine_;
  std::vector<std::unique_ptr<MoeLayer>> layers_;
  std::vector<bf16_t> x_;
  std::vector<bf16_t> out_;
};

}  // namespace ktrt
