#include "linear/row_products.h"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <vector>

#include "base/address_range.h"
#include "base/bf16.h"
#include "base/check.h"
#include "linear/dense_panels.h"

namespace ktrt {

namespace {

template <class Value>
void check_array(const char* name, const Value* data, std::int64_t rows, std::int64_t columns) {
  KTRT_CHECK(rows >= 0 && columns >= 0 &&
                 (columns == 0 || rows <= std::numeric_limits<std::int64_t>::max() / columns),
             name << " is [" << rows << ", " << columns << "], expected a size in memory");
  check_address_range(name, data, rows * columns, sizeof(Value));
  KTRT_CHECK(data != nullptr || rows * columns == 0, name << " is a null pointer");
}

template <class Value>
void check(const RowProduct<Value>& p) {
  KTRT_CHECK(p.in >= 1 && p.in <= std::numeric_limits<int>::max() && p.columns >= 1,
             "the weight is [" << p.columns << ", " << p.in << "], expected at least one number");
  check_array("x", p.x, p.rows, p.in);
  check_array("weight", p.weight, p.columns, p.in);
  check_array("out", p.out, p.rows, p.columns);
  if (p.bias != nullptr) check_array("bias", p.bias, 1, p.columns);
}

struct Bf16Epilogue {
  const RowProduct<std::uint16_t>& product;
  const DenseKernel& kernel;
  const float* bias;  // null without

  void start(std::int64_t, int) const {}
  void finish(std::int64_t row, int rows, std::int64_t first, int columns, const float* c) const {
    DenseFinishArgs args{};
    args.c = c;
    args.c_stride = args.columns = columns;
    args.rows = rows;
    args.bias = bias == nullptr ? nullptr : bias + first;
    args.out = product.out + row * product.columns + first;
    args.out_stride = product.columns;
    kernel.finish(args);
  }
};

struct F32Epilogue {
  const RowProduct<float>& product;

  void start(std::int64_t, int) const {}
  void finish(std::int64_t row, int rows, std::int64_t first, int columns, const float* c) const {
    for (int r = 0; r < rows; ++r, c += columns) {
      float* const out = product.out + (row + r) * product.columns + first;
      if (product.bias == nullptr) {
        std::copy_n(c, columns, out);
      } else {
        std::transform(c, c + columns, product.bias + first, out, std::plus<>());
      }
    }
  }
};

const auto kNothingBefore = [](int, int) {};

}  // namespace

RowProducts::RowProducts(std::shared_ptr<Engine> engine) : engine_(std::move(engine)) {
  KTRT_CHECK(engine_ != nullptr, "engine is missing");
}

void RowProducts::multiply(const RowProduct<std::uint16_t>& product) {
  check(product);
  if (product.rows == 0) return;
  const auto lease = engine_->lease();
  thread_local std::vector<float> bias;
  if (product.bias != nullptr) {
    bias.resize(static_cast<std::size_t>(product.columns));
    std::transform(product.bias, product.bias + product.columns, bias.begin(), bf16_to_f32);
  }
  const DenseKernel& kernel = *engine_->kernels().dense_bf16;
  const DensePanels<std::uint16_t, DenseKernel> panels(kernel, product.weight, product.columns,
                                                       product.in);
  panels.multiply(lease, queue_, product.x, product.rows, false, kNothingBefore,
                  Bf16Epilogue{product, kernel, product.bias == nullptr ? nullptr : bias.data()});
}

void RowProducts::multiply(const RowProduct<float>& product) {
  check(product);
  if (product.rows == 0) return;
  const auto lease = engine_->lease();
  const DensePanels<float, DenseF32Kernel> panels(*engine_->kernels().dense_f32, product.weight,
                                                  product.columns, product.in);
  panels.multiply(lease, queue_, product.x, product.rows, false, kNothingBefore,
                  F32Epilogue{product});
}

}  // namespace ktrt
