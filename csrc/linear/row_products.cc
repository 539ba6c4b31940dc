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
void check(const RowProduct<Value>& p) {
  check_address_range("x", p.x, p.x_count, sizeof(Value));
  check_address_range("weight", p.weight, p.weight_count, sizeof(Value));
  check_address_range("out", p.out, p.out_count, sizeof(Value));
  KTRT_CHECK(p.in >= 1 && p.in <= std::numeric_limits<int>::max() && p.weight_count >= p.in &&
                 p.weight_count % p.in == 0,
             "weight has " << p.weight_count << " elements, expected rows of " << p.in);
  // Not rows * columns, which may be above 2^63.
  KTRT_CHECK(p.x_count % p.in == 0 && p.out_count % p.columns() == 0 &&
                 p.out_count / p.columns() == p.rows(),
             "x has " << p.x_count << " elements and out " << p.out_count << ", expected rows of "
                      << p.in << " and as many of " << p.columns());
  check_address_range("bias", p.bias, p.bias == nullptr ? 0 : p.columns(), sizeof(Value));
  KTRT_CHECK(p.rows() == 0 || (p.x != nullptr && p.weight != nullptr && p.out != nullptr),
             "x, weight or out is a null pointer");
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
    args.out = product.out + row * product.columns() + first;
    args.out_stride = product.columns();
    kernel.finish(args);
  }
};

struct F32Epilogue {
  const RowProduct<float>& product;

  void start(std::int64_t, int) const {}
  void finish(std::int64_t row, int rows, std::int64_t first, int columns, const float* c) const {
    for (int r = 0; r < rows; ++r, c += columns) {
      float* const out = product.out + (row + r) * product.columns() + first;
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
  if (product.rows() == 0) return;
  const auto lease = engine_->lease();
  thread_local std::vector<float> bias;
  if (product.bias != nullptr) {
    bias.resize(static_cast<std::size_t>(product.columns()));
    std::transform(product.bias, product.bias + product.columns(), bias.begin(), bf16_to_f32);
  }
  const DenseKernel& kernel = *engine_->kernels().dense_bf16;
  const DensePanels<std::uint16_t, DenseKernel> panels(kernel, product.weight, product.columns(),
                                                       product.in);
  panels.multiply(lease, queue_, product.x, product.rows(), false, kNothingBefore,
                  Bf16Epilogue{product, kernel, product.bias == nullptr ? nullptr : bias.data()});
}

void RowProducts::multiply(const RowProduct<float>& product) {
  check(product);
  if (product.rows() == 0) return;
  const auto lease = engine_->lease();
  const DensePanels<float, DenseF32Kernel> panels(*engine_->kernels().dense_f32, product.weight,
                                                  product.columns(), product.in);
  panels.multiply(lease, queue_, product.x, product.rows(), false, kNothingBefore,
                  F32Epilogue{product});
}

}  // namespace ktrt
