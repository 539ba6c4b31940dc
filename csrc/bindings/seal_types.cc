#include "bindings/seal_types.h"

#include <cstddef>
#include <cstring>
#include <string>

namespace ktrt {

namespace py = pybind11;

namespace {

// Stands in for the allocation that pybind11 makes when a method meets an instance without an
// object; constructors do not come here.
void* refuse_uninitialised(std::size_t) {
  throw py::type_error("the object was never initialised: __new__ was called without __init__");
}

// Methods without named arguments take None for self, as a null pointer; with the record that
// pybind11 adds for named ones they refuse it.
void refuse_none(const py::handle& callable) {
  const py::handle function = py::detail::get_function(callable);
  if (!function || !PyCFunction_Check(function.ptr())) return;
  PyObject* const self = PyCFunction_GET_SELF(function.ptr());
  if (self == nullptr) return;
  auto* record = py::detail::function_record_ptr_from_PyObject(self);
  for (; record != nullptr; record = record->next) {
    if (!record->is_method || !record->args.empty()) continue;
    // The record frees its names.
    record->args.emplace_back(strdup("self"), nullptr, py::handle(), true, false);
  }
}

void refuse_none_as_self(PyTypeObject* type) {
  for (const auto& [name, value] : py::reinterpret_borrow<py::dict>(type->tp_dict)) {
    if (!PyObject_TypeCheck(value.ptr(), &PyProperty_Type)) {
      refuse_none(value);
      continue;
    }
    refuse_none(value.attr("fget"));
    refuse_none(value.attr("fset"));
  }
}

void refuse_copies(const py::object& type, const std::string& name) {
  const auto refuse = [name](const py::args&, const py::kwargs&) -> py::object {
    throw py::type_error(name +
                         " holds threads or memory of this process: it can be neither "
                         "copied nor pickled");
  };
  type.attr("__reduce_ex__") =
      py::cpp_function(refuse, py::name("__reduce_ex__"), py::is_method(type));
}

}  // namespace

void seal_types(py::module_& module) {
  for (const auto& [name, value] : module.attr("__dict__").cast<py::dict>()) {
    if (!PyType_Check(value.ptr())) continue;
    auto* type = reinterpret_cast<PyTypeObject*>(value.ptr());
    py::detail::type_info* info = py::detail::get_type_info(type);
    if (info == nullptr) continue;
    refuse_none_as_self(type);
    info->operator_new = &refuse_uninitialised;
    refuse_copies(py::reinterpret_borrow<py::object>(value), py::str(name));
    type->tp_flags |= Py_TPFLAGS_IMMUTABLETYPE;
    PyType_Modified(type);
  }
}

}  // namespace ktrt
