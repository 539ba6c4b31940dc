#include "moe/workspace.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "lora/expert_lora.h"
#include "moe/dispatch_plan.h"

namespace ktrt {
namespace {

using Part = std::pair<std::uintptr_t, std::size_t>;  // address, bytes

// The memory that a layer of this shape may write; checks that it can be written.
std::vector<Part> parts_of(const Workspace& workspace, const Scratch& scratch, int threads,
                           int max_qlen, const MoeShape& shape) {
  const auto job_rows = static_cast<std::size_t>(max_scratch_rows(workspace.max_job_rows()));
  std::vector<Part> parts;
  const std::byte* memory = nullptr;  // that the part lies in
  std::size_t memory_bytes = 0;
  const auto add = [&](void* data, std::size_t bytes) {
    ASSERT_GE(data, memory);
    ASSERT_LE(static_cast<std::byte*>(data) + bytes, memory + memory_bytes);
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
    memory = scratch.of_thread(static_cast<std::size_t>(i));
    memory_bytes = scratch.thread_bytes();
    add(thread.x, job_rows * stride(shape.hidden_size, 2));
    add(thread.codes, job_rows * stride(shape.hidden_size, 1));
    add(thread.scales, job_rows * sizeof(float));
    add(thread.t, job_rows * (2 * rank + kShrunkPadding) * sizeof(std::uint16_t));
    add(thread.c, job_rows * kStripRows * sizeof(float));
    add(thread.c_up, job_rows * kStripRows * sizeof(float));
    add(thread.tile_x, kMaxTileRows * stride(shape.hidden_size, 2));
    add(thread.tile_codes,
        kMaxTileRows * std::max(stride(shape.hidden_size, 1), stride(shape.intermediate_size, 1)));
    const std::size_t column = static_cast<std::size_t>(max_qlen) * 4;
    const auto columns = static_cast<std::size_t>(round_up(shape.hidden_size, kStripRows));
    add(thread.out, std::max(std::min(kOutputBlockBytes, column * columns), column * kStripRows));
  }
  const std::size_t rows = static_cast<std::size_t>(max_scratch_rows(max_qlen * shape.top_k));
  const Workspace::Shared& shared = workspace.shared();
  memory = scratch.shared();
  memory_bytes = scratch.shared_bytes();
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
  Scratch scratch(3);
  std::vector<Workspace> workspaces;
  for (const MoeShape& shape : shapes) workspaces.emplace_back(scratch, shape, 3, 70, 256);
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    EXPECT_EQ(workspaces[i].max_job_rows(), 256);
    workspaces[i].place(scratch);
    expect_apart(parts_of(workspaces[i], scratch, 3, 70, shapes[i]));
  }
}

TEST(Workspace, FollowsMemoryThatMoves) {
  Scratch scratch(1);
  Workspace small(scratch, {1, 1, 32, 32}, 1, 4, 128);
  small.place(scratch);
  Workspace large(scratch, {1, 1, 4096, 4096}, 1, 400, 128);
  small.place(scratch);
  expect_apart(parts_of(small, scratch, 1, 4, {1, 1, 32, 32}));
}

TEST(Workspace, WiderShrunkRowsMakeItGrow) {
  Scratch scratch(2);
  Workspace workspace(scratch, {4, 2, 64, 64}, 2, 10, 128);
  Workspace other(scratch, {4, 2, 96, 32}, 2, 10, 128);
  workspace.place(scratch);
  const std::size_t before = scratch.bytes();
  workspace.place(scratch, 2 * ExpertLora::kMaxRank, ExpertLora::kMaxRank);
  EXPECT_EQ(scratch.bytes(), before);
  workspace.place(scratch, 4000, 3000);
  EXPECT_GT(scratch.bytes(), before);
  const auto job_rows = static_cast<std::size_t>(max_scratch_rows(128));
  const auto end = [](const std::uint16_t* rows, std::size_t count, std::size_t ranks) {
    return reinterpret_cast<const std::byte*>(rows + count * (ranks + kShrunkPadding));
  };
  EXPECT_GE(reinterpret_cast<const std::byte*>(workspace.thread(1).c),
            end(workspace.thread(1).t, job_rows, 4000));
  EXPECT_GE(reinterpret_cast<const std::byte*>(workspace.shared().t_input),
            end(workspace.shared().t, 20, 3000));
  EXPECT_LE(end(workspace.shared().t_input, kSharedInputRows, 4000),
            scratch.shared() + scratch.shared_bytes());
  other.place(scratch);
  expect_apart(parts_of(other, scratch, 2, 10, {4, 2, 96, 32}));
}

TEST(Workspace, LongForwardsNeedAWiderOutputBlock) {
  Scratch scratch(1);
  Workspace workspace(scratch, {1, 1, 32, 32}, 1, 10'000, 128);
  workspace.place(scratch);
  expect_apart(parts_of(workspace, scratch, 1, 10'000, {1, 1, 32, 32}));
}

TEST(Workspace, ForwardsHaveALimit) {
  Scratch scratch(1);
  EXPECT_THROW(Workspace(scratch, {64, 64, 32, 32}, 1, 1 << 21, 128), std::invalid_argument);
  EXPECT_EQ(scratch.bytes(), 0u);
}

}  // namespace
}  // namespace ktrt
