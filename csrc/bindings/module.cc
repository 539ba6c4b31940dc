#include "bindings/register.h"
#include "bindings/seal_types.h"

PYBIND11_MODULE(_core, module) {
  module.doc() = "The compiled engine of ktrt: routed experts on the CPU.";
  module.attr("__version__") = KTRT_VERSION;
  ktrt::register_cpu(module);
  ktrt::register_moe(module);
  ktrt::register_gpu(module);
  ktrt::register_dense(module);
  ktrt::register_attention(module);
  ktrt::register_linear_attention(module);
  ktrt::register_random(module);
  ktrt::seal_types(module);
}
