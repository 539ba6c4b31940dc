#include "base/digest.h"

#include <array>
#include <bit>
#include <cstring>

namespace ktrt {

namespace {

constexpr std::size_t kLanes = 8;
constexpr std::size_t kStripe = kLanes * sizeof(std::uint64_t);
constexpr std::size_t kStripesPerRound = 16;
constexpr std::uint64_t kPrime = 0x9E3779B185EBCA87u;
constexpr std::uint64_t kRoundPrime = 0x9E3779B1u;

// Numbers whose bits look random (SplitMix64): zeros in the data then still multiply to something.
// Stripes of a round start at different keys, or exchanged ones would have the same sums.
constexpr auto kKeys = [] {
  std::array<std::uint64_t, kLanes + kStripesPerRound> keys{};
  std::uint64_t state = 0;
  for (std::uint64_t& key : keys) {
    state += kPrime;
    key = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9u;
    key = (key ^ (key >> 27)) * 0x94D049BB133111EBu;
    key ^= key >> 31;
  }
  return keys;
}();

void add_stripe(std::uint64_t* sums, const std::byte* stripe, std::size_t index) {
  std::uint64_t words[kLanes];
  std::memcpy(words, stripe, kStripe);
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    const std::uint64_t keyed = words[lane] ^ kKeys[lane + index];
    sums[lane] += words[lane ^ 1] + (keyed & 0xFFFFFFFFu) * (keyed >> 32);
  }
}

// Keeps the order of rounds.
void end_round(std::uint64_t* sums) {
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    sums[lane] = (sums[lane] ^ (sums[lane] >> 47) ^ kKeys[lane]) * kRoundPrime;
  }
}

std::uint64_t mix(std::uint64_t hash, std::uint64_t value) {
  return std::rotl(hash ^ value, 27) * kPrime;
}

}  // namespace

std::uint64_t digest(const std::byte* data, std::size_t bytes) noexcept {
  std::uint64_t sums[kLanes];
  for (std::size_t lane = 0; lane < kLanes; ++lane) sums[lane] = kPrime * (lane + 1);
  std::size_t rest = bytes;
  for (; rest >= kStripe * kStripesPerRound; rest -= kStripe * kStripesPerRound) {
    for (std::size_t stripe = 0; stripe < kStripesPerRound; ++stripe, data += kStripe) {
      add_stripe(sums, data, stripe);
    }
    end_round(sums);
  }
  for (; rest > 0;) {
    const std::size_t size = rest < kStripe ? rest : kStripe;
    std::byte stripe[kStripe] = {};
    std::memcpy(stripe, data, size);
    add_stripe(sums, stripe, 0);
    end_round(sums);
    data += size;
    rest -= size;
  }
  std::uint64_t hash = mix(kPrime, bytes);
  for (const std::uint64_t sum : sums) hash = mix(hash, sum);
  return hash ^ (hash >> 32);
}

std::uint64_t digest_of_digests(std::span<const std::uint64_t> digests) noexcept {
  std::uint64_t hash = mix(kPrime, digests.size());
  for (const std::uint64_t each : digests) hash = mix(hash, each);
  return hash ^ (hash >> 32);
}

}  // namespace ktrt
