// Addresses of a device that never move, of which only what is committed has memory.
#pragma once

#include <unistd.h>

#include <cstddef>
#include <string>
#include <vector>

#include "cuda/cuda_driver.h"

namespace ktrt {

// Not for several threads at once; each call may come from another one.
class DeviceRegion {
 public:
  // Reserves addresses for at least `bytes` on the device of the current context. Throws
  // std::runtime_error: no driver, no context, no virtual memory, no room for that many addresses.
  DeviceRegion(std::size_t bytes, const std::string& driver);
  // Waits for the device before its memory goes.
  ~DeviceRegion();
  DeviceRegion(const DeviceRegion&) = delete;
  DeviceRegion& operator=(const DeviceRegion&) = delete;

  CuDevicePtr address() const { return address_; }
  std::size_t bytes() const { return mapped_.size() * granularity_; }
  // Memory comes and goes in multiples of it: 2 MB.
  std::size_t granularity() const { return granularity_; }
  std::size_t committed_bytes() const { return count_ * granularity_; }

  // Gives bytes `first` … `end` - 1 and the rest of their granules memory, which holds anything,
  // as far as they have none; returns how many bytes got some. Throws std::runtime_error (out of
  // memory, say) with nothing changed; std::invalid_argument: not a range of the region.
  std::size_t commit(std::size_t first, std::size_t end);
  // Takes the memory of all granules that lie wholly in bytes `first` … `end` - 1, after waiting
  // for the device if there are any; returns how many bytes had some.
  std::size_t decommit(std::size_t first, std::size_t end);

 private:
  struct Run {
    std::size_t first, end;  // granules
  };
  CuMemoryProp prop() const;
  void check_range(std::size_t first, std::size_t end) const;
  // Runs of granules of [first, end) that are mapped, or are not.
  std::vector<Run> runs(std::size_t first, std::size_t end, bool mapped) const;
  void map(Run run);
  std::size_t unmap(Run run) noexcept;
  CuDevicePtr at(std::size_t granule) const { return address_ + granule * granularity_; }

  CudaDriver driver_;
  CuDevice device_;
  pid_t owner_ = getpid();
  CuDevicePtr address_ = 0;
  std::size_t granularity_ = 0;
  std::size_t count_ = 0;  // of mapped granules
  std::vector<bool> mapped_;
};

}  // namespace ktrt
