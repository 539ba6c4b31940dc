// Read-only views of a layer's packed memory for Python, without a copy.
#pragma once

#include <pybind11/pybind11.h>

#include "moe/moe_layer.h"

namespace ktrt {

// The classes that the functions below return.
void register_packed_views(pybind11::module_& module);

// One PackedPart per part of the weights.
pybind11::list packed_parts(MoeLayer& layer);

// PackedMemory of the biases by projection, of those that have one.
pybind11::dict bias_views(MoeLayer& layer);

// PackedLora, or None.
pybind11::object lora_view(MoeLayer& layer, int number);

}  // namespace ktrt
