// Scratch memory of an engine, shared by its operators. Whoever holds the engine's lock may use it;
// its contents are lost when the lock is released.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/aligned_buffer.h"

namespace ktrt {

// Bytes of a scratch row of `bytes`: a multiple of 64 that is not a multiple of 4096, or the rows
// of a register block would share one set of the L1 cache.
constexpr std::size_t scratch_stride(std::size_t bytes) {
  const std::size_t aligned = round_up(bytes, kCacheLine);
  return aligned % 4096 == 0 ? aligned + kCacheLine : aligned;
}

class Scratch {
 public:
  explicit Scratch(int num_threads) : thread_memory_(static_cast<std::size_t>(num_threads)) {}

  // Grows the memory of each thread and the memory that all threads share. An operator reserves
  // what it needs when it is constructed, so that a forward allocates nothing.
  void reserve(std::size_t thread_bytes, std::size_t shared_bytes);
  std::byte* of_thread(std::size_t thread) const { return thread_memory_[thread].as<std::byte>(); }
  std::byte* shared() const { return shared_memory_.as<std::byte>(); }
  std::size_t thread_bytes() const { return thread_memory_.front().bytes(); }
  std::size_t shared_bytes() const { return shared_memory_.bytes(); }
  // Changes whenever reserved memory moves.
  std::uint64_t generation() const { return generation_; }

  // Memory apart from the reserved one, for operators whose needs depend on the call: at least
  // `bytes`, aligned to 64.
  std::byte* block(std::size_t bytes);
  // `count` zeroed counters.
  std::atomic<int>* counters(std::size_t count);

  std::size_t bytes() const;
  void release();

 private:
  std::vector<AlignedBuffer> thread_memory_;
  AlignedBuffer shared_memory_;
  AlignedBuffer block_;
  std::uint64_t generation_ = 1;
  std::unique_ptr<std::atomic<int>[]> counters_;
  std::size_t counter_capacity_ = 0;
};

}  // namespace ktrt
