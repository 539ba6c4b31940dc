#include "lora/check_lora.h"

#include <initializer_list>

#include "base/check.h"

namespace ktrt {

namespace {

void check_float(const TensorView& array, std::initializer_list<std::int64_t> shape) {
  KTRT_CHECK(array.dtype == DType::kFloat32,
             array.name << " is " << name_of(array.dtype) << ", expected float32");
  array.expect_shape(shape);
}

}  // namespace

void check_lora(const TensorView& a, const TensorView& b, std::int64_t in, std::int64_t out,
                int max_rank) {
  KTRT_CHECK(a.ndim == 2 && a.shape[0] >= 1 && a.shape[0] <= max_rank,
             a.name << " has shape " << a.shape_string() << ", expected [rank, " << in
                    << "] with a rank from 1 to " << max_rank);
  check_float(a, {a.shape[0], in});
  check_float(b, {out, a.shape[0]});
}

}  // namespace ktrt
