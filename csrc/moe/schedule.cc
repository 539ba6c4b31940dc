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
// A piece of shrinks is at most 1 / kShrinkShare of all blocks per thread.
constexpr int kShrinkShare = 4;

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

void schedule_shrinks(const DispatchPlan& plan, const RowMixes& mixes, int threads, int capacity,
                      ShrinkQueue& queue) {
  const std::vector<Job>& jobs = plan.jobs();
  queue.pieces.reset();
  queue.blocks.clear();
  queue.first_row.assign(jobs.size(), -1);
  queue.job_blocks.assign(jobs.size(), 0);
  if (mixes.input_width() == 0) return;
  int row = 0;
  for (std::size_t j = 0; j < jobs.size(); ++j) {
    if (jobs[j].rows > kSharedShrinkRows || row + jobs[j].rows > capacity) continue;
    queue.first_row[j] = row;
    row += jobs[j].rows;
    const std::size_t before = queue.blocks.size();
    const std::span<const MixRun> runs = plan.runs(jobs[j]);
    for (std::size_t run = 0; run < runs.size(); ++run) {
      const std::vector<RowMixes::Part>& parts = mixes.mix(runs[run].mix).parts;
      for (std::size_t part = 0; part < parts.size(); ++part) {
        for (int block = 0; block < parts[part].lora->input_shrink().blocks; ++block) {
          queue.blocks.push_back({static_cast<int>(run), static_cast<int>(part), block});
        }
      }
    }
    queue.job_blocks[j] = static_cast<int>(queue.blocks.size() - before);
  }
  // Every piece gathers its job's rows: where there are many, as few as all threads have work.
  const int all = static_cast<int>(queue.blocks.size());
  const int most = std::max(1, all / (threads * kShrinkShare));
  int first = 0;
  for (std::size_t j = 0; j < jobs.size(); ++j) {
    const int end = first + queue.job_blocks[j];
    for (; first < end; first += most) {
      const int last = std::min(first + most, end);
      queue.pieces.pieces.push_back({static_cast<int>(j), first, last});
    }
    first = end;
  }
}

}  // namespace ktrt
