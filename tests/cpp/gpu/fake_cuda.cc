// A stand-in for the CUDA driver: the functions that the hand-off and its tests call, with streams
// that are asynchronous and in order, stream capture, replay, and faults on demand.
//
// Every stream has a thread. Device memory has addresses that the host cannot read or write, and
// pinned memory has other addresses for the device than for the host. A stream that captures
// refuses what the driver refuses. Host functions of all streams run one at a time.

#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

enum Result : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kInvalidContext = 201,
  kInvalidHandle = 400,
  kNotReady = 600,
  kNotSupported = 801,
  kCaptureUnsupported = 900,
  kCaptureInvalidated = 901,
};

using DevicePtr = std::uint64_t;
using Operation = std::function<void()>;
using HostFn = void (*)(void*);

constexpr std::size_t kDeviceBytes = std::size_t{256} << 20;
constexpr DevicePtr kPinnedOffset = DevicePtr{1} << 56;

struct Graph {
  std::vector<Operation> operations;
};

struct Stream {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Operation> queue;
  bool busy = false;
  bool stopping = false;
  int capture = 0;  // 0 none, 1 active, 2 invalidated
  bool capture_is_global = false;
  Graph* graph = nullptr;
  std::thread thread;

  Stream() : thread([this] { work(); }) {}

  void work() {
    std::unique_lock lock(mutex);
    for (;;) {
      changed.wait(lock, [this] { return stopping || !queue.empty(); });
      if (queue.empty()) return;
      const Operation operation = std::move(queue.front());
      queue.pop_front();
      busy = true;
      lock.unlock();
      operation();
      lock.lock();
      busy = false;
      changed.notify_all();
    }
  }
  bool drained() {
    const std::lock_guard lock(mutex);
    return queue.empty() && !busy;
  }
  void drain() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [this] { return queue.empty() && !busy; });
  }
};

struct Fault {
  int calls_left;
  int code;
};

struct State {
  std::mutex mutex;
  std::set<Stream*> streams;
  std::map<std::byte*, std::size_t> pinned;
  std::map<std::string, Fault> faults;
  std::map<std::string, int> settings;
  std::byte* device_addresses = nullptr;  // not accessible
  std::byte* device_memory = nullptr;
  std::size_t device_used = 0;
  Stream* legacy = nullptr;  // the stream with the handle 0
  std::mutex host_functions;
  std::atomic<bool> abandoned{false};
  std::atomic<int> delay_us{0};
  std::atomic<int> violations{0};
};

State& state() {
  static auto* const instance = new State;
  return *instance;
}

int context_token;
thread_local std::vector<void*> contexts;

int setting(const char* name, int otherwise) {
  const auto found = state().settings.find(name);
  return found == state().settings.end() ? otherwise : found->second;
}

// Counts a call; what it must return, if anything but success.
int enter(const char* function, bool needs_context = true) {
  const std::lock_guard lock(state().mutex);
  const auto fault = state().faults.find(function);
  if (fault != state().faults.end() && --fault->second.calls_left == 0) {
    const int code = fault->second.code;
    state().faults.erase(fault);
    return code;
  }
  if (needs_context && (contexts.empty() || contexts.back() == nullptr)) return kInvalidContext;
  return kSuccess;
}

Stream* stream_of(void* handle) {
  const std::lock_guard lock(state().mutex);
  if (handle == nullptr) {
    if (state().legacy == nullptr) {
      state().legacy = new Stream;
      state().streams.insert(state().legacy);
    }
    return state().legacy;
  }
  auto* stream = static_cast<Stream*>(handle);
  return state().streams.contains(stream) ? stream : nullptr;
}

// For what may not be called while anything is captured. Invalidates the captures.
bool prohibited() {
  const std::lock_guard lock(state().mutex);
  bool any = false;
  for (Stream* stream : state().streams) {
    const std::lock_guard stream_lock(stream->mutex);
    if (stream->capture != 1 || !stream->capture_is_global) continue;
    stream->capture = 2;
    any = true;
  }
  return any;
}

