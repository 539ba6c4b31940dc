#include "bindings/packed_views.h"

#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

namespace ktrt {

namespace py = pybind11;

namespace {

// A range of bytes and what keeps it alive.
struct PackedMemory {
  std::shared_ptr<const void> owner;
  const std::byte* data = nullptr;
  std::size_t bytes = 0;
};

std::optional<PackedMemory> memory_of(const std::shared_ptr<const void>& owner,
                                      const AlignedBuffer& buffer) {
  if (buffer.empty()) return std::nullopt;
  return PackedMemory{owner, buffer.as<std::byte>(), buffer.bytes()};
}

struct PackedMatrixView {
  int rows = 0;
  int columns = 0;
  int first_row = 0;
  std::size_t code_offset = 0;
  std::size_t scale_offset = 0;
};

struct PackedPart {
  std::size_t expert_code_bytes = 0;
  std::size_t expert_scales = 0;
  std::optional<PackedMemory> codes;
  std::optional<PackedMemory> scales;
  PackedMatrixView matrices[kProjections];
};

struct ShrinkView {
  int ranks = 0;
  int columns = 0;
  std::optional<PackedMemory> a;
};

struct ExpandView {
  int ranks = 0;
  int first_rank = 0;
  int rows = 0;
  std::optional<PackedMemory> b;
};

struct PackedLora {
  ShrinkView shrinks[2];
  ExpandView expands[kProjections];
};

PackedPart view_part(const std::shared_ptr<const ExpertWeights>& weights, int index) {
  const ExpertWeights::Part& part = weights->part(index);
  PackedPart view;
  view.expert_code_bytes = part.expert_code_bytes;
  view.expert_scales = part.expert_scales;
  const auto experts = static_cast<std::size_t>(weights->shape().num_experts);
  view.codes = PackedMemory{weights, part.base(), experts * part.expert_code_bytes};
  if (part.scales_offset > 0) {
    view.scales = PackedMemory{weights, part.base() + part.scales_offset,
                               experts * part.expert_scales * sizeof(float)};
  }
  for (std::size_t p = 0; p < kProjections; ++p) {
    const int first = weights->first_strip(static_cast<Projection>(p), index) * kStripRows;
    view.matrices[p] = {part.layouts[p].n(), part.layouts[p].k(), first, part.code_offset[p],
                        part.scale_offset[p]};
  }
  return view;
}

template <std::size_t kIndex>
const PackedMatrixView& matrix(const PackedPart& part) {
  return part.matrices[kIndex];
}

template <std::size_t kIndex>
const ExpandView& expand(const PackedLora& lora) {
  return lora.expands[kIndex];
}

template <std::size_t kIndex>
const ShrinkView& shrink(const PackedLora& lora) {
  return lora.shrinks[kIndex];
}

py::buffer_info buffer_of(const PackedMemory& memory) {
  auto* data = const_cast<std::byte*>(memory.data);
  constexpr bool kReadOnly = true;
  return {reinterpret_cast<std::uint8_t*>(data), static_cast<py::ssize_t>(memory.bytes), kReadOnly};
}

}  // namespace

void register_packed_views(py::module_& module) {
  py::class_<PackedMemory>(module, "PackedMemory", py::buffer_protocol())
      .def_buffer(&buffer_of)
      .def_property_readonly(
          "address", [](const PackedMemory& m) { return reinterpret_cast<std::uintptr_t>(m.data); })
      .def_property_readonly("nbytes", [](const PackedMemory& m) { return m.bytes; });
  py::class_<PackedMatrixView>(module, "PackedMatrix")
      .def_readonly("rows", &PackedMatrixView::rows)
      .def_readonly("columns", &PackedMatrixView::columns)
      .def_readonly("first_row", &PackedMatrixView::first_row)
      .def_readonly("code_offset", &PackedMatrixView::code_offset)
      .def_readonly("scale_offset", &PackedMatrixView::scale_offset);
  py::class_<PackedPart>(module, "PackedPart")
      .def_readonly("expert_code_bytes", &PackedPart::expert_code_bytes)
      .def_readonly("expert_scales", &PackedPart::expert_scales)
      .def_readonly("codes", &PackedPart::codes)
      .def_readonly("scales", &PackedPart::scales)
      .def_property_readonly("gate", &matrix<0>)
      .def_property_readonly("up", &matrix<1>)
      .def_property_readonly("down", &matrix<2>);
  py::class_<ShrinkView>(module, "PackedShrink")
      .def_readonly("ranks", &ShrinkView::ranks)
      .def_readonly("columns", &ShrinkView::columns)
      .def_readonly("a", &ShrinkView::a);
  py::class_<ExpandView>(module, "PackedExpand")
      .def_readonly("ranks", &ExpandView::ranks)
      .def_readonly("first_rank", &ExpandView::first_rank)
      .def_readonly("rows", &ExpandView::rows)
      .def_readonly("b", &ExpandView::b);
  py::class_<PackedLora>(module, "PackedLora")
      .def_property_readonly("input", &shrink<0>)
      .def_property_readonly("intermediate", &shrink<1>)
      .def_property_readonly("gate", &expand<0>)
      .def_property_readonly("up", &expand<1>)
      .def_property_readonly("down", &expand<2>);
}

py::list packed_parts(MoeLayer& layer) {
  const std::shared_ptr<const ExpertWeights> weights = [&] {
    const py::gil_scoped_release release;
    return layer.experts().share_weights();
  }();
  py::list parts;
  for (int p = 0; p < weights->parts(); ++p) parts.append(view_part(weights, p));
  return parts;
}

py::dict bias_views(MoeLayer& layer) {
  const std::shared_ptr<const ExpertBiases> biases = [&] {
    const py::gil_scoped_release release;
    return layer.experts().share_biases();
  }();
  py::dict views;
  if (biases == nullptr) return views;
  constexpr const char* kNames[kProjections] = {"gate", "up", "down"};
  for (std::size_t p = 0; p < kProjections; ++p) {
    const auto memory = memory_of(biases, biases->values(static_cast<Projection>(p)));
    if (memory) views[kNames[p]] = *memory;
  }
  return views;
}

py::object lora_view(MoeLayer& layer, int number) {
  const std::shared_ptr<const ExpertLora> lora = [&] {
    const py::gil_scoped_release release;
    return layer.share_lora(number);
  }();
  PackedLora view;
  const ExpertLora::Shrink* shrinks[] = {&lora->input_shrink(), &lora->down_shrink()};
  for (std::size_t s = 0; s < 2; ++s) {
    view.shrinks[s] = {shrinks[s]->width(), shrinks[s]->k, memory_of(lora, shrinks[s]->a)};
  }
  for (std::size_t p = 0; p < kProjections; ++p) {
    const ExpertLora::Expand& expand = lora->expand(static_cast<Projection>(p));
    view.expands[p] = {2 * expand.rank_pairs, expand.t_offset, expand.strips * kStripRows,
                       memory_of(lora, expand.b)};
  }
  return py::cast(view);
}

}  // namespace ktrt
