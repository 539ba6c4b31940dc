#include "cuda/gpu_handoff.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cuda/fake_cuda.h"
#include "cuda/handoff_case.h"

namespace ktrt {
namespace {

using namespace std::chrono_literals;
using testing::Batch;
using testing::FakeCuda;
using testing::HandoffCase;
using testing::kHandoffShape;
using testing::LayerCase;
using testing::make_engine;

constexpr auto kMemoryOps = SignalMechanism::kStreamMemoryOps;
constexpr auto kHostFunctions = SignalMechanism::kHostFunctions;

// With both mechanisms.
class GpuHandoffTest : public ::testing::TestWithParam<SignalMechanism> {
 protected:
  FakeCuda cuda_;
};

INSTANTIATE_TEST_SUITE_P(Mechanisms, GpuHandoffTest, ::testing::Values(kMemoryOps, kHostFunctions),
                         [](const auto& test) { return std::string(name_of(test.param)); });

TEST_P(GpuHandoffTest, EagerLayersGiveTheBitsOfDirectForwards) {
  HandoffCase test(cuda_, GetParam());
  EXPECT_EQ(test.handoff->mechanism(), GetParam());
  for (std::uint64_t seed = 1; seed <= 20; ++seed) test.expect_right(seed);
  // Many layers ahead of the device.
  test.upload(test.batch_of(1));
  cuda_.set_delay(200);
  for (int i = 0; i < 10; ++i) test.enqueue();
  test.synchronize();
  EXPECT_EQ(test.result(), test.direct(test.batch_of(1)));
}

TEST_P(GpuHandoffTest, AGraphIsReplayedAThousandTimes) {
  HandoffCase test(cuda_, GetParam());
  std::vector<Batch> batches;
  std::vector<std::vector<float>> expected;
  for (std::uint64_t seed = 0; seed < 5; ++seed) {
    batches.push_back(test.batch_of(seed));
    expected.push_back(test.direct(batches.back()));
  }
  ASSERT_NE(expected[0], expected[1]);
  void* graph = test.capture();
  ASSERT_NE(graph, nullptr);
  for (std::size_t round = 0; round < 1000; ++round) {
    test.upload(batches[round % 5]);
    test.replay(graph);
    test.synchronize();
    ASSERT_EQ(test.result(), expected[round % 5]) << round;
  }
  // Several in flight.
  for (int i = 0; i < 10; ++i) test.replay(graph);
  test.synchronize();
  EXPECT_EQ(test.result(), expected[999 % 5]);
  cuda_.destroy_graph(graph);
}

TEST_P(GpuHandoffTest, EagerLayersAndReplaysMix) {
  HandoffCase test(cuda_, GetParam());
  void* graph = test.capture();
  for (std::uint64_t seed = 1; seed <= 10; ++seed) {
    test.expect_right(seed);
    test.upload(test.batch_of(seed));
    test.enqueue();
    test.replay(graph);
    test.enqueue();
    test.replay(graph);
    test.synchronize();
    EXPECT_EQ(test.result(), test.direct(test.batch_of(seed)));
  }
  cuda_.destroy_graph(graph);
}

TEST_P(GpuHandoffTest, AllDtypes) {
  const auto engine = make_engine(1, 64);
  const LayerCase test(kHandoffShape, WeightFormat::kInt8);
  const std::shared_ptr<MoeLayer> layer = test.make_layer(engine);
  GpuHandoff handoff(engine, 30s, cuda_.path(), GetParam());
  const CuStream stream = nullptr;  // the default stream
  const Batch batch = testing::random_batch(kHandoffShape, 7);
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBfloat16}) {
    const int slot = handoff.add_slot(layer, 7, 2, dtype, "");
    const std::vector<std::byte> hidden = testing::encode(batch.hidden, dtype);
    const CuDevicePtr out = cuda_.allocate(hidden.size());
    handoff.submit(slot, stream, cuda_.upload(hidden), cuda_.upload(batch.ids),
                   cuda_.upload(batch.weights));
    handoff.wait(slot, stream, out);
    handoff.synchronize(stream, nullptr);
    std::vector<std::byte> expected(hidden.size());
    layer->forward(testing::view_of(hidden.data(), dtype, {7, 64}),
                   testing::view_of(batch.ids.data(), DType::kInt64, {7, 2}),
                   testing::view_of(batch.weights, {7, 2}),
                   testing::view_of(expected.data(), dtype, {7, 64}));
    EXPECT_EQ(cuda_.download<std::byte>(out, hidden.size()), expected) << name_of(dtype);
  }
}

