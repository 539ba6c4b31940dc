#include "moe/schedule.h"

#include <algorithm>
#include <cstdint>

namespace ktrt {

namespace {

// A strip costs its compute, about one unit per token row, or the time to read it, which equals
// that of about 12 rows on the machines measured (16 GB/s and 490 GFLOP/s per core in BF16).
constexpr std::int64_t kRowsPerStripRead = 12;
// A piece is at most 1 / kRemainingShare of the rest per thread, and at least 1 / kSmallestShare of
// the whole per thread.
constexpr std::int64_t kRemainingShare = 2;
constexpr std::int64_t kSmallestShare = 64;
// More rows than a tile's take longer to gather and multiply than A takes to read.
constexpr int kSharedShrinkRows = kMaxTileRows;

}  // namespace

void schedule_jobs(const std::vector<Job>& jobs, StripRange strips, int threads,
                   PieceQueue& queue) {
  queue.reset();
  std::int64_t remaining = 0;
  for (const Job& job : jobs)
    remaining += (job.rows + kRowsPerStripRead) * (strips.end - strips.begin);
  const std::int64_t smallest = remaining / (threads * kSmallestShare) + 1;
  for (std::size_t j = 0; j < jobs.size(); ++j) {
    const std::int64_t strip_cost = jobs[j].rows + kRowsPerStripRead;
    for (int strip = strips.begin; strip < strips.end;) {
      const std::int64_t target = std::max(smallest, remaining / (threads * kRemainingShare));
      const std::int64_t count =
          std::clamp<std::int64_t>(target / strip_cost, 1, strips.end - strip);
      const int end = strip + static_cast<int>(count);
      queue.pieces.push_back({static_cast<int>(j), strip, end});
      strip = end;
      remaining -= count * strip_cost;
    }
  }
}

void schedule_shrinks(const std::vector<Job>& jobs, int blocks, int capacity, ShrinkQueue& queue) {
  queue.blocks.reset();
  queue.first_row.assign(jobs.size(), -1);
  if (blocks == 0) return;
  int row = 0;
  for (std::size_t j = 0; j < jobs.size(); ++j) {
    if (jobs[j].rows > kSharedShrinkRows || row + jobs[j].rows > capacity) continue;
    queue.first_row[j] = row;
    row += jobs[j].rows;
    for (int block = 0; block < blocks; ++block) {
      queue.blocks.pieces.push_back({static_cast<int>(j), block, block + 1});
    }
  }
}

}  // namespace ktrt
