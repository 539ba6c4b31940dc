#include "cpu/thread_pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <string>

#include "base/check.h"
#include "cpu/thread_setup.h"
#include "cpu/topology.h"

namespace ktrt {
namespace {

using std::chrono::nanoseconds;
using std::chrono::steady_clock;

// Between runs the cores belong to other threads (torch's, say), so workers park soon; but not in
// the gaps between the layers of a decode step, after which waking them takes as long as the layer.
constexpr nanoseconds kIdleSpin = std::chrono::microseconds(200);

// Within a run the others are at work and arrive soon, while a wake-up costs 50 µs on a virtual
// machine: spin for longer than uneven work lasts.
constexpr nanoseconds kBusySpin = std::chrono::milliseconds(1);

// A pause is 40 to 140 cycles, reading the clock about 60: look at it every microsecond or two.
constexpr int kPausesPerClockRead = 32;

// A thread that spins while another of the pool waits for its core only delays it.
bool all_can_run(int threads) { return static_cast<size_t>(threads) <= allowed_cpus().size(); }

}  // namespace

// Either open() sees the sleeper, or the sleeper's futex call sees the new value: both sides write
// one word and then read the other's, sequentially consistent.
void Gate::open() noexcept {
  value_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) {
    syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }
}

void Gate::wait(uint32_t old, nanoseconds spin) noexcept {
  if (value() != old) return;
  if (spin.count() > 0) {
    const auto deadline = steady_clock::now() + spin;
    do {
      for (int i = 0; i < kPausesPerClockRead; ++i) {
        __builtin_ia32_pause();
        if (value() != old) return;
      }
    } while (steady_clock::now() < deadline);
  }
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  while (value_.load(std::memory_order_seq_cst) == old) {
    syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
  }
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

void Barrier::arrive() noexcept {
  // Releases what this thread wrote, and as the last one acquires what all the others did.
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == parties_) {
    arrived_.store(0, std::memory_order_relaxed);
    gate_.open();
  }
}

void Barrier::arrive_and_wait(nanoseconds spin) noexcept {
  const uint32_t round = gate_.value();
  arrive();
  gate_.wait(round, spin);
}

ThreadPool::ThreadPool(const std::vector<int>& cpus)
    : size_(static_cast<int>(cpus.size())),
      idle_spin_(all_can_run(size_) ? kIdleSpin : nanoseconds(0)),
      busy_spin_(all_can_run(size_) ? kBusySpin : nanoseconds(0)),
      owner_(getpid()),
      finish_(size_),
      barrier_(size_) {
  KTRT_CHECK(!cpus.empty(), "a thread pool needs at least one CPU");
  const BlockSignals block;
  try {
    for (int i = 1; i < size_; ++i) {
      workers_.emplace_back([this, i, cpu = cpus[static_cast<size_t>(i)]] { work(i, cpu); });
    }
  } catch (...) {
    stop_and_join();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  if (getpid() == owner_) {
    stop_and_join();
  } else {
    // A thread that fork() did not copy can be neither joined nor detached.
    new std::vector<std::thread>(std::move(workers_));
  }
}

void ThreadPool::stop_and_join() noexcept {
  start_.call = nullptr;
  start_.gate.open();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::dispatch(Call call, void* context) noexcept {
  start_.call = call;
  start_.context = context;
  start_.gate.open();
  call(context, 0);
  finish_.arrive_and_wait(busy_spin_);
}

void ThreadPool::work(int index, int cpu) noexcept {
  pthread_setname_np(pthread_self(), ("ktrt-" + std::to_string(index)).c_str());
  pin_current_thread(cpu);
  for (uint32_t epoch = 0;; ++epoch) {
    start_.gate.wait(epoch, idle_spin_);
    if (start_.call == nullptr) return;
    start_.call(start_.context, index);
    finish_.arrive();
  }
}

}  // namespace ktrt
