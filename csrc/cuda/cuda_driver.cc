#include "cuda/cuda_driver.h"

#include <dlfcn.h>

#include <stdexcept>

namespace ktrt {
namespace {

// CUDA 12, the first whose stream memory operations can be captured into a graph everywhere.
constexpr int kOldestVersion = 12000;

template <class F>
bool find(void* library, F*& function, const char* name) {
  function = reinterpret_cast<F*>(dlsym(library, name));
  return function != nullptr;
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

CudaDriver::CudaDriver(const std::string& path) {
  // Never closed: the driver runs threads.
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    throw std::runtime_error("the CUDA driver " + path + " cannot be opened (" +
                             (reason != nullptr ? reason : "no reason given") +
                             "): install the NVIDIA driver, or run without the hand-off");
  }
  load(library, path);
  int version = 0;
  check(api_.driver_get_version(&version), "cuDriverGetVersion");
  if (version < kOldestVersion) {
    throw std::runtime_error("the CUDA driver " + path + " supports CUDA " + version_text(version) +
                             ", at least " + version_text(kOldestVersion) +
                             " is needed: update the NVIDIA driver");
  }
  if (api_.ctx_get_current(&context_) != kCuSuccess || context_ == nullptr) {
    throw std::runtime_error(
        "the calling thread has no current CUDA context: use the device first "
        "(torch.cuda.set_device and one operation on it)");
  }
}

void CudaDriver::load(void* library, const std::string& path) {
  const char* missing = nullptr;
  const auto need = [&](auto*& function, const char* name) {
    if (!find(library, function, name) && missing == nullptr) missing = name;
  };
  need(api_.driver_get_version, "cuDriverGetVersion");
  need(api_.get_error_name, "cuGetErrorName");
  need(api_.get_error_string, "cuGetErrorString");
  need(api_.ctx_get_current, "cuCtxGetCurrent");
  need(api_.ctx_push_current, "cuCtxPushCurrent_v2");
  need(api_.ctx_pop_current, "cuCtxPopCurrent_v2");
  need(api_.ctx_get_device, "cuCtxGetDevice");
  need(api_.ctx_synchronize, "cuCtxSynchronize");
  need(api_.device_get_attribute, "cuDeviceGetAttribute");
  need(api_.mem_host_alloc, "cuMemHostAlloc");
  need(api_.mem_free_host, "cuMemFreeHost");
  need(api_.mem_host_get_device_pointer, "cuMemHostGetDevicePointer_v2");
  need(api_.memcpy_dtoh_async, "cuMemcpyDtoHAsync_v2");
  need(api_.memcpy_htod_async, "cuMemcpyHtoDAsync_v2");
  need(api_.launch_host_func, "cuLaunchHostFunc");
  need(api_.stream_query, "cuStreamQuery");
  need(api_.stream_is_capturing, "cuStreamIsCapturing");
  need(api_.stream_create, "cuStreamCreate");
  need(api_.stream_destroy, "cuStreamDestroy_v2");
  need(api_.stream_synchronize, "cuStreamSynchronize");
  need(api_.stream_begin_capture, "cuStreamBeginCapture_v2");
  need(api_.stream_end_capture, "cuStreamEndCapture");
  need(api_.graph_destroy, "cuGraphDestroy");
  if (missing != nullptr) {
    throw std::runtime_error("the CUDA driver " + path + " has no " + missing +
                             ": update the NVIDIA driver");
  }
  find(library, api_.stream_write_value32, "cuStreamWriteValue32_v2");
  find(library, api_.stream_wait_value32, "cuStreamWaitValue32_v2");
  const bool all = find(library, api_.mem_address_reserve, "cuMemAddressReserve") &&
                   find(library, api_.mem_address_free, "cuMemAddressFree") &&
                   find(library, api_.mem_create, "cuMemCreate") &&
                   find(library, api_.mem_release, "cuMemRelease") &&
                   find(library, api_.mem_map, "cuMemMap") &&
                   find(library, api_.mem_unmap, "cuMemUnmap") &&
                   find(library, api_.mem_set_access, "cuMemSetAccess");
  if (!all || !find(library, api_.mem_granularity, "cuMemGetAllocationGranularity")) {
    api_.mem_granularity = nullptr;
  }
}

CuDevice CudaDriver::device() const {
  const CurrentContext current(*this);
  CuDevice device = 0;
  check(api_.ctx_get_device(&device), "cuCtxGetDevice");
  return device;
}

int CudaDriver::device_attribute(int attribute) const {
  int value = 0;
  return api_.device_get_attribute(&value, attribute, device()) == kCuSuccess ? value : 0;
}

bool CudaDriver::has_virtual_memory() const {
  return api_.mem_granularity != nullptr && device_attribute(kCuVirtualMemory) != 0;
}

std::string CudaDriver::describe(CuResult result, const char* function) const {
  const char* name = nullptr;
  const char* text = nullptr;
  if (api_.get_error_name(result, &name) != kCuSuccess || name == nullptr) name = "unknown error";
  if (api_.get_error_string(result, &text) != kCuSuccess || text == nullptr) text = "no text";
  return std::string(function) + ": " + name + " (" + std::to_string(result) + ", " + text + ")";
}

void CudaDriver::check(CuResult result, const char* function) const {
  if (result != kCuSuccess) throw std::runtime_error(describe(result, function));
}

CurrentContext::CurrentContext(const CudaDriver& driver) : driver_(driver) {
  driver.check(driver.api().ctx_push_current(driver.context()), "cuCtxPushCurrent");
}

CurrentContext::~CurrentContext() {
  CuContext popped = nullptr;
  (void)driver_.api().ctx_pop_current(&popped);
}

}  // namespace ktrt
