// Any CPU array that speaks DLPack (torch.Tensor, numpy.ndarray), borrowed for the time of a call.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>

#include "base/tensor_view.h"

namespace ktrt {

class TensorArg {
 public:
  // Throws std::invalid_argument naming `name`: no __dlpack__, not on the CPU, an unsupported
  // dtype, misaligned, more than 3 dimensions, or a last dimension that is not contiguous.
  TensorArg(const pybind11::object& array, const char* name);

  const TensorView& view() const { return view_; }

 private:
  pybind11::object capsule_;  // keeps the array alive
  TensorView view_;
};

// None gives nothing.
std::optional<TensorArg> optional_tensor(const pybind11::object& array, const char* name);

}  // namespace ktrt
