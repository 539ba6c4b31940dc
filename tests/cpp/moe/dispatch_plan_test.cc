#include "moe/dispatch_plan.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "helpers/random.h"
#include "helpers/views.h"

namespace ktrt {
namespace {

using testing::view_of;

DispatchPlan plan_of(const std::vector<std::int64_t>& ids, const std::vector<float>& weights,
                     int slots, int num_experts, int max_job_rows = 128) {
  const auto qlen =
      static_cast<std::int64_t>(slots == 0 ? 0 : static_cast<int>(ids.size()) / slots);
  DispatchPlan plan;
  plan.build(view_of(ids.data(), DType::kInt64, {qlen, slots}), view_of(weights, {qlen, slots}),
             num_experts, max_job_rows);
  return plan;
}

TEST(DispatchPlan, RowsAreSortedByExpertThenTokenThenSlot) {
  const DispatchPlan plan =
      plan_of({3, 1, 1, 0, 3, 3, -1, 4}, {0.1f, 0.2f, 0.3f, 0.4f, 0.5f, 0.6f, 0.7f, 0.8f}, 2, 4);
  const std::vector<int> tokens = {1, 0, 1, 0, 2, 2};
  const std::vector<float> weights = {0.4f, 0.2f, 0.3f, 0.1f, 0.5f, 0.6f};
  ASSERT_EQ(plan.rows().size(), tokens.size());
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    EXPECT_EQ(plan.rows()[i].token, tokens[i]) << i;
    EXPECT_EQ(plan.rows()[i].weight, weights[i]) << i;
  }
  ASSERT_EQ(plan.jobs().size(), 3u);  // expert 2 has no token
  const std::vector<std::vector<int>> jobs = {{0, 0, 1}, {1, 1, 2}, {3, 3, 3}};
  for (std::size_t j = 0; j < jobs.size(); ++j) {
    EXPECT_EQ(plan.jobs()[j].expert, jobs[j][0]);
    EXPECT_EQ(plan.jobs()[j].first_row, jobs[j][1]);
    EXPECT_EQ(plan.jobs()[j].rows, jobs[j][2]);
  }
}

TEST(DispatchPlan, OutsideIdsOfEitherWidthAreLeftOut) {
  constexpr auto kMin = std::numeric_limits<std::int64_t>::min();
  constexpr auto kMax = std::numeric_limits<std::int64_t>::max();
  const std::int64_t wide = std::int64_t{1} << 32;
  const DispatchPlan plan =
      plan_of({kMin, kMax, wide, wide + 1, -1, 2, 1, -wide}, std::vector<float>(8, 1.0f), 1, 2);
  ASSERT_EQ(plan.rows().size(), 1u);
  EXPECT_EQ(plan.rows()[0].token, 6);

  const std::vector<std::int32_t> narrow = {-1, 1, 2, std::numeric_limits<std::int32_t>::min()};
  const std::vector<float> weights(4, 1.0f);
  DispatchPlan narrow_plan;
  narrow_plan.build(view_of(narrow.data(), DType::kInt32, {4, 1}), view_of(weights, {4, 1}), 2,
                    128);
  ASSERT_EQ(narrow_plan.rows().size(), 1u);
  EXPECT_EQ(narrow_plan.rows()[0].token, 1);
}

TEST(DispatchPlan, LongJobsAreSplitEvenly) {
  for (const int count : {1, 127, 128, 129, 256, 257, 1000}) {
    const std::vector<std::int64_t> ids(static_cast<std::size_t>(count), 1);
    const std::vector<float> weights(ids.size(), 1.0f);
    const DispatchPlan plan = plan_of(ids, weights, 1, 30, 128);
    EXPECT_EQ(plan.token_blocks(), 1);
    ASSERT_EQ(plan.jobs().size(), static_cast<std::size_t>((count + 127) / 128));
    int next = 0;
    int scratch = 0;
    const int even = count / static_cast<int>(plan.jobs().size());
    for (const Job& job : plan.jobs()) {
      EXPECT_EQ(job.expert, 1);
      EXPECT_EQ(job.first_row, next);
      EXPECT_GE(job.rows, even);
      EXPECT_LE(job.rows, std::min(even + 1, 128));
      next += job.rows;
      EXPECT_EQ(job.scratch_row, scratch);
      const int tile_rows = GemmKernel{"", nullptr, nullptr, 0, true}.tile_rows(job.rows);
      scratch += (job.rows + tile_rows - 1) / tile_rows * tile_rows;
    }
    EXPECT_EQ(next, count);
    EXPECT_LE(scratch, max_scratch_rows(count));
  }
}

// 10 experts with 4 slots of a token each: 0.4 rows of an expert per token.
TEST(DispatchPlan, TokensAreCutIntoBlocksThatGiveAnExpertAboutFourFifthsOfAJob) {
  for (const int qlen : {1, 7, 256, 383, 385, 1000, 5000}) {
    std::vector<std::int64_t> ids;
    for (int t = 0; t < qlen; ++t) {
      for (int s = 0; s < 4; ++s) ids.push_back((t + s) % 10);
    }
    const std::vector<float> weights(ids.size(), 1.0f);
    const DispatchPlan plan = plan_of(ids, weights, 4, 10, 128);
    // 103 rows of each of 10 experts belong to 257.5 tokens.
    EXPECT_EQ(plan.token_blocks(), std::max(1, (qlen * 4 + 515) / 1030)) << qlen;
    EXPECT_LT((plan.token_blocks() - 1) * plan.block_tokens(), qlen);
    EXPECT_GE(plan.token_blocks() * plan.block_tokens(), qlen);
    std::size_t row = 0;
    for (const Job& job : plan.jobs()) {
      for (int r = 0; r < job.rows; ++r, ++row) {
        ASSERT_EQ(plan.rows()[row].token / plan.block_tokens(), job.token_block) << qlen;
      }
    }
    EXPECT_EQ(row, ids.size());
  }
}

TEST(DispatchPlan, RowsOfAnExpertAreInRunsByMix) {
  testing::Random random(4);
  constexpr int kTokens = 200;
  std::vector<std::int64_t> ids;
  std::vector<float> weights;
  std::vector<int> mix;
  for (int t = 0; t < kTokens; ++t) {
    mix.push_back(random.integer(kNoMix, 3));
    for (int s = 0; s < 3; ++s) {
      ids.push_back(random.integer(-1, 6));
      weights.push_back(static_cast<float>(t * 3 + s));  // names the slot
    }
  }
  DispatchPlan plan;
  plan.build(view_of(ids.data(), DType::kInt64, {kTokens, 3}), view_of(weights, {kTokens, 3}), 7,
             16, {mix.data(), 4});
  std::size_t expected = 0;
  for (std::size_t i = 0; i < ids.size(); ++i) expected += mix[i / 3] != kNoMix && ids[i] >= 0;
  EXPECT_EQ(plan.rows().size(), expected);
  std::vector<int> last(kTokens, -1);  // expert of a token's last row
  for (const Job& job : plan.jobs()) {
    int next = 0;
    int before = -1;
    for (const MixRun& run : plan.runs(job)) {
      EXPECT_EQ(run.first, next);
      EXPECT_GT(run.rows, 0);
      EXPECT_GT(run.mix, before);
      before = run.mix;
      float slot = -1.0f;
      for (int r = run.first; r < run.first + run.rows; ++r) {
        const PlanRow& row = plan.rows()[static_cast<std::size_t>(job.first_row + r)];
        EXPECT_EQ(mix[static_cast<std::size_t>(row.token)], run.mix);
        EXPECT_GT(row.weight, slot) << "not by token and slot";
        slot = row.weight;
        EXPECT_LE(last[static_cast<std::size_t>(row.token)], job.expert);
        last[static_cast<std::size_t>(row.token)] = job.expert;
      }
      next += run.rows;
    }
    EXPECT_EQ(next, job.rows);
  }
}

TEST(DispatchPlan, CanBeBuiltAgain) {
  DispatchPlan plan = plan_of({0, 1, 2, 3}, {1, 2, 3, 4}, 2, 4);
  const std::vector<std::int64_t> ids = {1};
  const std::vector<float> weights = {0.5f};
  plan.build(view_of(ids.data(), DType::kInt64, {1, 1}), view_of(weights, {1, 1}), 2, 128);
  ASSERT_EQ(plan.rows().size(), 1u);
  EXPECT_EQ(plan.rows()[0].weight, 0.5f);
  ASSERT_EQ(plan.jobs().size(), 1u);
  EXPECT_EQ(plan.jobs()[0].expert, 1);
  plan.build(view_of(ids.data(), DType::kInt64, {1, 0}), view_of(weights, {1, 0}), 2, 128);
  EXPECT_TRUE(plan.rows().empty());
  EXPECT_TRUE(plan.jobs().empty());
}

TEST(DispatchPlan, WeightsOfAllFloatTypes) {
  const std::vector<std::int64_t> ids = {0, 0, 0};
  const std::vector<float> weights = {0.5f, -1.25f, 3.0f};
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBfloat16}) {
    const std::vector<std::byte> bytes = testing::encode(weights, dtype);
    DispatchPlan plan;
    plan.build(view_of(ids.data(), DType::kInt64, {1, 3}), view_of(bytes.data(), dtype, {1, 3}), 1,
               128);
    ASSERT_EQ(plan.rows().size(), 3u);
    for (std::size_t i = 0; i < 3; ++i)
      EXPECT_EQ(plan.rows()[i].weight, weights[i]) << name_of(dtype);
  }
}

TEST(DispatchPlan, EverySlotAppearsOnce) {
  testing::Random random(9);
  std::vector<std::int64_t> ids(600);
  std::vector<float> weights(ids.size());
  for (std::size_t i = 0; i < ids.size(); ++i) {
    ids[i] = random.integer(0, 30) * random.integer(0, 1);
    weights[i] = static_cast<float>(i);  // names the slot
  }
  const DispatchPlan plan = plan_of(ids, weights, 3, 31, 16);
  std::vector<bool> seen(ids.size(), false);
  int next = 0;
  for (const Job& job : plan.jobs()) {
    ASSERT_EQ(job.first_row, next);
    ASSERT_LE(job.rows, 16);
    next += job.rows;
    for (int r = job.first_row; r < next; ++r) {
      const PlanRow& row = plan.rows()[static_cast<std::size_t>(r)];
      const auto slot = static_cast<std::size_t>(row.weight);
      ASSERT_EQ(ids[slot], job.expert);
      ASSERT_EQ(static_cast<int>(slot) / 3, row.token);
      ASSERT_FALSE(seen[slot]);
      seen[slot] = true;
    }
  }
  EXPECT_EQ(next, static_cast<int>(ids.size()));
}

}  // namespace
}  // namespace ktrt
