// How one forward is cut into pieces that threads claim one after the other.
//
// Pieces are large at first and small at the end (guided self-scheduling): a thread streams long
// contiguous stretches of weights, and all threads finish together even if one of them loses its
// core for a while or the experts' loads are skewed. Which thread computes a piece changes no bit.
#pragma once

#include <vector>

#include "engine/work_queue.h"
#include "moe/dispatch_plan.h"
#include "moe/row_mixes.h"

namespace ktrt {

// 16 ranks of a part of a run's mix.
struct ShrinkBlock {
  int run = 0;  // of the job
  int part = 0;
  int block = 0;
};

// The LoRA shrink of the input of jobs with few rows. Threads that share such a job would each read
// all of A for their strips; instead blocks of 16 ranks are claimed before the strips are, and the
// shrunk rows are everybody's.
struct ShrinkQueue {
  PieceQueue pieces;  // strips are indices of `blocks`
  std::vector<ShrinkBlock> blocks;
  std::vector<int> first_row;   // [jobs] in the shared shrunk rows; -1: every thread its own
  std::vector<int> job_blocks;  // [jobs]
};

// `capacity`: number of shared rows.
void schedule_shrinks(const DispatchPlan& plan, const RowMixes& mixes, int threads, int capacity,
                      ShrinkQueue& queue);

// Gate and up: the strips of every job, weighted by its cost.
void schedule_jobs(const std::vector<Job>& jobs, StripRange strips, int threads, PieceQueue& queue);

}  // namespace ktrt
