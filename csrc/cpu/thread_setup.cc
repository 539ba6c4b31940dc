#include "cpu/thread_setup.h"

#include <pthread.h>
#include <sched.h>

#include <cstddef>
#include <memory>

namespace ktrt {

void pin_current_thread(int cpu) noexcept {
  if (cpu < 0) return;
  const auto release = [](cpu_set_t* set) { CPU_FREE(set); };
  const std::unique_ptr<cpu_set_t, decltype(release)> mask(CPU_ALLOC(cpu + 1), release);
  if (!mask) return;
  const std::size_t bytes = CPU_ALLOC_SIZE(cpu + 1);
  CPU_ZERO_S(bytes, mask.get());
  CPU_SET_S(cpu, bytes, mask.get());
  (void)pthread_setaffinity_np(pthread_self(), bytes, mask.get());
}

BlockSignals::BlockSignals() noexcept {
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &saved_);
}

BlockSignals::~BlockSignals() { pthread_sigmask(SIG_SETMASK, &saved_, nullptr); }

}  // namespace ktrt
