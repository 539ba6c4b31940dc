#include "bindings/tensor_arg.h"

#include <cstdint>
#include <string>

#include "base/check.h"

namespace ktrt {

namespace py = pybind11;

namespace {

// DLPack 0.x ABI (dmlc/dlpack, dlpack.h), which `__dlpack__()` without arguments still returns.
struct DLDevice {
  std::int32_t device_type;
  std::int32_t device_id;
};
struct DLDataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // null: compact row-major
  std::uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor* self);
};

constexpr std::int32_t kCpu = 1;
constexpr std::int32_t kCudaHost = 3;  // pinned host memory

DType dtype_of(const DLDataType& type, const char* name) {
  constexpr std::uint8_t kInt = 0;
  constexpr std::uint8_t kUint = 1;
  constexpr std::uint8_t kFloat = 2;
  constexpr std::uint8_t kBfloat = 4;
  if (type.lanes == 1) {
    if (type.code == kFloat && type.bits == 32) return DType::kFloat32;
    if (type.code == kFloat && type.bits == 16) return DType::kFloat16;
    if (type.code == kBfloat && type.bits == 16) return DType::kBfloat16;
    if (type.code == kInt && type.bits == 32) return DType::kInt32;
    if (type.code == kInt && type.bits == 64) return DType::kInt64;
    if (type.code == kUint && type.bits == 8) return DType::kUint8;
  }
  KTRT_CHECK(false, name << " has an unsupported dtype (DLPack code " << int{type.code} << ", "
                         << int{type.bits}
                         << " bits); expected float32, float16, bfloat16, int32, int64 or "
                         << "uint8");
  return DType::kFloat32;
}

void fill_shape(const DLTensor& tensor, TensorView& view) {
  KTRT_CHECK(
      tensor.ndim >= 1 && tensor.ndim <= TensorView::kMaxDims,
      view.name << " has " << tensor.ndim << " dimensions, expected 1 to " << TensorView::kMaxDims);
  view.ndim = tensor.ndim;
  std::int64_t compact = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    const auto d = static_cast<std::size_t>(i);
    view.shape[d] = tensor.shape[i];
    view.stride[d] = tensor.strides == nullptr ? compact : tensor.strides[i];
    compact *= tensor.shape[i];
  }
  const auto last = static_cast<std::size_t>(tensor.ndim - 1);
  KTRT_CHECK(view.shape[last] <= 1 || view.stride[last] == 1,
             view.name << " is not contiguous in its last dimension; pass a contiguous copy");
}

}  // namespace

TensorArg::TensorArg(const py::object& array, const char* name) {
  KTRT_CHECK(py::hasattr(array, "__dlpack__"), name
                                                   << " is a " << Py_TYPE(array.ptr())->tp_name
                                                   << ", expected a torch.Tensor or numpy.ndarray");
  capsule_ = array.attr("__dlpack__")();
  auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
  if (managed == nullptr) throw py::error_already_set();
  const DLTensor& tensor = managed->dl_tensor;
  view_.name = name;
  KTRT_CHECK(
      tensor.device.device_type == kCpu || tensor.device.device_type == kCudaHost,
      name << " is not in CPU memory (DLPack device type " << tensor.device.device_type << ")");
  view_.data = static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
  view_.dtype = dtype_of(tensor.dtype, name);
  KTRT_CHECK(reinterpret_cast<std::uintptr_t>(view_.data) % size_of(view_.dtype) == 0,
             name << " does not start at a multiple of its element size; pass a copy");
  fill_shape(tensor, view_);
}

std::optional<TensorArg> optional_tensor(const py::object& array, const char* name) {
  if (array.is_none()) return std::nullopt;
  return TensorArg(array, name);
}

}  // namespace ktrt
