#include "random/torch_exponentials.h"

#include <array>
#include <cmath>
#include <utility>

#include "base/check.h"

namespace ktrt {

namespace {

using Block = std::array<std::uint32_t, TorchState::kBlockWords>;

constexpr std::size_t kWords = TorchState::kBlockWords;
constexpr std::size_t kMiddle = 397;
constexpr std::size_t kFirst = kWords - kMiddle;

std::uint32_t twist(std::uint32_t high, std::uint32_t low) {
  const std::uint32_t mixed = (high & 0x80000000U) | (low & 0x7fffffffU);
  return (mixed >> 1) ^ ((0U - (low & 1U)) & 0x9908b0dfU);
}

// The block after `from`. Two arrays, so that the compiler sees vectors.
void next_block(const Block& from, Block& to) {
  for (std::size_t i = 0; i < kFirst; ++i) to[i] = from[i + kMiddle] ^ twist(from[i], from[i + 1]);
  for (std::size_t i = kFirst; i + 1 < kWords; ++i) {
    to[i] = to[i - kFirst] ^ twist(from[i], from[i + 1]);
  }
  to[kWords - 1] = to[kMiddle - 1] ^ twist(from[kWords - 1], to[0]);
}

std::uint32_t temper(std::uint32_t word) {
  word ^= word >> 11;
  word ^= (word << 7) & 0x9d2c5680U;
  word ^= (word << 15) & 0xefc60000U;
  return word ^ (word >> 18);
}

// The generator's words, counted from its current block's first.
class Words {
 public:
  explicit Words(const std::uint64_t* state) {
    for (std::size_t i = 0; i < kWords; ++i) {
      current_[i] = static_cast<std::uint32_t>(state[TorchState::kBlock + i]);
    }
  }

  // `place` never goes back to an earlier block.
  std::uint32_t at(std::size_t place) {
    reach(place);
    return temper(current_[place - start_]);
  }

  // Leaves the word before `place` as the latest.
  void store(std::size_t place, std::uint64_t* state) {
    reach(place - 1);
    for (std::size_t i = 0; i < kWords; ++i) state[TorchState::kBlock + i] = current_[i];
    const std::uint64_t next = place - start_;
    const std::uint64_t upper = state[TorchState::kLeft] & 0xffffffff00000000U;
    state[TorchState::kLeft] = upper | (kWords + 1 - next);
    state[TorchState::kNext] = next;
  }

 private:
  void reach(std::size_t place) {
    for (; place - start_ >= kWords; start_ += kWords) {
      next_block(current_, other_);
      std::swap(current_, other_);
    }
  }

  Block current_;
  Block other_;
  std::size_t start_ = 0;
};

// The place of the next word.
std::size_t position(const std::uint64_t* state) {
  const auto left = static_cast<std::uint32_t>(state[TorchState::kLeft]);
  const std::uint64_t next = state[TorchState::kNext];
  // One word left to count down: the next one begins a block, as at a seed's start (next is 0).
  if (left == 1) return kWords;
  KTRT_CHECK(next <= kWords && left == kWords + 1 - next,
             "state holds " << left << " words left after " << next
                            << ", expected that of a torch.Generator");
  return next;
}

}  // namespace

void torch_exponentials(std::uint64_t* state, std::size_t draws, const std::int64_t* indices,
                        std::size_t count, float* out) {
  std::int64_t before = -1;
  for (std::size_t i = 0; i < count; ++i) {
    KTRT_CHECK(indices[i] > before && static_cast<std::size_t>(indices[i]) < draws,
               "indices[" << i << "] is " << indices[i] << ", expected ascending ones from 0 to "
                          << draws << " (exclusive)");
    before = indices[i];
  }
  const std::size_t begin = position(state);
  if (draws == 0) return;
  Words words(state);
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t place = begin + 2 * static_cast<std::size_t>(indices[i]);
    const std::uint64_t high = words.at(place);
    const std::uint64_t bits = (high << 32 | words.at(place + 1)) & ((1ULL << 53) - 1);
    out[i] = static_cast<float>(-std::log1p(-static_cast<double>(bits) * 0x1p-53));
  }
  words.store(begin + 2 * draws, state);
}

}  // namespace ktrt
