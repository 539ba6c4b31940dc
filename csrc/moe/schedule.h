// How one forward is cut into pieces that threads claim one after the other.
//
// Pieces are large at first and small at the end (guided self-scheduling): a thread streams long
// contiguous stretches of weights, and all threads finish together even if one of them loses its
// core for a while or the experts' loads are skewed. Which thread computes a piece changes no bit.
#pragma once

#include <atomic>
#include <vector>

#include "moe/dispatch_plan.h"

namespace ktrt {

// Strips [first_strip, end_strip) of one job, or of all jobs of a block of tokens in the down
// phase.
struct Piece {
  int job = 0;  // or the block
  int first_strip = 0;
  int end_strip = 0;
};

class PieceQueue {
 public:
  std::vector<Piece> pieces;

  // Before the threads start.
  void reset() {
    pieces.clear();
    next_.store(0, std::memory_order_relaxed);
  }
  // The next unclaimed piece; null when there is none left.
  const Piece* claim() {
    const std::size_t index = next_.fetch_add(1, std::memory_order_relaxed);
    return index < pieces.size() ? &pieces[index] : nullptr;
  }

 private:
  alignas(64) std::atomic<std::size_t> next_{0};
};

// Strips [begin, end).
struct StripRange {
  int begin = 0;
  int end = 0;
};

// The LoRA shrink of the input of jobs with few rows. Threads that share such a job would each read
// all of A for their strips; instead blocks of 16 ranks are claimed one by one before the strips
// are, and the shrunk rows are everybody's.
struct ShrinkQueue {
  PieceQueue blocks;           // strips are blocks of ranks here
  std::vector<int> first_row;  // [jobs] in the shared shrunk rows; -1: every thread its own
};

// `capacity`: shared rows that there are.
void schedule_shrinks(const std::vector<Job>& jobs, int blocks, int capacity, ShrinkQueue& queue);

// Gate and up: the strips of every job, weighted by its cost.
void schedule_jobs(const std::vector<Job>& jobs, StripRange strips, int threads, PieceQueue& queue);

// Down: strips of output columns for every block of tokens.
struct ColumnCut {
  int token_blocks = 1;
  int max_strips = 1;  // of a piece
  int min_strips = 1;  // where there are enough for all threads
};
void schedule_columns(StripRange strips, const ColumnCut& cut, int threads, PieceQueue& queue);

}  // namespace ktrt
