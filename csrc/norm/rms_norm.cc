#include "norm/rms_norm.h"

#include <cmath>

#include "base/address_range.h"
#include "base/check.h"

namespace ktrt {

namespace {

// Numbers of all rows beyond which the threads' waking is worth it: 60 µs of one thread.
constexpr std::int64_t kAlone = 1 << 16;

}  // namespace

RmsNorm::RmsNorm(const ElementwiseKernels& kernels, const TensorView& weight, float eps,
                 float offset, bool rounds_twice, std::shared_ptr<Engine> engine)
    : kernels_(kernels), engine_(std::move(engine)) {
  weight.expect_shape({-1});
  KTRT_CHECK(
      weight.shape[0] >= 1 && weight.shape[0] <= (1 << 30),
      weight.name << " has shape " << weight.shape_string() << ", expected a size from 1 to 2^30");
  KTRT_CHECK(weight.dtype == DType::kBfloat16 || weight.dtype == DType::kFloat32,
             weight.name << " is " << name_of(weight.dtype) << ", expected bfloat16 or float32");
  KTRT_CHECK(eps >= 0.0f && std::isfinite(eps), "eps is " << eps << ", expected at least 0");
  KTRT_CHECK(std::isfinite(offset), "offset is " << offset << ", expected a number");
  args_.size = static_cast<int>(weight.shape[0]);
  if (weight.dtype == DType::kFloat32) {
    args_.weight_f32 = static_cast<const float*>(weight.data);
  } else {
    args_.weight_bf16 = static_cast<const std::uint16_t*>(weight.data);
  }
  args_.eps = eps;
  args_.offset = offset;
  args_.rounds_twice = rounds_twice;
}

void RmsNorm::forward(const std::uint16_t* x, std::int64_t x_count, std::int64_t rows,
                      std::int64_t row_stride, std::uint16_t* out, std::int64_t out_count) const {
  const std::int64_t size = args_.size;
  check_address_range("x", x, x_count, sizeof(std::uint16_t));
  check_address_range("out", out, out_count, sizeof(std::uint16_t));
  KTRT_CHECK(rows >= 0 && row_stride >= 0 && out_count / size == rows && out_count % size == 0,
             "out has " << out_count << " elements, expected " << rows << " rows of " << size);
  if (rows == 0) return;
  KTRT_CHECK(x_count >= size && (rows == 1 || row_stride <= (x_count - size) / (rows - 1)),
             "x has " << x_count << " elements, expected " << rows << " rows of " << size << ", "
                      << row_stride << " elements apart");
  KTRT_CHECK(x != nullptr && out != nullptr, "x or out is a null pointer");
  const auto norm = [&](std::int64_t begin, std::int64_t end) {
    RmsNormArgs args = args_;
    for (std::int64_t row = begin; row < end; ++row) {
      args.x = x + row * row_stride;
      args.out = out + row * size;
      kernels_.rms_norm(args);
    }
  };
  if (!shares(rows)) return norm(0, rows);
  const auto lease = engine_->lease();
  const int threads = lease.pool().size();
  lease.pool().run(
      [&](int thread) { norm(rows * thread / threads, rows * (thread + 1) / threads); });
}

bool RmsNorm::shares(std::int64_t rows) const {
  return engine_ != nullptr && rows > 1 && rows > kAlone / args_.size;
}

}  // namespace ktrt
