// Loading and saving of packed weights.
#include <pybind11/stl.h>

#include <cerrno>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/mapped_file.h"
#include "bindings/register.h"
#include "bindings/tensor_arg.h"
#include "moe/moe_layer.h"

namespace ktrt {

namespace py = pybind11;

namespace {

// Arrays of one projection, kept alive while their views are used.
class ShardArgs {
 public:
  ShardArgs(const std::vector<std::pair<py::object, py::object>>& arrays, const char* projection) {
    for (const auto& [codes, scales] : arrays) {
      args_.emplace_back(codes, (std::string(projection) + " codes").c_str());
      args_.emplace_back(scales, (std::string(projection) + " scales").c_str());
    }
    for (std::size_t i = 0; i < args_.size(); i += 2) {
      shards_.push_back({args_[i].view(), args_[i + 1].view()});
    }
  }
  const std::vector<PackedShard>& shards() const { return shards_; }

 private:
  std::vector<TensorArg> args_;
  std::vector<PackedShard> shards_;
};

using ShardList = std::vector<std::pair<py::object, py::object>>;

void load_packed_expert(MoeLayer& layer, int expert, const ShardList& gate, const ShardList& up,
                        const ShardList& down) {
  const ShardArgs g(gate, "gate");
  const ShardArgs u(up, "up");
  const ShardArgs d(down, "down");
  const py::gil_scoped_release release;
  layer.experts().load_packed_expert(expert, g.shards(), u.shards(), d.shards());
}

// One matrix's codes and scales, kept alive while they are packed.
class CodedArg {
 public:
  CodedArg(const std::pair<py::object, py::object>& arrays, const char* projection)
      : codes_(arrays.first, (std::string(projection) + " codes").c_str()),
        scales_(arrays.second, (std::string(projection) + " scales").c_str()) {}
  CodedSource source() const { return {codes_.view(), scales_.view()}; }

 private:
  TensorArg codes_;
  TensorArg scales_;
};

using CodedPair = std::pair<py::object, py::object>;

void load_coded_expert(MoeLayer& layer, int expert, const std::optional<CodedPair>& gate,
                       const CodedPair& up, const CodedPair& down) {
  std::optional<CodedArg> g;
  if (gate) g.emplace(*gate, "gate");
  const CodedArg u(up, "up");
  const CodedArg d(down, "down");
  const py::gil_scoped_release release;
  layer.experts().load_coded_expert(
      expert, g ? std::optional<CodedSource>(g->source()) : std::nullopt, u.source(), d.source());
}

// Errors of the operating system become OSError, with their number.
template <class F>
auto with_os_errors(F f) {
  try {
    const py::gil_scoped_release release;
    return f();
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
  }
}

bool use_images(MoeLayer& layer, const std::vector<int>& fds,
                const std::vector<std::uint64_t>& digests, const std::string& use) {
  KTRT_CHECK(use == "auto" || use == "map" || use == "copy",
             "use is '" << use << "', expected 'auto', 'map' or 'copy'");
  const ImageUse wanted = use == "auto"  ? ImageUse::kAuto
                          : use == "map" ? ImageUse::kMap
                                         : ImageUse::kCopy;
  return with_os_errors([&] { return layer.experts().use_images(fds, digests, wanted); }) ==
         ImageUse::kMap;
}

}  // namespace

void register_packed(py::module_& module, py::class_<MoeLayer, std::shared_ptr<MoeLayer>>& layer) {
  layer
      .def("load_packed_expert", &load_packed_expert, py::arg("expert"), py::arg("gate"),
           py::arg("up"), py::arg("down"))
      .def("load_coded_expert", &load_coded_expert, py::arg("expert"), py::arg("gate"),
           py::arg("up"), py::arg("down"))
      .def_property_readonly("image_bytes",
                             [](const MoeLayer& l) { return l.experts().image_bytes(); })
      .def(
          "write_image",
          [](MoeLayer& self, int part, int fd) {
            return with_os_errors([&] { return self.experts().write_image(part, fd); });
          },
          py::arg("part"), py::arg("fd"))
      .def("use_images", &use_images, py::arg("fds"), py::arg("digests"), py::kw_only(),
           py::arg("use") = "auto");
  module.def("release_file_pages", &release_pages_of, py::arg("path"),
             py::call_guard<py::gil_scoped_release>());
}

}  // namespace ktrt
