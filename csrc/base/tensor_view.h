// A borrowed, typed view of a dense array, with the checks that API edges need.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "base/check.h"

namespace ktrt {

enum class DType { kFloat32, kFloat16, kBfloat16, kInt32, kInt64, kUint8 };

inline std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kFloat16:
    case DType::kBfloat16:
      return 2;
    case DType::kInt64:
      return 8;
    case DType::kUint8:
      return 1;
  }
  return 0;
}

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBfloat16:
      return "bfloat16";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kUint8:
      return "uint8";
  }
  return "?";
}

// Up to three dimensions, the last one contiguous. Strides count elements.
struct TensorView {
  static constexpr int kMaxDims = 3;

  std::string name;  // as the caller knows it, for error messages
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int ndim = 0;
  std::array<std::int64_t, kMaxDims> shape{};
  std::array<std::int64_t, kMaxDims> stride{};

  bool is_float() const {
    return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBfloat16;
  }

  std::string shape_string() const {
    std::string text = "[";
    for (int i = 0; i < ndim; ++i) {
      if (i > 0) text += ", ";
      text += std::to_string(shape[static_cast<std::size_t>(i)]);
    }
    return text + "]";
  }

  // -1 stands for any size. Throws std::invalid_argument naming what was found and expected.
  void expect_shape(std::initializer_list<std::int64_t> expected) const {
    bool equal = static_cast<std::size_t>(ndim) == expected.size();
    std::size_t i = 0;
    for (const std::int64_t size : expected) {
      equal = equal && (size < 0 || shape[i] == size);
      ++i;
    }
    if (equal) return;
    std::string text = "[";
    for (const std::int64_t size : expected) {
      if (text.size() > 1) text += ", ";
      text += size < 0 ? "any" : std::to_string(size);
    }
    KTRT_CHECK(equal, name << " has shape " << shape_string() << ", expected " << text << "]");
  }

  void expect_float() const {
    KTRT_CHECK(is_float(),
               name << " is " << name_of(dtype) << ", expected float32, float16 or bfloat16");
  }

  // Address of row i of the first dimension.
  const std::byte* row(std::int64_t i) const {
    return static_cast<const std::byte*>(data) +
           static_cast<std::size_t>(i * stride[0]) * size_of(dtype);
  }
  std::byte* mutable_row(std::int64_t i) const {
    return static_cast<std::byte*>(data) + static_cast<std::size_t>(i * stride[0]) * size_of(dtype);
  }

  // The 2-D view at index i of a 3-D view's first dimension.
  TensorView slice(std::int64_t i) const {
    TensorView view;
    view.name = name;
    view.data = mutable_row(i);
    view.dtype = dtype;
    view.ndim = ndim - 1;
    for (int d = 1; d < ndim; ++d) {
      view.shape[static_cast<std::size_t>(d - 1)] = shape[static_cast<std::size_t>(d)];
      view.stride[static_cast<std::size_t>(d - 1)] = stride[static_cast<std::size_t>(d)];
    }
    return view;
  }
};

}  // namespace ktrt
