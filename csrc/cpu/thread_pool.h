// Pinned threads that run one function together, for phases of a few microseconds.
//
// A run costs one write that every worker polls (the epoch) and one arrival per worker; there is no
// mutex, no queue and no wake-up of single workers. Whoever waits spins for a while, then sleeps in
// a futex, so that waiting for a thread that is not scheduled does not keep a core busy for ever.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

namespace ktrt {

// A counter that threads wait on.
class Gate {
 public:
  uint32_t value() const noexcept { return value_.load(std::memory_order_acquire); }
  // Adds one and wakes sleepers; a system call only if there are any.
  void open() noexcept;
  // Returns once value() differs from `old`: spins for `spin`, then sleeps.
  void wait(uint32_t old, std::chrono::nanoseconds spin) noexcept;

 private:
  std::atomic<uint32_t> value_{0};
  std::atomic<int> sleepers_{0};
};

// The last of `parties` arrivals opens the gate for the others.
class alignas(64) Barrier {
 public:
  explicit Barrier(int parties) : parties_(parties) {}
  void arrive() noexcept;
  void arrive_and_wait(std::chrono::nanoseconds spin) noexcept;

 private:
  const int parties_;
  std::atomic<int> arrived_{0};
  alignas(64) Gate gate_;  // not on the line that arrivals write while others poll
};

class ThreadPool {
 public:
  // cpus.size() threads. Thread 0 is the caller of run(), which is never pinned; worker i > 0 is
  // pinned to cpus[i]. A CPU that cannot be had (or is negative) leaves its worker unpinned.
  // Throws std::invalid_argument if cpus is empty, std::system_error if a thread cannot be started.
  explicit ThreadPool(const std::vector<int>& cpus);
  // Stops and joins the workers. In a child after fork(), which has none, it only leaks their
  // handles; run() must not be called there.
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const noexcept { return size_; }

  // Calls fn(thread_index) on every thread, 0 being the caller, and returns when all have returned.
  // fn must not throw (the program ends). The caller sees to it that runs neither overlap nor nest.
  template <class F>
  void run(F&& fn) noexcept {
    if (size_ == 1) {
      fn(0);
      return;
    }
    using Fn = std::remove_reference_t<F>;
    const Call call = [](void* context, int index) { (*static_cast<Fn*>(context))(index); };
    dispatch(call, const_cast<void*>(static_cast<const void*>(&fn)));
  }

  // For use inside fn, by all threads equally often: returns when all have called it. What each
  // wrote before is visible to all after.
  void barrier() noexcept {
    if (size_ > 1) barrier_.arrive_and_wait(busy_spin_);
  }

 private:
  using Call = void (*)(void* context, int index);

  // One cache line, so that the task arrives with the news of it.
  struct alignas(64) Start {
    Gate gate;
    Call call = nullptr;  // null: stop
    void* context = nullptr;
  };

  void dispatch(Call call, void* context) noexcept;
  void work(int index, int cpu) noexcept;
  void stop_and_join() noexcept;

  const int size_;
  const std::chrono::nanoseconds idle_spin_;  // of a worker between runs
  const std::chrono::nanoseconds busy_spin_;  // within a run
  const pid_t owner_;
  std::vector<std::thread> workers_;
  Start start_;
  Barrier finish_;
  Barrier barrier_;
};

}  // namespace ktrt
