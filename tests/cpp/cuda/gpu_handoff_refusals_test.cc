// Calls that a hand-off refuses, and errors of the driver.

#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/fake_cuda.h"
#include "cuda/gpu_handoff.h"
#include "cuda/handoff_case.h"

namespace ktrt {
namespace {

using namespace std::chrono_literals;
using testing::FakeCuda;
using testing::HandoffCase;
using testing::make_engine;

constexpr auto kMemoryOps = SignalMechanism::kStreamMemoryOps;
constexpr auto kHostFunctions = SignalMechanism::kHostFunctions;

template <class Call>
std::string message_of(Call call) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

std::unique_ptr<GpuHandoff> make_handoff(FakeCuda& cuda,
                                         std::optional<SignalMechanism> mechanism = std::nullopt) {
  return std::make_unique<GpuHandoff>(make_engine(1), 30s, cuda.path(), mechanism);
}

TEST(GpuHandoffMechanism, StreamMemoryOperationsAreTakenWhereTheyWork) {
  FakeCuda cuda;
  EXPECT_EQ(make_handoff(cuda)->mechanism(), kMemoryOps);
  for (const char* missing : {"memory_ops", "memory_ops_attribute", "memory_ops_in_capture"}) {
    cuda.set(missing, 0);
    EXPECT_EQ(make_handoff(cuda)->mechanism(), kHostFunctions) << missing;
    EXPECT_EQ(message_of([&] { make_handoff(cuda, kMemoryOps); }),
              "this driver and device have no stream memory operations that can be captured: use "
              "mechanism 'auto' or 'host_functions'");
    cuda.set(missing, 1);
  }
  EXPECT_EQ(make_handoff(cuda, kHostFunctions)->mechanism(), kHostFunctions);
  EXPECT_EQ(cuda.pinned_blocks(), 0);
}

TEST(GpuHandoffMechanism, DriversWithoutTheEntryPointsHaveHostFunctions) {
  FakeCuda cuda(FAKE_CUDA_WITHOUT_MEMORY_OPS_LIBRARY);
  HandoffCase test(cuda, kHostFunctions);
  test.expect_right(1);
  EXPECT_EQ(make_handoff(cuda)->mechanism(), kHostFunctions);
  EXPECT_THROW(make_handoff(cuda, kMemoryOps), std::runtime_error);
}

TEST(GpuHandoffMechanism, Names) {
  EXPECT_EQ(parse_mechanism("auto"), std::nullopt);
  for (const auto mechanism : {kMemoryOps, kHostFunctions}) {
    EXPECT_EQ(parse_mechanism(name_of(mechanism)), mechanism);
  }
  EXPECT_THROW(parse_mechanism("events"), std::invalid_argument);
}

TEST(GpuHandoffRefusals, Sizes) {
  FakeCuda cuda;
  HandoffCase test(cuda, kMemoryOps);
  const auto add = [&](int tokens, int top_k, DType dtype = DType::kFloat32) {
    return message_of([&] { test.handoff->add_slot(test.layers[0], tokens, top_k, dtype, ""); });
  };
  EXPECT_EQ(add(0, 2), "tokens is 0, expected 1 to max_qlen (64)");
  EXPECT_EQ(add(65, 2), "tokens is 65, expected 1 to max_qlen (64)");
  EXPECT_EQ(add(4, 0), "top_k is 0, expected 1 to the layer's (2)");
  EXPECT_EQ(add(4, 3), "top_k is 3, expected 1 to the layer's (2)");
  EXPECT_EQ(add(4, 2, DType::kInt32),
            "hidden_states is int32, expected float32, float16 or bfloat16");
  EXPECT_EQ(message_of([&] {
              const std::shared_ptr<MoeLayer> other = test.cases[0].make_layer(make_engine(1));
              test.handoff->add_slot(other, 1, 1, DType::kFloat32, "");
            }),
            "the layer belongs to another engine than the hand-off");
  EXPECT_EQ(message_of([&] { GpuHandoff(test.engine, 0s, cuda.path()); }),
            "timeout must be positive");
}

TEST(GpuHandoffRefusals, SlotsAndAddresses) {
  FakeCuda cuda;
  HandoffCase test(cuda, kMemoryOps);
  GpuHandoff& handoff = *test.handoff;
  EXPECT_EQ(message_of([&] { handoff.submit(3, test.stream, 1, 1, 1); }),
            "slot is 3, expected 0 to 2");
  EXPECT_EQ(message_of([&] { handoff.expect({0, -1}); }), "slot is -1, expected 0 to 2");
  EXPECT_EQ(message_of([&] { handoff.wait(7, test.stream, 1); }), "slot is 7, expected 0 to 2");
  EXPECT_NE(message_of([&] { handoff.submit(0, test.stream, 1, 0, 1); }).find("null pointer"),
            std::string::npos);
  EXPECT_NE(message_of([&] { handoff.wait(0, test.stream, 0); }).find("null pointer"),
            std::string::npos);
  // None of them left anything.
  test.expect_right(1);
}

TEST(GpuHandoffRefusals, SubmitAndWaitAlternate) {
  FakeCuda cuda;
  HandoffCase test(cuda, kMemoryOps);
  GpuHandoff& handoff = *test.handoff;
  const auto submit = [&](int slot) {
    handoff.submit(slot, test.stream, test.states[0], test.ids, test.weights);
  };
  const auto wait = [&](int slot) { handoff.wait(slot, test.stream, test.states[1]); };
  EXPECT_EQ(message_of([&] { wait(0); }), "slot 0 (layer 0, 4 tokens) has not been submitted");
  submit(0);
  EXPECT_EQ(message_of([&] { wait(1); }),
            "slot 1 (layer 1, 4 tokens) has not been submitted; slot 0 (layer 0, 4 tokens) has");
  EXPECT_EQ(message_of([&] { submit(1); }),
            "slot 0 (layer 0, 4 tokens) was submitted and not waited for; slot 1 (layer 1, 4 "
            "tokens) shares its memory (synchronize forgets it)");
  EXPECT_EQ(test.failure(), "");  // the forward has run, for nobody
  test.expect_right(1);
}

TEST(GpuHandoffRefusals, CapturesAreWhole) {
  FakeCuda cuda;
  HandoffCase test(cuda, kMemoryOps);
  GpuHandoff& handoff = *test.handoff;
  handoff.submit(0, test.stream, test.states[0], test.ids, test.weights);
  cuda.begin_capture(test.stream);
  EXPECT_EQ(message_of([&] { handoff.wait(0, test.stream, test.states[1]); }),
            "slot 0 (layer 0, 4 tokens) was submitted outside a capture; the wait must be so too");
  EXPECT_EQ(message_of([&] { test.synchronize(); }),
            "synchronize cannot be called while the stream is being captured");
  cuda.destroy_graph(cuda.end_capture(test.stream));
  handoff.wait(0, test.stream, test.states[1]);
  EXPECT_EQ(test.failure(), "");
  // Broken off between submit and wait, and by what a capture does not allow.
  cuda.begin_capture(test.stream);
  handoff.submit(0, test.stream, test.states[0], test.ids, test.weights);
  EXPECT_THROW(handoff.add_slot(test.layers[0], 50, 2, DType::kFloat32, ""), std::runtime_error);
  EXPECT_EQ(message_of([&] { handoff.wait(0, test.stream, test.states[1]); }),
            "the stream's capture has been invalidated by an earlier error");
  EXPECT_EQ(cuda.end_capture(test.stream), nullptr);
  EXPECT_EQ(test.failure(), "");
  test.expect_right(1);
}

// A graph of a wait alone finds the slot idle and goes on.
TEST(GpuHandoffRefusals, AGraphMayBeCapturedInPieces) {
  FakeCuda cuda;
  HandoffCase test(cuda, kMemoryOps);
  cuda.begin_capture(test.stream);
  test.handoff->submit(0, test.stream, test.states[0], test.ids, test.weights);
  void* first = cuda.end_capture(test.stream);
  cuda.begin_capture(test.stream);
  test.handoff->wait(0, test.stream, test.states[1]);
  void* second = cuda.end_capture(test.stream);
  cuda.launch(second, test.stream);
  EXPECT_EQ(test.failure(), "");
  const testing::Batch batch = test.batch_of(1);
  test.upload(batch);
  test.handoff->expect({0});
  cuda.launch(first, test.stream);
  cuda.launch(second, test.stream);
  test.synchronize();
  EXPECT_EQ(cuda.download<float>(test.states[1], test.size()),
            testing::forward(*test.layers[0], batch));
  cuda.destroy_graph(first);
  cuda.destroy_graph(second);
}

TEST(GpuHandoffRefusals, MemoryIsShared) {
  FakeCuda cuda;
  HandoffCase test(cuda, kMemoryOps);
  const auto add = [&](int tokens, DType dtype) {
    test.handoff->add_slot(test.layers[0], tokens, 2, dtype, "");
    return test.handoff->pinned_bytes();
  };
  // hidden_states and out [tokens, 64], ids and weights [tokens, 2] in multiples of 256 bytes.
  const std::size_t words = 4096;
  const std::size_t four = 2 * (4 * 64 * 4) + 256 + 256;
  EXPECT_EQ(test.handoff->pinned_bytes(), words + four);
  EXPECT_EQ(add(1, DType::kFloat32), words + four);
  EXPECT_EQ(add(4, DType::kBfloat16), words + four);
  const std::size_t large = 2 * (64 * 64 * 4) + 1024 + 512;
  EXPECT_EQ(add(64, DType::kFloat32), words + four + large);
  EXPECT_EQ(add(64, DType::kFloat16), words + four + large);
  // 64 words to a page: one of the probe, three of the case's slots, four from here.
  for (int i = 8; i < 64; ++i) EXPECT_EQ(add(1, DType::kFloat32), words + four + large);
  EXPECT_EQ(add(1, DType::kFloat32), 2 * words + four + large);
  test.expect_right(1);
}

TEST(GpuHandoffErrors, OfEveryCallInSubmitAndWait) {
  struct Fault {
    const char* function;
    int nth;
  };
  const Fault in_submit[] = {{"cuCtxPushCurrent_v2", 1},  {"cuStreamIsCapturing", 1},
                             {"cuMemcpyDtoHAsync_v2", 1}, {"cuMemcpyDtoHAsync_v2", 2},
                             {"cuMemcpyDtoHAsync_v2", 3}, {"cuStreamWriteValue32_v2", 1}};
  const Fault in_wait[] = {
      {"cuStreamIsCapturing", 2}, {"cuStreamWaitValue32_v2", 1}, {"cuMemcpyHtoDAsync_v2", 1}};
  FakeCuda cuda;
  HandoffCase test(cuda, kMemoryOps);
  const auto try_fault = [&](const Fault& fault) {
    cuda.fail(fault.function, fault.nth, 2);
    const std::string found = message_of([&] { test.enqueue(0); });
    EXPECT_NE(found.find("CUDA_ERROR_OUT_OF_MEMORY (2, as the test asked)"), std::string::npos)
        << fault.function << fault.nth << ": " << found;
  };
  for (const Fault& fault : in_submit) {
    try_fault(fault);
    EXPECT_EQ(test.failure(), "") << fault.function;  // copies may be under way
    test.expect_right(1);
  }
  for (const Fault& fault : in_wait) {
    try_fault(fault);
    EXPECT_EQ(test.failure(), "") << fault.function;
    test.expect_right(2);
  }
}

TEST(GpuHandoffErrors, OfHostFunctions) {
  FakeCuda cuda;
  HandoffCase test(cuda, kHostFunctions);
  for (const int nth : {1, 2}) {
    cuda.fail("cuLaunchHostFunc", nth, 2);
    EXPECT_THROW(test.enqueue(0), std::runtime_error);
    EXPECT_EQ(test.failure(), "");
    test.expect_right(1);
  }
}

TEST(GpuHandoffErrors, OfAllocations) {
  FakeCuda cuda;
  HandoffCase test(cuda, kMemoryOps);
  for (const char* function : {"cuMemHostAlloc", "cuMemHostGetDevicePointer_v2"}) {
    const int before = cuda.pinned_blocks();
    cuda.fail(function, 1, 2);
    EXPECT_THROW(test.handoff->add_slot(test.layers[0], 64, 2, DType::kFloat32, ""),
                 std::runtime_error);
    EXPECT_EQ(cuda.pinned_blocks(), before);
    cuda.fail(function, 1, 2);
    EXPECT_THROW(make_handoff(cuda), std::runtime_error);
    EXPECT_EQ(cuda.pinned_blocks(), before);
  }
  test.expect_right(1);
}

TEST(GpuHandoffErrors, OfTheDeviceAreToldBySynchronize) {
  FakeCuda cuda;
  HandoffCase test(cuda, kMemoryOps);
  test.enqueue();
  cuda.fail("cuStreamQuery", 1, 700);
  EXPECT_EQ(test.failure(), "cuStreamQuery: CUDA_ERROR_OF_THE_STAND_IN (700, as the test asked)");
  while (!cuda.drained(test.stream)) std::this_thread::yield();
}

TEST(GpuHandoffErrors, MemoryThatTheDeviceMayStillUseIsNotFreed) {
  FakeCuda cuda;
  {
    HandoffCase test(cuda, kMemoryOps);
    test.expect_right(1);
    cuda.fail("cuCtxSynchronize", 1, 700);
    test.handoff->close();
    EXPECT_GT(cuda.pinned_blocks(), 0);
  }
  {
    HandoffCase test(cuda, kMemoryOps);
    cuda.fail("cuCtxPushCurrent_v2", 1, 4);  // the context is gone
    test.handoff->close();
  }
}

}  // namespace
}  // namespace ktrt
