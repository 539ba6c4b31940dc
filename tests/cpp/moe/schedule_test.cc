#include "moe/schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "helpers/random.h"
#include "helpers/views.h"

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

// A LoRA of `rank` on all projections, all zeros.
std::shared_ptr<const ExpertLora> lora_of(int experts, int rank) {
  const std::vector<float> zeros(static_cast<std::size_t>(experts * rank * 32), 0.0f);
  LoraPair pair;
  pair.a = testing::view_of(zeros, {experts, rank, 32}, "a");
  pair.b = testing::view_of(zeros, {experts, 32, rank}, "b");
  return std::make_shared<const ExpertLora>(MoeShape{experts, 1, 32, 32}, pair, pair, pair);
}

TEST(ScheduleShrinks, EveryBlockOfJobsWithFewRowsWhileThereIsRoom) {
  constexpr int kExperts = 12;
  LoraTable<ExpertLora> table;
  table.put(0, lora_of(kExperts, 4));   // one block for gate and up
  table.put(1, lora_of(kExperts, 20));  // three
  table.activate(std::vector<int>{0, 1}, std::vector<float>{1.0f, 0.5f});
  testing::Random random(3);
  std::vector<std::int32_t> adapters;
  std::vector<std::int64_t> experts;
  for (int token = 0; token < 100; ++token) {
    adapters.push_back(random.integer(-2, 1));
    experts.push_back(random.integer(0, 3) == 0 ? random.integer(0, 11) : random.integer(0, 1));
  }
  const std::vector<float> weights(100, 1.0f);
  RowMixes mixes;
  mixes.choose(table, testing::view_of(adapters.data(), DType::kInt32, {100}, "adapter_ids"), 100);
  EXPECT_EQ(mixes.input_width(), 16 + 48);
  EXPECT_EQ(mixes.down_width(), 16 + 32);
  DispatchPlan plan;
  plan.build(testing::view_of(experts.data(), DType::kInt64, {100, 1}),
             testing::view_of(weights, {100, 1}), kExperts, 128, mixes.of_tokens());
  const std::vector<Job>& jobs = plan.jobs();
  for (const int threads : {1, 2, 16}) {
    for (const int capacity : {0, 1, 12, 1000}) {
      ShrinkQueue queue;
      schedule_shrinks(plan, mixes, threads, capacity, queue);
      ASSERT_EQ(queue.first_row.size(), jobs.size());
      int row = 0;
      std::size_t block = 0;
      for (std::size_t j = 0; j < jobs.size(); ++j) {
        const bool fits = jobs[j].rows <= 16 && row + jobs[j].rows <= capacity;
        ASSERT_EQ(queue.first_row[j], fits ? row : -1) << "job " << j;
        if (!fits) continue;
        row += jobs[j].rows;
        const std::size_t before = block;
        for (std::size_t run = 0; run < plan.runs(jobs[j]).size(); ++run) {
          const auto& parts = mixes.mix(plan.runs(jobs[j])[run].mix).parts;
          for (std::size_t part = 0; part < parts.size(); ++part) {
            for (int b = 0; b < parts[part].lora->input_shrink().blocks; ++b, ++block) {
              EXPECT_EQ(queue.blocks[block].run, static_cast<int>(run));
              EXPECT_EQ(queue.blocks[block].part, static_cast<int>(part));
              EXPECT_EQ(queue.blocks[block].block, b);
            }
          }
        }
        EXPECT_EQ(queue.job_blocks[j], static_cast<int>(block - before));
      }
      EXPECT_EQ(block, queue.blocks.size());
      int next = 0;
      for (const Piece& piece : queue.pieces.pieces) {
        EXPECT_EQ(piece.first_strip, next);
        EXPECT_GT(piece.end_strip, next);
        next = piece.end_strip;
      }
      EXPECT_EQ(next, static_cast<int>(queue.blocks.size()));
    }
  }
  mixes.choose(LoraTable<ExpertLora>(), std::nullopt, 100);
  ShrinkQueue queue;
  schedule_shrinks(plan, mixes, 2, 1000, queue);
  EXPECT_TRUE(queue.pieces.pieces.empty());
  EXPECT_EQ(queue.first_row, std::vector<int>(jobs.size(), -1));
}

}  // namespace
}  // namespace ktrt
