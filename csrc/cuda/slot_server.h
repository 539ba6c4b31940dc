// Answers the starts of slots: one thread runs forwards, another sees to it that no stream waits
// for ever. Knows nothing of CUDA.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cuda/slot.h"

namespace ktrt {

// "0.5 s"
std::string seconds_text(std::chrono::nanoseconds duration);

// Python: TimeoutError.
class HandoffTimeout : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The *worker* polls the word of the slot that is expected next, runs its layer's forward and
// writes kDone; it parks while nothing is expected. The *watchdog* looks at all words a few times a
// second and declares a failure where a forward takes longer than the timeout or a slot starts that
// is not expected. After a failure (also of a forward, or declared by the caller) every start is
// answered with kDone at once, without a forward, until the failure has been taken.
class SlotServer {
 public:
  // cpu: where the worker runs, negative for anywhere. announce_all: wait_done() is used.
  SlotServer(int cpu, std::chrono::nanoseconds timeout, bool announce_all);
  ~SlotServer() { stop(); }
  SlotServer(const SlotServer&) = delete;
  SlotServer& operator=(const SlotServer&) = delete;

  // The slot must outlive the server, or its stop().
  void add(Slot& slot);

  // These slots will start next, in this order, after those expected already. Throws the failure
  // that has not been taken (std::runtime_error), or HandoffTimeout where a forward that was given
  // up does not end within the timeout.
  void expect(std::span<Slot* const> slots);
  // Takes back the last expectation: its start could not be enqueued.
  void retract();

  // Returns once the slot's word is kDone. For a thread of the CUDA driver.
  void wait_done(const Slot& slot) noexcept;

  // Declares a failure, unless there is one, and releases every stream.
  void fail(const std::string& what, bool timeout = false);

  struct Progress {
    bool pending = false;  // slots are expected or a forward runs, and nothing has failed
    bool running = false;  // a forward, which the watchdog limits
    bool failed = false;
    std::uint64_t steps = 0;  // grows with every forward that begins or ends
  };
  // Waits until nothing is pending, at most for `at_most`.
  Progress wait(std::chrono::nanoseconds at_most);
  // For a stream that is drained: fails if a slot is expected that nothing has started.
  void fail_if_not_started();

  // Throws the failure, if there is one, until it is forgotten.
  void throw_failure();
  void forget_failure();

  // Ends both threads; waits for a forward that runs. Slots that start later are not answered and
  // their memory is no longer touched. Idempotent.
  void stop() noexcept;

 private:
  using Lock = std::unique_lock<std::mutex>;
  struct Failure {
    std::string what;
    bool timeout;
  };

  void work(int cpu) noexcept;
  void serve(Slot& slot, Lock& lock) noexcept;
  bool claim(Slot& slot, std::uint32_t round) noexcept;
  void linger(Lock& lock) noexcept;
  void watch() noexcept;
  void look(std::chrono::nanoseconds same_step) noexcept;
  // The caller holds the mutex.
  void fail_locked(const std::string& what, bool timeout) noexcept;
  bool release_all() noexcept;
  void throw_failure_locked() const;

  const std::chrono::nanoseconds timeout_;
  const std::chrono::nanoseconds period_;  // of the watchdog
  const bool announce_all_;

  std::mutex mutex_;
  std::vector<Slot*> slots_;
  std::deque<Slot*> expected_;
  Slot* running_ = nullptr;
  bool given_up_ = false;  // the forward that runs
  std::uint64_t steps_ = 0;
  std::optional<Failure> failure_;
  bool stopping_ = false;
  std::condition_variable wake_;      // the worker
  std::condition_variable look_;      // the watchdog
  std::condition_variable progress_;  // everybody else
  // Written under the mutex; the worker polls them without.
  std::atomic<std::uint32_t> round_{0};  // changes when expectations become void
  std::atomic<std::size_t> num_expected_{0};

  std::thread worker_;
  std::thread watchdog_;
};

}  // namespace ktrt
