#include "cuda/device_region.h"

#include <algorithm>
#include <stdexcept>

#include "base/check.h"

namespace ktrt {
namespace {

constexpr int kPinned = 1;     // CU_MEM_ALLOCATION_TYPE_PINNED
constexpr int kDevice = 1;     // CU_MEM_LOCATION_TYPE_DEVICE
constexpr int kMinimum = 0;    // CU_MEM_ALLOC_GRANULARITY_MINIMUM
constexpr int kReadWrite = 3;  // CU_MEM_ACCESS_FLAGS_PROT_READWRITE

}  // namespace

DeviceRegion::DeviceRegion(std::size_t bytes, const std::string& driver)
    : driver_(driver), device_(driver_.device()) {
  KTRT_CHECK(bytes > 0, "a region needs bytes");
  if (!driver_.has_virtual_memory()) {
    throw std::runtime_error("the CUDA driver or the device has no virtual memory management");
  }
  const CurrentContext current(driver_);
  const CuMemoryProp wanted = prop();
  driver_.check(driver_.api().mem_granularity(&granularity_, &wanted, kMinimum),
                "cuMemGetAllocationGranularity");
  const std::size_t granules = (bytes + granularity_ - 1) / granularity_;
  driver_.check(driver_.api().mem_address_reserve(&address_, granules * granularity_, 0, 0, 0),
                "cuMemAddressReserve");
  mapped_.assign(granules, false);
}

DeviceRegion::~DeviceRegion() {
  // After fork() the device is the parent's. Errors: the driver may have ended before.
  if (getpid() != owner_) return;
  try {
    const CurrentContext current(driver_);
    if (count_ > 0) (void)driver_.api().ctx_synchronize();
    for (const Run run : runs(0, mapped_.size(), true)) unmap(run);
    (void)driver_.api().mem_address_free(address_, bytes());
  } catch (const std::runtime_error&) {
  }
}

CuMemoryProp DeviceRegion::prop() const { return {kPinned, 0, {kDevice, device_}, nullptr, {}}; }

void DeviceRegion::check_range(std::size_t first, std::size_t end) const {
  KTRT_CHECK(first <= end && end <= bytes(),
             "bytes " << first << " to " << end << " of a region of " << bytes());
}

std::vector<DeviceRegion::Run> DeviceRegion::runs(std::size_t first, std::size_t end,
                                                  bool mapped) const {
  std::vector<Run> found;
  for (std::size_t at = first; at < end; ++at) {
    if (mapped_[at] != mapped) continue;
    if (!found.empty() && found.back().end == at) {
      ++found.back().end;
    } else {
      found.push_back({at, at + 1});
    }
  }
  return found;
}

std::size_t DeviceRegion::commit(std::size_t first, std::size_t end) {
  check_range(first, end);
  if (first == end) return 0;
  const std::vector<Run> wanted =
      runs(first / granularity_, (end + granularity_ - 1) / granularity_, false);
  if (wanted.empty()) return 0;
  const CurrentContext current(driver_);
  std::size_t bytes = 0;
  for (std::size_t done = 0; done < wanted.size(); ++done) {
    try {
      map(wanted[done]);
    } catch (...) {
      for (std::size_t i = 0; i < done; ++i) unmap(wanted[i]);
      throw;
    }
    bytes += (wanted[done].end - wanted[done].first) * granularity_;
  }
  return bytes;
}

void DeviceRegion::map(Run run) {
  const CudaApi& api = driver_.api();
  const CuMemoryProp wanted = prop();
  const CuAccess access{{kDevice, device_}, kReadWrite};
  CuResult result = kCuSuccess;
  const char* function = "cuMemCreate";
  std::size_t done = run.first;
  for (; done < run.end; ++done) {
    // One by one: a mapping is taken back as a whole.
    CuMemory memory = 0;
    function = "cuMemCreate";
    if ((result = api.mem_create(&memory, granularity_, &wanted, 0)) != kCuSuccess) break;
    function = "cuMemMap";
    result = api.mem_map(at(done), granularity_, 0, memory, 0);
    (void)api.mem_release(memory);  // once nothing maps it
    if (result != kCuSuccess) break;
    mapped_[done] = true;
    ++count_;
  }
  if (result == kCuSuccess) {
    function = "cuMemSetAccess";
    result = api.mem_set_access(at(run.first), (run.end - run.first) * granularity_, &access, 1);
  }
  if (result == kCuSuccess) return;
  unmap({run.first, done});
  driver_.check(result, function);
}

std::size_t DeviceRegion::unmap(Run run) noexcept {
  for (std::size_t granule = run.first; granule < run.end; ++granule) {
    (void)driver_.api().mem_unmap(at(granule), granularity_);
    mapped_[granule] = false;
    --count_;
  }
  return (run.end - run.first) * granularity_;
}

std::size_t DeviceRegion::decommit(std::size_t first, std::size_t end) {
  check_range(first, end);
  const std::size_t from = (first + granularity_ - 1) / granularity_;
  const std::vector<Run> held = runs(from, std::max(from, end / granularity_), true);
  if (held.empty()) return 0;
  const CurrentContext current(driver_);
  driver_.check(driver_.api().ctx_synchronize(), "cuCtxSynchronize");
  std::size_t bytes = 0;
  for (const Run run : held) bytes += unmap(run);
  return bytes;
}

}  // namespace ktrt
