#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "moe/moe_layer.h"

namespace ktrt {

void register_cpu(pybind11::module_& module);
void register_moe(pybind11::module_& module);
void register_gpu(pybind11::module_& module);
void register_dense(pybind11::module_& module);
void register_attention(pybind11::module_& module);
void register_linear_attention(pybind11::module_& module);
void register_random(pybind11::module_& module);
// Adds to the class that register_moe made.
void register_packed(pybind11::module_& module,
                     pybind11::class_<MoeLayer, std::shared_ptr<MoeLayer>>& layer);

}  // namespace ktrt
