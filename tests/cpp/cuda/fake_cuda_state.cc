#include "fake_cuda_state.h"

#include <sys/mman.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace fake_cuda {

State& state() {
  static auto* const instance = new State;
  return *instance;
}

int context_token;
std::vector<void*>& contexts() {
  static thread_local std::vector<void*> current;
  return current;
}

int setting(const char* name, int otherwise) {
  const auto found = state().settings.find(name);
  return found == state().settings.end() ? otherwise : found->second;
}

int enter(const char* function, bool needs_context) {
  const std::lock_guard lock(state().mutex);
  const auto fault = state().faults.find(function);
  if (fault != state().faults.end() && --fault->second.calls_left == 0) {
    const int code = fault->second.code;
    state().faults.erase(fault);
    return code;
  }
  if (needs_context && (contexts().empty() || contexts().back() == nullptr)) return kInvalidContext;
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

Operation copy(std::byte* to, const std::byte* from, const std::byte* pinned, std::size_t bytes) {
  return [=] {
    if (is_pinned(pinned, bytes)) {
      std::memcpy(to, from, bytes);
    } else {
      ++state().violations;
    }
  };
}

int memory_operation(void* handle, DevicePtr address,
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

}  // namespace fake_cuda
