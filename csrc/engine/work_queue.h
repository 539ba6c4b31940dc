// A queue of pieces that threads claim one after the other.
//
// Pieces are large at first and small at the end (guided self-scheduling): a thread streams long
// contiguous stretches of weights, and all threads finish together even if one of them loses its
// core for a while. Which thread computes a piece changes no bit.
#pragma once

#include <atomic>
#include <cstddef>
#include <vector>

namespace ktrt {

// Strips [first_strip, end_strip) of a job; jobs and strips are whatever the operator cuts its work
// into.
struct Piece {
  int job = 0;
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

// Strips of output columns, for every block of tokens.
struct ColumnCut {
  int token_blocks = 1;
  int max_strips = 1;  // of a piece
  int min_strips = 1;  // where there are enough for all threads
};
void schedule_columns(StripRange strips, const ColumnCut& cut, int threads, PieceQueue& queue);

}  // namespace ktrt
