#include "dense/linear_args.h"

#include "base/address_range.h"
#include "base/bf16.h"
#include "base/check.h"

namespace ktrt {

namespace {

void check_float(const TensorView& array, std::initializer_list<std::int64_t> shape) {
  KTRT_CHECK(array.dtype == DType::kFloat32,
             array.name << " is " << name_of(array.dtype) << ", expected float32");
  array.expect_shape(shape);
}

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

void check_lora(const TensorView& a, const TensorView& b, std::int64_t in, std::int64_t out,
                int max_rank) {
  KTRT_CHECK(a.ndim == 2 && a.shape[0] >= 1 && a.shape[0] <= max_rank,
             a.name << " has shape " << a.shape_string() << ", expected [rank, " << in
                    << "] with a rank from 1 to " << max_rank);
  check_float(a, {a.shape[0], in});
  check_float(b, {out, a.shape[0]});
}

std::int64_t check_rows(const void* x, std::int64_t x_count, const void* out,
                        std::int64_t out_count, std::int64_t in_features,
                        std::int64_t out_features) {
  check_address_range("x", x, x_count, sizeof(bf16_t));
  check_address_range("out", out, out_count, sizeof(bf16_t));
  const std::int64_t rows = x_count / in_features;
  // Not rows * out_features, which may be above 2^63.
  KTRT_CHECK(rows * in_features == x_count && out_count % out_features == 0 &&
                 out_count / out_features == rows,
             "x has " << x_count << " elements and out " << out_count << ", expected rows of "
                      << in_features << " and as many of " << out_features);
  KTRT_CHECK(rows == 0 || (x != nullptr && out != nullptr), "x or out is a null pointer");
  return rows;
}

}  // namespace ktrt
