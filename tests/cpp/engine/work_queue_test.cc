#include "engine/work_queue.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <thread>
#include <vector>

namespace ktrt {
namespace {

// The strips of a whole matrix, and of one part of it.
constexpr StripRange kRanges[] = {{0, 1}, {0, 3}, {0, 44}, {0, 224}, {5, 6}, {22, 44}, {1, 64}};

TEST(ScheduleColumns, EveryStripOfEveryBlockOnceAndNotTooManyAtATime) {
  for (const int threads : {1, 2, 3, 16, 64}) {
    for (const StripRange strips : kRanges) {
      for (const ColumnCut cut : {ColumnCut{1, 1, 1}, {1, 4, 1}, {3, 4, 4}, {2, 1000, 6}}) {
        PieceQueue queue;
        schedule_columns(strips, cut, threads, queue);
        int block = 0;
        int next = strips.begin;
        for (const Piece& piece : queue.pieces) {
          ASSERT_EQ(piece.job, block);
          ASSERT_EQ(piece.first_strip, next);
          ASSERT_GT(piece.end_strip, next);
          ASSERT_LE(piece.end_strip - next, cut.max_strips);
          next = piece.end_strip;
          if (next == strips.end) {
            next = strips.begin;
            ++block;
          }
        }
        EXPECT_EQ(block, cut.token_blocks);
        EXPECT_EQ(next, strips.begin);
      }
    }
  }
}

TEST(ScheduleColumns, PiecesAreWideIfThatLeavesOneForEveryThread) {
  PieceQueue queue;
  schedule_columns({0, 64}, {1, 16, 4}, 16, queue);
  ASSERT_EQ(queue.pieces.size(), 16u);
  for (const Piece& piece : queue.pieces) EXPECT_EQ(piece.end_strip - piece.first_strip, 4);
  schedule_columns({0, 64}, {1, 16, 4}, 64, queue);
  EXPECT_EQ(queue.pieces.size(), 64u);
  schedule_columns({0, 64}, {1, 16, 4}, 2, queue);
  EXPECT_EQ(queue.pieces.front().end_strip, 16);
}

TEST(PieceQueue, EveryPieceIsClaimedOnce) {
  PieceQueue queue;
  for (int round = 0; round < 20; ++round) {
    queue.reset();
    EXPECT_EQ(queue.claim(), nullptr);
    queue.reset();
    for (int i = 0; i < 1000; ++i) queue.pieces.push_back({i, 0, 1});
    std::vector<int> claims[3];
    std::vector<std::thread> threads;
    for (std::vector<int>& mine : claims) {
      threads.emplace_back([&] {
        while (const Piece* piece = queue.claim()) mine.push_back(piece->job);
      });
    }
    for (std::thread& thread : threads) thread.join();
    std::vector<int> all;
    for (const std::vector<int>& mine : claims) {
      EXPECT_TRUE(std::is_sorted(mine.begin(), mine.end()));
      all.insert(all.end(), mine.begin(), mine.end());
    }
    std::sort(all.begin(), all.end());
    ASSERT_EQ(all.size(), 1000u);
    for (int i = 0; i < 1000; ++i) ASSERT_EQ(all[static_cast<std::size_t>(i)], i);
    EXPECT_EQ(queue.claim(), nullptr);
  }
}

}  // namespace
}  // namespace ktrt