TEST_P(GpuHandoffTest, AFailedForwardReleasesTheStreamAndSkipsTheRest) {
  HandoffCase test(cuda_, GetParam());
  const auto broken = std::make_shared<MoeLayer>(test.engine, kHandoffShape, WeightFormat::kBf16);
  for (int expert = 0; expert < 4; ++expert) test.cases[1].load(*broken, expert);
  test.slots[1] = test.handoff->add_slot(broken, test.tokens, 2, DType::kFloat32, "");
  void* graph = test.capture();
  const std::string expected = "slot 3 (layer 3, 4 tokens): expert 4 has not been loaded";
  for (int round = 0; round < 3; ++round) {
    test.replay(graph);
    EXPECT_EQ(test.failure(), expected);
    EXPECT_EQ(test.failure(), "") << "the failure has been told";
  }
  // Eagerly, submit may say so already; what was enqueued drains all the same.
  std::string found;
  try {
    for (int i = 0; i < 10'000; ++i) {
      test.enqueue();
      std::this_thread::sleep_for(1ms);
    }
  } catch (const std::runtime_error& error) {
    found = error.what();
  }
  EXPECT_EQ(found, expected);
  EXPECT_EQ(test.failure(), expected);
  // Repaired, the next use is as if nothing had been.
  test.cases[1].load(*broken, 4);
  test.upload(test.batch_of(3));
  test.replay(graph);
  test.synchronize();
  EXPECT_EQ(test.result(), test.direct(test.batch_of(3)));
  test.expect_right(4);
  cuda_.destroy_graph(graph);
}

TEST_P(GpuHandoffTest, AReplayThatWasNotExpectedIsReleased) {
  HandoffCase test(cuda_, GetParam());
  void* graph = test.capture();
  cuda_.launch(graph, test.stream);
  // Not even synchronize is needed for the stream to go on.
  while (!cuda_.drained(test.stream)) std::this_thread::sleep_for(1ms);
  EXPECT_EQ(test.failure(), "slot 0 (layer 0, 4 tokens) started, but nothing was expected");
  cuda_.launch(graph, test.stream);
  EXPECT_EQ(test.failure(), "slot 0 (layer 0, 4 tokens) started, but nothing was expected");
  test.handoff->expect({test.slots[1]});
  cuda_.launch(graph, test.stream);
  EXPECT_EQ(test.failure(),
            "slot 0 (layer 0, 4 tokens) started, but slot 1 (layer 1, 4 tokens) was expected");
  test.handoff->expect(test.slots);
  EXPECT_EQ(test.failure(),
            "slot 0 (layer 0, 4 tokens) was expected, but nothing on the stream started it");
  test.expect_right(1);
  cuda_.destroy_graph(graph);
}

// Keeps an engine's mutex for far longer than a timeout.
class BusyEngine {
 public:
  explicit BusyEngine(const std::shared_ptr<Engine>& engine)
      : case_({1, 1, 1024, 1024}, WeightFormat::kBf16), layer_(case_.make_layer(engine)) {
    const Batch batch = testing::random_batch(case_.shape, 64);
    thread_ = std::thread([this, batch] {
      while (!stop_) {
        testing::forward(*layer_, batch);
        ++forwards_;
      }
    });
    while (forwards_ == 0) std::this_thread::yield();
  }
  ~BusyEngine() {
    stop_ = true;
    thread_.join();
  }

 private:
  LayerCase case_;
  std::unique_ptr<MoeLayer> layer_;
  std::atomic<bool> stop_{false};
  std::atomic<int> forwards_{0};
  std::thread thread_;
};

