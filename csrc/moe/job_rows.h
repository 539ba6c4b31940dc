// The rows of jobs in scratch memory, in the order that their kernels read: gathered, rounded,
// quantised and shrunk.
#pragma once

#include <cstdint>

#include "moe/forward.h"

namespace ktrt {

// Row strides in the scratch memory of a layer.
struct RowStrides {
  std::int64_t x;          // elements
  std::int64_t x_codes;    // bytes
  std::int64_t act;        // elements
  std::int64_t act_codes;  // bytes
  std::int64_t t_input;    // elements
  std::int64_t t_down;     // elements
};

// One thread's share of these steps in one forward.
class JobRows {
 public:
  JobRows(const ForwardTask& task, int thread);

  // Input rows of a job into the thread's own memory.
  void gather(const Job& job) const;
  // Shrinks gathered rows for LoRA: into the thread's own memory, or one block of 16 ranks of a run
  // into the rows from `first_row` on that all threads share.
  void shrink_input(const Job& job) const;
  void shrink_input_block(const Job& job, const ShrinkBlock& block, int first_row) const;
  // Pads, quantises and shrinks a job's intermediate activations, once all are there.
  void finish_activations(const Job& job) const;

  // Make A of a GEMM the gathered rows, or the job's activations.
  void use_input(GemmArgs& args) const;
  void use_activations(GemmArgs& args, const Job& job, int slice) const;
  // The shrunk rows of a job. `first_row`: of the shared ones, or -1.
  const std::uint16_t* shrunk_input(int first_row) const;
  const std::uint16_t* shrunk_activations(const Job& job) const;

  const RowStrides& strides() const { return strides_; }
  const GemmKernel& gemm_for(const Job& job) const { return task_.gemm.for_rows(job.rows); }
  int tile_rows(const Job& job) const { return gemm_for(job).tile_rows(job.rows); }
  // Tile rows of the BF16 activations: INT8 kernels read codes.
  int act_tile_rows(const Job& job) const { return int8_ ? 1 : tile_rows(job); }

 private:
  const std::uint16_t* bf16_row(int token, std::uint16_t* converted) const;
  void gather_rows(const Job& job) const;
  void gather_tiles(const Job& job) const;
  void quantize_activations(const Job& job) const;
  void pad_activations(const Job& job) const;
  float* activation_scales(int row, int slice) const;
  ShrinkArgs input_shrink_args(const Job& job) const;
  void shrink_run(const Job& job, const MixRun& run, ShrinkArgs args, float weight) const;
  void pad_shrunk(const Job& job, const MixRun& run, int width, const ShrinkArgs& args) const;

  const ForwardTask& task_;
  const RowStrides strides_;
  const Workspace::Thread& scratch_;
  const Workspace::Shared& shared_;
  const ElementwiseKernels& elementwise_;
  const bool int8_;  // the activations
};

}  // namespace ktrt
