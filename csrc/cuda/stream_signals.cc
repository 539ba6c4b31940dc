#include "cuda/stream_signals.h"

#include <chrono>
#include <thread>

#include "base/check.h"

namespace ktrt {
namespace {

// CU_STREAM_WAIT_VALUE_EQ. No flush of remote writes: the word lies in host memory.
constexpr unsigned kWaitEqual = 1;
// CU_STREAM_WRITE_VALUE_DEFAULT: after a system-wide fence, so the host that sees the word sees the
// copies before it.
constexpr unsigned kWriteAfterFence = 0;
constexpr unsigned kNonBlockingStream = 1;  // CU_STREAM_NON_BLOCKING
constexpr int kCaptureThreadLocal = 1;      // CU_STREAM_CAPTURE_MODE_THREAD_LOCAL

constexpr std::chrono::seconds kProbeTime{1};

constexpr auto kStarted = static_cast<std::uint32_t>(SlotState::kStarted);
constexpr auto kDone = static_cast<std::uint32_t>(SlotState::kDone);

// Writes the value that the wait then finds.
bool enqueue_probe(const CudaApi& api, CuStream stream, CuDevicePtr word) {
  return api.stream_write_value32(stream, word, kStarted, kWriteAfterFence) == kCuSuccess &&
         api.stream_wait_value32(stream, word, kStarted, kWaitEqual) == kCuSuccess;
}

bool captures(const CudaApi& api, CuStream stream, CuDevicePtr word) {
  if (api.stream_begin_capture(stream, kCaptureThreadLocal) != kCuSuccess) return false;
  const bool enqueued = enqueue_probe(api, stream, word);
  CuGraph graph = nullptr;
  const bool ended = api.stream_end_capture(stream, &graph) == kCuSuccess;
  if (graph != nullptr) (void)api.graph_destroy(graph);
  return enqueued && ended;
}

bool runs(const CudaApi& api, CuStream stream, const PinnedMemory::Word& word) {
  SlotWord probe(word.host);
  const bool enqueued = enqueue_probe(api, stream, word.device);
  const auto deadline = std::chrono::steady_clock::now() + kProbeTime;
  while (enqueued && probe.state() != SlotState::kStarted &&
         std::chrono::steady_clock::now() < deadline) {
    std::this_thread::yield();
  }
  const bool written = probe.state() == SlotState::kStarted;
  probe.set(SlotState::kStarted);  // releases the stream in any case
  const bool drained = api.stream_synchronize(stream) == kCuSuccess;
  probe.set(SlotState::kDone);
  return enqueued && written && drained;
}

void on_start(void* user_data) {
  static_cast<SignalledSlot*>(user_data)->slot.word.set(SlotState::kStarted);
}

void on_wait(void* user_data) {
  const auto* slot = static_cast<const SignalledSlot*>(user_data);
  slot->server->wait_done(slot->slot);
}

}  // namespace

const char* name_of(SignalMechanism mechanism) {
  return mechanism == SignalMechanism::kStreamMemoryOps ? "stream_memory_ops" : "host_functions";
}

std::optional<SignalMechanism> parse_mechanism(const std::string& name) {
  if (name == "auto") return std::nullopt;
  for (const auto mechanism :
       {SignalMechanism::kStreamMemoryOps, SignalMechanism::kHostFunctions}) {
    if (name == name_of(mechanism)) return mechanism;
  }
  KTRT_CHECK(false, "mechanism is '"
                        << name << "', expected 'auto', 'stream_memory_ops' or 'host_functions'");
  return std::nullopt;
}

bool stream_memory_ops_work(const CudaDriver& driver, const PinnedMemory::Word& word) {
  const CudaApi& api = driver.api();
  if (api.stream_write_value32 == nullptr || api.stream_wait_value32 == nullptr) return false;
  if (driver.device_attribute(kCuCanUseStreamMemOps) == 0) return false;
  CuStream stream = nullptr;
  driver.check(api.stream_create(&stream, kNonBlockingStream), "cuStreamCreate");
  const bool work = captures(api, stream, word.device) && runs(api, stream, word);
  (void)api.stream_destroy(stream);
  return work;
}

void enqueue_start(const CudaDriver& driver, SignalMechanism mechanism, SignalledSlot& slot,
                   CuStream stream) {
  const CudaApi& api = driver.api();
  if (mechanism == SignalMechanism::kHostFunctions) {
    driver.check(api.launch_host_func(stream, &on_start, &slot), "cuLaunchHostFunc");
  } else {
    driver.check(api.stream_write_value32(stream, slot.word_address, kStarted, kWriteAfterFence),
                 "cuStreamWriteValue32");
  }
}

void enqueue_wait(const CudaDriver& driver, SignalMechanism mechanism, SignalledSlot& slot,
                  CuStream stream) {
  const CudaApi& api = driver.api();
  if (mechanism == SignalMechanism::kHostFunctions) {
    driver.check(api.launch_host_func(stream, &on_wait, &slot), "cuLaunchHostFunc");
  } else {
    driver.check(api.stream_wait_value32(stream, slot.word_address, kDone, kWaitEqual),
                 "cuStreamWaitValue32");
  }
}

}  // namespace ktrt
