// The few functions of the CUDA driver that the hand-off and device memory call, found at run time:
// nothing here needs CUDA to build or to be imported.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace ktrt {

// The driver's C types, of which no more is used than their size.
using CuResult = int;
using CuDevice = int;
using CuDevicePtr = std::uint64_t;
using CuContext = struct CuContextHandle*;
using CuStream = struct CuStreamHandle*;
using CuGraph = struct CuGraphHandle*;
using CuHostFn = void (*)(void* user_data);
using CuMemory = std::uint64_t;  // physical memory

struct CuLocation {
  int type;
  int id;
};
struct CuMemoryProp {
  int type;
  int handle_types;
  CuLocation location;
  void* metadata;
  unsigned char flags[8];
};
static_assert(sizeof(CuMemoryProp) == 32, "CUmemAllocationProp");
struct CuAccess {
  CuLocation location;
  int flags;
};
static_assert(sizeof(CuAccess) == 12, "CUmemAccessDesc");

enum CuCode : CuResult {
  kCuSuccess = 0,
  kCuNotReady = 600,
};
enum CuCaptureStatus : int { kCuCaptureNone = 0, kCuCaptureActive = 1, kCuCaptureInvalidated = 2 };
// CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS: the generation of stream memory operations
// whose entry points end in _v2. There is no attribute for the 32-bit ones alone.
inline constexpr int kCuCanUseStreamMemOps = 122;
// CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
inline constexpr int kCuVirtualMemory = 102;

struct CudaApi {
  CuResult (*driver_get_version)(int* version);
  CuResult (*get_error_name)(CuResult error, const char** text);
  CuResult (*get_error_string)(CuResult error, const char** text);
  CuResult (*ctx_get_current)(CuContext* context);
  CuResult (*ctx_push_current)(CuContext context);
  CuResult (*ctx_pop_current)(CuContext* context);
  CuResult (*ctx_get_device)(CuDevice* device);
  CuResult (*ctx_synchronize)();
  CuResult (*device_get_attribute)(int* value, int attribute, CuDevice device);
  CuResult (*mem_host_alloc)(void** memory, std::size_t bytes, unsigned flags);
  CuResult (*mem_free_host)(void* memory);
  CuResult (*mem_host_get_device_pointer)(CuDevicePtr* device, void* memory, unsigned flags);
  CuResult (*memcpy_dtoh_async)(void* to, CuDevicePtr from, std::size_t bytes, CuStream stream);
  CuResult (*memcpy_htod_async)(CuDevicePtr to, const void* from, std::size_t bytes,
                                CuStream stream);
  CuResult (*launch_host_func)(CuStream stream, CuHostFn function, void* user_data);
  CuResult (*stream_query)(CuStream stream);
  CuResult (*stream_is_capturing)(CuStream stream, int* status);
  CuResult (*stream_create)(CuStream* stream, unsigned flags);
  CuResult (*stream_destroy)(CuStream stream);
  CuResult (*stream_synchronize)(CuStream stream);
  CuResult (*stream_begin_capture)(CuStream stream, int mode);
  CuResult (*stream_end_capture)(CuStream stream, CuGraph* graph);
  CuResult (*graph_destroy)(CuGraph graph);
  // Null where the driver has none.
  CuResult (*stream_write_value32)(CuStream stream, CuDevicePtr address, std::uint32_t value,
                                   unsigned flags);
  CuResult (*stream_wait_value32)(CuStream stream, CuDevicePtr address, std::uint32_t value,
                                  unsigned flags);
  // All or none.
  CuResult (*mem_granularity)(std::size_t* granularity, const CuMemoryProp* prop, int option);
  CuResult (*mem_address_reserve)(CuDevicePtr* address, std::size_t bytes, std::size_t alignment,
                                  CuDevicePtr wanted, unsigned long long flags);
  CuResult (*mem_address_free)(CuDevicePtr address, std::size_t bytes);
  CuResult (*mem_create)(CuMemory* memory, std::size_t bytes, const CuMemoryProp* prop,
                         unsigned long long flags);
  CuResult (*mem_release)(CuMemory memory);
  CuResult (*mem_map)(CuDevicePtr address, std::size_t bytes, std::size_t offset, CuMemory memory,
                      unsigned long long flags);
  CuResult (*mem_unmap)(CuDevicePtr address, std::size_t bytes);
  CuResult (*mem_set_access)(CuDevicePtr address, std::size_t bytes, const CuAccess* access,
                             std::size_t count);
};

// The driver and the context that was current when it was opened.
class CudaDriver {
 public:
  // Throws std::runtime_error: the library or an entry point is missing, the driver is too old, the
  // calling thread has no current context.
  explicit CudaDriver(const std::string& library);
  CudaDriver(const CudaDriver&) = delete;
  CudaDriver& operator=(const CudaDriver&) = delete;

  const CudaApi& api() const { return api_; }
  CuContext context() const { return context_; }
  // The context's.
  CuDevice device() const;
  // 0 where the driver does not know the attribute.
  int device_attribute(int attribute) const;
  // Whether addresses can be reserved without memory, and memory be mapped to them later.
  bool has_virtual_memory() const;

  // "cuStreamQuery: CUDA_ERROR_ILLEGAL_ADDRESS (an illegal memory access was encountered)"
  std::string describe(CuResult result, const char* function) const;
  // Throws std::runtime_error with that text unless `result` is success.
  void check(CuResult result, const char* function) const;

 private:
  void load(void* library, const std::string& path);

  CudaApi api_{};
  CuContext context_ = nullptr;
};

// Makes the driver's context current for the time of a scope: the caller may be any thread.
class CurrentContext {
 public:
  explicit CurrentContext(const CudaDriver& driver);
  ~CurrentContext();
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  const CudaDriver& driver_;
};

}  // namespace ktrt
