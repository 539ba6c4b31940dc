// Shared by the stand-in's driver functions: its streams and memory, and what may go wrong.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

// Hidden: several variants of the stand-in are loaded into one process.
namespace fake_cuda __attribute__((visibility("hidden"))) {

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
  constexpr std::size_t kGranule = std::size_t{1} << 16;
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
    std::map<DevicePtr, std::size_t> reserved;
    std::set<DevicePtr> mapped;  // granules
    std::set<std::uint64_t> memories;
    std::uint64_t last_memory = 0;
    Stream* legacy = nullptr;  // the stream with the handle 0
    std::mutex host_functions;
    std::atomic<bool> abandoned{false};
    std::atomic<int> delay_us{0};
    std::atomic<int> violations{0};
  };

  State& state();

  // Contexts that are current in the calling thread, and the one that there is.
  std::vector<void*>& contexts();
  extern int context_token;

  // Set by fake_cuda_set; under the state's mutex.
  int setting(const char* name, int otherwise);

  // Counts a call; what it must return, if anything but success.
  int enter(const char* function, bool needs_context = true);

  // Null for a handle that is none.
  Stream* stream_of(void* handle);

  // For what may not be called while anything is captured. Invalidates the captures.
  bool prohibited();

  int enqueue(void* handle, Operation operation);

  // Where the bytes of device memory lie; null if the range is not allocated.
  std::byte* device_bytes(DevicePtr address, std::size_t bytes);

  bool is_pinned(const std::byte* memory, std::size_t bytes);

  // A copy whose pinned side must still be there when it runs, as on a device.
  Operation copy(std::byte * to, const std::byte* from, const std::byte* pinned, std::size_t bytes);

  // Stream memory operations, which may be missing in captures or altogether.
  int memory_operation(void* handle, DevicePtr address,
                       const std::function<void(std::uint32_t*)>& run);

}  // namespace fake_cuda
