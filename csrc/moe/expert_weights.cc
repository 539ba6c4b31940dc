#include "moe/expert_weights.h"

#include <algorithm>
#include <utility>

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

void check_slices(const MoeShape& shape, WeightFormat format, int slices) {
  KTRT_CHECK(slices >= 1 && slices <= ExpertWeights::kMaxDownSlices,
             "down_slices is " << slices << ", expected 1 to " << ExpertWeights::kMaxDownSlices);
  if (slices == 1) return;
  KTRT_CHECK(quantizes_rows(format), "down_slices is "
                                         << slices << ", but " << name_of(format)
                                         << " weights have no scales of rows to keep apart");
  const int tile = traits_of(format).tile_k;
  KTRT_CHECK(shape.intermediate_size % (slices * tile) == 0,
             "intermediate_size " << shape.intermediate_size << " cannot be cut into " << slices
                                  << " slices of whole tiles of " << tile << " columns");
}

}  // namespace

ExpertWeights::ExpertWeights(const MoeShape& shape, WeightFormat format, int parts, int down_slices)
    : shape_(shape), format_(format), down_slices_(down_slices) {
  check_shape(shape);
  check_slices(shape, format, down_slices);
  const int h = shape.hidden_size;
  const int i = shape.intermediate_size;
  if (shape.has_gate) layouts_[0] = PackedLayout(format, i, h);
  layouts_[1] = PackedLayout(format, i, h);
  layouts_[2] = PackedLayout(format, h, i / down_slices);
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
  constexpr std::size_t kPage = 4096;
  Part result;
  for (std::size_t p = 0; p < kProjections; ++p) {
    const auto projection = static_cast<Projection>(p);
    const int begin = first_strip(projection, part) * kStripRows;
    const int end = std::min(first_strip(projection, part + 1) * kStripRows, layouts_[p].n());
    const auto count = static_cast<std::size_t>(slices(projection));
    result.layouts[p] = PackedLayout(format_, end - begin, layouts_[p].k());
    result.code_offset[p] = result.expert_code_bytes;
    result.scale_offset[p] = result.expert_scales;
    result.expert_code_bytes += count * result.layouts[p].code_bytes();  // 2 KB tiles: aligned
    result.expert_scales += count * result.layouts[p].scales();
  }
  const auto experts = static_cast<std::size_t>(shape_.num_experts);
  result.bytes = round_up(experts * result.expert_code_bytes, kPage);
  const std::size_t scales = experts * result.expert_scales;
  if (scales > 0) {
    result.scales_offset = result.bytes;
    result.bytes += round_up(scales * sizeof(float), kPage);
  }
  if (quantizes_rows(format_)) {
    result.sums_offset = result.bytes;
    result.bytes += round_up(scales * sizeof(std::int32_t), kPage);
  }
  return result;
}

void ExpertWeights::allocate() {
  if (mapped()) loaded_.assign(loaded_.size(), false);
  for (Part& part : parts_) {
    part.file.reset();
    if (part.memory.empty()) part.memory = AlignedBuffer(part.bytes);
  }
}

PackedMatrix ExpertWeights::matrix(int expert, Projection projection, int part, int slice) const {
  const auto e = static_cast<std::size_t>(expert);
  const auto p = static_cast<std::size_t>(projection);
  const auto s = static_cast<std::size_t>(slice);
  const Part& memory = this->part(part);
  std::byte* base = memory.base();
  PackedMatrix matrix;
  matrix.layout = memory.layouts[p];
  matrix.codes = reinterpret_cast<std::uint8_t*>(base) + e * memory.expert_code_bytes +
                 memory.code_offset[p] + s * matrix.layout.code_bytes();
  if (memory.scales_offset != 0) {
    const std::size_t first =
        e * memory.expert_scales + memory.scale_offset[p] + s * matrix.layout.scales();
    matrix.scales = reinterpret_cast<float*>(base + memory.scales_offset) + first;
    if (memory.sums_offset != 0) {
      matrix.sums = reinterpret_cast<std::int32_t*>(base + memory.sums_offset) + first;
    }
  }
  return matrix;
}

StripRef ExpertWeights::strip(int expert, Projection projection, int strip, int slice) const {
  int part = 0;
  while (strip >= first_strip(projection, part + 1)) ++part;
  const int local = strip - first_strip(projection, part);
  const PackedMatrix w = matrix(expert, projection, part, slice);
  StripRef ref;
  ref.block = w.codes + w.layout.block_offset(local);
  ref.block_rows = w.layout.block_rows(local);
  ref.row_in_block = w.layout.row_in_block(local);
  ref.first_tile = w.codes + w.layout.tile_offset(local, 0);
  if (w.scales != nullptr) {
    ref.scales = w.scales + std::int64_t{local} * w.layout.strip_scales();
  }
  if (w.sums != nullptr) {
    ref.sums = w.sums + local * kStripRows;
  }
  return ref;
}

int ExpertWeights::first_missing() const {
  return static_cast<int>(std::find(loaded_.begin(), loaded_.end(), false) - loaded_.begin());
}

std::size_t ExpertWeights::packed_bytes() const {
  std::size_t bytes = 0;
  for (const Part& part : parts_) {
    const std::size_t scales = part.expert_scales * sizeof(float);
    bytes += static_cast<std::size_t>(shape_.num_experts) * (part.expert_code_bytes + scales);
  }
  return bytes;
}

std::span<std::byte> ExpertWeights::image(int part) const {
  const Part& memory = this->part(part);
  return {memory.base(), memory.base() == nullptr ? 0 : memory.bytes};
}

void ExpertWeights::use_file(int part, MappedFile file) {
  Part& memory = parts_[static_cast<std::size_t>(part)];
  memory.memory.reset();
  memory.file = std::move(file);
}

}  // namespace ktrt
