// What the layers of one model share: threads, kernels, scratch memory.
#pragma once

#include <cstddef>
#include <mutex>
#include <optional>
#include <set>
#include <vector>

#include "base/aligned_buffer.h"
#include "cpu/isa.h"
#include "cpu/read_probe.h"
#include "cpu/thread_pool.h"
#include "kernels/kernel_table.h"
#include "moe/workspace.h"

namespace ktrt {

class DenseLinear;
class LatentAttention;
class MoeLayer;
class TokenAttention;
class PackedLinear;

class Engine {
 public:
  // cpus[i]: where thread i runs; one thread each, the first being the caller of forward().
  // home[i]: which part of the weights is thread i's own, 0 … parts - 1, every part at least once;
  // one part per NUMA node, or one in all. Throws std::invalid_argument (also for a bad KTRT_ISA).
  Engine(const std::vector<int>& cpus, const std::vector<int>& home, int max_qlen);
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
  int max_qlen() const { return workspace_.max_qlen(); }
  // Where the caller of forward() should run; nobody pins it.
  int caller_cpu() const { return caller_cpu_; }
  Isa isa() const { return isa_; }
  const KernelTable& kernels() const { return kernels_; }
  // Also in a process that fork() made: the engine is of no use there.
  bool closed() const;
  // Scratch memory that the layers so far need.
  std::size_t workspace_bytes() const;

  // Seconds that one pass of the probe takes on the engine's threads.
  double run_probe(const ReadProbe& probe);

  // Stops the threads and frees scratch memory and the weights of all layers. Idempotent; does
  // nothing in a process that fork() made, which has neither the threads nor a mutex that it could
  // wait for.
  void close();

 private:
  friend class DenseLinear;
  friend class LatentAttention;
  friend class MoeLayer;
  friend class TokenAttention;
  friend class PackedLinear;

  // The only way to the mutex. Throws std::runtime_error in a process that fork() made: a thread
  // of the parent may have held the mutex, and nobody would ever release the copy.
  std::unique_lock<std::mutex> lock() const;
  // Layers, dense too, hold the lock while they use the pool, the workspace or their own weights.
  // Throws std::runtime_error once closed.
  std::unique_lock<std::mutex> lock_open();
  bool forked() const;
  // At least `bytes` for the call that holds the lock, aligned to 64; what they held is lost.
  std::byte* scratch(std::size_t bytes);

  const Isa isa_;
  const KernelTable kernels_;
  const int num_threads_;
  const int caller_cpu_;
  const std::vector<int> home_;
  const int parts_;
  const int process_;  // threads do not survive a fork
  mutable std::mutex mutex_;
  std::optional<ThreadPool> pool_;
  Workspace workspace_;
  AlignedBuffer scratch_;  // of dense layers and attention: grows
  std::set<MoeLayer*> layers_;
};

}  // namespace ktrt
