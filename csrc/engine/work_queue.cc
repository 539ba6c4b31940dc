#include "engine/work_queue.h"

#include <algorithm>

namespace ktrt {

void schedule_columns(StripRange strips, const ColumnCut& cut, int threads, PieceQueue& queue) {
  queue.reset();
  int rest = (strips.end - strips.begin) * cut.token_blocks;
  const int smallest = std::clamp(rest / threads, 1, cut.min_strips);
  for (int block = 0; block < cut.token_blocks; ++block) {
    for (int strip = strips.begin; strip < strips.end;) {
      const int target = std::max(smallest, rest / (threads * 2));
      const int count = std::min({target, cut.max_strips, strips.end - strip});
      queue.pieces.push_back({block, strip, strip + count});
      strip += count;
      rest -= count;
    }
  }
}

}  // namespace ktrt
