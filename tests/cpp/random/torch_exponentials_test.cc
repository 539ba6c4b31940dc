#include "random/torch_exponentials.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

namespace ktrt {
namespace {

// As torch's get_state after manual_seed(seed).
std::vector<std::uint64_t> seeded(std::uint32_t seed) {
  std::vector<std::uint64_t> state(TorchState::kSize);
  state[TorchState::kLeft] = 1ULL << 32 | 1;
  std::uint32_t word = seed;
  for (std::size_t i = 0; i < TorchState::kBlockWords; ++i) {
    state[TorchState::kBlock + i] = word;
    word = 1812433253U * (word ^ (word >> 30)) + static_cast<std::uint32_t>(i + 1);
  }
  return state;
}

float drawn(std::mt19937& words) {
  const std::uint64_t high = words();
  const std::uint64_t bits = (high << 32 | words()) & ((1ULL << 53) - 1);
  return static_cast<float>(-std::log1p(-static_cast<double>(bits) * 0x1p-53));
}

std::vector<float> some(std::vector<std::uint64_t>& state, std::size_t draws,
                        const std::vector<std::int64_t>& indices) {
  std::vector<float> out(indices.size());
  torch_exponentials(state.data(), draws, indices.data(), indices.size(), out.data());
  return out;
}

TEST(TorchExponentials, EqualThoseOfTheStandardTwisterAtAnyPlace) {
  auto state = seeded(42);
  std::mt19937 words(42);
  // Around a block's 312 draws, one after the other.
  for (const std::size_t draws : {1, 5, 306, 312, 1, 311, 313, 2000, 624}) {
    std::vector<float> all(draws);
    for (float& value : all) value = drawn(words);
    std::vector<std::int64_t> indices;
    for (std::size_t i = draws % 3; i < draws; i += 1 + i % 7) {
      indices.push_back(static_cast<std::int64_t>(i));
    }
    const std::vector<float> found = some(state, draws, indices);
    for (std::size_t i = 0; i < indices.size(); ++i) {
      EXPECT_EQ(found[i], all[static_cast<std::size_t>(indices[i])]) << draws << ' ' << indices[i];
    }
  }
}

TEST(TorchExponentials, NoIndexMovesTheStateOn) {
  auto state = seeded(7);
  some(state, 1000, {});
  std::mt19937 words(7);
  words.discard(2000);
  EXPECT_EQ(some(state, 1, {0})[0], drawn(words));
}

TEST(TorchExponentials, RefusesIndicesOutOfOrderAndForeignStates) {
  auto state = seeded(1);
  for (const std::vector<std::int64_t>& indices :
       {std::vector<std::int64_t>{-1}, {5}, {2, 1}, {2, 2}}) {
    EXPECT_THROW(some(state, 5, indices), std::invalid_argument);
  }
  state[TorchState::kLeft] = 5;
  EXPECT_THROW(some(state, 5, {0}), std::invalid_argument);
}

}  // namespace
}  // namespace ktrt
