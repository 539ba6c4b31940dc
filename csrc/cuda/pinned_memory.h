// Page-locked host memory that the device reads and writes, in blocks that never move: a captured
// graph keeps their addresses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cuda/cuda_driver.h"

namespace ktrt {

class PinnedBlock {
 public:
  // Zeroed. Throws std::runtime_error (out of memory, say). The context must be current here and at
  // destruction.
  PinnedBlock(const CudaDriver& driver, std::size_t bytes);
  ~PinnedBlock();
  PinnedBlock(const PinnedBlock&) = delete;
  PinnedBlock& operator=(const PinnedBlock&) = delete;

  std::byte* host() const { return host_; }
  CuDevicePtr device() const { return device_; }
  std::size_t bytes() const { return bytes_; }
  // The memory stays until the process ends.
  void leak() { host_ = nullptr; }

 private:
  const CudaDriver& driver_;
  std::byte* host_ = nullptr;
  CuDevicePtr device_ = 0;
  std::size_t bytes_;
};

class PinnedMemory {
 public:
  struct Word {
    std::uint32_t* host;
    CuDevicePtr device;
  };

  explicit PinnedMemory(const CudaDriver& driver) : driver_(driver) {}

  // A word on a separate cache line, zero.
  Word new_word();
  // At least `bytes`, shared with all slots that need as much or less.
  std::byte* shared_buffer(std::size_t bytes);

  std::size_t bytes() const;
  void release() noexcept;
  void leak() noexcept;

 private:
  const CudaDriver& driver_;
  std::vector<std::unique_ptr<PinnedBlock>> words_;
  std::size_t used_ = 0;  // bytes of the last block of words
  std::vector<std::unique_ptr<PinnedBlock>> buffers_;
};

}  // namespace ktrt