void invalidate(Stream& stream) {
  const std::lock_guard lock(stream.mutex);
  if (stream.capture == 1) stream.capture = 2;
}

int enqueue(void* handle, Operation operation) {
  Stream* stream = stream_of(handle);
  if (stream == nullptr) return kInvalidHandle;
  const std::lock_guard lock(stream->mutex);
  if (stream->capture == 2) return kCaptureInvalidated;
  Operation slow = [operation = std::move(operation)] {
    const int delay = state().delay_us;
    if (delay > 0) std::this_thread::sleep_for(std::chrono::microseconds(delay));
    operation();
  };
  if (stream->capture == 1) {
    stream->graph->operations.push_back(std::move(slow));
    return kSuccess;
  }
  stream->queue.push_back(std::move(slow));
  stream->changed.notify_all();
  return kSuccess;
}

// Where the bytes of device memory lie; null if the range is not allocated.
std::byte* device_bytes(DevicePtr address, std::size_t bytes) {
  const std::lock_guard lock(state().mutex);
  const auto base = reinterpret_cast<DevicePtr>(state().device_addresses);
  if (base == 0 || address < base || address + bytes > base + state().device_used) return nullptr;
  return state().device_memory + (address - base);
}

bool is_pinned(const std::byte* memory, std::size_t bytes) {
  const std::lock_guard lock(state().mutex);
  auto block = state().pinned.upper_bound(const_cast<std::byte*>(memory));
  if (block == state().pinned.begin()) return false;
  --block;
  return memory + bytes <= block->first + block->second;
}

std::uint32_t* word_of(DevicePtr address) {
  if (address < kPinnedOffset || address % sizeof(std::uint32_t) != 0) return nullptr;
  auto* word = reinterpret_cast<std::byte*>(address - kPinnedOffset);
  return is_pinned(word, sizeof(std::uint32_t)) ? reinterpret_cast<std::uint32_t*>(word) : nullptr;
}

// A copy whose pinned side must still be there when it runs, as on a device.
Operation copy(std::byte* to, const std::byte* from, const std::byte* pinned, std::size_t bytes) {
  return [=] {
    if (is_pinned(pinned, bytes)) {
      std::memcpy(to, from, bytes);
    } else {
      ++state().violations;
    }
  };
}

