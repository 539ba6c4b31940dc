#include <cstddef>
#include <cstdint>

#include "base/check.h"
#include "bindings/register.h"
#include "random/torch_exponentials.h"

namespace ktrt {

namespace py = pybind11;

namespace {

// A contiguous array [items] of T.
template <class T>
py::buffer_info array_of(const py::buffer& buffer, const char* name, bool writable) {
  py::buffer_info info = buffer.request(writable);
  KTRT_CHECK(info.ndim == 1 && info.item_type_is_equivalent_to<T>() &&
                 (info.size < 2 || info.strides[0] == info.itemsize),
             name << " has " << info.ndim << " dimensions of '" << info.format
                  << "', expected a contiguous one of '" << py::format_descriptor<T>::format()
                  << "'");
  return info;
}

void exponentials(const py::buffer& state, std::size_t draws, const py::buffer& indices,
                  const py::buffer& out) {
  const py::buffer_info words = array_of<std::uint64_t>(state, "state", true);
  const py::buffer_info places = array_of<std::int64_t>(indices, "indices", false);
  const py::buffer_info values = array_of<float>(out, "out", true);
  KTRT_CHECK(words.size >= static_cast<py::ssize_t>(TorchState::kSize),
             "state has " << words.size << " numbers, expected " << TorchState::kSize
                          << " or more, as torch.Generator.get_state() has");
  KTRT_CHECK(places.size == values.size, "out has " << values.size << " numbers, indices has "
                                                    << places.size << ": expected equal counts");
  const py::gil_scoped_release release;
  torch_exponentials(static_cast<std::uint64_t*>(words.ptr), draws,
                     static_cast<const std::int64_t*>(places.ptr),
                     static_cast<std::size_t>(places.size), static_cast<float*>(values.ptr));
}

}  // namespace

void register_random(py::module_& module) {
  module.def(
      "torch_exponentials", exponentials, py::arg("state"), py::arg("draws"), py::arg("indices"),
      py::arg("out"),
      "out[i] = torch.empty(draws).exponential_(1, generator)[indices[i]], for the generator "
      "with `state`, which moves on by as many draws; where torch draws serially.");
}

}  // namespace ktrt
