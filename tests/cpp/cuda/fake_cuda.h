// The stand-in for the CUDA driver as tests use it: streams, device arrays, graphs, faults.
#pragma once

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/cuda_driver.h"

namespace ktrt::testing {

class FakeCuda {
 public:
  explicit FakeCuda(const std::string& path = FAKE_CUDA_LIBRARY) : path_(path) {
    library_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library_ == nullptr) throw std::runtime_error(dlerror());
    call<void, int>("fake_cuda_make_current", 1);
  }
  // Tests end with all streams drained.
  ~FakeCuda() {
    EXPECT_EQ((call<int>("fake_cuda_reset")), 0) << "a stream was left waiting";
    call<void, int>("fake_cuda_make_current", 0);
  }
  FakeCuda(const FakeCuda&) = delete;
  FakeCuda& operator=(const FakeCuda&) = delete;

  const std::string& path() const { return path_; }

  void make_current(bool current) { call<void, int>("fake_cuda_make_current", current ? 1 : 0); }
  void set(const char* name, int value) {
    call<void, const char*, int>("fake_cuda_set", name, value);
  }
  void set_delay(int microseconds) { call<void, int>("fake_cuda_set_delay", microseconds); }
  void fail(const char* function, int nth, int code) {
    call<void, const char*, int, int>("fake_cuda_fail", function, nth, code);
  }
  int pinned_blocks() { return call<int>("fake_cuda_pinned_blocks"); }
  int granules() { return call<int>("fake_cuda_granules"); }
  int violations() { return call<int>("fake_cuda_violations"); }

  CuStream new_stream() {
    CuStream stream = nullptr;
    check(call<int, CuStream*, unsigned>("cuStreamCreate", &stream, 0));
    return stream;
  }
  void destroy(CuStream stream) { check(call<int, CuStream>("cuStreamDestroy_v2", stream)); }
  bool drained(CuStream stream) {
    const int result = call<int, CuStream>("cuStreamQuery", stream);
    if (result != kCuNotReady) check(result);
    return result == kCuSuccess;
  }

  template <class T>
  CuDevicePtr upload(const std::vector<T>& values) {
    const CuDevicePtr device = allocate(values.size() * sizeof(T));
    overwrite(device, values);
    return device;
  }
  CuDevicePtr allocate(std::size_t bytes) {
    CuDevicePtr device = 0;
    check(call<int, CuDevicePtr*, std::size_t>("cuMemAlloc_v2", &device, bytes));
    return device;
  }
  template <class T>
  std::vector<T> download(CuDevicePtr device, std::size_t count) {
    std::vector<T> values(count);
    check(call<int, void*, CuDevicePtr, std::size_t>("cuMemcpyDtoH_v2", values.data(), device,
                                                     count * sizeof(T)));
    return values;
  }
  template <class T>
  void overwrite(CuDevicePtr device, const std::vector<T>& values) {
    check(call<int, CuDevicePtr, const void*, std::size_t>("cuMemcpyHtoD_v2", device, values.data(),
                                                           values.size() * sizeof(T)));
  }

  void begin_capture(CuStream stream) {
    check(call<int, CuStream, int>("cuStreamBeginCapture_v2", stream, 0));
  }
  // Null where the capture was invalidated.
  void* end_capture(CuStream stream) {
    void* graph = nullptr;
    if (call<int, CuStream, void**>("cuStreamEndCapture", stream, &graph) != kCuSuccess) {
      return nullptr;
    }
    void* exec = nullptr;
    check(call<int, void**, void*, unsigned long long>("cuGraphInstantiateWithFlags", &exec, graph,
                                                       0));
    check(call<int, void*>("cuGraphDestroy", graph));
    return exec;
  }
  void launch(void* exec, CuStream stream) {
    check(call<int, void*, CuStream>("cuGraphLaunch", exec, stream));
  }
  void destroy_graph(void* exec) { check(call<int, void*>("cuGraphExecDestroy", exec)); }

 private:
  template <class Result, class... Args>
  Result call(const char* name, Args... args) {
    auto* function = reinterpret_cast<Result (*)(Args...)>(dlsym(library_, name));
    if (function == nullptr) throw std::runtime_error(std::string("no ") + name);
    return function(args...);
  }
  static void check(int result) {
    if (result != kCuSuccess) throw std::runtime_error("the stand-in: " + std::to_string(result));
  }

  const std::string path_;
  void* library_;
};

}  // namespace ktrt::testing
