#pragma once

#include <pybind11/pybind11.h>

namespace ktrt {

void register_cpu(pybind11::module_& module);
void register_moe(pybind11::module_& module);
void register_gpu(pybind11::module_& module);

}  // namespace ktrt
