// Tensor views of vectors, and vectors in another float type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "base/bf16.h"
#include "base/tensor_view.h"

namespace ktrt::testing {

// A compact view of `data`, whose element type `dtype` names.
inline TensorView view_of(const void* data, DType dtype, std::initializer_list<std::int64_t> shape,
                          std::string name = "tensor") {
  TensorView view;
  view.name = std::move(name);
  view.data = const_cast<void*>(data);
  view.dtype = dtype;
  view.ndim = static_cast<int>(shape.size());
  std::size_t d = 0;
  for (const std::int64_t size : shape) view.shape[d++] = size;
  std::int64_t stride = 1;
  while (d-- > 0) {
    view.stride[d] = stride;
    stride *= view.shape[d];
  }
  return view;
}

inline TensorView view_of(const std::vector<float>& data, std::initializer_list<std::int64_t> shape,
                          std::string name = "tensor") {
  return view_of(data.data(), DType::kFloat32, shape, std::move(name));
}

// The bytes of `values` rounded to a float type.
inline std::vector<std::byte> encode(const std::vector<float>& values, DType dtype) {
  std::vector<std::byte> bytes(values.size() * size_of(dtype));
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (dtype == DType::kFloat32) {
      reinterpret_cast<float*>(bytes.data())[i] = values[i];
    } else {
      reinterpret_cast<std::uint16_t*>(bytes.data())[i] =
          dtype == DType::kBfloat16 ? f32_to_bf16(values[i]) : f32_to_fp16(values[i]);
    }
  }
  return bytes;
}

inline std::vector<float> decode(const std::vector<std::byte>& bytes, DType dtype) {
  std::vector<float> values(bytes.size() / size_of(dtype));
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (dtype == DType::kFloat32) {
      values[i] = reinterpret_cast<const float*>(bytes.data())[i];
    } else {
      const std::uint16_t bits = reinterpret_cast<const std::uint16_t*>(bytes.data())[i];
      values[i] = dtype == DType::kBfloat16 ? bf16_to_f32(bits) : fp16_to_f32(bits);
    }
  }
  return values;
}

inline float round_to_bf16(float value) { return bf16_to_f32(f32_to_bf16(value)); }

}  // namespace ktrt::testing
