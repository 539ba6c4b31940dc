#include "engine/weight_args.h"

#include "base/bf16.h"
#include "base/check.h"

namespace ktrt {

namespace {

float value_at(const TensorView& array, std::int64_t i) {
  switch (array.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(array.data)[i];
    case DType::kBfloat16:
      return bf16_to_f32(static_cast<const bf16_t*>(array.data)[i]);
    default:
      return fp16_to_f32(static_cast<const fp16_t*>(array.data)[i]);
  }
}

}  // namespace

void check_weight(const TensorView& weight) {
  KTRT_CHECK(weight.dtype == DType::kBfloat16,
             weight.name << " is " << name_of(weight.dtype) << ", expected bfloat16");
  weight.expect_shape({-1, -1});
  const std::int64_t out = weight.shape[0];
  const std::int64_t in = weight.shape[1];
  KTRT_CHECK(
      out > 0 && in > 0 && in <= (1 << 30) && out <= (1 << 30),
      weight.name << " has shape " << weight.shape_string() << ", expected sizes from 1 to 2^30");
  KTRT_CHECK(out == 1 || weight.stride[0] == in, weight.name << " has rows " << weight.stride[0]
                                                             << " elements apart, expected " << in
                                                             << " (contiguous)");
}

AlignedBuffer copy_floats(const std::optional<TensorView>& values, std::int64_t count,
                          std::int64_t padded) {
  if (!values) return {};
  values->expect_float();
  values->expect_shape({count});
  AlignedBuffer copy(static_cast<std::size_t>(padded) * sizeof(float));
  for (std::int64_t i = 0; i < count; ++i) copy.as<float>()[i] = value_at(*values, i);
  return copy;
}

}  // namespace ktrt
