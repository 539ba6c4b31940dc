#include "base/tensor_view.h"

#include <gtest/gtest.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "helpers/views.h"

namespace ktrt {
namespace {

using testing::view_of;

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

TEST(DType, SizesAndNames) {
  EXPECT_EQ(size_of(DType::kFloat32), 4u);
  EXPECT_EQ(size_of(DType::kFloat16), 2u);
  EXPECT_EQ(size_of(DType::kBfloat16), 2u);
  EXPECT_EQ(size_of(DType::kInt32), 4u);
  EXPECT_EQ(size_of(DType::kInt64), 8u);
  EXPECT_STREQ(name_of(DType::kFloat32), "float32");
  EXPECT_STREQ(name_of(DType::kFloat16), "float16");
  EXPECT_STREQ(name_of(DType::kBfloat16), "bfloat16");
  EXPECT_STREQ(name_of(DType::kInt32), "int32");
  EXPECT_STREQ(name_of(DType::kInt64), "int64");
}

TEST(TensorView, ExpectShape) {
  const TensorView view = view_of(nullptr, DType::kFloat32, {2, 3}, "up_b");
  view.expect_shape({2, 3});
  view.expect_shape({-1, 3});
  view.expect_shape({2, -1});
  EXPECT_EQ(message_of([&] { view.expect_shape({2, 4}); }),
            "up_b has shape [2, 3], expected [2, 4]");
  EXPECT_EQ(message_of([&] { view.expect_shape({-1, 3, 1}); }),
            "up_b has shape [2, 3], expected [any, 3, 1]");
  EXPECT_EQ(message_of([&] { view.expect_shape({6}); }), "up_b has shape [2, 3], expected [6]");
  EXPECT_EQ(message_of([&] { view.expect_shape({2}); }), "up_b has shape [2, 3], expected [2]");
  EXPECT_EQ(message_of([&] { view.expect_shape({2, 3, -1}); }),
            "up_b has shape [2, 3], expected [2, 3, any]");
  EXPECT_EQ(message_of([&] { view.expect_shape({3, -1}); }),
            "up_b has shape [2, 3], expected [3, any]");
}

TEST(TensorView, ExpectFloat) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBfloat16}) {
    EXPECT_EQ(message_of([&] { view_of(nullptr, dtype, {1}).expect_float(); }), "");
  }
  for (const DType dtype : {DType::kInt32, DType::kInt64}) {
    EXPECT_EQ(message_of([&] { view_of(nullptr, dtype, {1}, "gate").expect_float(); }),
              "gate is " + std::string(name_of(dtype)) + ", expected float32, float16 or bfloat16");
  }
}

TEST(TensorView, RowsFollowTheStride) {
  std::vector<float> data(40);
  TensorView view = view_of(data, {4, 5});
  EXPECT_EQ(static_cast<const void*>(view.row(3)), &data[15]);
  view.stride[0] = 10;
  EXPECT_EQ(static_cast<const void*>(view.row(3)), &data[30]);
  EXPECT_EQ(static_cast<void*>(view.mutable_row(2)), &data[20]);
  // Rows in reverse order, as NumPy's x[::-1] passes them.
  view.data = &data[30];
  view.stride[0] = -10;
  EXPECT_EQ(static_cast<const void*>(view.row(3)), data.data());
  EXPECT_EQ(static_cast<void*>(view.mutable_row(1)), &data[20]);
}

TEST(TensorView, SliceDropsTheFirstDimension) {
  std::vector<float> data(24);
  TensorView view = view_of(data, {2, 3, 4}, "gate_a");
  const TensorView slice = view.slice(1);
  EXPECT_EQ(slice.name, "gate_a");
  EXPECT_EQ(slice.dtype, DType::kFloat32);
  EXPECT_EQ(slice.ndim, 2);
  EXPECT_EQ(slice.shape_string(), "[3, 4]");
  EXPECT_EQ(static_cast<const void*>(slice.row(0)), &data[12]);
  EXPECT_EQ(static_cast<const void*>(slice.row(2)), &data[20]);
}

}  // namespace
}  // namespace ktrt
