// The LoRA of all routed experts of one layer, in the form that the kernels read.
#pragma once

#include <cstdint>
#include <optional>

#include "base/aligned_buffer.h"
#include "base/tensor_view.h"
#include "layout/expert_shape.h"
#include "layout/packed_layout.h"

namespace ktrt {

// Values after a shrunk row's ranks, which kernels in tile order read and which are finite.
inline constexpr int kShrunkPadding = 32;

// One projection's float32 LoRA as it comes in: A [E, rank, in], B [E, out, rank], scaling folded
// into B.
struct LoraPair {
  std::optional<TensorView> a;
  std::optional<TensorView> b;
};

// A: BF16, blocks of 16 ranks [blocks][in/2][16][2], `in` padded to 32. Gate and up are read by one
// shrink: up's ranks follow gate's, or are gate's where the two share A.
// B: BF16, per strip of 32 outputs [rank_pairs][2][16][2], so that the expand is a few more k pairs
// of the GEMM. Ranks are padded to even with zeros, which add exactly 0.
class ExpertLora {
 public:
  static constexpr int kMaxRank = 256;
  static constexpr int kBlockRanks = 16;

  // Throws std::invalid_argument naming the array, found and expected.
  ExpertLora(const MoeShape& shape, const LoraPair& gate, const LoraPair& up, const LoraPair& down);

  // Shrink of the expert's input (gate and up together) or of its intermediate activations.
  struct Shrink {
    int blocks = 0;  // 0: nothing to do
    int k = 0;
    AlignedBuffer a;
    int width() const { return blocks * kBlockRanks; }
    const std::uint16_t* of(int expert) const {
      const auto size =
          static_cast<std::size_t>(blocks) * kBlockRanks * static_cast<std::size_t>(k);
      return a.as<std::uint16_t>() + static_cast<std::size_t>(expert) * size;
    }
  };

  struct Expand {
    int rank_pairs = 0;  // 0: no LoRA on this projection
    int t_offset = 0;    // where this projection's ranks start in a shrunk row
    int strips = 0;
    AlignedBuffer b;
    const std::uint16_t* of(int expert, int strip) const {
      const auto size = static_cast<std::size_t>(rank_pairs) * 2 * kStripRows;
      return b.as<std::uint16_t>() + static_cast<std::size_t>(expert * strips + strip) * size;
    }
  };

  // In whole pages.
  std::size_t bytes() const;
  const Shrink& input_shrink() const { return input_shrink_; }
  const Shrink& down_shrink() const { return down_shrink_; }
  const Expand& expand(Projection projection) const {
    return expands_[static_cast<std::size_t>(projection)];
  }

 private:
  Expand& new_expand(const MoeShape& shape, Projection projection, int rank_pairs, int t_offset);
  void pack_expand(const MoeShape& shape, Projection projection, const TensorView& b, int t_offset);

  Shrink input_shrink_;
  Shrink down_shrink_;
  Expand expands_[kProjections];
};

}  // namespace ktrt
