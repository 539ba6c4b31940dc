// A plain array as what the engine takes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "base/tensor_view.h"

namespace ktrt {

// Row-major, without gaps.
inline TensorView view(const void* data, DType dtype, std::initializer_list<std::int64_t> shape) {
  TensorView result;
  result.name = "array";
  result.data = const_cast<void*>(data);
  result.dtype = dtype;
  result.ndim = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), result.shape.begin());
  std::int64_t stride = 1;
  for (int d = result.ndim - 1; d >= 0; --d) {
    result.stride[static_cast<std::size_t>(d)] = stride;
    stride *= result.shape[static_cast<std::size_t>(d)];
  }
  return result;
}

}  // namespace ktrt
