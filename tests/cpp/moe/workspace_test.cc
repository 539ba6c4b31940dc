#include "moe/workspace.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "moe/dispatch_plan.h"
#include "moe/expert_lora.h"

namespace ktrt {
namespace {

using Part = std::pair<std::uintptr_t, std::size_t>;  // address, bytes

// What a layer of this shape may write, and that it can be written.
std::vector<Part> parts_of(const Workspace& workspace, int threads, const MoeShape& shape) {
  const auto job_rows = static_cast<std::size_t>(max_scratch_rows(workspace.max_job_rows()));
  std::vector<Part> parts;
  const auto add = [&](void* data, std::size_t bytes) {
    EXPECT_NE(data, nullptr);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(data) % kCacheLine, 0u);
    std::memset(data, 0xff, bytes);
    parts.emplace_back(reinterpret_cast<std::uintptr_t>(data), bytes);
  };
  const auto stride = [](int values, std::size_t size) {
    return scratch_stride(round_up(static_cast<std::size_t>(values), std::size_t{64}) * size);
  };
  const std::size_t rank = ExpertLora::kMaxRank;
  for (int i = 0; i < threads; ++i) {
    const Workspace::Thread& thread = workspace.thread(i);
    add(thread.x, job_rows * stride(shape.hidden_size, 2));
    add(thread.codes, job_rows * stride(shape.hidden_size, 1));
    add(thread.scales, job_rows * sizeof(float));
    add(thread.t, job_rows * (2 * rank + kShrunkPadding) * sizeof(std::uint16_t));
    add(thread.c, job_rows * kStripRows * sizeof(float));
    add(thread.c_up, job_rows * kStripRows * sizeof(float));
    add(thread.tile_x, kMaxTileRows * stride(shape.hidden_size, 2));
    add(thread.tile_codes,
        kMaxTileRows * std::max(stride(shape.hidden_size, 1), stride(shape.intermediate_size, 1)));
    const std::size_t column = static_cast<std::size_t>(workspace.max_qlen()) * 4;
    const auto columns = static_cast<std::size_t>(round_up(shape.hidden_size, kStripRows));
    add(thread.out, std::max(std::min(kOutputBlockBytes, column * columns), column * kStripRows));
  }
  const std::size_t rows =
      static_cast<std::size_t>(max_scratch_rows(workspace.max_qlen() * shape.top_k));
  const Workspace::Shared& shared = workspace.shared();
  add(shared.act, rows * stride(shape.intermediate_size, 2));
  add(shared.codes, rows * stride(shape.intermediate_size, 1));
  add(shared.scales, rows * sizeof(float));
  add(shared.t, rows * (rank + kShrunkPadding) * sizeof(std::uint16_t));
  add(shared.t_input, kSharedInputRows * (2 * rank + kShrunkPadding) * sizeof(std::uint16_t));
  return parts;
}

void expect_apart(std::vector<Part> parts) {
  std::sort(parts.begin(), parts.end());
  for (std::size_t i = 1; i < parts.size(); ++i) {
    EXPECT_LE(parts[i - 1].first + parts[i - 1].second, parts[i].first) << "parts overlap";
  }
}

TEST(Workspace, PartsHoldWhatAnyLayerWritesAndDoNotOverlap) {
  const std::vector<MoeShape> shapes = {
      {4, 2, 160, 96}, {4, 4, 64, 3000}, {2, 1, 2048, 64}, {8, 6, 2048, 1408}, {1, 1, 1, 1}};
  Workspace workspace(3, 70, 256);
  EXPECT_EQ(workspace.max_job_rows(), 256);
  EXPECT_EQ(workspace.max_qlen(), 70);
  for (const MoeShape& shape : shapes) workspace.reserve(shape);
  for (const MoeShape& shape : shapes) expect_apart(parts_of(workspace, 3, shape));
  workspace.release();
  EXPECT_EQ(workspace.shared().act, nullptr);
  EXPECT_EQ(workspace.thread(0).x, nullptr);
  workspace.reserve(shapes[0]);
  expect_apart(parts_of(workspace, 3, shapes[0]));
}

TEST(Workspace, LongForwardsNeedAWiderOutputBlock) {
  Workspace workspace(1, 10'000);
  workspace.reserve({1, 1, 32, 32});
  expect_apart(parts_of(workspace, 1, {1, 1, 32, 32}));
}

TEST(Workspace, NeedsAToken) { EXPECT_THROW(Workspace(1, 0), std::invalid_argument); }

TEST(Workspace, JobCountersStartAtZero) {
  Workspace workspace(1, 1);
  for (const std::size_t count : {3u, 100u, 7u}) {
    std::atomic<int>* counters = workspace.job_counters(count);
    for (std::size_t i = 0; i < count; ++i) EXPECT_EQ(counters[i]++, 0);
  }
}

TEST(ScratchStride, WholeLinesButNotWholePages) {
  for (std::size_t bytes = 1; bytes < 20'000; bytes += 7) {
    const std::size_t stride = scratch_stride(bytes);
    ASSERT_GE(stride, bytes);
    ASSERT_LE(stride, bytes + 2 * kCacheLine);
    ASSERT_EQ(stride % kCacheLine, 0u);
    ASSERT_NE(stride % 4096, 0u);
  }
}

}  // namespace
}  // namespace ktrt
