#include "cuda/slot_server.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <sstream>

#include "cpu/thread_setup.h"

namespace ktrt {
namespace {

using std::chrono::nanoseconds;
using std::chrono::steady_clock;
using namespace std::chrono_literals;

constexpr nanoseconds kLongestPeriod = 100ms;
constexpr nanoseconds kShortestPeriod = 1ms;
// While a stream that failed passes the slots that are left.
constexpr nanoseconds kReleasePeriod = 200us;
constexpr int kQuietRounds = 500;

// Between two layers of a decode step the device works for some 100 µs: poll without sleeping for
// far longer, then leave the core to others at the price of a late start.
constexpr nanoseconds kPollHard = 20ms;
constexpr nanoseconds kNap = 100us;
// The host enqueues layer after layer: the next expectation comes soon.
constexpr nanoseconds kLinger = 50us;
constexpr int kPausesPerYield = 32;

// Some microseconds, in which another thread may use this core.
template <class Done>
bool pause_until(Done done) noexcept {
  for (int i = 0; i < kPausesPerYield; ++i) {
    if (done()) return true;
    __builtin_ia32_pause();
  }
  sched_yield();
  return false;
}

bool is_at_work(const Slot& slot) {
  const SlotState state = slot.word.state();
  return state == SlotState::kStarted || state == SlotState::kRunning;
}

}  // namespace

std::string seconds_text(nanoseconds duration) {
  std::ostringstream text;
  text << std::chrono::duration<double>(duration).count() << " s";
  return text.str();
}

SlotServer::SlotServer(int cpu, nanoseconds timeout, bool announce_all)
    : timeout_(timeout),
      period_(std::clamp(timeout / 8, kShortestPeriod, kLongestPeriod)),
      announce_all_(announce_all) {
  const BlockSignals block;
  worker_ = std::thread([this, cpu] { work(cpu); });
  try {
    watchdog_ = std::thread([this] { watch(); });
  } catch (...) {
    stop();
    throw;
  }
}

void SlotServer::stop() noexcept {
  {
    const Lock lock(mutex_);
    stopping_ = true;
    ++round_;
    wake_.notify_all();
    look_.notify_all();
  }
  if (worker_.joinable()) worker_.join();
  if (watchdog_.joinable()) watchdog_.join();
  const Lock lock(mutex_);
  slots_.clear();
  expected_.clear();
}

void SlotServer::add(Slot& slot) {
  const Lock lock(mutex_);
  slots_.push_back(&slot);
}

void SlotServer::expect(std::span<Slot* const> slots) {
  Lock lock(mutex_);
  throw_failure_locked();
  if (!progress_.wait_for(lock, timeout_, [this] { return !given_up_; })) {
    throw HandoffTimeout("a forward that was given up still runs after " + seconds_text(timeout_) +
                         ": the slots cannot be used");
  }
  throw_failure_locked();
  expected_.insert(expected_.end(), slots.begin(), slots.end());
  num_expected_ = expected_.size();
  wake_.notify_one();
}

void SlotServer::retract() {
  const Lock lock(mutex_);
  if (expected_.empty()) return;
  expected_.pop_back();
  num_expected_ = expected_.size();
  ++round_;
}

void SlotServer::wait_done(const Slot& slot) noexcept {
  const auto done = [&] { return slot.word.state() == SlotState::kDone; };
  const auto deadline = steady_clock::now() + kLinger;
  while (steady_clock::now() < deadline) {
    if (pause_until(done)) return;
  }
  Lock lock(mutex_);
  // The watchdog's releases are announced too; the limit is for a server that is stopped meanwhile.
  while (!done()) progress_.wait_for(lock, period_);
}

void SlotServer::fail(const std::string& what, bool timeout) {
  const Lock lock(mutex_);
  fail_locked(what, timeout);
}

SlotServer::Progress SlotServer::wait(nanoseconds at_most) {
  Lock lock(mutex_);
  const auto running = [this] { return running_ != nullptr && !given_up_; };
  const auto pending = [&] { return !failure_ && (!expected_.empty() || running()); };
  progress_.wait_for(lock, at_most, [&] { return !pending(); });
  return {
      .pending = pending(), .running = running(), .failed = failure_.has_value(), .steps = steps_};
}

void SlotServer::fail_if_not_started() {
  const Lock lock(mutex_);
  if (failure_ || running_ != nullptr || expected_.empty()) return;
  if (is_at_work(*expected_.front())) return;
  fail_locked(expected_.front()->name + " was expected, but nothing on the stream started it",
              false);
}

void SlotServer::throw_failure() {
  const Lock lock(mutex_);
  throw_failure_locked();
}

void SlotServer::forget_failure() {
  const Lock lock(mutex_);
  failure_.reset();
}

void SlotServer::throw_failure_locked() const {
  if (!failure_) return;
  if (failure_->timeout) throw HandoffTimeout(failure_->what);
  throw std::runtime_error(failure_->what);
}

void SlotServer::fail_locked(const std::string& what, bool timeout) noexcept {
  if (!failure_) failure_ = Failure{what, timeout};
  ++round_;
  expected_.clear();
  num_expected_ = 0;
  given_up_ = given_up_ || running_ != nullptr;
  release_all();
  look_.notify_all();
  progress_.notify_all();
}

// Whether a word was waiting for it.
bool SlotServer::release_all() noexcept {
  bool any = false;
  for (Slot* slot : slots_) {
    any = slot->word.advance(SlotState::kStarted, SlotState::kDone) || any;
    any = slot->word.advance(SlotState::kRunning, SlotState::kDone) || any;
  }
  if (any) progress_.notify_all();
  return any;
}

void SlotServer::work(int cpu) noexcept {
  pthread_setname_np(pthread_self(), "ktrt-gpu");
  pin_current_thread(cpu);
  Lock lock(mutex_);
  while (!stopping_) {
    if (expected_.empty()) {
      wake_.wait(lock);
      continue;
    }
    Slot& slot = *expected_.front();
    const std::uint32_t round = round_;
    lock.unlock();
    const bool claimed = claim(slot, round);
    lock.lock();
    if (!claimed) continue;
    // Meanwhile the expectation may have become void, and may have been renewed.
    const bool expected = !failure_ && !expected_.empty() && expected_.front() == &slot;
    if (expected && slot.word.state() == SlotState::kRunning) {
      serve(slot, lock);
      linger(lock);
    } else {
      slot.word.advance(SlotState::kRunning, SlotState::kDone);
      progress_.notify_all();
    }
  }
}

bool SlotServer::claim(Slot& slot, std::uint32_t round) noexcept {
  const auto over = [&] {
    return slot.word.state() == SlotState::kStarted ||
           round_.load(std::memory_order_relaxed) != round;
  };
  const auto deadline = steady_clock::now() + kPollHard;
  while (!pause_until(over)) {
    if (steady_clock::now() > deadline) std::this_thread::sleep_for(kNap);
  }
  return slot.word.advance(SlotState::kStarted, SlotState::kRunning);
}

void SlotServer::serve(Slot& slot, Lock& lock) noexcept {
  expected_.pop_front();
  num_expected_ = expected_.size();
  running_ = &slot;
  ++steps_;
  lock.unlock();
  std::string error;
  try {
    slot.forward();
    slot.word.advance(SlotState::kRunning, SlotState::kDone);
  } catch (const std::exception& exception) {
    error = slot.name + ": " + exception.what();
  } catch (...) {
    error = slot.name + ": unknown exception";
  }
  lock.lock();
  running_ = nullptr;
  ++steps_;
  // The failure of a forward that was given up is nobody's any more.
  const bool given_up = given_up_;
  given_up_ = false;
  if (!error.empty() && !given_up) fail_locked(error, false);
  if (announce_all_ || given_up || expected_.empty()) progress_.notify_all();
}

void SlotServer::linger(Lock& lock) noexcept {
  if (!expected_.empty() || stopping_) return;
  const std::uint32_t round = round_;
  lock.unlock();
  const auto over = [&] {
    return num_expected_.load(std::memory_order_relaxed) != 0 ||
           round_.load(std::memory_order_relaxed) != round;
  };
  const auto deadline = steady_clock::now() + kLinger;
  while (!pause_until(over) && steady_clock::now() < deadline) {
  }
  lock.lock();
}

void SlotServer::watch() noexcept {
  pthread_setname_np(pthread_self(), "ktrt-gpu-watch");
  Lock lock(mutex_);
  std::uint64_t step = steps_;
  nanoseconds same_step{0};
  int quiet_rounds = 0;
  while (!stopping_) {
    const bool releasing = failure_ && quiet_rounds < kQuietRounds;
    const nanoseconds tick = releasing ? kReleasePeriod : period_;
    const auto before = steady_clock::now();
    look_.wait_for(lock, tick);
    if (failure_) {
      quiet_rounds = release_all() ? 0 : std::min(quiet_rounds + 1, kQuietRounds);
      continue;
    }
    quiet_rounds = 0;
    // Time during which the process was stopped does not count.
    same_step = step == steps_ ? same_step + std::min(steady_clock::now() - before, 2 * tick)
                               : nanoseconds(0);
    step = steps_;
    look(same_step);
  }
}

void SlotServer::look(nanoseconds same_step) noexcept {
  if (running_ != nullptr) {
    if (same_step > timeout_ && !given_up_) {
      fail_locked(running_->name + ": the forward has not ended after " + seconds_text(timeout_),
                  true);
    }
    return;
  }
  // The one that is expected next may have started; as long as it has not been answered, no other
  // can.
  const Slot* next = expected_.empty() ? nullptr : expected_.front();
  if (next != nullptr && is_at_work(*next)) return;
  for (const Slot* slot : slots_) {
    if (slot == next || slot->word.state() != SlotState::kStarted) continue;
    fail_locked(slot->name + " started, but " + (next ? next->name : "nothing") + " was expected",
                false);
    return;
  }
}

}  // namespace ktrt