TEST_P(GpuHandoffTest, AForwardThatTakesTooLongIsGivenUp) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "the stream goes on and overwrites what the forward still reads, for nobody";
#endif
  HandoffCase test(cuda_, GetParam(), 4, 50ms, make_engine(1, 64, Isa::kPortable));
  void* graph = test.capture();
  bool timed_out = false;
  {
    const BusyEngine busy(test.engine);
    for (int i = 0; i < 1000 && !timed_out; ++i) {
      try {
        test.replay(graph);
      } catch (const HandoffTimeout&) {
        continue;  // a forward that was given up has not ended
      }
      timed_out =
          test.failure().find("the forward has not ended after 0.05 s") != std::string::npos;
    }
  }
  EXPECT_TRUE(timed_out);
  EXPECT_TRUE(cuda_.drained(test.stream));
  cuda_.destroy_graph(graph);
}

TEST_P(GpuHandoffTest, AStreamThatIsBusyWithOtherWorkTimesOutToo) {
  HandoffCase test(cuda_, GetParam(), 4, 300ms);
  const Batch batch = test.batch_of(1);
  test.upload(batch);
  cuda_.set_delay(700'000);
  test.enqueue(0);
  const std::string found = test.failure();
  EXPECT_EQ(found, "timeout: the stream has not drained and no slot has moved for 0.3 s");
  EXPECT_THROW(test.enqueue(1), HandoffTimeout) << "not before it has drained";
  cuda_.set_delay(0);
  while (!cuda_.drained(test.stream)) std::this_thread::sleep_for(1ms);
  EXPECT_EQ(test.failure(), found);
  test.expect_right(2);
}

TEST_P(GpuHandoffTest, AnInterruptReleasesTheStream) {
  HandoffCase test(cuda_, GetParam());
  cuda_.set_delay(10'000);
  for (int i = 0; i < 3; ++i) test.enqueue();
  struct Interrupt {};
  EXPECT_THROW(test.handoff->synchronize(test.stream, [] { throw Interrupt(); }), Interrupt);
  EXPECT_TRUE(cuda_.drained(test.stream));
  cuda_.set_delay(0);
  EXPECT_EQ(test.failure(), "");
  test.expect_right(1);
}

TEST_P(GpuHandoffTest, CloseReleasesWhatIsPending) {
  HandoffCase test(cuda_, GetParam());
  const int before = cuda_.pinned_blocks();
  cuda_.set_delay(1000);
  void* graph = test.capture();
  for (int i = 0; i < 10; ++i) test.enqueue();
  test.replay(graph);
  EXPECT_GT(before, 0);
  EXPECT_FALSE(test.handoff->closed());
  test.handoff->close();
  test.handoff->close();
  EXPECT_TRUE(test.handoff->closed());
  EXPECT_TRUE(cuda_.drained(test.stream));
  EXPECT_EQ(cuda_.pinned_blocks(), 0);
  EXPECT_EQ(test.handoff->pinned_bytes(), 0u);
  EXPECT_EQ(cuda_.violations(), 0);
  cuda_.destroy_graph(graph);
  EXPECT_EQ(test.failure(), "the hand-off is closed");
  EXPECT_THROW(test.enqueue(), std::runtime_error);
  EXPECT_THROW(test.handoff->expect({0}), std::runtime_error);
  EXPECT_THROW(test.handoff->add_slot(test.layers[0], 1, 1, DType::kFloat32, ""),
               std::runtime_error);
}

TEST_P(GpuHandoffTest, CloseDuringSynchronize) {
  for (int round = 0; round < 3; ++round) {
    HandoffCase test(cuda_, GetParam());
    cuda_.set_delay(2000);
    for (int i = 0; i < 10; ++i) test.enqueue();
    std::string found;
    std::thread waiting([&] { found = test.failure(); });
    std::this_thread::sleep_for(round * 10ms);
    test.handoff->close();
    waiting.join();
    EXPECT_TRUE(found.find("closed") != std::string::npos) << found;
    cuda_.set_delay(0);
  }
  EXPECT_EQ(cuda_.violations(), 0);
}

TEST_P(GpuHandoffTest, TheDestructorCloses) {
  {
    HandoffCase test(cuda_, GetParam());
    cuda_.set_delay(1000);
    for (int i = 0; i < 5; ++i) test.enqueue();
  }
  EXPECT_EQ(cuda_.pinned_blocks(), 0);
  EXPECT_EQ(cuda_.violations(), 0);
}

TEST_P(GpuHandoffTest, TheEngineMayBeClosedFirst) {
  HandoffCase test(cuda_, GetParam());
  test.expect_right(1);
  test.engine->close();
  test.handoff->expect({});
  test.enqueue(0);  // more of them would race: once the first has failed, submit says so
  EXPECT_EQ(test.failure(), "slot 0 (layer 0, 4 tokens): the engine is closed");
}

TEST_P(GpuHandoffTest, SlotsKeepTheirLayers) {
  HandoffCase test(cuda_, GetParam());
  const Batch batch = test.batch_of(1);
  const std::vector<float> expected = test.direct(batch);
  const std::weak_ptr<MoeLayer> layer = test.layers[0];
  test.layers.clear();
  test.upload(batch);
  test.enqueue();
  test.synchronize();
  EXPECT_EQ(test.result(), expected);
  EXPECT_FALSE(layer.expired());
  test.handoff->close();
  EXPECT_TRUE(layer.expired());
}

TEST_P(GpuHandoffTest, TwoAtOnce) {
  const auto engine = make_engine(2, 64);
  HandoffCase first(cuda_, GetParam(), 4, 30s, engine);
  HandoffCase second(cuda_, GetParam(), 9, 30s, engine);
  HandoffCase third(cuda_, GetParam(), 1);
  std::vector<std::thread> threads;
  for (HandoffCase* test : {&first, &second, &third}) {
    threads.emplace_back([test] {
      // No context is current in this thread.
      for (std::uint64_t seed = 0; seed < 30; ++seed) {
        const Batch batch = test->batch_of(seed);
        test->upload(batch);
        test->enqueue();
        test->synchronize();
        EXPECT_EQ(test->result(), test->direct(batch));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Each token's LoRA comes through pinned memory like its states: a graph reads the ids that the
// device holds when it is launched.
TEST_P(GpuHandoffTest, AdapterIdsOfTokens) {
  HandoffCase test(cuda_, GetParam());
  MoeLayer& layer = *test.layers[0];
  for (const int number : {0, 1}) {
    LayerCase lora = test.cases[0];
    lora.add_lora(4 + number, 3, 8);
    lora.load_lora(layer, number);
    test.cases[0].random.normal();
  }
  layer.activate_loras(std::vector<int>{1}, std::vector<float>{0.5f});
  const int slot =
      test.handoff->add_slot(test.layers[0], test.tokens, 2, DType::kFloat32, "", true);
  const CuDevicePtr ids = cuda_.allocate(4 * sizeof(std::int32_t));
  const auto enqueue = [&] {
    test.handoff->submit(slot, test.stream, test.states[0], test.ids, test.weights, ids);
    test.handoff->wait(slot, test.stream, test.states.back());
  };
  const Batch batch = test.batch_of(3);
  test.upload(batch);
  cuda_.begin_capture(test.stream);
  enqueue();
  void* graph = cuda_.end_capture(test.stream);
  const std::vector<std::int32_t> choices[] = {{0, 1, -1, -2}, {1, 1, 0, -3}, {-2, -2, -2, -2}};
  for (const auto& chosen : choices) {
    cuda_.overwrite(ids, chosen);
    const std::vector<float> expected = forward(layer, batch, chosen);
    enqueue();
    test.synchronize();
    EXPECT_EQ(test.result(), expected);
    cuda_.overwrite(test.states.back(), std::vector<float>(test.size()));
    test.handoff->expect({slot});
    cuda_.launch(graph, test.stream);
    test.synchronize();
    EXPECT_EQ(test.result(), expected);
  }
  cuda_.overwrite(ids, std::vector<std::int32_t>{0, 7, 0, 0});
  enqueue();
  EXPECT_NE(test.failure().find("adapter_ids[1] is 7"), std::string::npos);
  EXPECT_THROW(test.handoff->submit(slot, test.stream, test.states[0], test.ids, test.weights),
               std::invalid_argument);
  EXPECT_THROW(
      test.handoff->submit(test.slots[0], test.stream, test.states[0], test.ids, test.weights, ids),
      std::invalid_argument);
  cuda_.destroy_graph(graph);
}

}  // namespace
}  // namespace ktrt
