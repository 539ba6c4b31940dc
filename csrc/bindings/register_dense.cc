#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "base/check.h"
#include "bindings/register.h"
#include "bindings/tensor_arg.h"
#include "dense/dense_linear.h"

namespace ktrt {

namespace py = pybind11;

namespace {

// A linear layer and the array that holds its weight.
struct HeldLinear {
  HeldLinear(std::shared_ptr<Engine> engine, const py::object& array, const py::object& bias)
      : weight(array, "weight"), linear(std::move(engine), weight.view(), view_of(bias)) {}

  static std::optional<TensorView> view_of(const py::object& bias) {
    const auto arg = optional_tensor(bias, "bias");
    return arg ? std::optional<TensorView>(arg->view()) : std::nullopt;
  }

  const TensorArg weight;
  DenseLinear linear;
};

const std::uint16_t* address(std::uintptr_t value, const char* name) {
  KTRT_CHECK(value % sizeof(std::uint16_t) == 0, name << " starts at an odd address");
  return reinterpret_cast<const std::uint16_t*>(value);  // NOLINT: Python's data_ptr()
}

void set_lora(HeldLinear& held, const py::object& a, const py::object& b) {
  const TensorArg lora_a(a, "a");
  const TensorArg lora_b(b, "b");
  const py::gil_scoped_release release;
  held.linear.set_lora(lora_a.view(), lora_b.view());
}

void forward(HeldLinear& held, std::uintptr_t x, std::int64_t x_count, std::uintptr_t out,
             std::int64_t out_count) {
  const std::uint16_t* in = address(x, "x");
  auto* result = const_cast<std::uint16_t*>(address(out, "out"));
  const py::gil_scoped_release release;
  held.linear.forward(in, x_count, result, out_count);
}

void forward_groups(HeldLinear& held, int groups, std::uintptr_t x, std::int64_t x_count,
                    std::uintptr_t out, std::int64_t out_count) {
  const std::uint16_t* in = address(x, "x");
  auto* result = const_cast<std::uint16_t*>(address(out, "out"));
  const py::gil_scoped_release release;
  held.linear.forward_groups(groups, in, x_count, result, out_count);
}

}  // namespace

void register_dense(py::module_& module) {
  py::class_<HeldLinear>(module, "DenseLinear")
      .def(py::init<std::shared_ptr<Engine>, const py::object&, const py::object&>(),
           py::arg("engine"), py::arg("weight"), py::arg("bias") = py::none())
      .def_property_readonly("in_features",
                             [](const HeldLinear& held) { return held.linear.in_features(); })
      .def_property_readonly("out_features",
                             [](const HeldLinear& held) { return held.linear.out_features(); })
      .def("set_lora", &set_lora, py::arg("a"), py::arg("b"))
      .def(
          "clear_lora", [](HeldLinear& held) { held.linear.clear_lora(); },
          py::call_guard<py::gil_scoped_release>())
      .def("forward", &forward, py::arg("x"), py::arg("x_count"), py::arg("out"),
           py::arg("out_count"))
      .def("forward_groups", &forward_groups, py::arg("groups"), py::arg("x"), py::arg("x_count"),
           py::arg("out"), py::arg("out_count"));
}

}  // namespace ktrt
