// A stand-in for the CUDA driver: the functions that the hand-off and its tests call, with streams
// that are asynchronous and in order, stream capture, replay, and faults on demand.
//
// Every stream has a thread. Device memory has addresses that the host cannot read or write, and
// pinned memory has other addresses for the device than for the host. A stream that captures
// refuses what the driver refuses. Host functions of all streams run one at a time.

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <utility>

#include "fake_cuda_state.h"

using namespace fake_cuda;

#define EXPORT extern "C" __attribute__((visibility("default")))

// Calls of the tests to the stand-in.

// Makes the one context current in the calling thread (0: none).
EXPORT void fake_cuda_make_current(int current) {
  contexts().clear();
  if (current != 0) contexts().push_back(&context_token);
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

// Granules of device memory that are mapped, or that nobody has released.
EXPORT int fake_cuda_granules() {
  const std::lock_guard lock(state().mutex);
  return static_cast<int>(state().mapped.size() + state().memories.size());
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
  for (const auto& [address, bytes] : state().reserved) {
    munmap(reinterpret_cast<void*>(address), bytes);
  }
  state().reserved.clear();
  state().mapped.clear();
  state().memories.clear();
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
  *context = contexts().empty() ? nullptr : contexts().back();
  return kSuccess;
}

EXPORT int cuCtxPushCurrent_v2(void* context) {
  if (const int error = enter("cuCtxPushCurrent_v2", false)) return error;
  if (context != &context_token) return kInvalidContext;
  contexts().push_back(context);
  return kSuccess;
}

EXPORT int cuCtxPopCurrent_v2(void** context) {
  if (contexts().empty()) return kInvalidContext;
  *context = contexts().back();
  contexts().pop_back();
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
  *value = attribute == 122   ? setting("memory_ops_attribute", 1)
           : attribute == 102 ? setting("virtual_memory", 1)
                              : 0;
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

EXPORT int cuMemGetAllocationGranularity(std::size_t* granularity, const void*, int) {
  if (const int error = enter("cuMemGetAllocationGranularity")) return error;
  *granularity = kGranule;
  return kSuccess;
}

// Addresses that the host can read and write too, where memory is mapped and access set.
EXPORT int cuMemAddressReserve(DevicePtr* address, std::size_t bytes, std::size_t, DevicePtr,
                               unsigned long long) {
  if (const int error = enter("cuMemAddressReserve")) return error;
  if (bytes == 0 || bytes % kGranule != 0) return kInvalidValue;
  void* found = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) return kOutOfMemory;
  const std::lock_guard lock(state().mutex);
  *address = reinterpret_cast<DevicePtr>(found);
  state().reserved[*address] = bytes;
  return kSuccess;
}

EXPORT int cuMemAddressFree(DevicePtr address, std::size_t bytes) {
  if (const int error = enter("cuMemAddressFree")) return error;
  const std::lock_guard lock(state().mutex);
  const auto found = state().reserved.find(address);
  if (found == state().reserved.end() || found->second != bytes) return kInvalidValue;
  const auto mapped = state().mapped.lower_bound(address);
  if (mapped != state().mapped.end() && *mapped < address + bytes) return kInvalidValue;
  munmap(reinterpret_cast<void*>(address), bytes);
  state().reserved.erase(found);
  return kSuccess;
}

EXPORT int cuMemCreate(std::uint64_t* memory, std::size_t bytes, const void*, unsigned long long) {
  if (const int error = enter("cuMemCreate")) return error;
  const std::lock_guard lock(state().mutex);
  const int most = setting("granules", 1 << 20);
  if (bytes != kGranule) return kInvalidValue;
  if (static_cast<int>(state().mapped.size()) >= most) return kOutOfMemory;
  *memory = ++state().last_memory;
  state().memories.insert(*memory);
  return kSuccess;
}

EXPORT int cuMemRelease(std::uint64_t memory) {
  const std::lock_guard lock(state().mutex);
  return state().memories.erase(memory) != 0 ? kSuccess : kInvalidValue;
}

EXPORT int cuMemMap(DevicePtr address, std::size_t bytes, std::size_t, std::uint64_t memory,
                    unsigned long long) {
  if (const int error = enter("cuMemMap")) return error;
  const std::lock_guard lock(state().mutex);
  auto found = state().reserved.upper_bound(address);
  if (found == state().reserved.begin() || bytes != kGranule ||
      !state().memories.contains(memory)) {
    return kInvalidValue;
  }
  --found;
  if (address + bytes > found->first + found->second) return kInvalidValue;
  return state().mapped.insert(address).second ? kSuccess : kInvalidValue;
}

EXPORT int cuMemSetAccess(DevicePtr address, std::size_t bytes, const void*, std::size_t) {
  if (const int error = enter("cuMemSetAccess")) return error;
  const std::lock_guard lock(state().mutex);
  for (std::size_t at = 0; at < bytes; at += kGranule) {
    if (!state().mapped.contains(address + at)) return kInvalidValue;
  }
  return mprotect(reinterpret_cast<void*>(address), bytes, PROT_READ | PROT_WRITE) == 0
             ? kSuccess
             : kOutOfMemory;
}

// The contents are gone, as on a device.
EXPORT int cuMemUnmap(DevicePtr address, std::size_t bytes) {
  if (const int error = enter("cuMemUnmap")) return error;
  const std::lock_guard lock(state().mutex);
  if (bytes != kGranule || state().mapped.erase(address) == 0) return kInvalidValue;
  mmap(reinterpret_cast<void*>(address), bytes, PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
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
