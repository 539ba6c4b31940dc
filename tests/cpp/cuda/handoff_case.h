// Layers one after the other on a stream of the stand-in: the output of one is the input of the
// next, so that results depend on every layer having run, once, in its turn.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "cuda/fake_cuda.h"
#include "cuda/gpu_handoff.h"
#include "moe/layer_case.h"

namespace ktrt::testing {

constexpr MoeShape kHandoffShape{5, 2, 64, 32};

struct HandoffCase {
  static constexpr int kLayers = 3;

  HandoffCase(FakeCuda& cuda_, SignalMechanism mechanism, int tokens_ = 4,
              std::chrono::nanoseconds timeout = std::chrono::seconds(30),
              std::shared_ptr<Engine> engine_ = make_engine(1, 64))
      : cuda(cuda_), tokens(tokens_), engine(std::move(engine_)) {
    for (int i = 0; i < kLayers; ++i) {
      cases.emplace_back(kHandoffShape, WeightFormat::kBf16, static_cast<std::uint64_t>(i));
      layers.push_back(cases.back().make_layer(engine));
    }
    handoff = std::make_unique<GpuHandoff>(engine, timeout, cuda.path(), mechanism);
    for (const auto& layer : layers) {
      slots.push_back(handoff->add_slot(layer, tokens, 2, DType::kFloat32, ""));
    }
    stream = cuda.new_stream();
    const std::size_t bytes = size() * sizeof(float);
    for (int i = 0; i <= kLayers; ++i) states.push_back(cuda.allocate(bytes));
    const Batch batch = batch_of(0);
    ids = cuda.upload(batch.ids);
    weights = cuda.upload(batch.weights);
  }

  std::size_t size() const {
    return static_cast<std::size_t>(tokens) * static_cast<std::size_t>(kHandoffShape.hidden_size);
  }
  Batch batch_of(std::uint64_t seed) const { return random_batch(kHandoffShape, tokens, 2, seed); }

  // The layers' outputs for a batch when they are called directly.
  std::vector<float> direct(Batch batch) {
    for (const auto& layer : layers) batch.hidden = forward(*layer, batch);
    return batch.hidden;
  }

  void upload(const Batch& batch) {
    cuda.overwrite(states[0], batch.hidden);
    cuda.overwrite(ids, batch.ids);
    cuda.overwrite(weights, batch.weights);
  }
  std::vector<float> result() { return cuda.download<float>(states.back(), size()); }

  void enqueue(std::size_t layer) {
    handoff->submit(slots[layer], stream, states[layer], ids, weights);
    handoff->wait(slots[layer], stream, states[layer + 1]);
  }
  void enqueue() {
    for (std::size_t layer = 0; layer < slots.size(); ++layer) enqueue(layer);
  }
  // The graph must be destroyed by the test.
  void* capture() {
    cuda.begin_capture(stream);
    enqueue();
    return cuda.end_capture(stream);
  }
  void replay(void* graph) {
    handoff->expect(slots);
    cuda.launch(graph, stream);
  }
  void synchronize() { handoff->synchronize(stream, nullptr); }
  // The message that synchronize throws, "" for none.
  std::string failure() {
    try {
      synchronize();
    } catch (const HandoffTimeout& error) {
      return std::string("timeout: ") + error.what();
    } catch (const std::runtime_error& error) {
      return error.what();
    }
    return "";
  }
  // Eagerly, from upload to download.
  void expect_right(std::uint64_t seed) {
    const Batch batch = batch_of(seed);
    upload(batch);
    enqueue();
    synchronize();
    EXPECT_EQ(result(), direct(batch));
  }

  FakeCuda& cuda;
  const int tokens;
  std::shared_ptr<Engine> engine;
  std::vector<LayerCase> cases;
  std::vector<std::shared_ptr<MoeLayer>> layers;
  std::unique_ptr<GpuHandoff> handoff;
  std::vector<int> slots;
  CuStream stream = nullptr;
  std::vector<CuDevicePtr> states;  // input of the first layer, output of the first, …
  CuDevicePtr ids = 0;
  CuDevicePtr weights = 0;
};

}  // namespace ktrt::testing
