#include "cuda/pinned_memory.h"

#include <cstring>

#include "base/aligned_buffer.h"

namespace ktrt {
namespace {

constexpr std::size_t kWordBlockBytes = 4096;
// CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP
constexpr unsigned kPortableMapped = 1u | 2u;

}  // namespace

PinnedBlock::PinnedBlock(const CudaDriver& driver, std::size_t bytes)
    : driver_(driver), bytes_(bytes) {
  void* memory = nullptr;
  driver.check(driver.api().mem_host_alloc(&memory, bytes, kPortableMapped), "cuMemHostAlloc");
  host_ = static_cast<std::byte*>(memory);
  const CuResult result = driver.api().mem_host_get_device_pointer(&device_, memory, 0);
  if (result != kCuSuccess) (void)driver.api().mem_free_host(memory);
  driver.check(result, "cuMemHostGetDevicePointer");
  // Zeros, because a stream copies them back where a forward was skipped: finite numbers.
  std::memset(memory, 0, bytes);
}

PinnedBlock::~PinnedBlock() {
  if (host_ != nullptr) (void)driver_.api().mem_free_host(host_);
}

PinnedMemory::Word PinnedMemory::new_word() {
  if (words_.empty() || used_ == kWordBlockBytes) {
    words_.push_back(std::make_unique<PinnedBlock>(driver_, kWordBlockBytes));
    used_ = 0;
  }
  const PinnedBlock& block = *words_.back();
  const Word word{reinterpret_cast<std::uint32_t*>(block.host() + used_), block.device() + used_};
  used_ += kCacheLine;
  return word;
}

std::byte* PinnedMemory::shared_buffer(std::size_t bytes) {
  for (const auto& block : buffers_) {
    if (block->bytes() >= bytes) return block->host();
  }
  buffers_.push_back(std::make_unique<PinnedBlock>(driver_, bytes));
  return buffers_.back()->host();
}

std::size_t PinnedMemory::bytes() const {
  std::size_t sum = 0;
  for (const auto& block : words_) sum += block->bytes();
  for (const auto& block : buffers_) sum += block->bytes();
  return sum;
}

void PinnedMemory::release() noexcept {
  words_.clear();
  buffers_.clear();
}

void PinnedMemory::leak() noexcept {
  for (const auto& block : words_) block->leak();
  for (const auto& block : buffers_) block->leak();
  release();
}

}  // namespace ktrt
