// How one forward is cut into pieces that threads claim one after the other.
//
// Pieces are large at first and small at the end (guided self-scheduling): a thread streams long
// contiguous stretches of weights, and all threads finish together even if one of them loses its
// core for a while or the experts' loads are skewed. Which thread computes a piece changes no bit.
#pragma once

#include <vector>

#include "engine/work_queue.h"
#include "moe/dispatch_plan.h"

namespace ktrt {

// The LoRA shrink of the input of jobs with few rows. Threads that share such a job would each read
// all of A for their strips; instead blocks of 16 ranks are claimed one by one before the strips
// are, and the shrunk rows are everybody's.
struct ShrinkQueue {
  PieceQueue blocks;           // strips are blocks of ranks here
  std::vector<int> first_row;  // [jobs] in the shared shrunk rows; -1: every thread its own
};

// `capacity`: number of shared rows.
void schedule_shrinks(const std::vector<Job>& jobs, int blocks, int capacity, ShrinkQueue& queue);

// Gate and up: the strips of every job, weighted by its cost.
void schedule_jobs(const std::vector<Job>& jobs, StripRange strips, int threads, PieceQueue& queue);

}  // namespace ktrt
