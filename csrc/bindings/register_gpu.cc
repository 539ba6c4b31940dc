#include <pybind11/stl.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "bindings/owned.h"
#include "bindings/register.h"
#include "cuda/device_region.h"
#include "cuda/gpu_handoff.h"

namespace ktrt {

namespace py = pybind11;

namespace {

using Released = py::call_guard<py::gil_scoped_release>;

// Hand-offs that the interpreter's end must close: the driver unmaps their memory some time after
// it, and their threads look at that memory. Guarded by the GIL.
std::vector<std::weak_ptr<GpuHandoff>>& open_handoffs() {
  static auto* handoffs = new std::vector<std::weak_ptr<GpuHandoff>>;
  return *handoffs;
}

void close_all() {
  const auto handoffs = std::exchange(open_handoffs(), {});
  const py::gil_scoped_release release;
  for (const auto& weak : handoffs) {
    if (const auto handoff = weak.lock()) handoff->close();
  }
}

void close_at_exit(const std::shared_ptr<GpuHandoff>& handoff) {
  auto& handoffs = open_handoffs();
  if (handoffs.empty()) {
    py::module_::import("atexit").attr("register")(py::cpp_function(&close_all));
  }
  std::erase_if(handoffs, [](const auto& weak) { return weak.expired(); });
  handoffs.push_back(handoff);
}

std::shared_ptr<GpuHandoff> make_handoff(std::shared_ptr<Engine> engine, double timeout,
                                         const std::string& driver, const std::string& mechanism) {
  constexpr double kLongest = 1e6;
  KTRT_CHECK(timeout > 0.0 && timeout <= kLongest,
             "timeout is " << timeout << " s, expected more than 0 and at most " << kLongest);
  const auto nanoseconds =
      std::chrono::nanoseconds(static_cast<std::int64_t>(std::ceil(timeout * 1e9)));
  const auto wanted = parse_mechanism(mechanism);
  std::shared_ptr<GpuHandoff> handoff;
  {
    const py::gil_scoped_release release;
    handoff = make_owned<GpuHandoff>(std::move(engine), nanoseconds, driver, wanted);
  }
  close_at_exit(handoff);
  return handoff;
}

DType parse_float_dtype(const std::string& name) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBfloat16}) {
    if (name == name_of(dtype)) return dtype;
  }
  KTRT_CHECK(false, "dtype is '" << name << "', expected 'float32', 'float16' or 'bfloat16'");
  return DType::kFloat32;
}

int add_slot(GpuHandoff& handoff, std::shared_ptr<MoeLayer> layer, int tokens, int top_k,
             const std::string& dtype, const std::string& name, bool adapters) {
  return handoff.add_slot(std::move(layer), tokens, top_k, parse_float_dtype(dtype), name,
                          adapters);
}

CuStream stream_of(std::uintptr_t handle) { return reinterpret_cast<CuStream>(handle); }

void submit(GpuHandoff& handoff, int slot, std::uintptr_t stream, CuDevicePtr hidden_states,
            CuDevicePtr expert_ids, CuDevicePtr routing_weights, CuDevicePtr adapter_ids) {
  handoff.submit(slot, stream_of(stream), hidden_states, expert_ids, routing_weights, adapter_ids);
}

void wait(GpuHandoff& handoff, int slot, std::uintptr_t stream, CuDevicePtr out) {
  handoff.wait(slot, stream_of(stream), out);
}

void synchronize(GpuHandoff& handoff, std::uintptr_t stream) {
  handoff.synchronize(stream_of(stream), [] {
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  });
}

}  // namespace

void register_gpu(py::module_& module) {
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const HandoffTimeout& error) {
      PyErr_SetString(PyExc_TimeoutError, error.what());
    }
  });
  py::class_<GpuHandoff, std::shared_ptr<GpuHandoff>>(module, "GpuHandoff")
      .def(py::init(&make_handoff), py::arg("engine").none(false), py::kw_only(),
           py::arg("timeout") = 30.0, py::arg("driver") = "libcuda.so.1",
           py::arg("mechanism") = "auto")
      .def_property_readonly("closed", &GpuHandoff::closed)
      .def_property_readonly(
          "mechanism", [](const GpuHandoff& h) { return std::string(name_of(h.mechanism())); })
      .def_property_readonly("pinned_bytes",
                             py::cpp_function(&GpuHandoff::pinned_bytes, Released()))
      .def("add_slot", &add_slot, py::arg("layer").none(false), py::kw_only(), py::arg("tokens"),
           py::arg("top_k"), py::arg("dtype"), py::arg("name") = "", py::arg("adapters") = false,
           Released())
      .def("submit", &submit, py::arg("slot"), py::arg("stream"), py::arg("hidden_states"),
           py::arg("expert_ids"), py::arg("routing_weights"), py::arg("adapter_ids") = 0,
           Released())
      .def("wait", &wait, py::arg("slot"), py::arg("stream"), py::arg("out"), Released())
      .def("expect", &GpuHandoff::expect, py::arg("slots"), Released())
      .def("synchronize", &synchronize, py::arg("stream"), Released())
      .def("close", &GpuHandoff::close, Released());
  py::class_<DeviceRegion, std::shared_ptr<DeviceRegion>>(module, "DeviceRegion")
      .def(py::init([](std::size_t size, const std::string& driver) {
             const py::gil_scoped_release release;
             return make_owned<DeviceRegion>(size, driver);
           }),
           py::arg("size"), py::kw_only(), py::arg("driver") = "libcuda.so.1")
      .def_property_readonly("address", &DeviceRegion::address)
      .def_property_readonly("nbytes", &DeviceRegion::bytes)
      .def_property_readonly("granularity", &DeviceRegion::granularity)
      .def_property_readonly("committed_bytes", &DeviceRegion::committed_bytes)
      .def("commit", &DeviceRegion::commit, py::arg("first"), py::arg("end"), Released())
      .def("decommit", &DeviceRegion::decommit, py::arg("first"), py::arg("end"), Released())
      .def_property_readonly("__cuda_array_interface__", [](const DeviceRegion& region) {
        py::dict interface;
        interface["shape"] = py::make_tuple(region.bytes());
        interface["typestr"] = "|u1";
        interface["data"] = py::make_tuple(region.address(), false);
        interface["version"] = 3;
        return interface;
      });
}

}  // namespace ktrt
