// The resources that the operators of one model share: threads, kernels, scratch memory, and the
// lock that serialises their use.
#pragma once

#include <cstddef>
#include <functional>
#include <mutex>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/read_probe.h"
#include "cpu/thread_pool.h"
#include "engine/scratch.h"
#include "kernels/kernel_table.h"

namespace ktrt {

class Engine {
 public:
  // Threads and scratch memory for one call, in which no other operator runs.
  class Lease {
   public:
    Lease(Engine& engine, std::unique_lock<std::mutex> held)
        : engine_(engine), held_(std::move(held)) {}

    ThreadPool& pool() const { return *engine_.pool_; }
    Scratch& scratch() const { return engine_.scratch_; }

   private:
    Engine& engine_;
    std::unique_lock<std::mutex> held_;
  };

  // Lets an operator free its memory when the engine closes: `release` is called under the lock,
  // unless the handler is destroyed before. Must not outlive the engine.
  class CloseHandler {
   public:
    CloseHandler(Engine& engine, const Lease& lease, std::function<void()> release);
    ~CloseHandler();
    CloseHandler(const CloseHandler&) = delete;
    CloseHandler& operator=(const CloseHandler&) = delete;

    void release() const { release_(); }

   private:
    Engine& engine_;
    const std::function<void()> release_;
  };

  // cpus[i]: where thread i runs; one thread each, the first being the caller of forward().
  // home[i]: which part of the weights is thread i's own, 0 … parts - 1, every part at least once;
  // one part per NUMA node, or one in all. `fixed_kernels`: see KernelTable. Throws
  // std::invalid_argument (also for a bad KTRT_ISA).
  Engine(const std::vector<int>& cpus, const std::vector<int>& home, int max_qlen,
         bool fixed_kernels = false);
  Engine(const std::vector<int>& cpus, int max_qlen)
      : Engine(cpus, std::vector<int>(cpus.size(), 0), max_qlen) {}
  // With kernels of the caller's choice: for tests and benchmarks.
  Engine(const std::vector<int>& cpus, const std::vector<int>& home, int max_qlen, Isa isa,
         const KernelTable& kernels);
  ~Engine() { close(); }
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  int num_threads() const { return num_threads_; }
  int parts() const { return parts_; }
  // [threads]: the part on the thread's own NUMA node.
  const std::vector<int>& home() const { return home_; }
  // Tokens of a forward of MoE layers, at most.
  int max_qlen() const { return max_qlen_; }
  // Where the caller of forward() should run; nobody pins it.
  int caller_cpu() const { return caller_cpu_; }
  Isa isa() const { return isa_; }
  const KernelTable& kernels() const { return kernels_; }
  // Whether a row's bits do not depend on the number of rows: always below AMX.
  bool fixed_kernels() const { return kernels_.fixed; }
  // Also true in a process that fork() made: the engine is of no use there.
  bool closed() const;
  // Scratch memory that the operators so far need.
  std::size_t workspace_bytes() const;

  // Waits for the call that runs. Operators hold a lease while they use the threads, the scratch
  // memory or their own weights; it is taken once per call, never inside one. Throws
  // std::runtime_error once closed, and as lock() does.
  Lease lease();
  // The lock alone, for questions that a closed engine answers too. Throws std::runtime_error in a
  // process that fork() made: a thread of the parent may have held the mutex, and nobody would ever
  // release the copy.
  std::unique_lock<std::mutex> lock() const;

  // Seconds that one pass of the probe takes on the engine's threads.
  double run_probe(const ReadProbe& probe);

  // Stops the threads and frees scratch memory and whatever close handlers free. Idempotent; does
  // nothing in a process that fork() made, which has neither the threads nor a mutex that it could
  // wait for.
  void close();

 private:
  bool forked() const;

  const Isa isa_;
  const KernelTable kernels_;
  const int num_threads_;
  const int max_qlen_;
  const int caller_cpu_;
  const std::vector<int> home_;
  const int parts_;
  const int process_;  // threads do not survive a fork
  mutable std::mutex mutex_;
  std::optional<ThreadPool> pool_;
  Scratch scratch_;
  std::set<const CloseHandler*> close_handlers_;
};

}  // namespace ktrt
