#include "engine/scratch.h"

#include <gtest/gtest.h>

#include <cstddef>

namespace ktrt {
namespace {

TEST(Scratch, GrowsAndSaysWhenItMoves) {
  Scratch scratch(2);
  const auto first = scratch.generation();
  scratch.reserve(1000, 5000);
  EXPECT_NE(scratch.generation(), first);
  EXPECT_GE(scratch.bytes(), 7000u);
  const auto before = scratch.generation();
  const std::byte* const memory = scratch.of_thread(1);
  scratch.reserve(1000, 5000);
  scratch.reserve(10, 10);
  EXPECT_EQ(scratch.generation(), before);
  EXPECT_EQ(scratch.of_thread(1), memory);
  scratch.reserve(10, 1 << 20);
  EXPECT_NE(scratch.generation(), before);
  EXPECT_EQ(scratch.of_thread(1), memory);
  scratch.release();
  EXPECT_EQ(scratch.bytes(), 0u);
  EXPECT_EQ(scratch.shared(), nullptr);
  EXPECT_EQ(scratch.of_thread(0), nullptr);
}

TEST(Scratch, ABlockIsApartFromWhatIsReserved) {
  Scratch scratch(1);
  scratch.reserve(1000, 1000);
  const auto before = scratch.generation();
  std::byte* const block = scratch.block(100);
  EXPECT_EQ(scratch.block(50), block);
  scratch.block(1 << 20);
  EXPECT_EQ(scratch.generation(), before);
}

TEST(Scratch, CountersStartAtZero) {
  Scratch scratch(1);
  for (const std::size_t count : {3u, 100u, 7u}) {
    std::atomic<int>* counters = scratch.counters(count);
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
