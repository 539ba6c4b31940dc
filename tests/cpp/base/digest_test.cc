#include "base/digest.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <span>
#include <vector>

#include "helpers/random.h"

namespace ktrt {
namespace {

std::vector<std::byte> random_bytes(std::size_t count) {
  testing::Random random(5);
  std::vector<std::byte> bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random.uniform(0.0, 256.0));
  return bytes;
}

TEST(Digest, EveryBitCounts) {
  for (const std::size_t size : {1u, 63u, 64u, 1023u, 1024u, 2500u}) {
    std::vector<std::byte> bytes = random_bytes(size);
    std::set<std::uint64_t> seen{digest(bytes.data(), size)};
    for (std::size_t i = 0; i < size; ++i) {
      for (const int bit : {0, 3, 7}) {
        bytes[i] ^= static_cast<std::byte>(1 << bit);
        EXPECT_TRUE(seen.insert(digest(bytes.data(), size)).second)
            << "byte " << i << " of " << size;
        bytes[i] ^= static_cast<std::byte>(1 << bit);
      }
    }
    EXPECT_EQ(seen.count(digest(bytes.data(), size)), 1u);
  }
}

TEST(Digest, LengthZerosAndOrderCount) {
  const std::vector<std::byte> zeros(8192);
  std::set<std::uint64_t> seen;
  for (std::size_t size = 0; size <= zeros.size(); size += 32) {
    EXPECT_TRUE(seen.insert(digest(zeros.data(), size)).second) << size;
  }
  std::vector<std::byte> bytes = random_bytes(4096);
  const std::uint64_t before = digest(bytes.data(), bytes.size());
  // Exchanged words, stripes and rounds.
  for (const std::size_t unit : {8u, 64u, 1024u}) {
    std::vector<std::byte> other = bytes;
    std::swap_ranges(other.begin(), other.begin() + static_cast<std::ptrdiff_t>(unit),
                     other.begin() + static_cast<std::ptrdiff_t>(2 * unit));
    EXPECT_NE(digest(other.data(), other.size()), before) << unit;
  }
}

TEST(Digest, OfDigestsKeepsTheOrder) {
  const std::vector<std::uint64_t> forward{1, 2, 3};
  const std::vector<std::uint64_t> backward{3, 2, 1};
  EXPECT_NE(digest_of_digests(forward), digest_of_digests(backward));
  EXPECT_NE(digest_of_digests(forward), digest_of_digests(std::span(forward).first(2)));
}

}  // namespace
}  // namespace ktrt
