// One forward of one layer over the thread pool: two phases with one barrier between.
//
// Gate and up: threads first claim the LoRA shrinks of jobs with few rows, then strips of 32
// intermediate columns of jobs. For every job it touches, a thread gathers the job's rows,
// quantises them and, where there are many, shrinks them for LoRA; then per strip: gate GEMM, up
// GEMM, their LoRA expands and biases, the activation. The GEMM adds the expand itself where all
// rows of a job have one LoRA; other rows get theirs run by run, while C is in the L1 cache.
// Whoever finishes a job's last strip quantises and shrinks its activations for the next phase, so
// that neither INT8 nor LoRA adds a barrier. A thread that needs a shared shrink spins until its
// last block is done.
//
// Down: threads claim ranges of output columns, each for all jobs, so that sums need no atomics and
// are made in plan order; routing weights are applied as the strips are added up.
//
// A thread first claims the pieces of the weights on its own NUMA node, then helps the others.
#pragma once

#include <atomic>
#include <vector>

#include "base/tensor_view.h"
#include "cpu/thread_pool.h"
#include "kernels/kernel_table.h"
#include "moe/dispatch_plan.h"
#include "moe/expert_biases.h"
#include "moe/expert_weights.h"
#include "moe/row_mixes.h"
#include "moe/schedule.h"
#include "moe/workspace.h"

namespace ktrt {

// The pieces of one part of the weights; kept from forward to forward for its memory.
struct PartQueues {
  PieceQueue gate_up;
  PieceQueue down;
};

struct ForwardTask {
  const ExpertWeights& weights;
  const Activation& activation;
  const ExpertBiases* biases;  // null: none
  const RowMixes& mixes;
  const DispatchPlan& plan;
  const KernelTable& kernels;
  const GemmChoice& gemm;
  const Workspace& workspace;
  std::atomic<int>* finished_strips;  // [jobs], zero: of gate and up
  std::atomic<int>* shrunk_blocks;    // [jobs], zero: of the shared shrinks
  ShrinkQueue& shrinks;
  std::vector<PartQueues>& queues;  // [parts of the weights]
  const std::vector<int>& home;     // [threads]: the part on the thread's own NUMA node
  const TensorView& hidden_states;
  const TensorView& out;
};

void run_forward(const ForwardTask& task, ThreadPool& pool);

}  // namespace ktrt
