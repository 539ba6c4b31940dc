#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/check.h"
#include "bindings/owned.h"
#include "bindings/register.h"
#include "bindings/tensor_arg.h"
#include "linear/dense_linear.h"
#include "linear/packed_linear.h"
#include "linear/row_products.h"

namespace ktrt {

namespace py = pybind11;

namespace {

std::optional<TensorView> view_of(const std::optional<TensorArg>& arg) {
  return arg ? std::optional<TensorView>(arg->view()) : std::nullopt;
}

// A linear layer and the array that holds its weight.
struct HeldLinear {
  HeldLinear(std::shared_ptr<Engine> engine, const py::object& array, const py::object& bias)
      : weight(array, "weight"),
        linear(std::move(engine), weight.view(), view_of(optional_tensor(bias, "bias"))) {}

  const TensorArg weight;
  DenseLinear linear;
};

DenseLinear& linear_of(HeldLinear& held) { return held.linear; }
PackedLinear& linear_of(PackedLinear& linear) { return linear; }

std::shared_ptr<PackedLinear> pack_linear(std::shared_ptr<Engine> engine, const py::object& weight,
                                          const py::object& bias) {
  const TensorArg weight_arg(weight, "weight");
  const auto bias_arg = optional_tensor(bias, "bias");
  const py::gil_scoped_release release;
  return make_owned<PackedLinear>(std::move(engine), weight_arg.view(), view_of(bias_arg));
}

std::shared_ptr<PackedLinear> pack_codes(std::shared_ptr<Engine> engine,
                                         const std::string& weight_format, const py::object& codes,
                                         const py::object& scales, std::int64_t in_features,
                                         const py::object& bias) {
  const TensorArg codes_arg(codes, "codes");
  const TensorArg scales_arg(scales, "scales");
  const auto bias_arg = optional_tensor(bias, "bias");
  const py::gil_scoped_release release;
  return make_owned<PackedLinear>(std::move(engine), parse_format(weight_format),
                                  CodedSource{codes_arg.view(), scales_arg.view()}, in_features,
                                  view_of(bias_arg));
}

// Python's data_ptr().
template <class Value>
Value* address(std::uintptr_t value, const char* name) {
  KTRT_CHECK(value % sizeof(Value) == 0,
             name << " starts at " << value << ", expected a multiple of " << sizeof(Value));
  return reinterpret_cast<Value*>(value);  // NOLINT
}

template <class Linear>
void load_lora(Linear& linear, int number, const py::object& a, const py::object& b) {
  if (a.is_none() && b.is_none()) {
    const py::gil_scoped_release release;
    return linear_of(linear).load_empty_lora(number);
  }
  const TensorArg lora_a(a, "a");
  const TensorArg lora_b(b, "b");
  const py::gil_scoped_release release;
  linear_of(linear).load_lora(number, lora_a.view(), lora_b.view());
}

template <class Linear>
void activate_loras(Linear& linear, const std::vector<int>& ids,
                    const std::vector<float>& weights) {
  const py::gil_scoped_release release;
  linear_of(linear).activate_loras(ids, weights);
}

template <class Linear>
void forward(Linear& linear, std::uintptr_t x, std::int64_t x_count, std::uintptr_t out,
             std::int64_t out_count, std::uintptr_t adapter_ids, std::int64_t adapter_count) {
  const auto* in = address<const std::uint16_t>(x, "x");
  auto* result = address<std::uint16_t>(out, "out");
  const AdapterIds adapters{address<const std::int32_t>(adapter_ids, "adapter_ids"), adapter_count};
  const py::gil_scoped_release release;
  linear_of(linear).forward(in, x_count, result, out_count, adapters);
}

template <class Value>
void multiply(RowProducts& products, std::uintptr_t x, std::int64_t x_count, std::uintptr_t weight,
              std::int64_t weight_count, std::uintptr_t bias, std::uintptr_t out,
              std::int64_t out_count, std::int64_t in) {
  const RowProduct<Value> product{address<const Value>(x, "x"),
                                  x_count,
                                  address<const Value>(weight, "weight"),
                                  weight_count,
                                  address<const Value>(bias, "bias"),
                                  address<Value>(out, "out"),
                                  out_count,
                                  in};
  const py::gil_scoped_release release;
  products.multiply(product);
}

// Methods that both kinds of linears have.
template <class Linear>
void define_common(py::class_<Linear, std::shared_ptr<Linear>>& type) {
  using Underlying = std::remove_reference_t<decltype(linear_of(std::declval<Linear&>()))>;
  type.def_property_readonly_static("max_rank",
                                    [](const py::object&) { return Underlying::kMaxRank; })
      .def_property_readonly("in_features",
                             [](Linear& linear) { return linear_of(linear).in_features(); })
      .def_property_readonly("out_features",
                             [](Linear& linear) { return linear_of(linear).out_features(); })
      .def("load_lora", &load_lora<Linear>, py::arg("number"), py::arg("a") = py::none(),
           py::arg("b") = py::none())
      .def(
          "unload_lora", [](Linear& linear, int number) { linear_of(linear).unload_lora(number); },
          py::arg("number"), py::call_guard<py::gil_scoped_release>())
      .def("activate_loras", &activate_loras<Linear>, py::arg("ids"), py::arg("weights"))
      .def_property_readonly("lora_bytes",
                             [](Linear& linear) { return linear_of(linear).lora_bytes(); })
      .def("forward", &forward<Linear>, py::arg("x"), py::arg("x_count"), py::arg("out"),
           py::arg("out_count"), py::arg("adapter_ids") = 0, py::arg("adapter_count") = 0);
}

}  // namespace

void register_dense(py::module_& module) {
  py::class_<HeldLinear, std::shared_ptr<HeldLinear>> dense(module, "DenseLinear");
  dense.def(py::init([](std::shared_ptr<Engine> engine, const py::object& weight,
                        const py::object& bias) {
              return make_owned<HeldLinear>(std::move(engine), weight, bias);
            }),
            py::arg("engine").none(false), py::arg("weight"), py::arg("bias") = py::none());
  define_common(dense);

  py::class_<PackedLinear, std::shared_ptr<PackedLinear>> packed(module, "PackedLinear");
  packed.def(py::init(&pack_linear), py::arg("engine").none(false), py::arg("weight"),
             py::arg("bias") = py::none());
  packed.def_static("of_codes", &pack_codes, py::arg("engine").none(false),
                    py::arg("weight_format"), py::arg("codes"), py::arg("scales"),
                    py::arg("in_features"), py::arg("bias") = py::none());
  define_common(packed);
  packed.def_property_readonly("packed_bytes", &PackedLinear::packed_bytes)
      .def("kernel_name", &PackedLinear::kernel_name, py::arg("rows"));

  py::class_<RowProducts, std::shared_ptr<RowProducts>> products(module, "RowProducts");
  products.def(py::init([](std::shared_ptr<Engine> engine) {
                 return make_owned<RowProducts>(std::move(engine));
               }),
               py::arg("engine").none(false));
  const auto define = [&](const char* name, auto function) {
    products.def(name, function, py::arg("x"), py::arg("x_count"), py::arg("weight"),
                 py::arg("weight_count"), py::arg("bias"), py::arg("out"), py::arg("out_count"),
                 py::arg("in_features"));
  };
  define("multiply_bf16", &multiply<std::uint16_t>);
  define("multiply_f32", &multiply<float>);
}

}  // namespace ktrt
