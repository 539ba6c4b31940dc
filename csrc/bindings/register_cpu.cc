#include <string>

#include "bindings/register.h"
#include "cpu/isa.h"
#include "kernels/select.h"

namespace ktrt {

namespace py = pybind11;

namespace {

py::dict kernels() {
  const KernelTable table = select_kernels(active_isa(), cpu_features());
  py::dict names;
  names["gemm_bf16"] = table.gemm_bf16.many->name;
  names["gemm_bf16_few_rows"] = table.gemm_bf16.few->name;
  names["gemm_int8"] = table.gemm_int8.many->name;
  names["gemm_int8_few_rows"] = table.gemm_int8.few->name;
  names["lora_shrink"] = table.lora_shrink->name;
  names["elementwise"] = table.elementwise->name;
  return names;
}

}  // namespace

void register_cpu(py::module_& module) {
  module.def(
      "isa", [] { return std::string(name_of(active_isa())); },
      "The ISA level in use, after KTRT_ISA.");
  module.def(
      "detected_isa", [] { return std::string(name_of(detected_isa())); },
      "The highest ISA level that this machine and build can run.");
  module.def("kernels", &kernels, "For every kernel family, the variant that runs.");
}

}  // namespace ktrt
