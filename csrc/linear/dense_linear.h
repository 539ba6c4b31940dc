// A linear layer outside the routed experts, on the engine's threads: y = x Wᵀ + bias + LoRA, all
// BF16 with float32 sums. The weight stays where torch has it, row-major.
//
// Every output is one dot product in one fixed order (linear/dense_panels.h), and a row is shrunk
// and expanded by the ranks of one LoRA alone, so that the bits of a row depend neither on its
// neighbours nor on the number of threads. With AMX many rows have another order
// (linear/dense_tiles.h), and a LoRA that all of them share, unless the kernels are fixed.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/tensor_view.h"
#include "engine/engine.h"
#include "engine/work_queue.h"
#include "linear/dense_panels.h"
#include "linear/dense_tiles.h"
#include "linear/row_groups.h"
#include "lora/lora_table.h"

namespace ktrt {

class DenseLinear {
 public:
  static constexpr int kMaxRank = 1024;

  // weight: BF16 [out, in], contiguous, borrowed for the object's life. bias: [out] in any float
  // dtype, copied. Throws std::invalid_argument naming the array, found and expected.
  DenseLinear(std::shared_ptr<Engine> engine, const TensorView& weight,
              const std::optional<TensorView>& bias);

  std::int64_t in_features() const { return in_; }
  std::int64_t out_features() const { return out_; }

  // LoRAs by number, and the sum that acts: see LoraTable. a [rank, in], b [out, rank]: float32,
  // scaling folded into b; each is rounded to BF16 once. Throw std::invalid_argument.
  void load_lora(int number, const TensorView& a, const TensorView& b);
  // A LoRA without ranks: its rows have the base's bits.
  void load_empty_lora(int number);
  void unload_lora(int number);
  void activate_loras(std::span<const int> numbers, std::span<const float> weights);
  // The memory of all that are held, in whole pages.
  std::size_t lora_bytes() const;

  // out [rows, out] = x [rows, in] · Wᵀ + …, BF16, contiguous. `x_count` and `out_count`: elements
  // of the two arrays, which must fit each other. Throws std::invalid_argument; std::runtime_error
  // once the engine is closed.
  void forward(const std::uint16_t* x, std::int64_t x_count, std::uint16_t* out,
               std::int64_t out_count, const AdapterIds& adapters = {});

 private:
  struct Lora {
    int rank = 0;
    int rank_pairs = 0;
    AlignedBuffer a;  // BF16 [rank][in]
    AlignedBuffer b;  // BF16 [rank_pairs][out][2], zeros after an odd rank
    std::size_t bytes() const { return a.page_bytes() + b.page_bytes(); }
  };
  using Loras = LoraTable<Lora>;
  // One LoRA's ranks for one group of rows.
  struct Shrink {
    RowGroup rows;
    const Loras::Part* part;
    std::int64_t t_offset;  // where they start in a row of T
  };
  struct Task;
  class Epilogue;

  void plan(std::int64_t rows, Task& task);
  const DenseTileLora* plan_tiles(const Task& task);
  void shrink(const Task& task, int threads, int thread) const;
  void shrink_group(const Task& task, const Shrink& shrink, DenseRange ranks, bool cold) const;

  const std::shared_ptr<Engine> engine_;
  const std::uint16_t* weight_ = nullptr;
  std::int64_t out_ = 0;
  std::int64_t in_ = 0;
  AlignedBuffer bias_;  // float32 [out]; empty without
  Loras loras_;
  PieceQueue queue_;
  // The running forward's.
  Loras::Rows chosen_;
  RowGroups groups_;
  std::vector<Shrink> shrinks_;
  std::vector<DenseLoraB> expands_;  // each mix's parts one after the other
  std::vector<int> first_expand_;    // [mixes + 1]
  DenseTileLora tile_lora_;
};

}  // namespace ktrt
