// A slot: a forward, and the word by which a stream and the host take turns.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>

namespace ktrt {

// The values of a slot's word. The stream writes kStarted once its copies have arrived, and waits
// for kDone; everything between is the host's. All values are constants, so a captured graph can be
// replayed any number of times; nothing has to be reset, because the next start overwrites kDone;
// and a wait without a start returns at once.
enum class SlotState : std::uint32_t { kDone = 0, kStarted = 1, kRunning = 2 };

// A word that the host and the device (or a driver's thread) share. Acquire and release order the
// host's accesses to the slot's arrays; the device's side is ordered by its stream.
class SlotWord {
 public:
  SlotWord() = default;
  explicit SlotWord(std::uint32_t* word) : word_(word) {}

  SlotState state() const noexcept {
    return static_cast<SlotState>(
        std::atomic_ref<std::uint32_t>(*word_).load(std::memory_order_acquire));
  }
  void set(SlotState state) noexcept {
    std::atomic_ref<std::uint32_t>(*word_).store(static_cast<std::uint32_t>(state),
                                                 std::memory_order_release);
  }
  // For transitions that several threads may attempt: one thread succeeds.
  bool advance(SlotState from, SlotState to) noexcept {
    auto expected = static_cast<std::uint32_t>(from);
    return std::atomic_ref<std::uint32_t>(*word_).compare_exchange_strong(
        expected, static_cast<std::uint32_t>(to), std::memory_order_acq_rel);
  }

 private:
  std::uint32_t* word_ = nullptr;
};

struct Slot {
  std::string name;  // for error messages
  std::function<void()> forward;
  SlotWord word;
};

}  // namespace ktrt
