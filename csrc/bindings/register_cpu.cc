#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "base/check.h"
#include "bindings/register.h"
#include "cpu/isa.h"
#include "cpu/topology.h"
#include "kernels/bf16_arithmetic.h"
#include "kernels/peak.h"
#include "kernels/select.h"
#include "layout/format_traits.h"

namespace ktrt {

namespace py = pybind11;

namespace {

py::dict kernels() {
  const KernelTable table = active_kernels();
  py::dict names;
  for (const FormatTraits& traits : kFormatTraits) {
    const GemmChoice& gemm = table.gemm(traits.format);
    names[traits.gemm_family] = gemm.many->name;
    names[(std::string(traits.gemm_family) + "_few_rows").c_str()] = gemm.few->name;
  }
  names["lora_shrink"] = table.shrink_for(*table.gemm(WeightFormat::kBf16).many).name;
  names["lora_shrink_few_rows"] = table.lora_shrink->name;
  names["elementwise"] = table.elementwise->name;
  names["dense_bf16"] = table.dense_bf16->name;
  names["dense_f32"] = table.dense_f32->name;
  names["attention"] = table.attention->name;
  names["linear_attention"] = select_linear_attention(active_isa(), cpu_features()).name;
  return names;
}

std::vector<std::vector<int>> numa_cpus() {
  const Topology topology = read_topology(allowed_cpus());
  std::vector<std::vector<int>> nodes;
  for (const int node : topology.nodes()) nodes.push_back(topology.cpu_ids_of_node(node));
  return nodes;
}

std::vector<std::tuple<std::string, std::string, std::string>> arithmetic_loops() {
  std::vector<std::tuple<std::string, std::string, std::string>> found;
  for (const PeakLoop* loop : peak_loops(active_isa(), cpu_features())) {
    found.emplace_back(loop->name, loop->instruction, loop->operands);
  }
  return found;
}

double arithmetic_rate(const std::string& name, double seconds) {
  KTRT_CHECK(seconds > 0 && seconds <= 60, "seconds is " << seconds << ", expected 0 to 60");
  for (const PeakLoop* loop : peak_loops(active_isa(), cpu_features())) {
    if (name == loop->name) return measure_peak(*loop, seconds);
  }
  KTRT_CHECK(false, "name is '" << name << "', expected one of arithmetic_loops()");
  return 0;
}

// A matrix's sizes as packed. Throws std::invalid_argument for sizes that no matrix has.
template <std::size_t (PackedLayout::*kSize)() const>
std::size_t with_layout(const FormatTraits& traits, int rows, int columns) {
  constexpr int kMost = 1 << 30;
  KTRT_CHECK(rows >= 1 && rows <= kMost && columns >= 1 && columns <= kMost,
             "the matrix is " << rows << " x " << columns << ", expected sizes from 1 to 2^30");
  return (PackedLayout(traits.format, rows, columns).*kSize)();
}

void register_formats(py::module_& module) {
  py::class_<FormatTraits>(module, "WeightFormat")
      .def_readonly("name", &FormatTraits::name)
      .def_readonly("kt_backend", &FormatTraits::kt_backend)
      .def_readonly("kernel_family", &FormatTraits::gemm_family)
      .def_readonly("bits", &FormatTraits::bits)
      .def_property_readonly("quantizes_rows", &FormatTraits::quantizes_rows)
      .def_property_readonly("coded", [](const FormatTraits& t) { return is_coded(t.format); })
      .def_readonly("group", &FormatTraits::group)
      .def_readonly("tile_scale_bytes", &FormatTraits::tile_scale_bytes)
      .def_readonly("block_rows", &FormatTraits::block_rows)
      .def_readonly("block_columns", &FormatTraits::block_k)
      .def_readonly("tile_columns", &FormatTraits::tile_k)
      .def("code_bytes", with_layout<&PackedLayout::code_bytes>, py::arg("rows"),
           py::arg("columns"))
      .def("scale_bytes", with_layout<&PackedLayout::scale_bytes>, py::arg("rows"),
           py::arg("columns"))
      .def("sum_bytes", with_layout<&PackedLayout::sum_bytes>, py::arg("rows"), py::arg("columns"));
  module.def(
      "weight_formats",
      [] {
        py::list formats;
        for (const FormatTraits& traits : kFormatTraits) {
          formats.append(py::cast(traits, py::return_value_policy::reference));
        }
        return formats;
      },
      "Every format that the engine keeps weights in.");
}

}  // namespace

void register_cpu(py::module_& module) {
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const IsaError& error) {
      // A setting of the user's, which every command reports as such.
      py::set_error(py::module_::import("ktrt.errors").attr("ConfigError"), error.what());
    }
  });
  module.def(
      "isa", [] { return std::string(name_of(active_isa())); },
      "The ISA level in use, after KTRT_ISA.");
  module.def(
      "detected_isa", [] { return std::string(name_of(detected_isa())); },
      "The highest ISA level that this machine and build can run.");
  module.def(
      "bf16_arithmetic", [] { return std::string(name_of(active_bf16_arithmetic())); },
      "What AVX-512 multiplies BF16 by where the processor has both: 'dot' or 'float32'.");
  module.def("numa_cpus", &numa_cpus, "The CPUs this process may use, by NUMA node.");
  module.def(
      "num_cores", [] { return read_topology(allowed_cpus()).num_cores(); },
      "Physical cores among the CPUs this process may use.");
  module.def("arithmetic_loops", &arithmetic_loops,
             "(name, instruction, operands) of every loop that runs at this ISA level.");
  module.def("arithmetic_rate", &arithmetic_rate, py::arg("name"), py::arg("seconds"),
             py::call_guard<py::gil_scoped_release>());
  register_formats(module);
  module.def("kernels", &kernels, "For every kernel family, the variant that runs.");
}

}  // namespace ktrt
