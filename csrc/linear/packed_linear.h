// A linear layer outside the routed experts with a packed weight, on the engine's threads:
// DenseLinear in the numbers and the packed layout of the experts, in INT8 or a coded format
// (layout/coded.h).
//
// Rows of x are quantised (of coded weights: padded) and shrunk for LoRA once, by whichever thread
// claims them; after a barrier threads claim ranges of strips of 32 outputs. A range takes the rows
// in blocks that fit the L2 cache. Neither threads nor blocks change a bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/tensor_view.h"
#include "engine/engine.h"
#include "engine/work_queue.h"
#include "layout/coded.h"
#include "layout/pack.h"
#include "linear/row_groups.h"
#include "lora/expert_lora.h"
#include "lora/lora_table.h"

namespace ktrt {

class PackedLinear {
 public:
  static constexpr int kMaxRank = ExpertLora::kMaxRank;
  // 255 · 127 · in, the largest sum of products, is an int32.
  static constexpr std::int64_t kMaxIn = 65536;

  // weight: BF16 [out, in], contiguous, packed in INT8 by the engine's threads and not needed
  // afterwards. bias: [out] in any float dtype, copied. Throws std::invalid_argument naming the
  // array, found and expected, for NaN and infinity in the weight too; std::runtime_error once the
  // engine is closed.
  PackedLinear(std::shared_ptr<Engine> engine, const TensorView& weight,
               const std::optional<TensorView>& bias);
  // The same from a weight [out, in] in a coded format.
  PackedLinear(std::shared_ptr<Engine> engine, WeightFormat format, const CodedSource& weight,
               std::int64_t in, const std::optional<TensorView>& bias);

  WeightFormat format() const { return base_->matrix.layout.format(); }
  std::int64_t in_features() const { return base_->matrix.layout.k(); }
  std::int64_t out_features() const { return base_->matrix.layout.n(); }
  // Bytes of the weight that forward() reads: codes, scales and sums of codes.
  std::size_t packed_bytes() const;
  const char* kernel_name(int rows) const {
    return engine_->kernels().gemm(format()).for_rows(rows).name;
  }

  // As DenseLinear's.
  void load_lora(int number, const TensorView& a, const TensorView& b);
  void load_empty_lora(int number);
  void unload_lora(int number);
  void activate_loras(std::span<const int> numbers, std::span<const float> weights);
  // The memory of all that are held, in whole pages.
  std::size_t lora_bytes() const;
  void forward(const std::uint16_t* x, std::int64_t x_count, std::uint16_t* out,
               std::int64_t out_count, const AdapterIds& adapters = {});

 private:
  struct Base {
    PackedMatrix matrix;
    AlignedBuffer codes, scales, sums;
    AlignedBuffer bias;  // float32 [padded_n]; empty without
  };
  using Loras = LoraTable<ExpertLora>;
  // Some blocks of one LoRA's ranks for one group of rows.
  struct Shrink {
    RowGroup rows;
    std::int64_t scratch_row;  // of the first
    const Loras::Part* part;
    std::int64_t t_offset;  // where the LoRA's ranks start in a row of T
    int first_block, blocks;
  };
  struct Task;
  struct Block;

  void put_lora(int number, const LoraPair& lora);
  // Packs strip by strip with pack(strip, matrix), which returns whether all is finite.
  template <class Pack>
  void make_base(const PackedLayout& layout, const std::string& name,
                 const std::optional<TensorView>& bias, const Pack& pack);
  Task make_task(const std::uint16_t* x, std::int64_t rows, std::uint16_t* out) const;
  void plan_loras(Task& task);
  void plan_shrinks(const RowGroup& group, std::int64_t scratch_row, bool split_ranks);
  void prepare(const Task& task, std::int64_t unit) const;
  void gather(const Task& task, const Block& tile) const;
  void shrink(const Task& task, const Shrink& shrink) const;
  void multiply(const Task& task, const Piece& piece, int thread) const;
  void multiply_few_rows(const Task& task, const Piece& piece) const;
  void expand(const Task& task, const Block& block, int strip, float* c) const;
  void store(const Task& task, const Block& block, int strip, float* c) const;
  GemmArgs gemm_args(const Task& task, const Block& block, int strip) const;
  const std::uint8_t* first_tile(int strip) const;

  const std::shared_ptr<Engine> engine_;
  std::unique_ptr<const Base> base_;
  Loras loras_;
  PieceQueue queue_;
  // The running forward's.
  Loras::Rows chosen_;
  RowGroups groups_;
  std::vector<Shrink> shrinks_;
};

}  // namespace ktrt
