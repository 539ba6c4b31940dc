#include "moe/expert_weights.h"

#include <algorithm>

#include "base/check.h"

namespace ktrt {

namespace {

// Larger sizes would overflow 32-bit row arithmetic or an INT8 accumulator long before they made
// sense: 255 · 127 · k must stay below 2^31.
constexpr int kMaxSize = 65536;

void check_shape(const MoeShape& shape) {
  KTRT_CHECK(shape.num_experts >= 1 && shape.num_experts <= kMaxSize,
             "num_experts is " << shape.num_experts << ", expected 1 to " << kMaxSize);
  KTRT_CHECK(
      shape.top_k >= 1 && shape.top_k <= shape.num_experts,
      "top_k is " << shape.top_k << ", expected 1 to num_experts (" << shape.num_experts << ")");
  KTRT_CHECK(shape.hidden_size >= 1 && shape.hidden_size <= kMaxSize,
             "hidden_size is " << shape.hidden_size << ", expected 1 to " << kMaxSize);
  KTRT_CHECK(shape.intermediate_size >= 1 && shape.intermediate_size <= kMaxSize,
             "intermediate_size is " << shape.intermediate_size << ", expected 1 to " << kMaxSize);
}

}  // namespace

const char* name_of(Projection projection) {
  switch (projection) {
    case Projection::kGate:
      return "gate";
    case Projection::kUp:
      return "up";
    case Projection::kDown:
      return "down";
  }
  return "?";
}

ExpertWeights::ExpertWeights(const MoeShape& shape, WeightFormat format, int parts)
    : shape_(shape), format_(format) {
  check_shape(shape);
  const int h = shape.hidden_size;
  const int i = shape.intermediate_size;
  if (shape.has_gate) layouts_[0] = PackedLayout(format, i, h);
  layouts_[1] = PackedLayout(format, i, h);
  layouts_[2] = PackedLayout(format, h, i);
  KTRT_CHECK(parts >= 1 && parts <= std::min(layouts_[1].strips(), layouts_[2].strips()),
             "the experts are to be cut into "
                 << parts << " parts, but intermediate_size " << i << " and hidden_size " << h
                 << " have " << std::min(layouts_[1].strips(), layouts_[2].strips())
                 << " strips of 32 rows");
  parts_.resize(static_cast<std::size_t>(parts));
  for (int p = 0; p < parts; ++p) parts_[static_cast<std::size_t>(p)] = make_part(p);
  loaded_.assign(static_cast<std::size_t>(shape.num_experts), false);
}

ExpertWeights::Part ExpertWeights::make_part(int part) const {
  Part result;
  for (std::size_t p = 0; p < kProjections; ++p) {
    const auto projection = static_cast<Projection>(p);
    const int begin = first_strip(projection, part) * kStripRows;
    const int end = std::min(first_strip(projection, part + 1) * kStripRows, layouts_[p].n());
    result.layouts[p] = PackedLayout(format_, end - begin, layouts_[p].k());
    result.code_offset[p] = result.expert_code_bytes;
    result.row_offset[p] = result.expert_rows;
    result.expert_code_bytes += result.layouts[p].code_bytes();  // 2 KB tiles: stays aligned
    result.expert_rows += static_cast<std::size_t>(result.layouts[p].padded_n());
  }
  const auto experts = static_cast<std::size_t>(shape_.num_experts);
  result.codes = AlignedBuffer(experts * result.expert_code_bytes);
  if (is_quantized(format_)) {
    result.scales = AlignedBuffer(experts * result.expert_rows * sizeof(float));
    result.sums = AlignedBuffer(experts * result.expert_rows * sizeof(std::int32_t));
  }
  return result;
}

PackedMatrix ExpertWeights::matrix(int expert, Projection projection, int part) const {
  const auto e = static_cast<std::size_t>(expert);
  const auto p = static_cast<std::size_t>(projection);
  const Part& memory = parts_[static_cast<std::size_t>(part)];
  PackedMatrix matrix;
  matrix.layout = memory.layouts[p];
  matrix.codes =
      memory.codes.as<std::uint8_t>() + e * memory.expert_code_bytes + memory.code_offset[p];
  if (!memory.scales.empty()) {
    const std::size_t rows = e * memory.expert_rows + memory.row_offset[p];
    matrix.scales = memory.scales.as<float>() + rows;
    matrix.sums = memory.sums.as<std::int32_t>() + rows;
  }
  return matrix;
}

StripRef ExpertWeights::strip(int expert, Projection projection, int strip) const {
  int part = 0;
  while (strip >= first_strip(projection, part + 1)) ++part;
  const int local = strip - first_strip(projection, part);
  const PackedMatrix w = matrix(expert, projection, part);
  StripRef ref;
  ref.block = w.codes + w.layout.block_offset(local);
  ref.block_rows = w.layout.block_rows(local);
  ref.row_in_block = w.layout.row_in_block(local);
  ref.first_tile = w.codes + w.layout.tile_offset(local, 0);
  if (w.scales != nullptr) {
    ref.scales = w.scales + local * kStripRows;
    ref.sums = w.sums + local * kStripRows;
  }
  return ref;
}

int ExpertWeights::first_missing() const {
  return static_cast<int>(std::find(loaded_.begin(), loaded_.end(), false) - loaded_.begin());
}

std::size_t ExpertWeights::packed_bytes() const {
  std::size_t bytes = 0;
  for (const Part& part : parts_) bytes += part.codes.bytes() + part.scales.bytes();
  return bytes;
}

}  // namespace ktrt
