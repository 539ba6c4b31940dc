// A linear layer outside the routed experts, on the engine's threads: y = x Wᵀ + bias + LoRA, all
// BF16 with float32 sums. The weight stays where torch has it, row-major.
//
// Threads claim ranges of output columns. A range goes through in panels of W that fit the L2
// cache: the first rows of x read a panel from memory, the others find it there. Every output is
// one dot product in one fixed order, so that the bits of a row depend neither on its
// neighbours nor on the number of threads.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "base/aligned_buffer.h"
#include "base/tensor_view.h"
#include "engine/engine.h"
#include "engine/work_queue.h"
#include "lora/one_of_loras.h"

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
  const char* kernel_name() const { return engine_->kernels().dense_bf16->name; }

  // LoRAs by number, of which one acts, or none: see OneOfLoras. a [rank, in], b [out, rank]:
  // float32, scaling folded into b; each is rounded to BF16 once. Throw std::invalid_argument.
  void load_lora(int number, const TensorView& a, const TensorView& b);
  void unload_lora(int number);
  void activate_loras(std::span<const int> numbers, std::span<const float> weights);

  // out [rows, out] = x [rows, in] · Wᵀ + …, BF16, contiguous. `x_count` and `out_count`: elements
  // of the two arrays, which must fit each other. Throws std::invalid_argument; std::runtime_error
  // once the engine is closed.
  void forward(const std::uint16_t* x, std::int64_t x_count, std::uint16_t* out,
               std::int64_t out_count);

 private:
  struct Lora {
    int rank = 0;
    int rank_pairs = 0;
    AlignedBuffer a;  // BF16 [rank][in]
    AlignedBuffer b;  // BF16 [rank_pairs][out][2], zeros after an odd rank
  };
  struct Task;
  struct Panel;
  struct Range {
    std::int64_t begin, end;
  };

  void shrink(const Task& task, Range rows, Range ranks) const;
  DenseFinishArgs finish_args(const Task& task, std::int64_t first, int columns) const;
  void compute(const Task& task, Range range, int thread) const;
  void compute_blocks(const Task& task, const Panel& panel, Range blocks, Range k, bool cold) const;
  std::int64_t row_blocks(std::int64_t rows) const;
  int panel_columns() const;

  const std::shared_ptr<Engine> engine_;
  const std::uint16_t* weight_ = nullptr;
  std::int64_t out_ = 0;
  std::int64_t in_ = 0;
  std::int64_t part_of_k_ = 0;
  AlignedBuffer bias_;  // float32 [out]; empty without
  OneOfLoras<Lora> loras_;
  PieceQueue queue_;
};

}  // namespace ktrt
