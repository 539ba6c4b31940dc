// Steps that every thread of ours takes before and after it is started.
#pragma once

#include <signal.h>

namespace ktrt {

// A CPU that cannot be had (or is negative) leaves the thread unpinned: slower at worst.
void pin_current_thread(int cpu) noexcept;

// New threads inherit the mask: a worker must not run the process's signal handlers (Python's
// Ctrl-C would otherwise interrupt a thread that cannot act on it).
class BlockSignals {
 public:
  BlockSignals() noexcept;
  ~BlockSignals();
  BlockSignals(const BlockSignals&) = delete;
  BlockSignals& operator=(const BlockSignals&) = delete;

 private:
  sigset_t saved_;
};

}  // namespace ktrt
