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

ExpertWeights::ExpertWeights(const MoeShape& shape, WeightFormat format)
    : shape_(shape), format_(format) {
  check_shape(shape);
  const int h = shape.hidden_size;
  const int i = shape.intermediate_size;
  layouts_[0] = PackedLayout(format, i, h);
  layouts_[1] = PackedLayout(format, i, h);
  layouts_[2] = PackedLayout(format, h, i);
  for (std::size_t p = 0; p < kProjections; ++p) {
    code_offset_[p] = expert_code_bytes_;
    row_offset_[p] = expert_rows_;
    expert_code_bytes_ += layouts_[p].code_bytes();  // strips of 2 KB tiles: stays 64-byte aligned
    expert_rows_ += static_cast<std::size_t>(layouts_[p].padded_n());
  }
  const auto experts = static_cast<std::size_t>(shape.num_experts);
  codes_ = AlignedBuffer(experts * expert_code_bytes_);
  if (format == WeightFormat::kInt8) {
    scales_ = AlignedBuffer(experts * expert_rows_ * sizeof(float));
    sums_ = AlignedBuffer(experts * expert_rows_ * sizeof(std::int32_t));
  }
  loaded_.assign(experts, false);
}

PackedMatrix ExpertWeights::matrix(int expert, Projection projection) const {
  const auto e = static_cast<std::size_t>(expert);
  const auto p = static_cast<std::size_t>(projection);
  PackedMatrix matrix;
  matrix.layout = layouts_[p];
  matrix.codes = codes_.as<std::uint8_t>() + e * expert_code_bytes_ + code_offset_[p];
  if (!scales_.empty()) {
    matrix.scales = scales_.as<float>() + e * expert_rows_ + row_offset_[p];
    matrix.sums = sums_.as<std::int32_t>() + e * expert_rows_ + row_offset_[p];
  }
  return matrix;
}

bool ExpertWeights::all_loaded() const {
  return std::all_of(loaded_.begin(), loaded_.end(), [](bool loaded) { return loaded; });
}

int ExpertWeights::first_missing() const {
  return static_cast<int>(std::find(loaded_.begin(), loaded_.end(), false) - loaded_.begin());
}

std::size_t ExpertWeights::packed_bytes() const {
  return codes_.bytes() + scales_.bytes();
}

}  // namespace ktrt
