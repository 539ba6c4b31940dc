#pragma once

#include <pybind11/pybind11.h>

namespace ktrt {

// Makes every class of the module safe against what Python allows with any class: an instance that
// `__new__` made without `__init__` (pybind11 hands out memory that nobody initialised for it),
// None for self, a copy or a pickle, another class put into `__class__`. Each is a TypeError then.
void seal_types(pybind11::module_& module);

}  // namespace ktrt
