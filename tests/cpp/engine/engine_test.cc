#include "engine/engine.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <optional>
#include <stdexcept>
#include <thread>
#include <vector>

#include "moe/layer_case.h"

namespace ktrt {
namespace {

using testing::Batch;
using testing::forward;
using testing::LayerCase;
using testing::make_engine;
using testing::random_batch;

constexpr MoeShape kShape{4, 2, 96, 64};

TEST(Engine, SaysWhatItIs) {
  const auto engine = make_engine(3, 17, Isa::kPortable);
  EXPECT_EQ(engine->num_threads(), 3);
  EXPECT_EQ(engine->parts(), 1);
  EXPECT_EQ(engine->max_qlen(), 17);
  EXPECT_EQ(engine->isa(), Isa::kPortable);
  EXPECT_FALSE(engine->closed());
}

TEST(Engine, WrongArgumentsAreRefused) {
  EXPECT_THROW(Engine(std::vector<int>{}, 8), std::invalid_argument);
  EXPECT_THROW(Engine(std::vector<int>{-1}, 0), std::invalid_argument);
  EXPECT_THROW(Engine(std::vector<int>{-1}, -3), std::invalid_argument);
}

TEST(Engine, EveryPartHasAThread) {
  const auto parts_of = [](const std::vector<int>& home) {
    return Engine(std::vector<int>(3, -1), home, 8).parts();
  };
  EXPECT_EQ(parts_of({0, 0, 0}), 1);
  EXPECT_EQ(parts_of({1, 0, 0}), 2);
  EXPECT_EQ(parts_of({2, 1, 0}), 3);
  EXPECT_THROW(parts_of({1, 1, 1}), std::invalid_argument);
  EXPECT_THROW(parts_of({0, 2, 2}), std::invalid_argument);
  EXPECT_THROW(parts_of({0, -1, 1}), std::invalid_argument);
  EXPECT_THROW(parts_of({-1, -1, -1}), std::invalid_argument);
  EXPECT_THROW(parts_of({0, 0}), std::invalid_argument);
}

TEST(Engine, RefusesAnUnknownIsa) {
  const char* value = std::getenv("KTRT_ISA");
  const std::string before = value == nullptr ? "" : value;
  setenv("KTRT_ISA", "pentium", 1);
  EXPECT_THROW(Engine(std::vector<int>{-1}, 8), std::invalid_argument);
  setenv("KTRT_ISA", before.c_str(), 1);
}

TEST(Engine, CloseCallsTheHandlersThatAreLeft) {
  Engine engine({-1, -1}, 8);
  int released = 0;
  std::optional<Engine::CloseHandler> kept;
  std::optional<Engine::CloseHandler> gone;
  {
    const Engine::Lease lease = engine.lease();
    EXPECT_EQ(lease.pool().size(), 2);
    kept.emplace(engine, lease, [&] { released += 1; });
    gone.emplace(engine, lease, [&] { released += 10; });
  }
  gone.reset();
  engine.close();
  engine.close();
  EXPECT_EQ(released, 1);
  EXPECT_THROW(engine.lease(), std::runtime_error);
  EXPECT_NO_THROW(engine.lock());
}

TEST(Engine, ClosedItRefusesEverything) {
  LayerCase test(kShape, WeightFormat::kInt8);
  test.add_lora(4, 4, 4);
  const auto engine = make_engine();
  const auto layer = test.make_layer(engine);
  EXPECT_GT(layer->experts().packed_bytes(), 0u);
  engine->close();
  engine->close();
  EXPECT_TRUE(engine->closed());
  EXPECT_EQ(layer->experts().packed_bytes(), 0u) << "the weights are still there";
  EXPECT_THROW(forward(*layer, random_batch(kShape, 2)), std::runtime_error);
  EXPECT_THROW(test.load(*layer, 0), std::runtime_error);
  EXPECT_THROW(test.set_lora(*layer), std::runtime_error);
  EXPECT_THROW(testing::apply_no_lora(*layer), std::runtime_error);
  EXPECT_THROW(layer->experts().packed_codes(0, Projection::kGate), std::runtime_error);
  EXPECT_THROW(layer->experts().packed_scales(0, Projection::kGate), std::runtime_error);
  EXPECT_THROW(MoeLayer(engine, kShape, WeightFormat::kBf16), std::runtime_error);
}

TEST(Engine, SharedMemoryOutlivesIt) {
  LayerCase test(kShape, WeightFormat::kInt8);
  test.add_lora(4, 4, 4);
  const auto engine = make_engine();
  auto layer = test.make_layer(engine);
  const auto expected = layer->experts().packed_codes(3, Projection::kDown);
  const auto weights = layer->experts().share_weights();
  const auto lora = layer->share_lora(0);
  ASSERT_NE(lora, nullptr);
  const int version = layer->lora_version();
  testing::apply_no_lora(*layer);
  EXPECT_NE(layer->lora_version(), version);
  EXPECT_THROW(layer->share_lora(1), std::invalid_argument);
  engine->close();
  EXPECT_THROW(layer->experts().share_weights(), std::runtime_error);
  EXPECT_THROW(layer->share_lora(0), std::runtime_error);
  layer.reset();
  const PackedMatrix matrix = weights->matrix(3, Projection::kDown, 0);
  EXPECT_EQ(std::vector<std::uint8_t>(matrix.codes, matrix.codes + expected.size()), expected);
  EXPECT_EQ(lora->expand(Projection::kGate).rank_pairs, 2);
}

TEST(Engine, UnfinishedLayersAreNotShared) {
  const auto engine = make_engine();
  MoeLayer layer(engine, kShape, WeightFormat::kBf16);
  EXPECT_THROW(layer.experts().share_weights(), std::invalid_argument);
}

TEST(Engine, LivesAsLongAsItsLayers) {
  const LayerCase test(kShape, WeightFormat::kBf16);
  auto engine = make_engine();
  const auto layer = test.make_layer(engine);
  engine.reset();
  testing::expect_matches_reference(test, *layer, random_batch(kShape, 3));
}

TEST(Engine, LayersMayGoInAnyOrder) {
  const LayerCase test(kShape, WeightFormat::kBf16);
  const auto engine = make_engine();
  auto first = test.make_layer(engine);
  auto second = test.make_layer(engine);
  first.reset();
  testing::expect_matches_reference(test, *second, random_batch(kShape, 3));
  first = test.make_layer(engine);
  second.reset();
  testing::expect_matches_reference(test, *first, random_batch(kShape, 3));
  engine->close();
}

// The scratch memory grows with each, in both directions.
TEST(Engine, LayersOfDifferentShapesShareTheWorkspace) {
  const auto engine = make_engine();
  std::vector<LayerCase> tests;
  std::vector<std::unique_ptr<MoeLayer>> layers;
  for (const MoeShape& shape : {MoeShape{2, 1, 32, 200}, MoeShape{8, 8, 96, 64},
                                MoeShape{2, 2, 700, 32}, MoeShape{3, 2, 64, 1000}}) {
    for (const WeightFormat format : testing::kFormatKinds) {
      tests.emplace_back(shape, format);
      tests.back().add_lora(2, 2, 256);
      layers.push_back(tests.back().make_layer(engine));
      testing::expect_matches_reference(tests.back(), *layers.back(), random_batch(shape, 20));
    }
  }
  for (std::size_t i = 0; i < layers.size(); ++i) {
    testing::expect_matches_reference(tests[i], *layers[i], random_batch(tests[i].shape, 20));
  }
}

// Scratch memory is not cleared between forwards; nothing of one may reach another.
TEST(Engine, ANanOfOneLayerDoesNotReachAnother) {
  for (const WeightFormat format : testing::kFormatKinds) {
    LayerCase wide({3, 2, 700, 700}, format);
    LayerCase narrow({3, 2, 37, 45}, format);
    wide.add_lora(200, 200, 200);
    narrow.add_lora(1, 3, 5);
    const auto engine = make_engine(1);  // whose one thread computes both
    const auto wide_layer = wide.make_layer(engine);
    const auto narrow_layer = narrow.make_layer(engine);
    const std::vector<float> expected = forward(*narrow_layer, random_batch(narrow.shape, 20));
    Batch nans = random_batch(wide.shape, 64);
    for (float& value : nans.hidden) value = std::nanf("");
    forward(*wide_layer, nans);
    EXPECT_EQ(forward(*narrow_layer, random_batch(narrow.shape, 20)), expected);
  }
}

TEST(Engine, TwoInOneProcess) {
  const LayerCase test(kShape, WeightFormat::kBf16);
  const auto first = test.make_layer(make_engine(2));
  std::vector<float> expected;
  {
    const auto second = test.make_layer(make_engine(3, 64, Isa::kPortable));
    expected = forward(*first, random_batch(kShape, 20));
    testing::expect_matches_reference(test, *second, random_batch(kShape, 20));
  }
  EXPECT_EQ(forward(*first, random_batch(kShape, 20)), expected);
}

// Calls `work(thread)` on `count` threads at once.
template <class Work>
void on_threads(int count, Work work) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back([=] { work(i); });
  for (std::thread& thread : threads) thread.join();
}

TEST(Engine, ForwardsOfSeveralThreadsDoNotMix) {
  const LayerCase test(kShape, WeightFormat::kInt8);
  const auto shared = make_engine();
  std::vector<std::unique_ptr<MoeLayer>> layers;
  layers.push_back(test.make_layer(shared));
  layers.push_back(test.make_layer(shared));
  layers.push_back(test.make_layer(make_engine()));
  const std::vector<Batch> batches = {random_batch(kShape, 3, 2, 1), random_batch(kShape, 40, 2, 2),
                                      random_batch(kShape, 9, 2, 3)};
  std::vector<std::vector<float>> expected;
  for (const Batch& batch : batches) expected.push_back(forward(*layers[0], batch));
  std::atomic<int> wrong{0};
  // Threads 0 … 2 have a layer each, the others share one with them.
  on_threads(5, [&](int thread) {
    const auto t = static_cast<std::size_t>(thread) % 3;
    for (int i = 0; i < 30; ++i) {
      if (forward(*layers[t], batches[t]) != expected[t]) ++wrong;
    }
  });
  EXPECT_EQ(wrong, 0);
}

TEST(Engine, CloseWaitsForForwards) {
  const LayerCase test(kShape, WeightFormat::kBf16);
  const Batch batch = random_batch(kShape, 30);
  for (int round = 0; round < 10; ++round) {
    const auto engine = make_engine();
    const auto layer = test.make_layer(engine);
    const std::vector<float> expected = forward(*layer, batch);
    std::atomic<int> wrong{0};
    on_threads(3, [&](int thread) {
      if (thread == 0) {
        std::this_thread::yield();
        engine->close();
        return;
      }
      try {
        for (int i = 0; i < 200; ++i) {
          if (forward(*layer, batch) != expected) ++wrong;
        }
      } catch (const std::runtime_error&) {
      }
    });
    EXPECT_EQ(wrong, 0);
  }
}

TEST(Engine, QuestionsMayBeAskedAtAnyTime) {
  const LayerCase test(kShape, WeightFormat::kBf16);
  const Batch batch = random_batch(kShape, 30);
  const auto engine = make_engine();
  const auto layer = test.make_layer(engine);
  const std::size_t bytes = layer->experts().packed_bytes();
  std::atomic<int> wrong{0};
  on_threads(2, [&](int thread) {
    if (thread == 0) {
      for (int i = 0; i < 100; ++i) forward(*layer, batch);
      engine->close();
      return;
    }
    for (bool closed = false; !closed;) {
      closed = engine->closed();
      const std::size_t now = layer->experts().packed_bytes();
      const KernelsUsed used = layer->last_kernels();
      if (now != 0 && (closed || now != bytes)) ++wrong;
      if ((used.elementwise != nullptr) !=
          (used.gemm != nullptr || used.gemm_few_rows != nullptr)) {
        ++wrong;
      }
    }
  });
  EXPECT_EQ(wrong, 0);
}

TEST(Engine, ALoraMayBeExchangedBetweenForwards) {
  LayerCase first(kShape, WeightFormat::kBf16);
  LayerCase second = first;
  first.add_lora(3, 0, 8);
  second.add_lora(0, 20, 0);
  const auto layer = first.make_layer(make_engine());
  const Batch batch = random_batch(kShape, 10);
  const std::vector<float> with_first = forward(*layer, batch);
  second.set_lora(*layer);
  const std::vector<float> with_second = forward(*layer, batch);
  ASSERT_NE(with_first, with_second);
  std::atomic<int> wrong{0};
  on_threads(2, [&](int thread) {
    for (int i = 0; i < 100; ++i) {
      if (thread == 0) {
        (i % 2 == 0 ? first : second).set_lora(*layer);
        continue;
      }
      const std::vector<float> out = forward(*layer, batch);
      if (out != with_first && out != with_second) ++wrong;
    }
  });
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace ktrt
