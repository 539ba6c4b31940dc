#include "moe/schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "helpers/random.h"

namespace ktrt {
namespace {

// The strips of a whole matrix, and of one part of it.
constexpr StripRange kRanges[] = {{0, 1}, {0, 3}, {0, 44}, {0, 224}, {5, 6}, {22, 44}, {1, 64}};

std::vector<Job> random_jobs(int count) {
  testing::Random random(3);
  std::vector<Job> jobs;
  int row = 0;
  for (int i = 0; i < count; ++i) {
    const int rows = random.integer(0, 3) == 0 ? random.integer(1, 128) : random.integer(1, 4);
    jobs.push_back({i, row, rows});
    row += rows;
  }
  return jobs;
}

TEST(ScheduleJobs, EveryStripOfEveryJobOnceAndInOrder) {
  for (const int threads : {1, 2, 3, 16, 64}) {
    for (const int count : {0, 1, 6, 64}) {
      for (const StripRange strips : kRanges) {
        PieceQueue queue;
        schedule_jobs(random_jobs(count), strips, threads, queue);
        int job = 0;
        int strip = strips.begin;
        for (const Piece& piece : queue.pieces) {
          ASSERT_EQ(piece.job, job);
          ASSERT_EQ(piece.first_strip, strip);
          ASSERT_GT(piece.end_strip, piece.first_strip);
          ASSERT_LE(piece.end_strip, strips.end);
          strip = piece.end_strip;
          if (strip == strips.end) {
            strip = strips.begin;
            ++job;
          }
        }
        EXPECT_EQ(job, count);
        EXPECT_EQ(strip, strips.begin);
      }
    }
  }
}

// With one token and 6 experts of 44 strips there is enough to share for any number of threads.
TEST(ScheduleJobs, ThreadsFinishTogether) {
  std::vector<Job> jobs;
  for (int i = 0; i < 6; ++i) jobs.push_back({i, i, 1});
  for (const int threads : {2, 4, 16}) {
    PieceQueue queue;
    schedule_jobs(jobs, {0, 44}, threads, queue);
    std::vector<int> load(static_cast<std::size_t>(threads), 0);
    while (const Piece* piece = queue.claim()) {
      *std::min_element(load.begin(), load.end()) += piece->end_strip - piece->first_strip;
    }
    const auto [least, most] = std::minmax_element(load.begin(), load.end());
    EXPECT_LE(*most - *least, 2) << threads << " threads";
  }
}

TEST(ScheduleShrinks, EveryBlockOfJobsWithFewRowsWhileThereIsRoom) {
  const std::vector<Job> jobs = random_jobs(64);
  for (const int capacity : {0, 1, 50, 1000}) {
    ShrinkQueue queue;
    schedule_shrinks(jobs, 3, capacity, queue);
    ASSERT_EQ(queue.first_row.size(), jobs.size());
    int row = 0;
    std::size_t piece = 0;
    for (std::size_t j = 0; j < jobs.size(); ++j) {
      const bool fits = jobs[j].rows <= 16 && row + jobs[j].rows <= capacity;
      ASSERT_EQ(queue.first_row[j], fits ? row : -1) << "job " << j;
      if (!fits) continue;
      row += jobs[j].rows;
      for (int block = 0; block < 3; ++block, ++piece) {
        ASSERT_LT(piece, queue.blocks.pieces.size());
        EXPECT_EQ(queue.blocks.pieces[piece].job, static_cast<int>(j));
        EXPECT_EQ(queue.blocks.pieces[piece].first_strip, block);
        EXPECT_EQ(queue.blocks.pieces[piece].end_strip, block + 1);
      }
    }
    EXPECT_EQ(piece, queue.blocks.pieces.size());
    schedule_shrinks(jobs, 0, capacity, queue);
    EXPECT_TRUE(queue.blocks.pieces.empty());
    EXPECT_EQ(queue.first_row, std::vector<int>(jobs.size(), -1));
  }
}

}  // namespace
}  // namespace ktrt