// Stream memory operations, which may be missing in captures or altogether.
[[maybe_unused]] int memory_operation(void* handle, DevicePtr address,
                                      const std::function<void(std::uint32_t*)>& run) {
  std::uint32_t* word = word_of(address);
  if (word == nullptr) return kInvalidValue;
  Stream* stream = stream_of(handle);
  if (stream == nullptr) return kInvalidHandle;
  bool capturing = false;
  {
    const std::lock_guard lock(stream->mutex);
    capturing = stream->capture != 0;
  }
  bool supported = false;
  bool in_capture = false;
  {
    const std::lock_guard lock(state().mutex);
    supported = setting("memory_ops", 1) != 0;
    in_capture = setting("memory_ops_in_capture", 1) != 0;
  }
  if (!supported) return kNotSupported;
  if (capturing && !in_capture) {
    invalidate(*stream);
    return kCaptureUnsupported;
  }
  return enqueue(handle, [=] {
    if (is_pinned(reinterpret_cast<std::byte*>(word), sizeof(*word))) {
      run(word);
    } else {
      ++state().violations;
    }
  });
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// What tests say to the stand-in.

// Makes the one context current in the calling thread (0: none).
EXPORT void fake_cuda_make_current(int current) {
  contexts.clear();
  if (current != 0) contexts.push_back(&context_token);
}

// "version" (12080), "memory_ops" (1), "memory_ops_in_capture" (1), "memory_ops_attribute" (1)
EXPORT void fake_cuda_set(const char* name, int value) {
  const std::lock_guard lock(state().mutex);
  state().settings[name] = value;
}

// Before every operation of every stream.
EXPORT void fake_cuda_set_delay(int microseconds) { state().delay_us = microseconds; }

// The n-th call from now (1: the next) of a function returns `code`.
EXPORT void fake_cuda_fail(const char* function, int nth, int code) {
  const std::lock_guard lock(state().mutex);
  state().faults[function] = {nth, code};
}

// Blocks of pinned memory that have not been freed.
EXPORT int fake_cuda_pinned_blocks() {
  const std::lock_guard lock(state().mutex);
  return static_cast<int>(state().pinned.size());
}

// Operations that touched pinned memory after it had been freed.
EXPORT int fake_cuda_violations() { return state().violations; }

// As new. Waits that are left are abandoned: returns how many streams had not drained.
EXPORT int fake_cuda_reset() {
  state().abandoned = true;
  int busy = 0;
  std::set<Stream*> streams;
  {
    const std::lock_guard lock(state().mutex);
    streams = state().streams;
  }
  for (Stream* stream : streams) {
    busy += stream->drained() ? 0 : 1;
    stream->drain();
  }
  const std::lock_guard lock(state().mutex);
  for (const auto& block : state().pinned) std::free(block.first);
  state().pinned.clear();
  state().faults.clear();
  state().settings.clear();
  state().device_used = 0;
  state().delay_us = 0;
  state().violations = 0;
  state().abandoned = false;
  return busy;
}

// The driver.

EXPORT int cuDriverGetVersion(int* version) {
  if (const int error = enter("cuDriverGetVersion", false)) return error;
  const std::lock_guard lock(state().mutex);
  *version = setting("version", 12080);
  return kSuccess;
}

EXPORT int cuGetErrorName(int error, const char** text) {
  *text = error == kOutOfMemory ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OF_THE_STAND_IN";
  return kSuccess;
}

EXPORT int cuGetErrorString(int, const char** text) {
  *text = "as the test asked";
  return kSuccess;
}

EXPORT int cuCtxGetCurrent(void** context) {
  if (const int error = enter("cuCtxGetCurrent", false)) return error;
  *context = contexts.empty() ? nullptr : contexts.back();
  return kSuccess;
}

EXPORT int cuCtxPushCurrent_v2(void* context) {
  if (const int error = enter("cuCtxPushCurrent_v2", false)) return error;
  if (context != &context_token) return kInvalidContext;
  contexts.push_back(context);
  return kSuccess;
}

EXPORT int cuCtxPopCurrent_v2(void** context) {
  if (contexts.empty()) return kInvalidContext;
  *context = contexts.back();
  contexts.pop_back();
  return kSuccess;
}

EXPORT int cuCtxGetDevice(int* device) {
  if (const int error = enter("cuCtxGetDevice")) return error;
  *device = 0;
  return kSuccess;
}

EXPORT int cuCtxSynchronize() {
  if (const int error = enter("cuCtxSynchronize")) return error;
  if (prohibited()) return kCaptureUnsupported;
  std::set<Stream*> streams;
  {
    const std::lock_guard lock(state().mutex);
    streams = state().streams;
  }
  for (Stream* stream : streams) stream->drain();
  return kSuccess;
}

EXPORT int cuDeviceGetAttribute(int* value, int attribute, int) {
  if (const int error = enter("cuDeviceGetAttribute", false)) return error;
  const std::lock_guard lock(state().mutex);
  *value = attribute == 122 ? setting("memory_ops_attribute", 1) : 0;
  return kSuccess;
}

EXPORT int cuMemHostAlloc(void** memory, std::size_t bytes, unsigned) {
  if (const int error = enter("cuMemHostAlloc")) return error;
  if (prohibited()) return kCaptureUnsupported;
  const std::size_t rounded = (bytes + 4095) / 4096 * 4096;
  auto* block = static_cast<std::byte*>(std::aligned_alloc(4096, rounded));
  if (block == nullptr) return kOutOfMemory;
  std::memset(block, 0x5a, rounded);
  const std::lock_guard lock(state().mutex);
  state().pinned[block] = bytes;
  *memory = block;
  return kSuccess;
}

EXPORT int cuMemFreeHost(void* memory) {
  if (const int error = enter("cuMemFreeHost")) return error;
  const std::lock_guard lock(state().mutex);
  if (state().pinned.erase(static_cast<std::byte*>(memory)) == 0) return kInvalidValue;
  std::free(memory);
  return kSuccess;
}

EXPORT int cuMemHostGetDevicePointer_v2(DevicePtr* device, void* memory, unsigned) {
  if (const int error = enter("cuMemHostGetDevicePointer_v2")) return error;
  *device = reinterpret_cast<DevicePtr>(memory) + kPinnedOffset;
  return kSuccess;
}

EXPORT int cuMemAlloc_v2(DevicePtr* device, std::size_t bytes) {
  if (const int error = enter("cuMemAlloc_v2")) return error;
  const std::lock_guard lock(state().mutex);
  if (state().device_memory == nullptr) {
    const auto reserve = [](int protection) {
      return static_cast<std::byte*>(mmap(nullptr, kDeviceBytes, protection,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    };
    state().device_addresses = reserve(PROT_NONE);
    state().device_memory = reserve(PROT_READ | PROT_WRITE);
  }
  const std::size_t rounded = (bytes + 255) / 256 * 256;
  if (state().device_used + rounded > kDeviceBytes) return kOutOfMemory;
  *device = reinterpret_cast<DevicePtr>(state().device_addresses) + state().device_used;
  state().device_used += rounded;
  return kSuccess;
}

// For tests, in order with nothing.
EXPORT int cuMemcpyHtoD_v2(DevicePtr to, const void* from, std::size_t bytes) {
  std::byte* memory = device_bytes(to, bytes);
  if (memory == nullptr) return kInvalidValue;
  std::memcpy(memory, from, bytes);
  return kSuccess;
}

EXPORT int cuMemcpyDtoH_v2(void* to, DevicePtr from, std::size_t bytes) {
  const std::byte* memory = device_bytes(from, bytes);
  if (memory == nullptr) return kInvalidValue;
  std::memcpy(to, memory, bytes);
  return kSuccess;
}

EXPORT int cuMemcpyDtoHAsync_v2(void* to, DevicePtr from, std::size_t bytes, void* stream) {
  if (const int error = enter("cuMemcpyDtoHAsync_v2")) return error;
  const std::byte* memory = device_bytes(from, bytes);
  auto* pinned = static_cast<std::byte*>(to);
  if (memory == nullptr || !is_pinned(pinned, bytes)) return kInvalidValue;
  return enqueue(stream, copy(pinned, memory, pinned, bytes));
}

EXPORT int cuMemcpyHtoDAsync_v2(DevicePtr to, const void* from, std::size_t bytes, void* stream) {
  if (const int error = enter("cuMemcpyHtoDAsync_v2")) return error;
  std::byte* memory = device_bytes(to, bytes);
  const auto* pinned = static_cast<const std::byte*>(from);
  if (memory == nullptr || !is_pinned(pinned, bytes)) return kInvalidValue;
  return enqueue(stream, copy(memory, pinned, pinned, bytes));
}

EXPORT int cuLaunchHostFunc(void* stream, HostFn function, void* user_data) {
  if (const int error = enter("cuLaunchHostFunc")) return error;
  return enqueue(stream, [=] {
    const std::lock_guard lock(state().host_functions);
    function(user_data);
  });
}

#ifndef FAKE_CUDA_WITHOUT_MEMORY_OPS
EXPORT int cuStreamWriteValue32_v2(void* stream, DevicePtr address, std::uint32_t value, unsigned) {
  if (const int error = enter("cuStreamWriteValue32_v2")) return error;
  return memory_operation(stream, address, [value](std::uint32_t* word) {
    std::atomic_ref<std::uint32_t>(*word).store(value, std::memory_order_release);
  });
}

EXPORT int cuStreamWaitValue32_v2(void* stream, DevicePtr address, std::uint32_t value,
                                  unsigned flags) {
  if (const int error = enter("cuStreamWaitValue32_v2")) return error;
  if (flags != 1) return kNotSupported;  // CU_STREAM_WAIT_VALUE_EQ
  return memory_operation(stream, address, [value](std::uint32_t* word) {
    while (std::atomic_ref<std::uint32_t>(*word).load(std::memory_order_acquire) != value &&
           !state().abandoned) {
      std::this_thread::yield();
    }
  });
}
#endif

#ifndef FAKE_CUDA_WITHOUT_QUERY
EXPORT int cuStreamQuery(void* handle) {
  if (const int error = enter("cuStreamQuery")) return error;
  Stream* stream = stream_of(handle);
  if (stream == nullptr) return kInvalidHandle;
  const std::lock_guard lock(stream->mutex);
  if (stream->capture != 0) {
    stream->capture = 2;
    return kCaptureUnsupported;
  }
  return stream->queue.empty() && !stream->busy ? kSuccess : kNotReady;
}
#endif

EXPORT int cuStreamIsCapturing(void* handle, int* status) {
  if (const int error = enter("cuStreamIsCapturing")) return error;
  Stream* stream = stream_of(handle);
  if (stream == nullptr) return kInvalidHandle;
  const std::lock_guard lock(stream->mutex);
  *status = stream->capture;
  return kSuccess;
}

EXPORT int cuStreamCreate(void** handle, unsigned) {
  if (const int error = enter("cuStreamCreate")) return error;
  auto* stream = new Stream;
  const std::lock_guard lock(state().mutex);
  state().streams.insert(stream);
  *handle = stream;
  return kSuccess;
}

EXPORT int cuStreamDestroy_v2(void* handle) {
  if (const int error = enter("cuStreamDestroy_v2")) return error;
  Stream* stream = stream_of(handle);
  if (stream == nullptr) return kInvalidHandle;
  {
    const std::lock_guard lock(state().mutex);
    state().streams.erase(stream);
  }
  {
    const std::lock_guard lock(stream->mutex);
    stream->stopping = true;
    stream->changed.notify_all();
  }
  stream->thread.join();
  delete stream;
  return kSuccess;
}

EXPORT int cuStreamSynchronize(void* handle) {
  if (const int error = enter("cuStreamSynchronize")) return error;
  Stream* stream = stream_of(handle);
  if (stream == nullptr) return kInvalidHandle;
  stream->drain();
  return kSuccess;
}

EXPORT int cuStreamBeginCapture_v2(void* handle, int mode) {
  if (const int error = enter("cuStreamBeginCapture_v2")) return error;
  Stream* stream = stream_of(handle);
  if (stream == nullptr || handle == nullptr) return kCaptureUnsupported;
  const std::lock_guard lock(stream->mutex);
  if (stream->capture != 0) return kInvalidValue;
  stream->capture = 1;
  stream->capture_is_global = mode == 0;
  stream->graph = new Graph;
  return kSuccess;
}

EXPORT int cuStreamEndCapture(void* handle, void** graph) {
  if (const int error = enter("cuStreamEndCapture")) return error;
  Stream* stream = stream_of(handle);
  if (stream == nullptr) return kInvalidHandle;
  const std::lock_guard lock(stream->mutex);
  if (stream->capture == 0) return kInvalidValue;
  const bool valid = stream->capture == 1;
  stream->capture = 0;
  Graph* captured = std::exchange(stream->graph, nullptr);
  if (!valid) delete captured;
  *graph = valid ? captured : nullptr;
  return valid ? kSuccess : kCaptureInvalidated;
}

EXPORT int cuGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long) {
  if (const int error = enter("cuGraphInstantiateWithFlags")) return error;
  *exec = new Graph(*static_cast<Graph*>(graph));
  return kSuccess;
}

EXPORT int cuGraphLaunch(void* exec, void* stream) {
  if (const int error = enter("cuGraphLaunch")) return error;
  for (const Operation& operation : static_cast<Graph*>(exec)->operations) {
    if (const int error = enqueue(stream, operation)) return error;
  }
  return kSuccess;
}

EXPORT int cuGraphExecDestroy(void* exec) {
  delete static_cast<Graph*>(exec);
  return kSuccess;
}

EXPORT int cuGraphDestroy(void* graph) {
  delete static_cast<Graph*>(graph);
  return kSuccess;
}
