// The packed weights of all routed experts of one layer, in one allocation.
#pragma once

#include <cstdint>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/tensor_view.h"
#include "layout/pack.h"
#include "layout/packed_layout.h"

namespace ktrt {

struct MoeShape {
  int num_experts = 0;
  int top_k = 0;  // slots per token, at most
  int hidden_size = 0;
  int intermediate_size = 0;
};

enum class Projection { kGate = 0, kUp = 1, kDown = 2 };
inline constexpr int kProjections = 3;

const char* name_of(Projection projection);

class ExpertWeights {
 public:
  // Reserves the memory; pages are touched as experts are packed. Throws std::invalid_argument for
  // sizes below 1 and std::bad_alloc.
  ExpertWeights(const MoeShape& shape, WeightFormat format);

  const MoeShape& shape() const { return shape_; }
  WeightFormat format() const { return format_; }
  const PackedLayout& layout(Projection projection) const {
    return layouts_[static_cast<std::size_t>(projection)];
  }
  PackedMatrix matrix(int expert, Projection projection) const;

  bool loaded(int expert) const { return loaded_[static_cast<std::size_t>(expert)]; }
  bool all_loaded() const;
  int first_missing() const;
  void set_loaded(int expert, bool loaded) { loaded_[static_cast<std::size_t>(expert)] = loaded; }

  // Codes and scales of all experts.
  std::size_t packed_bytes() const;

 private:
  MoeShape shape_;
  WeightFormat format_;
  PackedLayout layouts_[kProjections];
  std::size_t code_offset_[kProjections];  // inside one expert's codes
  std::size_t row_offset_[kProjections];   // inside one expert's scales, and sums
  std::size_t expert_code_bytes_ = 0;
  std::size_t expert_rows_ = 0;
  AlignedBuffer codes_;
  AlignedBuffer scales_;
  AlignedBuffer sums_;
  std::vector<bool> loaded_;
};

}  // namespace ktrt
