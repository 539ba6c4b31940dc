#include "engine/scratch.h"

#include <algorithm>

namespace ktrt {

void Scratch::reserve(std::size_t thread_bytes, std::size_t shared_bytes) {
  for (AlignedBuffer& memory : thread_memory_) {
    if (memory.bytes() >= thread_bytes) continue;
    memory = AlignedBuffer(thread_bytes);
    ++generation_;
  }
  if (shared_memory_.bytes() >= shared_bytes) return;
  shared_memory_ = AlignedBuffer(shared_bytes);
  ++generation_;
}

std::byte* Scratch::block(std::size_t bytes) {
  if (block_.bytes() < bytes) block_ = AlignedBuffer(std::max(bytes, 2 * block_.bytes()));
  return block_.as<std::byte>();
}

std::atomic<int>* Scratch::counters(std::size_t count) {
  if (count > counter_capacity_) {
    counters_ = std::make_unique<std::atomic<int>[]>(count);
    counter_capacity_ = count;
  }
  for (std::size_t i = 0; i < count; ++i) counters_[i].store(0, std::memory_order_relaxed);
  return counters_.get();
}

std::size_t Scratch::bytes() const {
  std::size_t bytes = shared_memory_.bytes() + block_.bytes();
  for (const AlignedBuffer& memory : thread_memory_) bytes += memory.bytes();
  return bytes;
}

void Scratch::release() {
  for (AlignedBuffer& memory : thread_memory_) memory.reset();
  shared_memory_.reset();
  block_.reset();
  ++generation_;
}

}  // namespace ktrt
