// A layer's view of the engine's scratch memory, sized before the first forward.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "engine/scratch.h"
#include "kernels/kernel_table.h"
#include "layout/expert_shape.h"

namespace ktrt {

// Token rows of one job. 128 rows of hidden size 2048 in BF16 are 0.5 MB, which stays in an L2
// cache of 1 MB together with the strips of gate and up that are multiplied with it.
inline constexpr int kMaxJobRows = 128;
// The same for AMX, whose tiles want more rows for every byte of weights and whose machines have L2
// caches of 2 MB: about 256, and what chance adds to that, or half of all jobs would be cut in two.
inline constexpr int kMaxTileJobRows = 320;
// Rows of jobs with few rows whose shrunk inputs are shared by all threads in one forward.
inline constexpr int kSharedInputRows = 1024;
// float32 sums of one thread's output columns in the down phase.
inline constexpr std::size_t kOutputBlockBytes = std::size_t{4} << 20;

class Workspace {
 public:
  // Private to one thread, for one job at a time.
  struct Thread {
    std::uint16_t* x = nullptr;          // gathered rows, BF16
    std::uint8_t* codes = nullptr;       // the same, INT8
    float* scales = nullptr;             // [rows] of codes
    std::uint16_t* t = nullptr;          // shrunk rows for gate and up
    float* c = nullptr;                  // [rows][32]
    float* c_up = nullptr;               // [rows][32]
    std::uint16_t* tile_x = nullptr;     // [16] rows on their way into tile order, BF16
    std::uint8_t* tile_codes = nullptr;  // the same, INT8
    float* out = nullptr;                // [qlen][columns of a strip group]
  };

  // Shared by all threads: one row per plan row.
  struct Shared {
    std::uint16_t* act = nullptr;  // BF16 intermediate activations
    std::uint8_t* codes = nullptr;
    float* scales = nullptr;           // [slices of down][rows] of codes
    std::uint16_t* t = nullptr;        // shrunk rows for down
    std::uint16_t* t_input = nullptr;  // [kSharedInputRows] for gate and up
  };

  // Reserves what a layer of this shape needs. Throws std::invalid_argument for more rows than a
  // forward can have.
  Workspace(Scratch& scratch, const MoeShape& shape, int num_threads, int max_qlen,
            int max_job_rows);

  // Before a forward: other operators may have made the memory grow, and move. It grows here where
  // shrunk rows of `input_ranks` and `down_ranks` are wider than a single LoRA's.
  void place(Scratch& scratch, int input_ranks = 0, int down_ranks = 0);

  int max_job_rows() const { return max_job_rows_; }
  const Thread& thread(int index) const { return threads_[static_cast<std::size_t>(index)]; }
  const Shared& shared() const { return shared_; }

 private:
  // Bytes of rows, and of the output block.
  struct Sizes {
    std::size_t job_rows, plan_rows, x_row, act_row, out, t_input_row, t_down_row;
  };
  class Carver;
  static Thread carve(Carver& carver, const Sizes& size);
  static Shared carve_shared(Carver& carver, const Sizes& size);
  void reserve(Scratch& scratch) const;

  const int max_job_rows_;
  Sizes sizes_;
  std::vector<Thread> threads_;
  Shared shared_;
  std::uint64_t generation_ = 0;  // of the scratch memory that the addresses are in
};

// Rows of a job, by the kernels that multiply them.
inline int max_job_rows(const KernelTable& kernels) {
  return kernels.gemm(WeightFormat::kBf16).many->tile_order ? kMaxTileJobRows : kMaxJobRows;
}

}  // namespace ktrt
