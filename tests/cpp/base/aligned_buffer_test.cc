#include "base/aligned_buffer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <utility>

namespace ktrt {
namespace {

TEST(AlignedBuffer, IsZeroAndAligned) {
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{4097}, std::size_t{5} << 20}) {
    const AlignedBuffer buffer(bytes);
    EXPECT_EQ(buffer.bytes(), bytes);
    EXPECT_FALSE(buffer.empty());
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer.as<char>()) % kCacheLine, 0u);
    const auto* data = buffer.as<char>();
    EXPECT_TRUE(std::all_of(data, data + bytes, [](char c) { return c == 0; }));
  }
}

TEST(AlignedBuffer, EmptyHasNoMemory) {
  for (const AlignedBuffer& buffer : {AlignedBuffer(), AlignedBuffer(0)}) {
    EXPECT_TRUE(buffer.empty());
    EXPECT_EQ(buffer.as<char>(), nullptr);
  }
}

TEST(AlignedBuffer, MovesAndResets) {
  AlignedBuffer first(100);
  first.as<char>()[99] = 'x';
  AlignedBuffer second(std::move(first));
  EXPECT_EQ(second.as<char>()[99], 'x');
  AlignedBuffer third(200);
  third = std::move(second);
  EXPECT_EQ(third.bytes(), 100u);
  EXPECT_EQ(third.as<char>()[99], 'x');
  third.reset();
  EXPECT_TRUE(third.empty());
  third.reset();
}

#ifndef __SANITIZE_ADDRESS__
TEST(AlignedBuffer, TooLargeIsBadAlloc) {
  EXPECT_THROW(AlignedBuffer(std::size_t{1} << 62), std::bad_alloc);
}
#endif

TEST(RoundUp, ToTheNextMultiple) {
  EXPECT_EQ(round_up(0, 32), 0);
  EXPECT_EQ(round_up(1, 32), 32);
  EXPECT_EQ(round_up(32, 32), 32);
  EXPECT_EQ(round_up(33, 32), 64);
}

}  // namespace
}  // namespace ktrt
